r"""Three ways to spend the same compute on the same prompts, in minutes on two CPU cores: which one teaches most?

    accelerate launch --num_processes 1 --cpu recipes/quickstart.py                # what `make quickstart` runs
    accelerate launch --num_processes 1 --cpu recipes/quickstart.py --seed 7 --generated_regime longtail

The paper's staged selection comes first, and says how much compute it takes, scoring included. Then the same base
model trains on the shuffled pool, and in adaptive order (docs/continual.md), until each has spent as much. Settings of
recipes/configs/quickstart.yaml; those of the command line hold for all three.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging as transformers_logging
from typing_extensions import override

from trl_learnalign import LearnAlignCallback
from trl_learnalign.cli.arguments import parse
from trl_learnalign.cli.problems import load_problems
from trl_learnalign.cli.recipe import close, make_trainer
from trl_learnalign.evaluation.held_out import held_out_accuracy
from trl_learnalign.records.notes import SCORING_ACCOUNT
from trl_learnalign.records.summary import rollouts_of_run
from trl_learnalign.report import read_run
from trl_learnalign.report.contrast import Variant, conclusion, contrast
from trl_learnalign.toy.model import make_base_model

SETTINGS = Path(__file__).parent / "configs" / "quickstart.yaml"
BASE_MODEL = Path(__file__).resolve().parents[1] / "docs" / "results" / "base_model"
"""Made by `make_base_model`, as it would make it now; it saves two minutes."""

WHOLE_POOL = "--stages 1 --warmup_samples 0 --stage_epochs 100"
LINES = {
    "paper": "",
    "shuffled": WHOLE_POOL,
    "adaptive": f"{WHOLE_POOL} --order adaptive --skip_zero_advantages true --num_generations 2",
}
"""What makes a line, beside what all have. The adaptive order rolls out 2 completions for four times as many prompts:
small groups pay where groups without a gradient are rare and cost their generation alone (docs/continual.md)."""

NAMES = {
    "paper": "the paper's stages",
    "shuffled": "the shuffled pool",
    "adaptive": "adaptive, G = 2",
}


LEGEND = (
    "Difference: to the shuffled pool, with a 95 % interval over held-out tasks. Useful groups: share of the groups "
    "of rollouts with a gradient. To choose prompts: share of the compute."
)
"""Meaning of the headings."""


class Bar(TrainerCallback):
    """One bar for each line, which moves with every step.

    Args:
        progress (`rich.progress.Progress`): The bars.
        task (`TaskID`): The line's own.
        callback (`LearnAlignCallback`): Of its trainer.
    """

    def __init__(self, progress: Progress, task: TaskID, callback: LearnAlignCallback):
        self.progress, self.task, self.callback = progress, task, callback

    @override
    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show(state)

    @override
    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show(state)

    def _show(self, state: TrainerState) -> None:
        callback = self.callback
        done = state.global_step / callback.plan.total_steps
        if callback.config.compute_budget is not None:
            ledger = callback.record.contents.ledger
            spent = ledger.compute(ledger.total + callback.run.steps.cost())
            done = min(1.0, spent / callback.config.compute_budget)
        phase = callback.plan.phase_at(max(0, state.global_step - 1)).name
        self.progress.update(self.task, completed=done, phase=phase, step=state.global_step)


def train(name: str, budget: float | None, arguments: list[str], progress: Progress) -> Path:
    """Train one line and keep its record.

    Args:
        name (`str`): A key of [`LINES`].
        budget (`float`, *optional*): Compute to spend, in tokens of a forward pass; without it, the steps decide.
        arguments (`list[str]`): Of the command line.
        progress (`rich.progress.Progress`): Where its bar is shown.

    Returns:
        `Path`: The output folder.
    """
    given = [*LINES[name].split(), *arguments]
    if budget is not None:
        given += ["--compute_budget", str(budget)]
    recipe, config, args, model = parse(SETTINGS, given)
    folder = Path(str(args.output_dir)) / name
    args.output_dir, args.disable_tqdm = str(folder), True
    model.model_name_or_path = str(make_base_model(BASE_MODEL))
    problems = load_problems(recipe)
    task = progress.add_task(NAMES[name], total=1.0, phase="", step=0)
    trainer = make_trainer(args, model, problems.train, problems.rewards)
    trainer.remove_callback(PrinterCallback)  # a bar shows it instead
    callback = LearnAlignCallback(
        trainer,
        config,
        on_phase_end=lambda phase, step: held_out_accuracy(
            trainer, problems.held_out, problems.rewards[0]
        ),
    )
    trainer.add_callback(callback)
    trainer.add_callback(Bar(progress, task, callback))
    trainer.train()
    progress.update(task, completed=1.0)
    close(trainer)
    return folder


def comparison(variants: list[Variant]) -> Table:
    """What each line has reached, for how much.

    Args:
        variants (`list[Variant]`): The first is the control.
    """
    table = Table(
        title="Held-out accuracy at equal compute, %", caption=LEGEND, caption_justify="left"
    )
    for heading in ("", "accuracy", "difference", "steps", "useful groups", "to choose prompts"):
        table.add_column(heading, justify="right" if heading else "left")
    for variant in variants:
        (run,) = variant.runs
        difference = "" if variant is variants[0] else in_points(variants[0], variant)
        rollouts = rollouts_of_run(run.contents)
        scoring = run.ledger.compute(run.ledger.sum(SCORING_ACCOUNT))
        table.add_row(
            variant.name,
            f"{100 * run.accuracies[-1].value:.1f}",
            difference,
            str(sum(phase.steps for phase in run.phases)),
            f"{rollouts.useful_share:.0%}" if rollouts and rollouts.useful_share else "",
            f"{scoring / run.ledger.compute(run.ledger.total):.0%}",
        )
    return table


def in_points(control: Variant, variant: Variant) -> str:
    """The difference to the control, with its interval over held-out tasks."""
    found = contrast(control, variant)
    if found is None:
        return ""
    value, low, high = (
        100 * x for x in (found.difference.value, found.difference.low, found.difference.high)
    )
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def main() -> None:
    started = time.perf_counter()
    logging.getLogger("trl_learnalign").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    columns = ("{task.description:18}", "{task.fields[phase]:8}", "step {task.fields[step]:4}")
    described, phase, step = map(TextColumn, columns)
    with Progress(described, BarColumn(), phase, step, TimeElapsedColumn(), console=console) as bar:
        folders = {"paper": train("paper", None, sys.argv[1:], bar)}
        ledger = read_run(folders["paper"]).ledger
        budget = ledger.compute(ledger.total)
        for name in ("shuffled", "adaptive"):
            folders[name] = train(name, budget, sys.argv[1:], bar)
    names = "shuffled", "paper", "adaptive"
    variants = [Variant(NAMES[name], [read_run(folders[name])]) for name in names]
    console.print(comparison(variants))
    console.print(conclusion(variants, []))
    minutes = (time.perf_counter() - started) / 60
    where = f"{folders['paper'].parent}/{{{','.join(names)}}}"
    console.print(f"{minutes:.1f} minutes. What each has done:")
    console.print(f"trl-learnalign compare {where}", soft_wrap=True, highlight=False)
    console.print("Next: docs/quickstart.md adds it to your trainer.")


if __name__ == "__main__":
    main()
