"""The Pythons that are claimed are the same everywhere; that the pins can be installed for them, a script checks."""

import re
import tomllib
from pathlib import Path

import pytest
import python_versions

ROOT = Path(python_versions.ROOT)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_lowest_python_is_the_same_everywhere():
    lowest, *others = python_versions.claimed()
    assert PYPROJECT["project"]["requires-python"] == f">={lowest}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    minor = int(lowest.split(".")[1])
    assert others == [f"3.{minor + more}" for more in range(1, len(others) + 1)]
    for page in ("README.md", "docs/quickstart.md", "Makefile"):
        named = set(re.findall(r"Python (3\.\d+) or newer", (ROOT / page).read_text()))
        assert named == {lowest}, page


def test_pins_are_those_of_the_constraints_that_have_wheels():
    pins = python_versions.pins()
    assert "trl==1.16.0" in pins
    assert not [pin for pin in pins if pin.startswith(("#", *python_versions.SOURCE_ONLY))]
    constraints = (ROOT / "constraints.txt").read_text()
    for name in python_versions.SOURCE_ONLY:
        assert f"\n{name}==" in constraints


@pytest.mark.parametrize(("code", "said"), [(0, None), (1, "ERROR: No matching distribution")])
def test_what_pip_says_against_a_python_is_told(monkeypatch, code, said):
    def run(command, **_):
        assert command[command.index("--python-version") + 1] == "3.12"
        done = python_versions.subprocess.CompletedProcess(command, code)
        done.stderr = f"ERROR: Ignored\n{said}\n"
        return done

    monkeypatch.setattr(python_versions.subprocess, "run", run)
    assert python_versions.problem("3.12") == said


def test_every_install_of_the_makefile_takes_pips_options():
    lines = re.findall(r"pip install .*", (ROOT / "Makefile").read_text())
    of_packages = [line for line in lines if "--upgrade pip" not in line]
    assert len(of_packages) == 4
    assert all("$(PIP_OPTIONS)" in line for line in of_packages)
