"""Figures of continual selection: what was believed and what came out, step by step."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trl_learnalign.adaptive.calibration import reliability_bins
from trl_learnalign.curriculum import Phase
from trl_learnalign.records.outcomes import Outcomes
from trl_learnalign.report.drawing import (
    COLOURS,
    HEIGHT,
    WIDE,
    draw_phases,
    legend_above,
    new_axes,
    smoothed,
)
from trl_learnalign.report.run import Run

MANY = 8
"""Prompts that were rolled out so often or more share a bar."""


def order_figures(run: Run) -> dict[str, Figure]:
    """Those that a run's records have data for, by name; none for runs without continual selection."""
    outcomes = run.outcomes
    if outcomes is None or not len(outcomes) or not run.contents.is_continual:
        return {}
    figures = {"order": order_figure(outcomes, run.phases)}
    if len(outcomes.predictions):
        figures["reliability"] = reliability_figure(outcomes.predictions)
    if "adaptive" in run.contents.orders:
        figures["repeats"] = repeats_figure(outcomes, run.contents.plan.dataset_size)
    return figures


def order_figure(outcomes: Outcomes, phases: list[Phase]) -> Figure:
    """Useful groups, and success rates that were predicted and seen, over steps."""
    figure, axes = new_axes(WIDE, HEIGHT * 1.1)
    draw_phases(axes, phases)
    is_first = True
    for phase in phases:
        of_phase = outcomes.of_phase(phase.name)
        if len(of_phase):
            _draw_phase(axes, of_phase, is_first)
            is_first = False
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_above(axes)
    return figure


def _draw_phase(axes: Axes, outcomes: Outcomes, is_first: bool) -> None:
    curves = (
        ("useful groups", outcomes.useful.astype(np.float64), "accent", "-"),
        ("right rollouts", outcomes.success_rates, "selected", "-"),
        ("predicted to be right", outcomes.predicted, "ink", ":"),
    )
    for label, values, colour, line in curves:
        steps, means = means_by_step(outcomes.steps, values)
        if len(steps):
            # Over about a twentieth of the phase.
            weight = 1 - 1 / max(4, len(steps) / 20)
            axes.plot(
                steps + 1,
                smoothed(means.tolist(), weight),
                color=COLOURS[colour],
                linestyle=line,
                linewidth=1.6,
                label=label if is_first else f"_{label}",
            )


def means_by_step(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps that have a value, `(S,)`, and the mean of each one's values; NaN is no value."""
    has_value = ~np.isnan(values)
    numbers, places = np.unique(steps[has_value], return_inverse=True)
    sums, counts = np.bincount(places, values[has_value]), np.bincount(places)
    return numbers, sums / counts


def reliability_figure(outcomes: Outcomes) -> Figure:
    """What was seen over what was predicted, in ten bins; the area of a point is the number of its rollouts."""
    figure, axes = new_axes()
    bins = reliability_bins(outcomes.predicted, outcomes.right, outcomes.wrong)
    bins = [bin_ for bin_ in bins if bin_.rollouts]
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.8, linestyle=":")
    predictions, shares = [bin_.predicted for bin_ in bins], [bin_.seen for bin_ in bins]
    axes.plot(predictions, shares, color=COLOURS["selected"], linewidth=1.2)
    most = max((bin_.rollouts for bin_ in bins), default=1)
    areas = [20 + 160 * bin_.rollouts / most for bin_ in bins]
    axes.scatter(predictions, shares, s=areas, color=COLOURS["selected"], alpha=0.85, linewidths=0)
    axes.set_xlabel("predicted success rate")
    axes.set_ylabel("seen")
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.04, 1.04)
    return figure


def repeats_figure(outcomes: Outcomes, dataset_size: int) -> Figure:
    """How many prompts were rolled out how often."""
    figure, axes = new_axes()
    heights = repeats(outcomes, dataset_size)
    axes.bar(range(len(heights)), heights, 0.8, color=COLOURS["selected"])
    labels = [str(times) for times in range(len(heights))]
    if len(labels) > MANY:
        labels[-1] += "+"
    axes.set_xticks(range(len(heights)), labels)
    axes.set_xlabel("times rolled out")
    axes.set_ylabel("prompts")
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def repeats(outcomes: Outcomes, dataset_size: int) -> list[int]:
    """Prompts that were rolled out never, once, twice, …; from [`MANY`] on together."""
    times = np.bincount(outcomes.rows, minlength=dataset_size)
    return np.bincount(np.minimum(times, MANY)).tolist()
