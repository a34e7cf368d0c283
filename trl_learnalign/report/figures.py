"""Figures of a run, with matplotlib: as PNG files, and as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trl_learnalign.records.layout import CORRELATIONS, OVERLAPS
from trl_learnalign.records.ledger import Cost
from trl_learnalign.records.notes import SCORING_ACCOUNT, TRAINING_ACCOUNT
from trl_learnalign.report.drawing import (
    COLOURS,
    HEIGHT,
    SERIES,
    WIDTH,
    draw_phases,
    new_axes,
    smoothed,
    style,
    title_of,
)
from trl_learnalign.report.order_figures import order_figures
from trl_learnalign.report.run import Accuracy, Run, Stage
from trl_learnalign.report.variants import Variant, estimate_of
from trl_learnalign.statistics import Estimate

_MANY_POINTS = 1500  # more are drawn as an image: a page of thousands of shapes is slow


def figures_of(run: Run) -> dict[str, Figure]:
    """All figures of a run by name; only those that its records have data for."""
    figures: dict[str, Figure] = {}
    stages = [stage for stage in run.scored_stages if stage.has_rollouts]
    with style():
        if run.rewards[0] or run.accuracies:
            figures["training"] = training_figure(run)
        figures |= order_figures(run)
        for stage in stages:
            figures[f"{stage.name}_success_rate"] = success_rate_figure(stage)
            figures[f"{stage.name}_score"] = score_figure(stage)
            figures[f"{stage.name}_length"] = length_figure(stage)
        for before, after in itertools.pairwise(stages):
            figures[f"{before.name}_to_{after.name}"] = movement_figure(before, after)
        for name, (table, low) in _agreements(run).items():
            figures[name] = agreement_figure(table, low)
        if run.ledger.entries:
            figures["cost"] = cost_figure(run)
    return figures


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
    label = f"rest ({rest.sum():,})"
    axes.bar(middles, rest, widths, bottom=top, color=COLOURS["rest"], label=label)
    axes.set_xlabel("success rate p")
    axes.set_ylabel("prompts")
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
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
    for mask, colour, label in ((~selected, "rest", "rest"), (selected, "selected", "selected")):
        axes.scatter(
            (rate + shift)[mask],
            score[mask],
            s=10,
            color=COLOURS[colour],
            alpha=0.6,
            linewidths=0,
            label=label,
            rasterized=many,
        )
    axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
    axes.set_xlabel("success rate p")
    axes.set_ylabel("score")
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.legend()
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
            color=colour,
            alpha=0.55,
            histtype="stepfilled",
            label=name,
        )
        axes.axvline(float(np.median(values)), color=colour, linestyle="--", linewidth=1.5)
    axes.set_xlabel("mean completion length (tokens)")
    axes.set_ylabel("share of prompts")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend()
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
            axes.scatter(x, y, s=area, color=COLOURS[colour], alpha=0.75, linewidths=0)
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


# ---- Between selectors ----------------------------------------------------------------------------------------------


def _agreements(run: Run) -> dict[str, tuple[pd.DataFrame, float]]:
    """Tables of agreement between selectors, each with the lowest value that it can have."""
    lowest = {CORRELATIONS: -1.0, OVERLAPS: 0.0}
    return {name: (table, lowest[name]) for name, table in run.agreement.items()}


def agreement_figure(table: pd.DataFrame, low: float) -> Figure:
    """Selectors against selectors, with the numbers.

    Args:
        table (`pandas.DataFrame`): Square, by selector; up to 1, NaN where nothing is known.
        low (`float`): Its lowest possible value: the scale's end.
    """
    count = len(table)
    side = max(HEIGHT, 1.6 + 0.38 * count)
    figure, axes = new_axes(side + 0.4, side)
    values = table.to_numpy(dtype=np.float64)
    colours = matplotlib.colormaps["RdBu" if low < 0 else "Blues"]
    axes.pcolormesh(
        values, cmap=colours, vmin=low, vmax=1, edgecolors=COLOURS["grid"], linewidth=0.5
    )
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            is_dark = abs(value) > 0.6 if low < 0 else value > 0.6
            # Not of the page's palette: what lies behind does not change in dark mode either.
            colour = "#ffffff" if is_dark else "#111111"
            label = f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"
            x, y = column + 0.5, row + 0.5
            axes.text(x, y, label, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(np.arange(count) + 0.5, table.columns, rotation=90)
    axes.set_yticks(np.arange(count) + 0.5, table.index)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return figure


# ---- The whole run --------------------------------------------------------------------------------------------------


def training_figure(run: Run) -> Figure:
    """Training reward and held-out accuracy over steps, with a band for each phase."""
    figure, axes = new_axes(WIDTH * 1.9, HEIGHT * 1.1)
    draw_phases(axes, run.phases)
    # Each phase on its own: its rewards are of other prompts. What begins with "_" is in no legend.
    labels = ("training reward", "smoothed")
    for phase in run.phases:
        pairs = [(step, reward) for step, reward in zip(*run.rewards, strict=True)]
        pairs = [(step, reward) for step, reward in pairs if phase.start < step <= phase.end]
        if pairs:
            _draw_rewards(axes, pairs, labels)
        labels = ("_reward", "_smoothed")
    if run.accuracies:
        steps_at = [float(accuracy.step) for accuracy in run.accuracies]
        measured = [estimate_of([accuracy]) for accuracy in run.accuracies]
        _draw_accuracies(axes, steps_at, measured, COLOURS["accent"], "held-out accuracy")
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(1, run.phases[-1].end) * 1.02)
    axes.legend(loc="best")
    return figure


def _draw_rewards(axes: Axes, pairs: Sequence[tuple[int, float]], labels: tuple[str, str]) -> None:
    steps = [step for step, _ in pairs]
    rewards = [reward for _, reward in pairs]
    raw, smooth = labels
    axes.plot(steps, rewards, color=COLOURS["rest"], linewidth=1, alpha=0.8, label=raw)
    axes.plot(steps, smoothed(rewards), color=COLOURS["selected"], linewidth=1.8, label=smooth)


def _draw_accuracies(
    axes: Axes,
    places: Sequence[float],
    accuracies: Sequence[Estimate],
    colour: str,
    label: str,
) -> None:
    values = []
    below = []
    above = []
    for accuracy in accuracies:
        values.append(accuracy.value)
        below.append(max(accuracy.value - accuracy.low, 0))
        above.append(max(accuracy.high - accuracy.value, 0))
    axes.errorbar(
        places,
        values,
        yerr=[below, above],
        color=colour,
        marker="o",
        markersize=4.5,
        linewidth=1.4,
        capsize=2.5,
        elinewidth=1,
        label=label,
    )


def cost_figure(run: Run) -> Figure:
    """Compute of scoring and training in each phase, in tokens of a forward pass."""
    figure, axes = new_axes()
    entries = run.ledger.entries
    names = list(entries)
    places = range(len(names))
    starts = np.zeros(len(names))
    for account, colour in ((SCORING_ACCOUNT, "accent"), (TRAINING_ACCOUNT, "selected")):
        costs = [entries[name].get(account, Cost()) for name in names]
        values = np.array([cost.forward_equivalents for cost in costs], dtype=np.float64)
        axes.barh(places, values, left=starts, height=0.6, color=COLOURS[colour], label=account)
        starts += values
    axes.set_yticks(places, [title_of(name) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("compute (tokens of a forward pass)")
    axes.ticklabel_format(axis="x", scilimits=(-2, 4))
    axes.legend()
    return figure


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
    with style():
        figure, axes = new_axes(WIDTH * 1.9, HEIGHT * 1.15)
        for number, variant in enumerate(variants):
            places, accuracies = variant.curve(x)
            if places:
                colour = SERIES[number % len(SERIES)]
                label = f"{run_label(number)} ({variant.basis})"
                _draw_accuracies(axes, places, accuracies, colour, label)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("held-out accuracy")
        axes.legend(ncols=2)
    return figure


def run_label(number: int) -> str:
    """What a compared run is called in figures and tables: a letter, as long as there are some."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)


# ---- Files ----------------------------------------------------------------------------------------------------------


def svg_of(figure: Figure, name: str, label: str) -> str:
    """A figure as an `<svg>` element for a page that defines the CSS variables of [`COLOURS`].

    Args:
        figure (`Figure`): The figure.
        name (`str`): Makes ids inside the picture unlike those of others on the page.
        label (`str`): What it shows, for screen readers; plain ASCII letters, digits and punctuation.
    """
    sink = io.StringIO()
    with style(), matplotlib.rc_context({"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(sink, format="svg", metadata=metadata)
    # It stays as it was laid out: doing so again for the PNG takes as long.
    figure.set_layout_engine("none")
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(<svg [^>]*?) width=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg [^>]*?) height=\"[^\"]*\"", r"\1", text, count=1)
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    # Ids of groups ("figure_1", "axes_1") are the same in every picture, and nothing refers to them.
    text = re.sub(r"<g id=\"[a-zA-Z]+_?[0-9._]*\"", "<g", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def write_pngs(figures: Mapping[str, Figure], folder: Path) -> dict[str, Path]:
    """Write figures as PNG files on white; returns their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, figure in figures.items():
        paths[name] = folder / f"{name}.png"
        with style():
            figure.savefig(paths[name], dpi=140, facecolor="white", transparent=False)
    return paths
