"""Figures of a run, with matplotlib: as PNG files, and as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_learnalign.records.layout import CORRELATIONS, OVERLAPS
from trl_learnalign.records.ledger import Cost
from trl_learnalign.records.notes import SCORING_ACCOUNT, TRAINING_ACCOUNT
from trl_learnalign.records.store import write_atomically
from trl_learnalign.report.drawing import (
    COLOURS,
    HEIGHT,
    WIDE,
    bars_of,
    draw_legend,
    draw_phases,
    legend_above,
    new_axes,
    smoothed,
    style,
    title_of,
)
from trl_learnalign.report.order_figures import order_figures
from trl_learnalign.report.run import Accuracy, Run
from trl_learnalign.report.stage_figures import (
    length_figure,
    movement_figure,
    score_figure,
    success_rate_figure,
)
from trl_learnalign.report.variants import estimate_of


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
    figure, axes = new_axes(WIDE, HEIGHT * 1.1)
    draw_phases(axes, run.phases)
    logged = list(zip(*run.rewards, strict=True))
    # What begins with "_" is in no legend: one line of each kind is.
    labels = ("training reward", "smoothed")
    for phase in run.phases:
        # Each phase on its own: its rewards are of other prompts.
        pairs = [pair for pair in logged if phase.start < pair[0] <= phase.end]
        if pairs:
            _draw_rewards(axes, pairs, labels)
            labels = ("_reward", "_smoothed")
    if run.accuracies:
        _draw_accuracies(axes, run.accuracies)
    legend_above(axes)
    return figure


def _draw_rewards(axes: Axes, pairs: Sequence[tuple[int, float]], labels: tuple[str, str]) -> None:
    """The rewards of a phase; a line through one point would be none."""
    steps = [step for step, _ in pairs]
    rewards = [reward for _, reward in pairs]
    raw, smooth = labels
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, rewards, color=COLOURS["rest"], linewidth=1, marker=marker, label=raw)
    axes.plot(
        steps,
        smoothed(rewards),
        color=COLOURS["selected"],
        linewidth=1.8,
        marker=marker,
        markersize=4,
        label=smooth,
    )


def _draw_accuracies(axes: Axes, accuracies: Sequence[Accuracy]) -> None:
    measured = [estimate_of([accuracy]) for accuracy in accuracies]
    axes.errorbar(
        [accuracy.step for accuracy in accuracies],
        [estimate.value for estimate in measured],
        yerr=bars_of(measured),
        color=COLOURS["accent"],
        marker="o",
        markersize=4.5,
        linewidth=1.4,
        capsize=2.5,
        elinewidth=1,
        label="held-out accuracy",
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
        values = np.array(list(map(run.ledger.compute, costs)), dtype=np.float64)
        axes.barh(places, values, left=starts, height=0.6, color=COLOURS[colour], label=account)
        starts += values
    axes.set_yticks(places, [title_of(name) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("compute (tokens of a forward pass)")
    axes.ticklabel_format(axis="x", scilimits=(-2, 4))
    draw_legend(axes)
    return figure


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
        picture = io.BytesIO()
        with style():
            figure.savefig(picture, format="png", dpi=140, facecolor="white", transparent=False)
        write_atomically(paths[name], picture.getvalue())  # a link there is replaced, not followed
    return paths
