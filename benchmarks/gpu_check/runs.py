"""Whole runs: the quickstart beside the CPU's, a run that is killed and resumed, and rollouts by memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from gpu_check.record import PartSkippedError, Record, Setting
from gpu_check.trainers import model_of_shape, peak_gigabytes, prompts, shapes, trainer_on
from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.cli.arguments import parse
from trl_learnalign.cli.problems import load_problems
from trl_learnalign.cli.recipe import close, make_trainer
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.generation import Footprint, default_scoring_batch_prompts, roll_out
from trl_learnalign.report import read_run
from trl_learnalign.report.contrast import Variant, contrast
from trl_learnalign.success import SuccessRule
from trl_learnalign.toy.model import make_base_model
from trl_learnalign.training.checkpoints import last_complete_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "recipes" / "configs" / "quickstart.yaml"
BASE_MODEL = ROOT / "docs" / "results" / "base_model"


def needs_tasks() -> None:
    """The quickstart's tasks are made by a package that not every environment has."""
    if find_spec("reasoning_gym") is None:
        raise PartSkippedError(
            "reasoning-gym, which makes the quickstart's tasks, is not installed"
        )


# ---- The quickstart -------------------------------------------------------------------------------------------------

LINES = ("paper", "shuffled", "adaptive")
SAME_START = 0.02
"""Accuracy of one model with greedy decoding, on two devices: ties may fall otherwise."""


def quickstart(setting: Setting, record: Record) -> None:
    """Its three lines on the device and on the CPU, at the same time."""
    needs_tasks()
    folders = {name: setting.folder / name for name in ("cpu", "device")}
    processes = [
        start_quickstart(setting, folders["cpu"], on_cpu=True),
        start_quickstart(setting, folders["device"], on_cpu=not setting.on_gpu),
    ]
    for process in processes:
        if process.wait() != 0:
            raise RuntimeError(f"recipes/quickstart.py ended with code {process.returncode}")
    for line in LINES:
        with record.attempt(line):
            record.add(line, **compared(setting, folders["cpu"] / line, folders["device"] / line))


def start_quickstart(setting: Setting, folder: Path, on_cpu: bool) -> subprocess.Popen[bytes]:
    """The recipe in a process of its own, smaller than `make quickstart`."""
    train, held_out, warm_up = (32, 20, 8) if setting.small else (160, 300, 32)
    sizes = f"--train_samples {train} --eval_samples {held_out} --warmup_samples {warm_up}"
    command = [sys.executable, str(ROOT / "recipes" / "quickstart.py"), *sizes.split()]
    command += ["--use_cpu", str(on_cpu).lower(), "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(command, env=environment)


def compared(setting: Setting, cpu: Path, device: Path) -> dict[str, Any]:
    """Whether a line came out as on the CPU (`passed`), and the figures of both."""
    theirs, ours = read_run(cpu), read_run(device)
    start = [run.accuracies[0].value for run in (theirs, ours)]
    end = [run.accuracies[-1].value for run in (theirs, ours)]
    steps = [sum(phase.steps for phase in run.phases) for run in (theirs, ours)]
    found = contrast(Variant("CPU", [theirs]), Variant("device", [ours]))
    apart = found.difference if found else None
    is_as_there = theirs.finished and ours.finished and abs(start[0] - start[1]) <= SAME_START
    if not setting.on_gpu:  # the same run twice
        is_as_there = is_as_there and end[0] == end[1] and steps[0] == steps[1]
    return {
        "passed": is_as_there,
        "before": start[1],
        "before, CPU": start[0],
        "after": end[1],
        "after, CPU": end[0],
        "difference": apart and f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]",
        "steps": steps[1],
        "steps, CPU": steps[0],
        "s": ours.ledger.total.seconds,
        "s, CPU": theirs.ledger.total.seconds,
    }


# ---- A run that is killed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Staged:
    """A staged run, and the optimizer step at which it is killed, in its first stage.

    Args:
        sizes (`str`): For the command line.
        killed_at (`int`): Steps made before.
    """

    sizes: str
    killed_at: int

    @classmethod
    def of(cls, setting: Setting) -> Staged:
        """By the size of the check."""
        if setting.small:
            sizes = "--train_samples 12 --warmup_samples 4 --stages 0.5 --stage_epochs 1"
            return cls(f"{sizes} --per_device_train_batch_size 16", 3)
        sizes = "--train_samples 40 --warmup_samples 16 --stages 0.5 0.3 --stage_epochs 2"
        return cls(f"{sizes} --per_device_train_batch_size 32", 7)


STAGED = "--eval_samples 8 --save_strategy steps --save_steps 2 --logging_steps 1"
STAGED += " --disable_tqdm true"


class KillAt(TrainerCallback):
    """Kills its own process when a step begins.

    Args:
        step (`int`, *optional*): Steps made before; `None` for never.
    """

    def __init__(self, step: int | None):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def staged_run(
    folder: Path, setting: Setting, kill_at: int | None = None, checkpoint: str | None = None
) -> tuple[dict[str, list[int]], torch.Tensor, int]:
    """The paper's staged selection on the quickstart's tasks.

    Args:
        folder (`Path`): The output folder.
        setting (`Setting`): With device and size.
        kill_at (`int`, *optional*): The step at which the process is killed.
        checkpoint (`str`, *optional*): Where it goes on.

    Returns:
        `tuple`: Rows that each stage selected, all weights, and optimizer steps.
    """
    given = f"{STAGED} {Staged.of(setting).sizes} --output_dir {folder}"
    given += f" --use_cpu {str(not setting.on_gpu).lower()}"
    recipe, config, args, model = parse(SETTINGS, given.split())
    model.model_name_or_path = str(make_base_model(BASE_MODEL))
    problems = load_problems(recipe)
    trainer = make_trainer(args, model, problems.train, problems.rewards)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    trainer.add_callback(KillAt(kill_at))
    trainer.train(resume_from_checkpoint=checkpoint)
    close(trainer)
    weights = torch.cat([p.detach().flatten().cpu() for p in trainer.model.parameters()])
    pools = {name: pool.tolist() for name, pool in callback.state.pools.items()}
    return pools, weights, trainer.state.global_step


def resume(setting: Setting, record: Record) -> None:
    """Both checks."""
    with record.attempt("killed and resumed"):
        needs_tasks()
        check_resume(setting, record)
    for shape in shapes(setting)[:1]:
        with record.attempt("rollouts by memory"):
            check_memory(setting, record, shape)


def check_resume(setting: Setting, record: Record) -> None:
    """A run that was killed by SIGKILL against one that was not."""
    killed, whole = setting.folder / "killed", setting.folder / "whole"
    command = [sys.executable, "-m", "gpu_check.runs", str(killed), setting.device]
    command += ["small"] if setting.small else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(command, env=environment)
    pools, weights, steps = staged_run(whole, setting)
    code = child.wait()
    checkpoint = last_complete_checkpoint(killed)
    if code != -signal.SIGKILL or checkpoint is None:
        raise RuntimeError(f"the run that was to be killed ended with code {code}, at {checkpoint}")
    found, resumed, steps_again = staged_run(killed, setting, None, str(checkpoint))
    distance = float((weights - resumed).norm() / weights.norm())
    is_same = steps == steps_again and pools["stage_1"] == found["stage_1"]
    record.add(
        "killed and resumed",
        is_same and (setting.on_gpu or distance == 0),
        note=f"killed at step {Staged.of(setting).killed_at} of {steps}, resumed at {checkpoint.name}",
        **{"weights apart": distance, "same prompts selected": str(pools == found)},
    )


# ---- Rollouts by memory ---------------------------------------------------------------------------------------------


def reward_in_turn(completions: list[Any], **_: Any) -> list[float]:
    """Right and wrong in turn."""
    return [float(i % 2) for i in range(len(completions))]


def check_memory(setting: Setting, record: Record, shape: str) -> None:
    """What docs/cost.md counts for a rollout against what one takes; then the call that the rule chooses."""
    tokens = 6 if setting.small else 128
    options = dict(max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens})
    # With shards of so many prompts it is memory that decides, not the shard.
    config = LearnAlignConfig(shard_size=8 if setting.small else 512)
    data = prompts(config.shard_size)
    with (
        trainer_on(setting, model_of_shape(shape), 8, data, reward_in_turn, **options) as trainer,
        preserve_trainer_state(trainer),
    ):
        footprint = Footprint.of(trainer)
        assert footprint is not None
        chosen = default_scoring_batch_prompts(trainer, config, Ranks(trainer.accelerator))
        roll_out(trainer, range(1), 0, SuccessRule(0, reward_in_turn.__name__, 0.5))  # warms up
        peaks = {count: memory_of_call(setting, trainer, count) for count in (4, 8)}
        per_rollout = None if None in peaks.values() else (peaks[8] - peaks[4]) / (4 * 8)
        counted = footprint.rollout / 1e9
        # Half of what training leaves is given to them: up to twice what is counted does no harm.
        fits = per_rollout < 2 * counted if setting.on_gpu else None
        record.add(
            f"memory of a rollout, {shape}",
            fits,
            **{"counted, MB": 1e3 * counted, "measured, MB": per_rollout and 1e3 * per_rollout},
        )
        peak = memory_of_call(setting, trainer, chosen)
        record.add(
            "the call that the rule chooses",
            True,
            **{"prompts": chosen, "rollouts": 8 * chosen, "GB": peak},
        )


def memory_of_call(setting: Setting, trainer: Any, count: int) -> float | None:
    """Peak GB of generating for so many prompts."""
    rule = SuccessRule(0, reward_in_turn.__name__, 0.5)
    return peak_gigabytes(setting, lambda: roll_out(trainer, range(count), 0, rule))


def main(arguments: Sequence[str]) -> None:
    """The run that is killed: FOLDER DEVICE, and `small`."""
    folder, device, *size = arguments
    setting = Setting(device, bool(size), Path(folder))
    staged_run(setting.folder, setting, Staged.of(setting).killed_at)


if __name__ == "__main__":
    main(sys.argv[1:])
