"""Measures a few steps of training and scoring on this machine, and extrapolates to the whole run."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from trl_learnalign import LearnAlignCallback
from trl_learnalign.adaptive.group_size import GroupSizes, group_sizes
from trl_learnalign.bridge.borrow import preserve_trainer_state
from trl_learnalign.cli.arguments import RecipeArguments
from trl_learnalign.cli.problems import Problems, load_problems
from trl_learnalign.cli.run import check_surroundings, make_trainer
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.evaluation.held_out import held_out_accuracy
from trl_learnalign.preflight import checks
from trl_learnalign.preflight.forecast import Forecast
from trl_learnalign.records.history import first_groups_of
from trl_learnalign.records.notes import SelectionNote

UNITS = 4
"""Number of training units that are run; the first one is a warm-up of caches and is not timed."""


@dataclass(frozen=True)
class Calibration:
    """Times on this machine, with the launched number of processes.

    Args:
        loading (`float`): Seconds to load the model and build the trainer.
        step (`float`): Seconds per optimizer step, generation included.
        prompt (`float`): Seconds to score a candidate.
        problem (`float`): Seconds per held-out problem.
        completion_length (`float`): Mean tokens of the measured rollouts.
        learnable (`float`, *optional*): Share of the scored prompts with learnability above 0.
        prompts (`int`): Candidates that were scored for this calibration.
        sizes (`GroupSizes`, *optional*): Effect of G on the share of mixed groups; `None` if unknown.
    """

    loading: float
    step: float
    prompt: float
    problem: float
    completion_length: float | None
    learnable: float | None
    prompts: int
    sizes: GroupSizes | None = None

    def minutes(self, forecast: Forecast) -> dict[str, float]:
        """Minutes of each part of a run."""
        parts = {
            "loading": self.loading,
            "training": self.step * forecast.steps,
            "scoring": self.prompt * sum(phase.measured for phase in forecast.phases),
            "evaluation": self.problem * forecast.evaluation_rollouts,
        }
        return {name: seconds / 60 for name, seconds in parts.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self, forecast: Forecast) -> list[str]:
        """The result in words."""
        minutes = self.minutes(forecast)
        parts = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
        seen = [f"{self.step:.2f} s per optimizer step", f"{self.prompt:.3f} s per scored prompt"]
        if self.completion_length is not None:
            seen.append(f"{self.completion_length:.0f} tokens per completion")
        if self.learnable is not None:
            seen.append(f"{self.learnable:.0%} of {self.prompts} prompts learnable")
        return [
            f"On this machine: about {sum(minutes.values()):.1f} minutes ({parts}).",
            f"Measured with the untrained model: {', '.join(seen)}. Completions may become longer or shorter in "
            "training.",
            *([] if self.sizes is None else self.sizes.lines),
        ]


class _StepTimes(TrainerCallback):
    """Records when each optimizer step began and ended."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended.append(time.perf_counter())


def calibrate(
    recipe: RecipeArguments, config: LearnAlignConfig, args: GRPOConfig, model: ModelConfig
) -> Calibration:
    """Train and score a few prompts, and discard the result; all ranks call it together.

    Args:
        recipe (`RecipeArguments`): Source of the prompts.
        config (`LearnAlignConfig`): Settings of the selection.
        args (`GRPOConfig`): Settings of the trainer.
        model (`ModelConfig`): The policy.

    Raises:
        `SystemExit`: With a one-line message, if the model, the dataset or the GPU is missing.
    """
    check_surroundings(recipe, args, model)
    problems = load_problems(recipe)
    unit = checks.geometry(args).unit_prompts
    prompts = min(len(problems.train), UNITS * unit)
    # Evenly spaced over the pool, because files are often sorted by difficulty.
    rows = np.linspace(0, len(problems.train) - 1, prompts).round().astype(int)
    folder = Path(broadcast_object_list([tempfile.mkdtemp(prefix="learnalign-calibration-")])[0])
    try:
        return _measure(problems, rows, unit, config, _quiet(args, folder), model)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _quiet(args: GRPOConfig, folder: Path) -> GRPOConfig:
    """The trainer's settings with all saving, evaluation and logging disabled."""
    args = copy.deepcopy(args)
    args.output_dir = str(folder)
    args.save_strategy = args.eval_strategy = "no"  # type: ignore[assignment]
    args.report_to = []  # type: ignore[assignment]
    args.disable_tqdm, args.log_completions, args.push_to_hub = True, False, False
    args.max_steps, args.resume_from_checkpoint = -1, None
    return args


def _short(config: LearnAlignConfig, prompts: int, unit: int) -> LearnAlignConfig:
    """Settings for a warm-up on these prompts and then their scoring, as in the full run."""
    return dataclasses.replace(
        config,
        warmup_samples=prompts,
        warmup_epochs=math.ceil(UNITS * unit / prompts),
        after_warmup="continue",
        stages=[max(2, min(unit, prompts))],
        stage_epochs=[1],
        stage_steps=None,
        order=["shuffled"],  # the adaptive order has the same steps
        selector=config.selectors[0],
        on_shortfall="shrink",  # score even if the stage could take all candidates
        pool_sample=None,
        rollout_budget=None,
        plateau_patience=0,
        compute_budget=None,
        save_at_phase_end=False,
        record_dir=None,
        verbose=False,
    )


def _measure(
    problems: Problems,
    rows: np.ndarray,
    unit: int,
    config: LearnAlignConfig,
    args: GRPOConfig,
    model: ModelConfig,
) -> Calibration:
    started = time.perf_counter()
    trainer = make_trainer(args, model, problems.train.select(rows), problems.rewards)
    loading = time.perf_counter() - started
    trainer.remove_callback(PrinterCallback)
    times = _StepTimes()
    callback = LearnAlignCallback(trainer, _short(config, len(rows), unit))
    trainer.add_callback(callback)
    trainer.add_callback(times)
    trainer.train()
    first, last = callback.plan.geometry.unit_steps, callback.plan.phases[0].end - 1
    selection = callback.record.get("stage_1", SelectionNote)
    assert selection is not None
    assert selection.scoring is not None
    rollouts = len(rows) * trainer.num_generations
    generated = selection.scoring.tokens_generated
    return Calibration(
        loading=loading,
        step=(times.ended[last] - times.began[first]) / (last - first + 1),
        prompt=selection.scoring.seconds / len(rows),
        problem=_problem_seconds(trainer, problems),
        completion_length=generated / rollouts if generated else None,
        learnable=selection.learnable_share,
        prompts=len(rows),
        sizes=_group_sizes(callback, trainer.num_generations) if generated else None,
    )


def _group_sizes(callback: LearnAlignCallback, own: int) -> GroupSizes | None:
    """Effect of G on the share of mixed groups, estimated from the scoring rollouts."""
    return group_sizes(first_groups_of(callback.table("stage_1").reset_index()), own)


def _problem_seconds(trainer: GRPOTrainer, problems: Problems) -> float:
    """Seconds per held-out problem, over one batch of each process."""
    batch = trainer.args.per_device_eval_batch_size * trainer.accelerator.num_processes
    few = problems.held_out.select(range(min(batch, len(problems.held_out))))
    with preserve_trainer_state(trainer):
        started = time.perf_counter()
        held_out_accuracy(trainer, few, problems.rewards[0])
    return (time.perf_counter() - started) / len(few)
