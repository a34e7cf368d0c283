"""Held-out accuracy of several runs, one line for each."""

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
    """Held-out accuracy of several variants over anything that grows with a run, one line for each.

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
        for number, variant in enumerate(variants):
            places, accuracies = variant.curve(x)
            if places:
                _draw_line(axes, number, labels[number], places, accuracies, has_bars)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("held-out accuracy")
        axes.legend(ncols=columns, loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


def _draw_line(
    axes: Axes,
    number: int,
    label: str,
    places: Sequence[float],
    accuracies: Sequence[Estimate],
    has_bars: bool,
) -> None:
    """A line unlike all others: by its colour and its points, and where colours are used up, by its dashes."""
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
        linestyle=_DASHES[rounds % len(_DASHES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4.5,
        linewidth=1.4,
        capsize=2.5,
        elinewidth=1,
        label=label,
    )


def run_label(number: int) -> str:
    """What a compared run is called in figures and tables: a letter, as long as there are some."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)
