"""`trl-learnalign grpo` beside `trl grpo`: the same script, YAML file and model; only the callback is added."""

import json
import os
import subprocess
import sys

import cases
import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl import GRPOTrainer

from trl_learnalign import cli
from trl_learnalign.cli import grpo

SETTINGS = {
    "reward_funcs": ["cases.accuracy_reward"],
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 7,
    # accelerate's
    "num_processes": 1,
    "num_machines": 1,
    "mixed_precision": "no",
    "dynamo_backend": "no",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    cases.model().save_pretrained(folder / "model")
    cases.tokenizer().save_pretrained(folder / "model")
    for name, size in (("data", 24), ("more", 9)):
        (folder / name).mkdir()
        cases.dataset(size).to_json(folder / name / "train.jsonl")
    return folder


def run_file(inputs, folder, **settings):
    """A YAML file that `trl grpo` takes; `settings` may hold some that only the callback knows."""
    folder.mkdir(exist_ok=True)
    file = folder / "run.yaml"
    names = {
        "model_name_or_path": str(inputs / "model"),
        "dataset_name": str(inputs / "data"),
        "output_dir": str(folder / "out"),
    }
    given = {**names, **SETTINGS, **settings}
    file.write_text(yaml.safe_dump({key: given[key] for key in given if given[key] is not None}))
    return file


def weights(folder):
    return load_file(folder / "out" / "model.safetensors")


def launched(*command, code=0):
    """Runs a command as a shell would; returns what it prints."""
    paths = os.pathsep.join([str(cases.ROOT), str(cases.ROOT / "tests" / "helpers")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def streams(inputs):
    """Settings of a mixture of two datasets that are streamed."""
    parts = [{"path": str(inputs / name), "split": "train"} for name in ("data", "more")]
    return {"dataset_name": None, "datasets": parts, "streaming": True}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda _: {}, id="dataset"),
        pytest.param(streams, id="streams", marks=pytest.mark.slow),
    ],
)
def test_a_file_of_trls_gives_trls_model_where_the_callback_leaves_the_order(
    inputs, tmp_path, data
):
    stock = run_file(inputs, tmp_path / "stock", **data(inputs))
    unchanged = dict(order="trainer", skip_zero_advantages=False)
    ours = run_file(inputs, tmp_path / "ours", **data(inputs), **unchanged)
    launched("trl.cli.main", "grpo", "--config", stock)
    said = launched("trl_learnalign", "grpo", "--config", ours)
    theirs, found = weights(tmp_path / "stock"), weights(tmp_path / "ours")
    before = load_file(inputs / "model" / "model.safetensors")
    assert found.keys() == theirs.keys()
    assert any(not torch.equal(found[name], before[name]) for name in found)
    for name, value in theirs.items():
        assert torch.equal(found[name], value), name
    assert "Training completed" in said


@pytest.mark.slow
def test_a_setting_of_ours_on_the_command_line_stands_above_the_file(inputs, tmp_path):
    stages = dict(stages=[8], selector="random", stage_steps=[2], max_steps=-1)
    file = run_file(inputs, tmp_path / "run", **stages)
    launched("trl_learnalign", "grpo", "--config", file, "--selector", "learnability")
    record = json.loads((tmp_path / "run" / "out" / "_learnalign" / "run.json").read_text())
    assert record["config"]["selector"] == "learnability"
    assert record["config"]["stages"] == [8]


def test_settings_that_do_not_fit_the_trainer_end_the_script_with_a_sentence(inputs, tmp_path):
    file = run_file(inputs, tmp_path / "run", stages=[8], stage_steps=[2])
    said = launched("trl_learnalign.cli.grpo", "--config", file, code=1)
    assert "max_steps=4, but warm-up and stages plan" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_an_order_by_rows_is_refused_on_streams_with_a_sentence(inputs, tmp_path):
    file = run_file(inputs, tmp_path / "run", **streams(inputs))
    said = launched("trl_learnalign.cli.grpo", "--config", file, code=1)
    assert "by row numbers, which a stream does not have" in said
    assert "Traceback" not in said


def refusal(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["grpo", *map(str, arguments)])
    return str(ended.value)


def test_a_name_that_nobody_knows_is_refused_with_the_nearest(inputs, tmp_path):
    file = run_file(inputs, tmp_path / "run")
    said = refusal("--config", file, "--selectr", "random")
    assert "--selectr is not a setting of TRL, LearnAlign or accelerate launch" in said
    assert "did you mean --selector?" in said
    typo = run_file(inputs, tmp_path / "typo", lerning_rate=1e-5)
    assert "--lerning_rate is not a setting" in refusal("--config", typo)


def test_bad_settings_and_files_are_refused_in_a_sentence(inputs, tmp_path):
    file = run_file(inputs, tmp_path / "run")
    assert "selector" in refusal("--config", file, "--selector", "best")
    assert "missing.yaml" in refusal("--config", tmp_path / "missing.yaml")
    assert "nowhere" in refusal("--config", file, "--accelerate_config", "nowhere")


def test_what_accelerate_knows_is_left_to_it(inputs, tmp_path):
    file = run_file(inputs, tmp_path / "run")
    _settings, left = grpo.parsed(["--config", str(file), "--main_process_port", "0"])
    assert left[-2:] == ["--main_process_port", "0"]
    assert "--num_processes" in left
    grpo.check_launch(left)


def test_trainers_are_as_they_were_afterwards():
    before = GRPOTrainer.__init__
    with grpo.callback_added(None):
        assert GRPOTrainer.__init__ is not before
    assert GRPOTrainer.__init__ is before
    with pytest.raises(RuntimeError), grpo.callback_added(None):
        raise RuntimeError
    assert GRPOTrainer.__init__ is before
