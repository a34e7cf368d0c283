"""What the figures of a report have in common: colours, type, sizes, and the phases behind a curve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_learnalign.curriculum import Phase

COLOURS = {
    "ink": "#1d2433",
    "muted": "#5f6b80",
    "grid": "#e3e7ee",
    "band": "#eef1f6",
    "selected": "#2463eb",
    "rest": "#9aa5b6",
    "accent": "#c2570c",
}
"""Of the PNG files; in SVG each becomes the CSS variable of its name, so that dark mode changes it."""

SERIES = ("#2463eb", "#c2570c", "#0f8a6d", "#8b3fd1", "#b5174b", "#5f6b80")

WIDTH, HEIGHT = 3.7, 2.7  # inches; small enough to be read on a phone


@contextmanager
def style() -> Iterator[None]:
    """Settings of matplotlib while a figure is made or written."""
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


def draw_phases(axes: Axes, phases: Sequence[Phase]) -> None:
    """A band for every other phase, and their names above."""
    for number, phase in enumerate(phases):
        if number % 2 == 0:
            axes.axvspan(phase.start, phase.end, color=COLOURS["band"], linewidth=0)
        axes.text(
            (phase.start + phase.end) / 2,
            1.01,
            title_of(phase.name),
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=COLOURS["muted"],
        )


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential mean without the pull towards 0 of its start."""
    total = norm = 0.0
    result = []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def title_of(name: str) -> str:
    """A phase's name as words."""
    return name.replace("_", " ").replace("warmup", "warm-up")
