"""Colours, fonts, sizes and legends of figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from trl_learnalign.intervals import Estimate
from trl_learnalign.plan import Phase

COLOURS = {
    "ink": "#1d2433",
    "muted": "#5f6b80",
    "grid": "#e3e7ee",
    "band": "#eef1f6",
    "selected": "#2463eb",
    "rest": "#6f7c93",
    "accent": "#c2570c",
    "series-3": "#0b7d62",
    "series-4": "#8b3fd1",
    "series-5": "#b5174b",
    "series-6": "#8a6d00",
    "series-7": "#0b7fab",
    "series-8": "#7a4a2b",
}
"""Colours of the PNG files; in SVG each becomes the CSS variable of its name, so that dark mode can change it."""

SERIES = ("selected", "accent", *(f"series-{number}" for number in range(3, 9)))
"""Names of the colours of compared lines, in order."""

WIDTH, HEIGHT = 3.7, 2.7  # inches; small enough to be read on a phone
WIDE = 4.8
"""Width of a figure over steps: the largest that can be read on a phone without scrolling."""

_DOT = 30.0
"""Area of a marker in a legend, in square points."""
_NAME = 0.09
"""Fraction of the axis that a phase's name occupies."""


@contextmanager
def style() -> Iterator[None]:
    """Settings of matplotlib for drawing and writing a figure."""
    settings: dict[Any, Any] = {
        "font.size": 9,
        "axes.edgecolor": COLOURS["muted"],
        "axes.labelcolor": COLOURS["ink"],
        "text.color": COLOURS["ink"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLOURS["grid"],
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.fonttype": "none",
        "savefig.transparent": True,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(settings):
        yield


def new_axes(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of this size in inches, with its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def draw_legend(axes: Axes) -> None:
    """A legend with visible markers, however small and faint those of the figure are."""
    legend = axes.legend()
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([_DOT])
            handle.set_alpha(1.0)


def legend_above(axes: Axes) -> None:
    """A legend above the names of the phases, where it does not cover a curve."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.06), ncols=3)


def draw_phases(axes: Axes, phases: Sequence[Phase]) -> None:
    """Mark the phases of a run: a band for every other phase, and names above where they fit."""
    end = max(1, phases[-1].end)
    margin = 0.02 * end
    axes.set_xlabel("optimizer step")
    axes.set_xlim(-margin, end + margin)  # markers at either end are not clipped
    written = float(-end)
    for number, phase in enumerate(phases):
        if number % 2 == 1:
            axes.axvspan(phase.start, phase.end, color=COLOURS["band"], linewidth=0)
        middle = (phase.start + phase.end) / 2
        if middle - written < _NAME * end:
            continue
        written = middle
        axes.text(
            middle,
            1.01,
            title_of(phase.name),
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=COLOURS["muted"],
        )


def bars_of(accuracies: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the error bars below and above the values, in the form that `Axes.errorbar` expects."""
    below = []
    above = []
    for accuracy in accuracies:
        below.append(max(accuracy.value - accuracy.low, 0))
        above.append(max(accuracy.high - accuracy.value, 0))
    return [below, above]


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average with bias correction at its start."""
    total = norm = 0.0
    result = []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def title_of(name: str) -> str:
    """A phase's name as a title."""
    return name.replace("_", " ").replace("warmup", "warm-up")
