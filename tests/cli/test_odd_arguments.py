"""Whatever a command is told, and whatever its files hold, it ends with a sentence and never with a traceback."""

import dataclasses
import json
import os

import cases
import pytest
import question_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import GRPOConfig, ModelConfig

from trl_learnalign.cli import COMMANDS, evaluate_options, grpo, main
from trl_learnalign.cli.plan import PlanArguments
from trl_learnalign.cli.select import SelectArguments
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.training.subset import SubsetConfig

BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
QUICKSTART = str(cases.ROOT / "recipes" / "configs" / "quickstart.yaml")


class ReachedError(Exception):
    """Everything was checked, and what takes long would begin."""


def stop(*_, **__):
    raise ReachedError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model and a file of questions, as the current one; nothing reaches the hub or a model."""
    folder = tmp_path_factory.mktemp("fuzz")
    question_files.write(folder)
    before = os.getcwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_learnalign.cli.select.make_trainer", stop)
        patch.setattr("trl_learnalign.cli.evaluate._load", stop)
        patch.setattr("trl_learnalign.cli.grpo.launch_command", stop)
        for module in ("cli.problems", "cli.recipe", "preflight.environment"):
            patch.setattr(f"trl_learnalign.{module}.missing_from_hub", lambda *_: "no hub is here")
        yield folder
    os.chdir(before)


def exit_code(arguments):
    """What a command ends with; any exception but these two is a traceback."""
    try:
        main(list(map(str, arguments)))
    except ReachedError:
        return None
    except SystemExit as ended:
        return ended.code
    return None


def ends_well(*arguments):
    """Runs a command, and returns the sentence that it ends with, or 0."""
    code = exit_code(arguments)
    assert code in (None, 0, 2) or isinstance(code, str), arguments
    if isinstance(code, str):
        assert code.strip(), arguments
        assert "Traceback" not in code, arguments
    return code or 0


# ---- Arguments ------------------------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        *("0", "-1", "1", "2.5", "nan", "inf", "-inf", "1e400", "99999999999999999999", "", " "),
        *("x", "None", "null", "true", "[]", "{}", '{"a": 1}', "[nan]", "a b", "../..", "\u202e☃"),
        *("train.jsonl", "model", "nowhere.jsonl", "a:b", "json:loads", "os.path:sep", "--", "-x"),
    ]
)

# They load libraries that may not be there, or begin a network of processes.
SPARED = ("deepspeed", "fsdp", "vllm", "hub", "report_to", "accelerator_config", "ddp", "debug")


def names_of(*kinds):
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}
    return sorted(name for name in fields if not any(part in name for part in SPARED))


PLAN = names_of(PlanArguments, LearnAlignConfig, GRPOConfig, ModelConfig)
GRPO = names_of(*grpo.SETTINGS)
SELECT = names_of(SelectArguments, SubsetConfig, GRPOConfig, ModelConfig)
EVALUATE = sorted(
    name
    for action in evaluate_options.parser()._actions
    for name in action.option_strings
    if name not in ("-h", "--help", "--harness")
)


def spelt(option, values):
    """An option with its values; one value after an equals sign, which also negative ones may follow."""
    return [f"{option}={values[0]}"] if len(values) == 1 else [option, *values]


@BOUNDED
@given(name=st.sampled_from(PLAN), values=st.lists(ODD, max_size=2))
def test_plan_with_odd_arguments(place, name, values):
    ends_well("plan", "--config", QUICKSTART, "--pool_size", "600", *spelt(f"--{name}", values))


@BOUNDED
@given(name=st.sampled_from(GRPO), values=st.lists(ODD, max_size=2))
def test_grpo_with_odd_arguments(place, name, values):
    own = ["--model_name_or_path", "model", "--dataset_name", "train.jsonl"]
    ends_well("grpo", *own, *spelt(f"--{name}", values))


@BOUNDED
@given(name=st.sampled_from(SELECT), values=st.lists(ODD, max_size=2))
def test_select_with_odd_arguments(place, name, values):
    own = ["--model_name_or_path", "model", *question_files.SMALL, "--output_dir", "out"]
    ends_well("select", "train.jsonl", "-n", "3", *own, *spelt(f"--{name}", values))


@BOUNDED
@given(name=st.sampled_from(EVALUATE), values=st.lists(ODD, max_size=2))
def test_evaluate_with_odd_arguments(place, name, values):
    own = ["--benchmarks", "test.jsonl", "--output_dir", "evaluated"]
    ends_well(
        "evaluate", "--model_name_or_path", "model", "--use_cpu", "true", *own, *spelt(name, values)
    )


@BOUNDED
@given(
    command=st.sampled_from(["report", "export", "compare"]),
    words=st.lists(
        st.one_of(ODD, st.sampled_from(["--top", "--stage", "--selector", "--html", "chosen"])),
        max_size=4,
    ),
)
def test_commands_on_records_with_odd_arguments(place, command, words):
    ends_well(command, *words)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num_generations", "0"], "num_generations=0: give a whole number of at least 1"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0: give a whole"),
        (["--beta", "nan"], "beta=nan: give a finite number"),
        (["--learning_rate", "inf"], "learning_rate=inf: give a finite number"),
        (["--temperature=-inf"], "temperature=-inf: give a finite number"),
    ],
)
def test_numbers_that_nothing_can_be_computed_with(place, arguments, said):
    assert said in ends_well("plan", "--config", QUICKSTART, "--pool_size", "600", *arguments)


def test_no_limit_may_be_infinite(place):
    assert (
        ends_well("plan", "--config", QUICKSTART, "--pool_size", "600", "--max_grad_norm", "inf")
        == 0
    )


# ---- Files ----------------------------------------------------------------------------------------------------------

SETTINGS = [
    *(
        b"",
        b"[",
        b"a: b: c",
        b"\xff\xfe\x00",
        b"- 1",
        b"7",
        b"a",
        b"1: 2",
        b"null: 3",
        b"---\n---\n",
    ),
    *(b"a: !!python/object/apply:os.system [ls]", b"a: !nothing x", b"a: &x [*x]", b"? [a]\n: b"),
    *(b"beta: .nan", b"stages: {a: 1}", b"num_generations: 0", b"output_dir: [1]", b"env: 7"),
    *(b"env: {A: [1]}", b"seed: 1e999", b"learning_rate: {}", b"stages: 2020-01-01", b"top: x"),
]


@pytest.mark.parametrize("content", SETTINGS)
@pytest.mark.parametrize("command", ["plan", "select"])
def test_files_of_settings_of_any_content(place, command, content):
    (place / "odd.yaml").write_bytes(content)
    own = ["--pool_size", "600"] if command == "plan" else ["--top", "3"]
    ends_well(command, "--config", "odd.yaml", *own, "--use_cpu", "true", "--bf16", "false")


CELL = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)
ROW = st.dictionaries(
    st.sampled_from(["question", "answer", "options", "prompt", "reward_model", "images", "x"]),
    CELL,
    max_size=4,
)
WHOLE = json.dumps({"question": "1+1?", "answer": "2"})


def read_by_all(file):
    own = ["--model_name_or_path", "model", *question_files.SMALL, "--output_dir", "out"]
    ends_well("select", file, "-n", "2", *own)
    ends_well("plan", "--config", QUICKSTART, "--dataset_name", file)
    ends_well(
        "evaluate", "--model_name_or_path", "model", "--use_cpu", "true", "--benchmarks", file
    )
    reward = ["--reward_funcs", "cases:accuracy_reward", "--output_dir", "evaluated"]
    ends_well(
        "evaluate",
        "--model_name_or_path",
        "model",
        "--use_cpu",
        "true",
        "--benchmarks",
        file,
        *reward,
    )


@BOUNDED
@given(rows=st.lists(st.one_of(ROW, CELL), max_size=3), count=st.integers(0, 3))
def test_files_of_questions_with_odd_rows(place, rows, count):
    lines = [WHOLE] * count + [json.dumps(row) for row in rows]
    (place / "odd.jsonl").write_text("\n".join(lines))
    read_by_all("odd.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("odd.jsonl", text) for text in (b"", b"\n", b"{", b"\x00", b"\xff", b"[]", b"{}\n{}")),
        *(("odd.json", text) for text in (b"", b"{}", b"7", b'{"question": ["a"]}', b"[[1]]")),
        *(("odd.csv", text) for text in (b"", b"question,answer\n1", b"\xff\xfe", b'"')),
        *(("odd.parquet", text) for text in (b"", b"PAR1PAR1")),
        *(("odd.jsonl.gz", text) for text in (b"", b"\x1f\x8b")),
    ],
)
def test_files_of_questions_of_any_content(place, name, content):
    (place / name).write_bytes(content)
    read_by_all(name)


@pytest.mark.parametrize("name", ["folder", "folder.jsonl", "folder.parquet"])
def test_folders_without_a_dataset(place, name):
    (place / name).mkdir()
    read_by_all(name)
    (place / name / "dataset_info.json").write_text("7")
    read_by_all(name)
    for command in ("report", "compare"):
        ends_well(command, name)
    ends_well("export", name, "chosen")


def test_every_command_is_tried():
    assert set(COMMANDS) == {"plan", "grpo", "select", "evaluate", "report", "export", "compare"}
