"""The staged recipe with one and with two CPU processes; a file of its own, to run beside the other launches."""

import json
import os
import shutil
import subprocess
import sys

import cases
import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = cases.ROOT


def test_the_quickstart_with_two_processes(tmp_path, record_property):
    """End to end under DDP, ZeRO-2 and ZeRO-3."""
    made = ROOT / "outputs" / "toy"
    if made.exists():  # the base model, if the quickstart has trained it already
        shutil.copytree(made, tmp_path / "outputs" / "toy")
    summaries = {}
    for config in ("cpu", "cpu_2_processes_ddp", "cpu_2_processes_zero2", "cpu_2_processes_zero3"):
        summaries[config] = staged_recipe(tmp_path, config)
        assert summaries[config]["accuracy"].keys() == {
            "base",
            "warmup",
            "stage_1",
            "stage_2",
            "stage_3",
        }
    record_property(
        "timings", {config: summary["timings"] for config, summary in summaries.items()}
    )


def staged_recipe(folder, config):
    two = "2_processes" in config
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--main_process_port",
        "0",
    ]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    command += [
        str(ROOT / "recipes" / "gsm8k_staged.py"),
        "--config",
        str(ROOT / "recipes/configs/quickstart.yaml"),
    ]
    command += ["--per_device_train_batch_size", "32" if two else "64", "--output_dir", config]
    command += [
        "--train_samples",
        "64",
        "--eval_samples",
        "40",
        "--warmup_samples",
        "16",
        "--stage_epochs",
        "1",
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((folder / config / "summary.json").read_text())
    record = json.loads((folder / config / "_learnalign" / "run.json").read_text())
    assert record["trainer"]["processes"] == (2 if two else 1)
    phases = record["phases"].values()
    summary["timings"] = {
        "scoring_seconds": sum(
            notes["selection"]["scoring"]["seconds"] for notes in phases if "selection" in notes
        ),
        "seconds_per_step": sum(
            notes["training"]["training_seconds"] for notes in phases if "training" in notes
        )
        / sum(notes["training"]["steps"] for notes in phases if "training" in notes),
    }
    return summary
