"""`trl-learnalign plan`: what a run will take, before a model is loaded."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import GRPOConfig, ModelConfig

from trl_learnalign.cli import jobs
from trl_learnalign.cli.command_line import given_settings
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.curriculum import Plan, make_plan
from trl_learnalign.planning import checks
from trl_learnalign.planning.forecast import Forecast, make_forecast
from trl_learnalign.selectors import find_selector

if TYPE_CHECKING:
    from trl_learnalign.cli.calibration import Calibration

USAGE = """usage: trl-learnalign plan --config FILE [--pool_size N] [--processes N] [--calibrate] [--json] [settings]

Prints phases, optimizer steps, rollouts, scoring's share and disk of a run. Loads no model and needs no GPU.

  --pool_size N   plan for a pool of N prompts; the dataset is not loaded
  --eval_size N   plan for N held-out problems, with --pool_size
  --processes N   plan for N processes (GPUs)
  --calibrate     load the model, run a few steps of training and scoring here, and say how long the run would take
  --json          print JSON instead of a table

Every setting of the YAML file can be overridden, as for the recipes: --stages 1000 --num_generations 4 ..."""


@dataclass
class PlanArguments(jobs.RecipeArguments):
    """Arguments of `trl-learnalign plan`."""

    pool_size: int | None = field(default=None, metadata={"help": "Plan for this many prompts; loads no dataset."})
    eval_size: int = field(default=0, metadata={"help": "With pool_size: held-out problems."})
    processes: int | None = field(default=None, metadata={"help": "Plan for this many processes."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    with jobs.one_line_errors():
        given = given_settings((PlanArguments, LearnAlignConfig, GRPOConfig, ModelConfig), arguments).values
        calibrate, processes = given["calibrate"], given["processes"]
        if processes is not None and processes < 1:
            raise ValueError(f"processes={processes}: give a whole number of at least 1.")
        if calibrate and processes is not None:
            raise ValueError(
                "--processes plans for another machine, and --calibrate measures this one: launch the command with as "
                "many processes instead (accelerate launch --module trl_learnalign plan ...)."
            )
    trainer = GRPOConfig if calibrate else jobs.planned_config(processes)
    recipe, config, args, model = jobs.parse(None, arguments, PlanArguments, trainer)
    show(recipe, config, args, model)


def show(recipe: jobs.RecipeArguments, config: LearnAlignConfig, args: GRPOConfig, model: ModelConfig) -> None:
    """Print the plan of a run on the main process; with `recipe.calibrate` measure it too.

    Args:
        recipe (`RecipeArguments`): Where the prompts come from.
        config (`LearnAlignConfig`): Settings of the selection.
        args (`GRPOConfig`): Settings of the trainer.
        model (`ModelConfig`): The policy.
    """
    with jobs.one_line_errors():
        plan, held_out = _plan(recipe, config, args)
    forecast = make_forecast(
        plan,
        config,
        [find_selector(name) for name in config.selectors],
        max_completion_length=args.max_completion_length,
        iterations=args.num_iterations,
        beta=args.beta,
        held_out=held_out,
        completions_per_step=args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
    )
    measured = None
    if recipe.calibrate:
        with contextlib.redirect_stdout(sys.stderr):  # libraries greet when imported, and JSON is for programs
            from trl_learnalign.cli.calibration import calibrate

            measured = calibrate(recipe, config, args, model)
    if args.process_index:
        return
    if getattr(recipe, "json", False):
        found = forecast.as_dict() | _measured_values(measured, forecast)
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    console = Console()
    title = (
        f"{model.model_name_or_path} on {_pool_name(recipe)}: {plan.dataset_size} prompts, "
        f"{args.world_size} process(es)"
    )
    console.print(plan_table(forecast, title))
    for line in summary_lines(forecast, config):
        console.print(Text(line), soft_wrap=True)
    if measured:
        for line in measured.lines(forecast):
            console.print(Text(line), soft_wrap=True)


def _measured_values(measured: Calibration | None, forecast: Forecast) -> dict[str, Any]:
    return {} if measured is None else {"calibration": measured.as_dict(), "minutes": measured.minutes(forecast)}


def _pool_name(recipe: jobs.RecipeArguments) -> str:
    return "a pool of your choice" if getattr(recipe, "pool_size", None) else str(recipe.dataset_name)


def _plan(recipe: jobs.RecipeArguments, config: LearnAlignConfig, args: GRPOConfig) -> tuple[Plan, int]:
    pool_size = getattr(recipe, "pool_size", None)
    if pool_size is not None:
        if recipe.calibrate:
            raise ValueError("--calibrate rolls out real prompts: leave pool_size out, or plan without --calibrate.")
        plan = make_plan(config, pool_size, checks.geometry(args))
        checks.check_args(args, plan)
        return plan, getattr(recipe, "eval_size", 0)
    problem = jobs.missing_dataset(recipe)
    if problem:
        jobs.leave(
            problem, hint=" Plan without it, for as many prompts as it has: trl-learnalign plan --pool_size N ..."
        )
    problems = jobs.load_problems(recipe)
    return checks.plan_run(config, args, problems.train, problems.rewards), len(problems.held_out)


def plan_table(forecast: Forecast, title: str) -> Table:
    """One row per phase, and the totals."""
    table = Table(title=Text(title), show_footer=True, box=box.SIMPLE_HEAD)
    table.add_column("phase", footer="total", no_wrap=True)
    for name, total in (
        ("prompts\n× passes", ""),
        ("\nsteps", f"{forecast.steps:,}"),
        ("rollouts\nto train", f"{forecast.training_rollouts:,}"),
        ("prompts\nscored", f"{sum(phase.measured for phase in forecast.phases):,}"),
        ("rollouts\nto score", f"{forecast.scoring_rollouts:,}"),
        ("disk for\nfeatures", size_text(forecast.feature_bytes)),
    ):
        table.add_column(name, footer=total, justify="right", no_wrap=True)
    for phase in forecast.phases:
        pool = f"{phase.prompts:,} × {phase.passes}"
        scored = f"{phase.measured:,}" + (f" of {phase.candidates:,}" if phase.measured < phase.candidates else "")
        table.add_row(
            *(phase.name, pool, f"{phase.steps:,}", f"{phase.training_rollouts:,}"),
            *((scored, f"{phase.scoring_rollouts:,}") if phase.candidates else ("", "")),
            size_text(phase.feature_bytes) if phase.measured else "",
        )
    return table


def summary_lines(forecast: Forecast, config: LearnAlignConfig) -> list[str]:
    """The totals in words."""
    total = forecast.training_rollouts + forecast.scoring_rollouts
    per_step = f" of {forecast.completions_per_step:,} completions each" if forecast.completions_per_step else ""
    low, high = forecast.scoring_share(0.0), forecast.scoring_share(1.0)
    lines = [
        f"Optimizer steps: {forecast.steps:,}{per_step}; rollouts: {forecast.training_rollouts:,} to train, "
        f"{forecast.scoring_rollouts:,} to score"
        + (f", {forecast.evaluation_rollouts:,} to evaluate" if forecast.evaluation_rollouts else "")
        + f"; at most {forecast.max_completion_tokens:,} completion tokens "
        f"({forecast.max_completion_length:,} each).",
    ]
    if forecast.scoring_rollouts:
        lines.append(
            f"Scoring: {forecast.scoring_rollouts / total:.0%} of these rollouts, and {low:.0%} of the compute if no "
            f"prompt is learnable, {high:.0%} if every one is (1 forward pass to sample, 3 to update or capture)."
        )
    if forecast.feature_bytes:
        lines.append(f"Disk for features: at most {size_text(forecast.feature_bytes)}, if every prompt is learnable.")
    last = forecast.phases[-1]
    if last.scoring_rollouts and last.candidates <= last.prompts and not config.skip_forced_scoring:
        lines.append(
            f"{last.name} takes every candidate that is left: --skip_forced_scoring would save its "
            f"{last.scoring_rollouts:,} rollouts."
        )
    return lines


def size_text(size: int | None) -> str:
    """Bytes as a person reads them; `?` if unknown."""
    if size is None:
        return "?"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, size.bit_length() - 1) // 10)
    value = size / 1024**power
    return f"{value:.0f} {units[power]}" if value >= 10 or power == 0 else f"{value:.1f} {units[power]}"
