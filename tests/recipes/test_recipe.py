import json
import os
import runpy
import subprocess
import sys
from typing import get_args, get_type_hints

import cases
import pandas as pd
import pytest
import question_files
import torch
from trl import GRPOConfig

from trl_learnalign.cli.arguments import (
    RecipeArguments,
    batch_arguments,
    given_settings,
    parse,
    processes_of,
)
from trl_learnalign.toy import tasks

ROOT = cases.ROOT
STAGED = ROOT / "recipes" / "gsm8k_staged.py"
STAGED_CONFIG = ROOT / "recipes" / "configs" / "gsm8k_staged.yaml"


def launch(*arguments, cwd, **environment):
    """Run the staged recipe as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(STAGED), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder and GSM8K-like files."""
    folder = tmp_path_factory.mktemp("files")
    question_files.write(folder)
    return folder


SMALL = [*question_files.SMALL, "--save_strategy", "no"]


def test_local_files_end_to_end(tmp_path, files):
    done = launch(
        *("--model_name_or_path", files / "model", "--dataset_name", files / "train.jsonl"),
        *("--eval_dataset_name", files / "test.jsonl", *SMALL, "--output_dir", "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"base", "warmup", "stage_1", "stage_2", "stage_3"}
    assert summary["n_eval"] == 5
    assert summary["seconds"] > 0
    assert [phase["name"] for phase in summary["phases"]] == [
        "warmup",
        "stage_1",
        "stage_2",
        "stage_3",
    ]
    assert [phase["selected"] for phase in summary["phases"]] == [4, 10, 6, 4]
    assert all(phase["steps"] for phase in summary["phases"])
    assert len(pd.read_parquet(tmp_path / "out" / "_learnalign" / "stage_1.parquet")) == 20
    assert "stage_2: 6 prompts, 1 pass, steps" in done.stdout
    assert done.stdout.count("stage_2: selected 6 of 10") == 1
    assert "LearnAlign: " not in done.stdout + done.stderr  # the recipe's own logging tells it
    assert done.stdout.count("out/_learnalign") == 1  # in the line that ends the story
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "report: out/report.html" in done.stdout
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- learnalign" in card  # TRL's own card, with a tag and a section
    assert "## Data selection" in card
    assert "| stage_2 | 6 | 10 |" in card


OWN_REWARD = """
from pathlib import Path

import trl_learnalign.data.answers as answers

def accuracy(completions, **columns):
    if list(Path("out/_learnalign/stage_1").glob("*/shard-*")):
        raise KeyboardInterrupt  # Ctrl-C after the first shard
    return answers.accuracy_reward(completions, **columns)
"""


def test_ctrl_c_in_scoring_ends_a_recipe_with_one_sentence(tmp_path, files):
    (tmp_path / "own.py").write_text(OWN_REWARD)
    done = launch(
        *("--model_name_or_path", files / "model", "--dataset_name", files / "train.jsonl"),
        *("--eval_dataset_name", files / "test.jsonl", *SMALL, "--output_dir", "out"),
        *("--reward_funcs", "own:accuracy", "--shard_size", 4, "--save_strategy", "steps"),
        cwd=tmp_path,
    )
    assert done.returncode == 130, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("stage_1: gradients: interrupted, 4 of 20 prompts are kept; the same")
    assert "with resume" in last
    assert "of the file do not apply to own:accuracy: each weight is 1" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "0.9", "0.9"], "add up to 1.8 of the pool"),
        (["--warmup_samples", "300"], "warmup_samples=300, but the pool has 18 prompts"),
        (["--success_reward", "right"], "success_reward='right' is not a reward function of"),
        (["--dataset_name", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--selector", "best"], "selector='best': choose one of"),
        (
            ["--on_shortfall", "grow"],
            "argument --on_shortfall/--on-shortfall: invalid choice: 'grow' (choose from ",
        ),
    ],
)
def test_bad_input_ends_before_a_model_is_loaded(tmp_path, files, monkeypatch, arguments, message):
    local = ["--model_name_or_path", files / "model", "--dataset_name", files / "train.jsonl"]
    said = refusal(monkeypatch, *local, *SMALL, "--output_dir", tmp_path / "out", *arguments)
    assert said.startswith("gsm8k_staged.py: ")
    assert message in said
    assert not (tmp_path / "out").exists()


def test_continual_selection_end_to_end(tmp_path, files):
    done = launch(
        *("--model_name_or_path", files / "model", "--dataset_name", files / "train.jsonl"),
        *("--eval_dataset_name", files / "test.jsonl", *SMALL, "--output_dir", "out"),
        *("--order", "adaptive", "--stages", 1, "--warmup_samples", 0, "--stage_steps", 3),
        *("--skip_zero_advantages", "true"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage_1: 20 prompts, in adaptive order, steps 1 to 3 of 3" in done.stdout
    assert "groups had a gradient (success rate: predicted" in done.stdout
    # The paper's beta gives every rollout a gradient.
    assert "trained on like the others: beta=0.04" in done.stdout
    assert "success rate, selected" not in done.stdout
    assert "useful" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained on all of a pool of 20 prompts" in card
    assert "The order of the prompts was adaptive" in card
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["phases"][0]["useful"] is not None
    assert summary["phases"][0]["tokens_skipped"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "in spite of skip_zero_advantages: beta=0.04" in page


def refusal(monkeypatch, *arguments):
    """The line with which the recipe ends, in this process (imports take longer than the refusal)."""
    monkeypatch.syspath_prepend(str(STAGED.parent))
    monkeypatch.setattr(sys, "argv", [str(STAGED), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(STAGED), run_name="__main__")
    return str(ended.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_names_the_quickstart(monkeypatch):
    said = refusal(monkeypatch)
    assert said.startswith("gsm8k_staged.py: no GPU is visible. Try `make quickstart`")
    assert "--dataset_name train.jsonl" in said


def test_without_the_hub_one_line_says_what_is_missing(tmp_path):
    done = launch(
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "gsm8k_staged.py: model 'Qwen/Qwen2.5-1.5B-Instruct' is not in the local cache"
    )
    assert "make quickstart" in last


def test_the_paper_settings_are_in_the_yaml():
    import yaml

    settings = yaml.safe_load((ROOT / "recipes" / "configs" / "gsm8k_staged.yaml").read_text())
    assert settings["model_name_or_path"] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert settings["stages"] == [0.5, 0.3, 0.2]
    assert settings["warmup_samples"] == 300
    assert (settings["num_generations"], settings["temperature"]) == (8, 1.0)
    assert settings["completions_per_step"] == 48
    assert "gradient_accumulation_steps" not in settings
    assert (settings["learning_rate"], settings["beta"], settings["epsilon"]) == (1e-6, 0.04, 0.2)
    assert settings["reward_weights"] == [2.0, 1.0]


def test_the_mixtures_of_generated_tasks_are_those_that_there_are():
    regimes = get_args(get_type_hints(RecipeArguments)["generated_regime"])
    assert set(regimes) == set(tasks.REGIMES)


CPU = ["--use_cpu", "true", "--bf16", "true"]


@pytest.mark.parametrize(
    "arguments", [["--dry_run", "false"], ["--dry_run=false"], ["--dry-run", "False"], []]
)
def test_a_run_that_is_not_dry_trains_with_its_own_settings(arguments):
    recipe, _, args, _ = parse(STAGED_CONFIG, [*CPU, *arguments])
    assert not recipe.dry_run
    assert type(args) is GRPOConfig
    assert args.bf16


@pytest.mark.parametrize("arguments", [["--dry_run"], ["--dry_run=true"], ["--dry-run"], "file"])
def test_a_dry_run_needs_no_gpu(tmp_path, arguments):
    config = STAGED_CONFIG
    if arguments == "file":
        config = tmp_path / "dry.yaml"
        config.write_text(STAGED_CONFIG.read_text() + "dry_run: true\n")
        arguments = []
    recipe, _, args, _ = parse(config, arguments)
    assert recipe.dry_run
    assert type(args) is not GRPOConfig
    assert not args.bf16


def test_the_launched_processes_decide_the_accumulation(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    given = given_settings((RecipeArguments, GRPOConfig), ["--completions_per_step", "48"])
    assert batch_arguments(given, processes_of(GRPOConfig)) == [
        "--gradient_accumulation_steps=2",
        "--per_device_train_batch_size=8",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_run_that_is_not_dry_is_refused(monkeypatch):
    assert "no GPU is visible" in refusal(monkeypatch, "--dry_run", "false")
