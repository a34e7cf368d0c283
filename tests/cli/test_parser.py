"""Options are whole names, files may be named either way, and `--help` begins with what matters."""

import re
import sys
import warnings
from dataclasses import fields

import cases
import pytest

from trl_learnalign import LearnAlignConfig, cli
from trl_learnalign.cli.arguments import RecipeArguments, given_settings, parse
from trl_learnalign.cli.console import FIRST, OneLineParser, exit_with_error
from trl_learnalign.version import __version__

CONFIG = cases.ROOT / "recipes" / "configs" / "quickstart.yaml"
POOL = ["--pool_size", "100"]


def refusal(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    return str(ended.value)


@pytest.mark.parametrize("path", ["/bin/trl-learnalign", "/lib/trl_learnalign/__main__.py"])
def test_errors_begin_with_the_name_of_the_command(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [path])
    with pytest.raises(SystemExit, match=r"^trl-learnalign: no such file$"):
        exit_with_error("no such file", hint="")


def test_the_version_is_printed(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"trl-learnalign {__version__}\n"


def test_a_command_that_is_none_names_the_nearest():
    assert "'selct' is not a command. Did you mean select?" in refusal("selct")
    assert "Did you mean" not in refusal("xyz")


def test_a_part_of_a_name_is_no_option():
    said = refusal("plan", "--config", CONFIG, *POOL, "--warmup_sample", 3)
    assert "unrecognized arguments: --warmup_sample 3; did you mean --warmup_samples?" in said
    assert "did you mean" not in refusal("plan", "--config", CONFIG, *POOL, "--zzzz", 3)


def test_a_file_may_be_named_with_an_equals_sign(capsys):
    said = []
    for config in (["--config", CONFIG], [f"--config={CONFIG}"]):
        cli.main(["plan", *map(str, config), *POOL])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    recipe, *_ = parse(None, [f"--config={CONFIG}", "--use_cpu", "true", "--bf16", "false"])
    assert recipe.dataset_name == "generated"


@pytest.mark.parametrize("form", ["--config nope.yaml", "--config=nope.yaml"])
def test_a_file_that_is_not_there_is_one_line(form):
    assert "--config nope.yaml: the file does not exist." in refusal("plan", *form.split())


def test_a_setting_of_a_file_that_is_none_names_the_nearest(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("warmup_sample: 3\n")
    said = refusal("plan", "--config", path, *POOL)
    assert "'warmup_sample' is not a setting; did you mean warmup_samples?" in said


def test_help_begins_with_what_most_runs_set_then_ours_then_the_trainers():
    from trl import GRPOConfig, ModelConfig

    parser = OneLineParser((RecipeArguments, LearnAlignConfig, GRPOConfig, ModelConfig), prog="own")
    shown = parser.format_help()
    assert shown.startswith("usage: own [--config FILE] [--SETTING VALUE ...]\n")
    titles = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
    assert titles[0] == "settings of most runs"
    assert titles.index("Warm-up and stages") < titles.index(
        "the trainer: TRL's GRPOConfig, transformers' TrainingArguments"
    )
    options = re.findall(r"^  (?:-h, )?--(\w+)", shown, re.MULTILINE)
    first = ["help", *(name for name in FIRST if name != "top")]
    assert options[: len(first)] == first
    # Each setting is there, and once.
    settings = {field.name for kind in parser.dataclass_types for field in fields(kind)}
    assert settings - {"world_size"} <= set(options)
    assert len(options) == len(set(options))


def test_what_matters_exists():
    from trl import GRPOConfig, ModelConfig

    from trl_learnalign.training.subset import SubsetConfig

    kinds = (RecipeArguments, SubsetConfig, GRPOConfig, ModelConfig)
    known = {field.name for kind in kinds for field in fields(kind)}
    assert set(FIRST) <= known


def test_an_option_in_full_is_read_in_both_spellings():
    for option in ("--warmup_samples", "--warmup-samples"):
        given = given_settings((LearnAlignConfig,), [option, "3"])
        assert given.command_line == {"warmup_samples": 3}


def test_commands_have_one_name_for_each_thing():
    """What `evaluate` and the commands with TRL's settings both can be told is called alike."""
    from trl import GRPOConfig, ModelConfig

    from trl_learnalign.cli.evaluate_options import parser
    from trl_learnalign.training.subset import SubsetConfig

    kinds = (RecipeArguments, SubsetConfig, GRPOConfig, ModelConfig)
    known = {field.name for kind in kinds for field in fields(kind)}
    actions = parser()._actions
    options = {name.removeprefix("--") for action in actions for name in action.option_strings}
    assert options - known == {"-h", "help", "benchmarks", "harness", "system_prompt", "compare"}


def test_evaluate_guesses_no_option_either(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--model", "x"])
    assert "unrecognized arguments: --model x" in capsys.readouterr().err


def test_no_command_begins_with_a_warning(monkeypatch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing_kwargs", "{}"]
        for checkpointing in ([], ["--gradient_checkpointing", "false"]):
            *_, args, _ = parse(None, ["--stages", "9", *own, *checkpointing])
            assert args.gradient_checkpointing is not bool(checkpointing)
    assert [str(each.message) for each in caught if each.category is FutureWarning] == []
