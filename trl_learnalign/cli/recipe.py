"""One run, from its checks to the final table, and how long it takes; shared by recipes and commands."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

from trl_learnalign.adaptive.order import GroupSizes, group_sizes
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.cli.arguments import RecipeArguments
from trl_learnalign.cli.console import exit_with_error, one_line_errors, shorten_logs
from trl_learnalign.cli.problems import (
    TOY_MODEL,
    Problems,
    check_weights,
    find_rewards,
    load_problems,
    missing_dataset,
    model_path,
)
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.evaluation.grading import Reward
from trl_learnalign.evaluation.held_out import held_out_accuracy
from trl_learnalign.preflight.environment import missing_from_hub, missing_gpu
from trl_learnalign.preflight.forecast import Forecast, geometry
from trl_learnalign.records import layout
from trl_learnalign.records.history import first_groups_of
from trl_learnalign.records.notes import BASE, SelectionNote
from trl_learnalign.records.run_record import RunContents
from trl_learnalign.records.store import StoreError, write_atomically
from trl_learnalign.records.summary import (
    PhaseSummary,
    accuracies,
    phase_summaries,
    section,
    with_section,
)
from trl_learnalign.training.callback import LearnAlignCallback
from trl_learnalign.training.checkpoints import (
    interrupted_run,
    is_reported,
    last_complete_checkpoint,
)

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from trl_learnalign.training.callback import LearnAlignCallback

logger = logging.getLogger(__name__)


def check_surroundings(recipe: RecipeArguments, args: GRPOConfig, model: ModelConfig) -> None:
    """Exit early if the hub or the GPU that this run needs is not available.

    Args:
        recipe (`RecipeArguments`): Source of the prompts.
        args (`GRPOConfig`): Settings of the trainer.
        model (`ModelConfig`): The policy.
    """
    problem = missing_gpu(args.use_cpu)
    if not problem and model.model_name_or_path != TOY_MODEL:
        problem = missing_from_hub(str(model.model_name_or_path), "model")
    problem = problem or missing_dataset(recipe)
    if problem:
        exit_with_error(problem)
    if recipe.reward_funcs is not None:
        with one_line_errors():
            check_weights(args.reward_weights, find_rewards(recipe.reward_funcs))


def make_trainer(
    args: GRPOConfig, model: ModelConfig, train: Dataset, rewards: list[Reward]
) -> GRPOTrainer:
    """An unmodified `GRPOTrainer` whose policy is loaded as in TRL's own scripts.

    Args:
        args (`GRPOConfig`): Settings of the trainer.
        model (`ModelConfig`): The policy, and its adapter if any.
        train (`datasets.Dataset`): The pool of prompts.
        rewards (list of callables): The first one defines success.
    """
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = GRPOTrainer(
        model=model_path(model),
        reward_funcs=rewards,
        args=args,
        train_dataset=train,
        peft_config=get_peft_config(model),
    )
    shorten_logs(trainer)
    return trainer


def checkpoint(args: GRPOConfig) -> str | None:
    """The checkpoint of `--resume_from_checkpoint`: a folder, or with `true` the last complete checkpoint if any."""
    wanted = args.resume_from_checkpoint
    if str(wanted).lower() != "true":
        return wanted
    folder = last_complete_checkpoint(str(args.output_dir))
    return None if folder is None else str(folder)


INTERRUPTED = 130
"""Exit status of a program that was interrupted by Ctrl-C."""


@contextmanager
def exit_cleanly(trainer: GRPOTrainer) -> Iterator[None]:
    """End interrupted training, or training refused because of another run's folder, with a one-sentence message.

    Args:
        trainer (`GRPOTrainer`): The trainer that trains or scores within the context.
    """
    try:
        yield
    except StoreError as error:
        exit_with_error(str(error), hint="")
    except KeyboardInterrupt as interruption:
        if trainer.accelerator.is_main_process and not is_reported(interruption):
            logger.warning("%s", interrupted_run(trainer))
        sys.exit(INTERRUPTED)


def finish(trainer: GRPOTrainer, callback: LearnAlignCallback, seconds: float) -> None:
    """Write `summary.json` into the output folder, print the table, and [`close`]."""
    if trainer.accelerator.is_main_process:
        _conclude(trainer, callback, seconds)
    close(trainer)


SETTLING = 0.2
"""Seconds that a process waits for its communication threads before it exits."""


def close(trainer: GRPOTrainer) -> None:
    """Destroy the process group on all processes; a process that exits with it open may abort (seen with gloo)."""
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.num_processes > 1:
        # A process that exits right after the last gather may abort, too: a thread of gloo still holds a tensor, and
        # needs the interpreter to free it. A barrier is not enough, because the thread has to be scheduled.
        time.sleep(SETTLING)
    trainer.accelerator.end_training()


def _conclude(trainer: GRPOTrainer, callback: LearnAlignCallback, seconds: float) -> None:
    summary = summarise(callback, seconds)
    path = Path(trainer.args.output_dir) / layout.SUMMARY
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print_table(summary)
    add_to_model_card(trainer, callback.record.contents)
    places = {
        "Summary": path,
        "report": write_report(trainer.args.output_dir),
    }
    print_places(places)


def print_places(places: Mapping[str, str | Path | None]) -> None:
    """Print one line with the locations of outputs; missing ones are omitted."""
    said = " · ".join(f"{name}: {path}" for name, path in places.items() if path is not None)
    Console().print(Text(said), soft_wrap=True)


def write_report(output_dir: str | Path) -> Path | None:
    """Write `report.html` if its dependencies are installed. An error does not affect the job's result."""
    again = f"trl-learnalign report {output_dir}"
    try:
        from trl_learnalign.report import write_report as write

        return write(output_dir)
    except ImportError as error:
        logger.info("No report.html: %s Then: %s", error, again)
    except Exception:
        logger.warning(
            "The report could not be written; the records are complete. Try: %s",
            again,
            exc_info=True,
        )
    return None


def summarise(callback: LearnAlignCallback, seconds: float) -> dict[str, Any]:
    """Accuracy after each phase and statistics of the phases, from the run's record."""
    contents = callback.record.contents
    measured = accuracies(contents)
    return {
        "accuracy": {accuracy.phase: accuracy.value for accuracy in measured},
        "n_eval": next((accuracy.count for accuracy in measured if accuracy.count), 0),
        "seconds": seconds,
        "dataset_size": contents.plan.dataset_size,
        "phases": [
            _phase_entry(phase) for phase in phase_summaries(contents) if phase.name != BASE
        ],
        "records": str(callback.folder),
    }


def _phase_entry(phase: PhaseSummary) -> dict[str, Any]:
    """The summary of a phase as JSON: actual values without planned ones, and accuracy as a number."""
    entry = dict(vars(phase))
    del entry["planned_steps"]
    return {**entry, "accuracy": None if phase.accuracy is None else phase.accuracy.value}


COLUMNS = {
    "prompts": "selected",
    "success rate, selected": "success_rate_selected",
    "left out": "success_rate_left_out",
    "useful groups": "useful",
    "tokens skipped": "tokens_skipped",
    "steps": "steps",
    "reward": "reward",
    "accuracy": "accuracy",
}
"""Headings of the final table and the phase attribute of each."""


def print_table(summary: dict[str, Any]) -> None:
    """Print one row per phase; columns without any value are omitted."""
    base = {"name": BASE, "accuracy": summary["accuracy"].get(BASE)}
    rows = [base, *summary["phases"]]
    known = {
        heading: name
        for heading, name in COLUMNS.items()
        if any(row.get(name) is not None for row in rows)
    }
    table = Table(
        title=f"Held-out accuracy (greedy, {summary['n_eval']} problems) and what each phase trained on"
    )
    for heading in ("phase", *known):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for row in rows:
        table.add_row(row["name"], *(_cell(name, row.get(name)) for name in known.values()))
    Console().print(table)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in ("useful", "tokens_skipped"):
        return f"{value:.0%}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


# ---- Time on this machine -------------------------------------------------------------------------------------------

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
    unit = geometry(args).unit_prompts
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


# ---- Model card -----------------------------------------------------------------------------------------------------


def _model_name(trainer: GRPOTrainer) -> str:
    """The model name that the hub would show."""
    hub_name = trainer.args.hub_model_id
    if hub_name:
        return str(hub_name).rsplit("/", 1)[-1]
    return Path(trainer.args.output_dir).resolve().name


def with_local_names(card: str, base: str, place: str) -> str:
    """TRL's model card with local names instead of "None" for a model or base model that is not on the hub.

    Args:
        card (`str`): The card.
        base (`str`): Source of the base model, or empty.
        place (`str`): Location of the trained model.
    """
    known = f"`{base}`" if base else "an unnamed model"
    named = card.replace("[None](https://huggingface.co/None)", known)
    return named.replace('model="None"', f'model="{place}"')


def add_to_model_card(trainer: GRPOTrainer, contents: RunContents) -> Path | None:
    """Write TRL's model card, with local names, and the section into the output folder; on the main process.

    Args:
        trainer (`GRPOTrainer`): The trainer, after training.
        contents (`RunContents`): `run.json`.
    """
    if not trainer.accelerator.is_main_process:
        return None
    path = Path(trainer.args.output_dir) / layout.MODEL_CARD
    trainer.create_model_card(model_name=_model_name(trainer), tags=["learnalign"])
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    base = trainer.model.config.name_or_path
    card = with_local_names(card, base, str(trainer.args.output_dir))
    write_atomically(path, with_section(card, section(contents)).encode())
    return path
