"""Held-out accuracy of several runs: a point for each measurement, and lines where all were measured alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_learnalign.report.drawing import COLOURS, HEIGHT, SERIES, WIDE, bars_of, new_axes, style
from trl_learnalign.report.run import Accuracy, Run
from trl_learnalign.report.text import headline
from trl_learnalign.report.variants import Variant
from trl_learnalign.report.verdict import FEW
from trl_learnalign.statistics import Estimate

_MARKERS = "os^DvPX*"
_DASHES = ("-", "--", ":")
_LEGEND_ROW = 0.19  # inches
_NAME = 44  # characters


def comparison_figure(
    variants: Sequence[Variant],
    x: Callable[[Run, Accuracy], float | None],
    xlabel: str,
) -> Figure:
    """Held-out accuracy of several variants over anything that grows with a run.

    Points are joined only if all variants were measured after the same steps. Otherwise a line would lead through
    stretches where one was measured and another was not, and the eye would find a lead there that nobody measured.

    Args:
        variants (sequence of `Variant`): Runs by configuration.
        x (callable): Where a measurement of a run lies; `None` leaves it out.
        xlabel (`str`): What `x` is.
    """
    labels = []
    for number, variant in enumerate(variants):
        labels.append(f"{run_label(number)}: {headline(variant.name, _NAME)}")
    # Two names side by side, if both have room below the axes.
    columns = 2 if max(map(len, labels)) <= _NAME // 2 + 4 else 1
    legend_rows = math.ceil(len(variants) / columns)
    with style():
        figure, axes = new_axes(WIDE, HEIGHT * 1.1 + _LEGEND_ROW * legend_rows)
        has_bars = len(variants) <= FEW  # of more, they could not be told apart
        joined = are_measured_alike(variants)
        for number, variant in enumerate(variants):
            places, accuracies = variant.curve(x)
            if places:
                _draw(axes, number, labels[number], places, accuracies, has_bars, joined)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("held-out accuracy")
        axes.legend(ncols=columns, loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


def are_measured_alike(variants: Sequence[Variant]) -> bool:
    """Whether accuracy was measured after the same steps in all of them.

    Args:
        variants (sequence of `Variant`): Runs by configuration.
    """
    measured = set()
    for variant in variants:
        for run in variant.runs:
            measured.add(tuple(accuracy.step for accuracy in run.accuracies))
    return len(measured) == 1


def _draw(
    axes: Axes,
    number: int,
    label: str,
    places: Sequence[float],
    accuracies: Sequence[Estimate],
    has_bars: bool,
    joined: bool,
) -> None:
    """Points unlike all others: by colour and shape, which go together anew where colours are used up."""
    bars = bars_of(accuracies)
    if not has_bars:
        of_others = [0.0] * (len(places) - 1)
        bars = [[*of_others, reach[-1]] for reach in bars]
    rounds = number // len(SERIES)
    axes.errorbar(
        places,
        [accuracy.value for accuracy in accuracies],
        yerr=bars,
        color=COLOURS[SERIES[number % len(SERIES)]],
        linestyle=_DASHES[rounds % len(_DASHES)] if joined else "none",
        marker=_MARKERS[(number + rounds) % len(_MARKERS)],
        markersize=4.5,
        linewidth=1.4,
        capsize=2.5,
        elinewidth=1,
        label=label,
    )


def run_label(number: int) -> str:
    """What a compared run is called in figures and tables: a letter, as long as there are some."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)
