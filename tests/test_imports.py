import importlib
import json
import subprocess
import sys

import cases
import pytest

import trl_learnalign

OPTIONAL = (
    "deepspeed",
    "vllm",
    "matplotlib",
    "jinja2",
    "peft",
    "reasoning_gym",
    "tensorboard",
    "trackio",
)


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=cases.HANGS
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_imports_nothing_but_the_standard_library():
    others = python(
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "import trl_learnalign\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(names - set(sys.stdlib_module_names))))"
    )
    assert others == ["trl_learnalign"]


def test_optional_packages_are_optional():
    missing = "; ".join(
        f"sys.modules[{name!r}] = None" for name in OPTIONAL if name != "jinja2"
    )  # torch needs jinja2
    names = ", ".join(trl_learnalign.__all__)
    assert python(
        f"import json, sys; {missing}\n"
        f"from trl_learnalign import {names}\n"
        "import trl_learnalign.cli, trl_learnalign.cli.plan\n"
        "import trl_learnalign.cli.recipe\n"
        "print(json.dumps(LearnAlignConfig().warmup_samples))"
    )


def test_every_public_name_is_found_and_listed():
    for name in trl_learnalign.__all__:
        assert getattr(trl_learnalign, name) is vars(trl_learnalign)[name]
    assert set(trl_learnalign.__all__) <= set(dir(trl_learnalign))
    with pytest.raises(AttributeError, match="has no attribute 'LearnAlign'"):
        trl_learnalign.LearnAlign  # noqa: B018


def test_the_names_of_the_lazy_table_are_the_public_ones():
    assert set(trl_learnalign._MODULES) == set(trl_learnalign.__all__)
    for name, module in trl_learnalign._MODULES.items():
        assert hasattr(importlib.import_module(f"trl_learnalign.{module}"), name)
