"""One run, from its checks to the final table; shared by recipes and commands."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

from trl_learnalign import LearnAlignCallback
from trl_learnalign.cli.arguments import RecipeArguments
from trl_learnalign.cli.console import exit_with_error, one_line_errors, shorten_logs
from trl_learnalign.cli.problems import (
    TOY_MODEL,
    check_weights,
    find_rewards,
    missing_dataset,
    model_path,
)
from trl_learnalign.evaluation.grading import Reward
from trl_learnalign.preflight.environment import missing_from_hub, missing_gpu
from trl_learnalign.records import layout
from trl_learnalign.records.export import PhaseSummary, accuracies, phase_summaries
from trl_learnalign.records.notes import BASE
from trl_learnalign.records.store import StoreError
from trl_learnalign.training.checkpoints import (
    interrupted_run,
    is_reported,
    last_complete_checkpoint,
)
from trl_learnalign.training.model_card import add_to_model_card

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
    add_to_model_card(trainer, callback)
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
