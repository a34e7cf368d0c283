"""The recipe for a small pretrained model, run as a user would, with a model that knows nothing."""

import json
import os
import subprocess
import sys

import cases
import pytest
from loading import benchmark_modules

pytest.importorskip("reasoning_gym")

ROOT = cases.ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with benchmark_modules("common") as modules:
        common = modules["common"]
        common.make_model("tiny", 0).save_pretrained(folder)
        common.tokenizer().save_pretrained(folder)
    return folder


def launch(model, cwd, *options):
    arguments = ["--model_name_or_path", model, "--output_dir", "outputs", *options]
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "short_tasks.py"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--order", "adaptive", "--skip_zero_advantages", "true"),
    ],
)
def test_the_recipe_trains_a_local_model_and_says_how_it_does_on_held_out_tasks(
    model, tmp_path, options
):
    small = ("--train_samples", 40, "--eval_samples", 20, "--stage_steps", 2)
    run = launch(model, tmp_path, *small, *options)
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "outputs" / "summary.json").read_text())
    assert summary["n_eval"] == 20
    assert summary["dataset_size"] == 40
    assert [phase["steps"] for phase in summary["phases"]] == [2]
    assert (tmp_path / "outputs" / "model.safetensors").exists()


def test_a_dry_run_prints_the_plan_without_a_model(tmp_path):
    run = launch("no_such_model", tmp_path, "--dry_run", "true")
    assert run.returncode == 0, run.stderr
    assert "60" in run.stdout  # optimizer steps
    assert "1,000" in run.stdout or "1000" in run.stdout


def test_a_pool_that_is_too_small_ends_with_one_line(model, tmp_path):
    run = launch(model, tmp_path, "--train_samples", 5)
    assert run.returncode == 1
    assert "size=5: a pool of ten families needs at least 20 prompts" in run.stderr
    assert "Traceback" not in run.stderr
