"""Figures of a stage, and of what moved between two."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trl_learnalign.report.drawing import COLOURS, draw_legend, new_axes, title_of
from trl_learnalign.report.run import Stage

_MANY_POINTS = 1500  # more are drawn as an image: a page of thousands of shapes is slow

POINT_ALPHA = 0.85
"""How much of a point's colour is left where points lie upon each other."""
_FILL = 0.35
"""Of the areas of two histograms that are drawn over each other; their outlines are whole."""

# ---- One stage ------------------------------------------------------------------------------------------------------


def success_rate_figure(stage: Stage) -> Figure:
    """Histogram of success rates, the selected part marked."""
    figure, axes = new_axes()
    rate = stage.column("success_rate")
    has_rate = np.isfinite(rate)
    edges = _rate_edges(rate[has_rate])
    top, _ = np.histogram(rate[stage.selected & has_rate], edges)
    rest, _ = np.histogram(rate[~stage.selected & has_rate], edges)
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges) * 0.88
    label = f"selected ({top.sum():,})"
    axes.bar(middles, top, widths, color=COLOURS["selected"], label=label)
    if not stage.selected.all():
        label = f"rest ({rest.sum():,})"
        axes.bar(middles, rest, widths, bottom=top, color=COLOURS["rest"], label=label)
    axes.set_xlabel("success rate p")
    axes.set_ylabel("prompts")
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    draw_legend(axes)
    return figure


def _rate_edges(rate: np.ndarray) -> np.ndarray:
    """One bin for each rate where they are few (G rollouts give G + 1 of them), else twenty."""
    values = np.unique(rate)
    step = np.diff(values).min() if 1 < len(values) <= 33 else 0.05
    count = max(1, round(1 / step))
    if len(values) > 33 or count > 32:
        return np.linspace(0, 1, 21)
    return (np.arange(count + 2) - 0.5) / count


def score_figure(stage: Stage) -> Figure:
    """Score against success rate; points are shifted a little sideways, since rates are few."""
    figure, axes = new_axes()
    rate, score, selected = stage.column("success_rate"), stage.column("score"), stage.selected
    shift = np.random.default_rng(0).uniform(-0.012, 0.012, len(rate))
    many = len(rate) > _MANY_POINTS
    for mask, name in ((~selected, "rest"), (selected, "selected")):
        if not mask.any():
            continue
        axes.scatter(
            (rate + shift)[mask],
            score[mask],
            s=14,
            color=COLOURS[name],
            alpha=POINT_ALPHA,
            linewidths=0,
            label=name,
            rasterized=many,
        )
    axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
    axes.set_xlabel("success rate p")
    axes.set_xlim(-0.06, 1.06)
    axes.set_ylabel("score")
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    draw_legend(axes)
    return figure


def length_figure(stage: Stage) -> Figure:
    """Mean completion length of selected and left-out prompts, each as shares of its own; medians dashed."""
    figure, axes = new_axes()
    length, selected = stage.column("mean_completion_length"), stage.selected
    has_length = np.isfinite(length)
    low, high = 0.0, 1.0
    if has_length.any():
        low, high = float(length[has_length].min()), float(length[has_length].max())
    edges = np.linspace(low, high if high > low else low + 1, 21)
    for mask, name in ((~selected & has_length, "rest"), (selected & has_length, "selected")):
        if not mask.any():
            continue
        colour, values = COLOURS[name], length[mask]
        axes.hist(
            values,
            list(edges),
            weights=np.full(len(values), 1 / len(values)),
            facecolor=to_rgba(colour, _FILL),
            edgecolor=colour,
            histtype="stepfilled",
            label=name,
        )
        axes.axvline(float(np.median(values)), color=colour, linestyle="--", linewidth=1.5)
    axes.set_xlabel("mean completion length (tokens)")
    axes.set_ylabel("share of prompts")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    draw_legend(axes)
    return figure


# ---- Between stages -------------------------------------------------------------------------------------------------


def movement_figure(before: Stage, after: Stage) -> Figure:
    """Success rates of the prompts that two stages scored, then and now; the area of a bubble is their number."""
    figure, axes = new_axes()
    places, selected = _movements(before, after)
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.8, linestyle=":")
    largest = max(places.values(), default=1)
    label = f"selected by {title_of(after.name)}"
    # The selected lie upon all of their place, so that what is seen around them is the rest.
    for counts, colour, name in ((places, "rest", "rest"), (selected, "selected", label)):
        if counts:
            x, y = np.array(list(counts)).T
            area = 14 + 260 * np.array(list(counts.values()), dtype=float) / largest
            axes.scatter(x, y, s=area, color=COLOURS[colour], alpha=POINT_ALPHA, linewidths=0)
        # For the legend: there, both have one size.
        axes.scatter([], [], s=30, color=COLOURS[colour], label=name)
    axes.set_xlabel(f"success rate at {title_of(before.name)}")
    axes.set_ylabel(f"at {title_of(after.name)}")
    axes.set_xlim(-0.09, 1.09)
    axes.set_ylim(-0.09, 1.09)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def _movements(before: Stage, after: Stage) -> tuple[Counter[Any], Counter[Any]]:
    """How many prompts went from one rate to another: all of them, and those that `after` selected."""
    then = dict(zip(before.column("index"), before.column("success_rate"), strict=True))
    places: Counter[Any] = Counter()
    selected: Counter[Any] = Counter()
    for index, now, is_selected in zip(
        after.column("index"), after.column("success_rate"), after.selected.tolist(), strict=True
    ):
        if index in then and np.isfinite(now) and np.isfinite(then[index]):
            place = round(then[index], 2), round(now, 2)
            places[place] += 1
            if is_selected:
                selected[place] += 1
    return places, selected
