"""`trl-learnalign plan`: the cost of a run, computed before a model is loaded."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import GRPOConfig, ModelConfig

from trl_learnalign.adaptive.order import GroupSizes, group_sizes
from trl_learnalign.cli.arguments import RecipeArguments, given_settings, parse, planned_config
from trl_learnalign.cli.console import exit_with_error, one_line_errors
from trl_learnalign.cli.problems import load_problems, missing_dataset
from trl_learnalign.config import LearnAlignConfig, setting
from trl_learnalign.measuring.generation import planned_scoring_batch_prompts
from trl_learnalign.plan import Plan, make_plan
from trl_learnalign.preflight import checks
from trl_learnalign.preflight.forecast import (
    Forecast,
    PhaseForecast,
    geometry,
    make_forecast,
    with_trainer_length,
)
from trl_learnalign.records.history import first_groups
from trl_learnalign.records.notes import PRICES
from trl_learnalign.selectors import find_selector
from trl_learnalign.training.sampler import find_sampler

if TYPE_CHECKING:
    from trl_learnalign.cli.recipe import Calibration

USAGE = """usage: trl-learnalign plan --config FILE [--pool_size N] [--processes N] [--outcomes FILE] [--calibrate]
                           [--json] [settings]

Prints phases, optimizer steps, rollouts, scoring's share and disk of a run. Loads no model and needs no GPU.

  --pool_size N   plan for a pool of N prompts; the dataset is not loaded
  --eval_size N   plan for N held-out problems, with --pool_size
  --processes N   plan for N processes (GPUs)
  --outcomes FILE reward_history.parquet, or the table of a scored stage, of a run on such prompts: predict how
                  num_generations changes the share of groups with both correct and wrong rollouts
  --calibrate     load the model, run a few steps of training and scoring here, and predict how long the run takes
  --json          print JSON instead of a table

Every setting of the YAML file can be overridden, as for the recipes: --stages 1000 --num_generations 4 ..."""


@dataclass
class PlanArguments(RecipeArguments):
    """Arguments of `trl-learnalign plan`."""

    pool_size: int | None = setting(None, "Plan for this many prompts; loads no dataset.")
    eval_size: int = setting(0, "With pool_size: held-out problems.")
    processes: int | None = setting(None, "Plan for this many processes.")
    outcomes: str | None = setting(
        None,
        "Rollouts of an earlier run, to predict how num_generations changes the share of mixed groups.",
    )
    json: bool = setting(False, "Print JSON instead of a table.")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments (sequence of `str`): The command line, without the program's name.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    with one_line_errors():
        trainer = _trainer_settings(arguments)
    recipe, config, args, model = parse(None, arguments, PlanArguments, trainer)
    with one_line_errors():
        config = checks.drop_unneeded_warmup(config)
    show(
        recipe,
        config,
        args,
        model,
        pool_size=recipe.pool_size,
        eval_size=recipe.eval_size,
        as_json=recipe.json,
        outcomes=recipe.outcomes,
    )


def _check_samplers(config: LearnAlignConfig) -> None:
    """Exit with one sentence if a user-defined sampler cannot be found."""
    with one_line_errors():
        for path in config.own_orders:
            find_sampler(path)


def _trainer_settings(arguments: Sequence[str]) -> type[GRPOConfig]:
    """The class of the trainer's settings: calibration needs the real one, for this machine."""
    classes = (PlanArguments, LearnAlignConfig, GRPOConfig, ModelConfig)
    given = given_settings(classes, arguments).values
    processes = given["processes"]
    if processes is not None and processes < 1:
        raise ValueError(f"processes={processes}: give a whole number of at least 1.")
    if not given["calibrate"]:
        return planned_config(processes)
    if processes is not None:
        raise ValueError(
            "--processes plans for another machine, but --calibrate measures this one: launch the command with "
            "that many processes instead (accelerate launch --module trl_learnalign plan ...)."
        )
    return GRPOConfig


def show(
    recipe: RecipeArguments,
    config: LearnAlignConfig,
    args: GRPOConfig,
    model: ModelConfig,
    pool_size: int | None = None,
    eval_size: int = 0,
    as_json: bool = False,
    outcomes: str | None = None,
) -> None:
    """Print the plan of a run on the main process; with `recipe.calibrate` also measure it.

    Args:
        recipe (`RecipeArguments`): Source of the prompts.
        config (`LearnAlignConfig`): Settings of the selection.
        args (`GRPOConfig`): Settings of the trainer.
        model (`ModelConfig`): The policy.
        pool_size (`int`, *optional*): Plan for this number of prompts, without their dataset.
        eval_size (`int`, *optional*, defaults to `0`): With `pool_size`: number of held-out problems.
        as_json (`bool`, *optional*, defaults to `False`): Print JSON instead of a table.
        outcomes (`str`, *optional*): File with the rollouts of an earlier run.
    """
    _check_samplers(config)
    with one_line_errors():
        sizes = None if outcomes is None else _group_sizes(Path(outcomes))
    with one_line_errors():
        if pool_size is None:
            plan, held_out = _plan_of_dataset(recipe, config, args)
        elif recipe.calibrate:
            raise ValueError(
                "--calibrate rolls out real prompts: remove --pool_size, or plan without --calibrate."
            )
        else:
            config = with_trainer_length(config, args, pool_size)
            plan, held_out = make_plan(config, pool_size, geometry(args)), eval_size
            checks.check_args(args, plan, config)
    forecast = _forecast(plan, config, args, held_out)
    calibration = _calibrated(recipe, config, args, model) if recipe.calibrate else None
    if args.process_index:
        return
    if as_json:
        _print_json(forecast, calibration, sizes)
        return
    pool = str(recipe.dataset_name) if pool_size is None else "a pool of your choice"
    policy = model.model_name_or_path or "A model"
    title = f"{policy} on {pool}: {plan.dataset_size} prompts, {args.world_size} process(es)"
    _print_table(title, forecast, config, args, calibration, sizes)


def _print_table(
    title: str,
    forecast: Forecast,
    config: LearnAlignConfig,
    args: GRPOConfig,
    calibration: Calibration | None,
    sizes: GroupSizes | None,
) -> None:
    lines = summary_lines(forecast, config)
    if forecast.scoring_rollouts:
        lines.append(_calls_line(config, args))
    if calibration:
        lines += calibration.lines(forecast)
    if sizes is not None:
        lines += sizes.lines
    console = Console()
    console.print(plan_table(forecast, title))
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _plan_of_dataset(
    recipe: RecipeArguments, config: LearnAlignConfig, args: GRPOConfig
) -> tuple[Plan, int]:
    """Phases of the run, and the number of its held-out problems."""
    problem = missing_dataset(recipe)
    if problem:
        exit_with_error(
            problem,
            hint=" To plan without the dataset, give its number of prompts: trl-learnalign plan --pool_size N ...",
        )
    problems = load_problems(recipe)
    return checks.plan_run(config, args, problems.train, problems.rewards), len(problems.held_out)


def _calibrated(
    recipe: RecipeArguments, config: LearnAlignConfig, args: GRPOConfig, model: ModelConfig
) -> Calibration:
    with contextlib.redirect_stdout(
        sys.stderr
    ):  # libraries print messages on import, which would break the JSON output
        from trl_learnalign.cli.recipe import calibrate

        return calibrate(recipe, config, args, model)


def _group_sizes(path: Path) -> GroupSizes | None:
    """The share of mixed groups by number of rollouts, estimated from an earlier run."""
    outcomes = first_groups(path)
    return group_sizes(outcomes, own=int(np.median(outcomes.judged)))


def _print_json(
    forecast: Forecast, calibration: Calibration | None, sizes: GroupSizes | None
) -> None:
    values = forecast.as_dict()
    if sizes is not None:
        values["group_sizes"] = asdict(sizes)
    if calibration is not None:
        values |= {"calibration": calibration.as_dict(), "minutes": calibration.minutes(forecast)}
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def _forecast(plan: Plan, config: LearnAlignConfig, args: GRPOConfig, held_out: int) -> Forecast:
    return make_forecast(
        plan,
        config,
        [find_selector(name) for name in config.selectors],
        max_completion_length=args.max_completion_length,
        iterations=args.num_iterations,
        beta=args.beta,
        held_out=held_out,
        completions_per_step=args.per_device_train_batch_size
        * args.world_size
        * args.gradient_accumulation_steps,
        processes=args.world_size,
    )


SCORING_COLUMNS = ("prompts\nscored", "rollouts\nto score", "disk for\nfeatures")
"""Columns of the table that are omitted if nothing is scored."""

SAMPLING_COLUMN = "rolled out\nat most"
"""Column that is omitted without dynamic sampling."""


def plan_table(forecast: Forecast, title: str) -> Table:
    """One row per phase, and the totals."""
    table = Table(title=Text(title), show_footer=True, box=box.SIMPLE_HEAD)
    table.add_column("phase", footer="total", no_wrap=True)
    measured = sum(phase.measured for phase in forecast.phases)
    totals = {
        "prompts\n× passes": "",
        "\nsteps": f"{forecast.steps:,}",
        "rollouts\nto train": f"{forecast.training_rollouts:,}",
        SAMPLING_COLUMN: f"{forecast.most_rolled_out:,}",
        "prompts\nscored": f"{measured:,}",
        "rollouts\nto score": f"{forecast.scoring_rollouts:,}",
        "disk for\nfeatures": size_text(forecast.feature_bytes),
    }
    if forecast.most_rolled_out == forecast.training_rollouts:
        del totals[SAMPLING_COLUMN]
    if not measured:
        totals = {head: total for head, total in totals.items() if head not in SCORING_COLUMNS}
    for heading, total in totals.items():
        table.add_column(heading, footer=total, justify="right", no_wrap=True)
    for phase in forecast.phases:
        cells = _cells(phase)
        table.add_row(phase.name, *(cells[heading] for heading in totals))
    return table


def _cells(phase: PhaseForecast) -> dict[str, str]:
    """The row of a phase by heading; empty where it scores or stores nothing."""
    scored = f"{phase.measured:,}"
    if phase.measured < phase.candidates:
        scored += f" of {phase.candidates:,}"
    return {
        "prompts\n× passes": f"{phase.prompts:,} × {phase.passes}",
        "\nsteps": f"{phase.steps:,}",
        "rollouts\nto train": f"{phase.training_rollouts:,}",
        SAMPLING_COLUMN: f"{phase.most_rolled_out:,}",
        "prompts\nscored": scored if phase.candidates else "",
        "rollouts\nto score": f"{phase.scoring_rollouts:,}" if phase.candidates else "",
        "disk for\nfeatures": size_text(phase.feature_bytes) if phase.measured else "",
    }


def summary_lines(forecast: Forecast, config: LearnAlignConfig) -> list[str]:
    """The totals in words."""
    lines = [_totals_line(forecast)]
    if forecast.training_rollouts and not config.uses_trainer_order:
        lines.append(_plain_line(forecast))
    if forecast.scoring_rollouts:
        lines.append(_scoring_line(forecast))
    if forecast.feature_bytes:
        size = size_text(forecast.feature_bytes)
        lines.append(f"Disk for features: at most {size}, if every prompt is learnable.")
    last = forecast.phases[-1]
    if config.on_shortfall == "shrink":
        lines.append(
            "on_shortfall='shrink': a stage may take fewer prompts than requested, and the next one scores the "
            "remaining ones; these numbers are upper bounds."
        )
    elif last.scoring_rollouts and last.candidates <= last.prompts:
        lines.append(
            f"{last.name} takes all remaining candidates: --skip_forced_scoring would save its "
            f"{last.scoring_rollouts:,} rollouts."
        )
    return lines + _continual_lines(forecast, config)


def _scoring_line(forecast: Forecast) -> str:
    """Scoring's share, and its value at other prices of a generated token."""
    share = forecast.scoring_rollouts / (forecast.least_rolled_out + forecast.scoring_rollouts)
    low, high = forecast.scoring_share_bounds
    own = forecast.generation_price
    others = []
    for price in PRICES:
        if price != own:
            bounds = replace(forecast, generation_price=price).scoring_share_bounds
            others.append(f"{price:g}: {bounds[0]:.0%} to {bounds[1]:.0%}")
    return (
        f"Scoring: {share:.0%} of these rollouts, and {low:.0%} of the compute if no prompt is learnable, {high:.0%} "
        f"if every one is (sampling counts {own:g} and an update or a capture 3; with generation_price "
        f"{', '.join(others)})."
    )


def _calls_line(config: LearnAlignConfig, args: GRPOConfig) -> str:
    """The number of rollouts that scoring generates at once."""
    prompts = planned_scoring_batch_prompts(args, config, args.world_size)
    rollouts = prompts * args.num_generations
    line = f"Scoring generates up to {rollouts:,} rollouts in a call ({prompts:,} prompts), in each process"
    if config.scoring_batch_prompts is None and not args.use_vllm:
        line = (
            f"Scoring generates at least {rollouts:,} rollouts in a call, and more if memory allows"
        )
    return f"{line} (scoring_batch_prompts)."


def _continual_lines(forecast: Forecast, config: LearnAlignConfig) -> list[str]:
    """The effects of a training order, skipping and dynamic sampling."""
    lines = []
    if config.uses_trainer_order:
        lines.append(
            "order='trainer': the trainer decides the order and the number of steps; the order is not recorded."
        )
    if config.is_adaptive:
        read = f"{forecast.prompts_read:,} prompts are read once by the initial policy, one forward pass each"
        nothing = "no prompt is read in advance (adaptive_embeddings)"
        lines.append(
            f"Adaptive order: no additional rollouts; {read if forecast.prompts_read else nothing}."
        )
    for path in config.own_orders:
        lines.append(f"Order of {path}: no additional rollouts; it draws when training begins.")
    if forecast.most_rolled_out > forecast.training_rollouts:
        times = [
            made / forecast.training_rollouts
            for made in (forecast.least_rolled_out, forecast.most_rolled_out)
        ]
        lines.append(
            f"Dynamic sampling: {times[0]:.2f} to {times[1]:.2f} times as many rollouts as are trained on; the "
            "factor depends on how often a prompt's rollouts are both correct and wrong."
        )
    if config.skip_zero_advantages and forecast.reference:
        lines.append(
            "beta is above 0: every rollout has a gradient, and skip_zero_advantages skips nothing."
        )
    elif config.skip_zero_advantages:
        lines.append(
            "Rollouts without an advantage are not trained on, so these numbers are upper bounds of training; the "
            "run logs the saving (learnalign/tokens_skipped)."
        )
    return lines


def _totals_line(forecast: Forecast) -> str:
    steps = f"Optimizer steps: {forecast.steps:,}"
    if forecast.completions_per_step:
        steps += f" of {forecast.completions_per_step:,} completions each"
    made = f"{forecast.least_rolled_out:,}"
    if forecast.most_rolled_out > forecast.least_rolled_out:
        made += f" to {forecast.most_rolled_out:,}"
    rollouts = f"rollouts: {made} to train, {forecast.scoring_rollouts:,} to score"
    if forecast.evaluation_rollouts:
        rollouts += f", {forecast.evaluation_rollouts:,} to evaluate"
    tokens = f"{forecast.max_completion_tokens:,} completion tokens ({forecast.max_completion_length:,} each)"
    return f"{steps}; {rollouts}; at most {tokens}."


def _plain_line(forecast: Forecast) -> str:
    """Cost relative to training without selection."""
    least, most = forecast.times_plain_rollouts
    plain = "plain GRPO with the same number of optimizer steps"
    if most == 1:
        return f"The number of rollouts is that of {plain}."
    if most > least:
        return f"Compared with {plain}: {least:.2f} to {most:.2f} times the rollouts."
    low, high = (1 / (1 - share) for share in forecast.scoring_share_bounds)
    return f"Compared with {plain}: {least:.2f} times the rollouts, {low:.2f} to {high:.2f} times the compute."


def size_text(size: int | None) -> str:
    """Human-readable number of bytes; `?` if unknown."""
    if size is None:
        return "?"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = max(0, size.bit_length() - 1) // 10
    power = min(power, len(units) - 1)
    value = size / 1024**power
    digits = 0 if value >= 10 or power == 0 else 1
    return f"{value:.{digits}f} {units[power]}"
