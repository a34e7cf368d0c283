"""Figures of a run: PNG files, and SVG with colours from the page."""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import reliability_bins
from trl_learnalign.plan import Phase
from trl_learnalign.records.layout import CORRELATIONS, OVERLAPS
from trl_learnalign.records.notes import SCORING_ACCOUNT, TRAINING_ACCOUNT, Cost
from trl_learnalign.records.store import write_atomically
from trl_learnalign.records.summary import Accuracy
from trl_learnalign.report.contrast import estimate_of
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
from trl_learnalign.report.run_data import Run, Stage

# ---- Axes and lines -------------------------------------------------------------------------------------------------


def short_numbers() -> FuncFormatter:
    """Ticks such as 250, 25k, 1.5M and 3B."""
    return FuncFormatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def connection() -> dict[str, Any]:
    """The line between two measurements: nothing is known of what lies between them, so it is thin and dotted."""
    return {"linestyle": ":", "linewidth": 0.9}


# ---- Figures of a stage ---------------------------------------------------------------------------------------------

_MANY_POINTS = 1500  # more points are rasterised, because a page with thousands of shapes is slow

POINT_ALPHA = 0.85
"""Opacity of overlapping points."""
_FILL = 0.35
"""Opacity of the fill of two overlaid histograms; their outlines are opaque."""

# ---- One stage ------------------------------------------------------------------------------------------------------


def success_rate_figure(stage: Stage) -> Figure:
    """Histogram of success rates, with the selected part highlighted."""
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
    """One bin per distinct rate if there are few (G rollouts give G + 1 of them), otherwise twenty bins."""
    values = np.unique(rate)
    step = np.diff(values).min() if 1 < len(values) <= 33 else 0.05
    count = max(1, round(1 / step))
    if len(values) > 33 or count > 32:
        return np.linspace(0, 1, 21)
    return (np.arange(count + 2) - 0.5) / count


def score_figure(stage: Stage) -> Figure:
    """Score against success rate; points have horizontal jitter, because there are few distinct rates."""
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
    """Mean completion length of selected and other prompts, each normalised to 1; medians are dashed."""
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
    """Success rates in two stages of the prompts that both scored; the area of a bubble is their number."""
    figure, axes = new_axes()
    places, selected = _movements(before, after)
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.8, linestyle=":")
    largest = max(places.values(), default=1)
    label = f"selected by {title_of(after.name)}"
    # Selected prompts are drawn on top of all prompts at the same place, so the visible ring is the rest.
    for counts, colour, name in ((places, "rest", "rest"), (selected, "selected", label)):
        if counts:
            x, y = np.array(list(counts)).T
            area = 14 + 260 * np.array(list(counts.values()), dtype=float) / largest
            axes.scatter(x, y, s=area, color=COLOURS[colour], alpha=POINT_ALPHA, linewidths=0)
        # Legend entries only; there, both have the same size.
        axes.scatter([], [], s=30, color=COLOURS[colour], label=name)
    axes.set_xlabel(f"success rate at {title_of(before.name)}")
    axes.set_ylabel(f"at {title_of(after.name)}")
    axes.set_xlim(-0.09, 1.09)
    axes.set_ylim(-0.09, 1.09)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def _movements(before: Stage, after: Stage) -> tuple[Counter[Any], Counter[Any]]:
    """Number of prompts for each pair of rates: of all prompts, and of those that `after` selected."""
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


# ---- Figures of adaptive order --------------------------------------------------------------------------------------

MANY = 8
"""Prompts that were rolled out this often or more share a bar."""


def order_figures(run: Run) -> dict[str, Figure]:
    """Figures of adaptive order for which the run has data, by name; none without continual selection."""
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
    """Share of useful groups, and predicted and observed success rates, over steps."""
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
        ("correct rollouts", outcomes.success_rates, "selected", "-"),
        ("predicted correct rollouts", outcomes.predicted, "ink", ":"),
    )
    for label, values, colour, line in curves:
        steps, means = means_by_step(outcomes.steps, values)
        if len(steps):
            # The averaging window is about a twentieth of the phase.
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
    """Steps that have a value, `(S,)`, and the mean value of each; NaN values are ignored."""
    has_value = ~np.isnan(values)
    numbers, places = np.unique(steps[has_value], return_inverse=True)
    sums, counts = np.bincount(places, values[has_value]), np.bincount(places)
    return numbers, sums / counts


def reliability_figure(outcomes: Outcomes) -> Figure:
    """Observed against predicted success rates, in ten bins; the area of a point is its number of rollouts."""
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
    axes.set_ylabel("observed")
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.04, 1.04)
    return figure


def repeats_figure(outcomes: Outcomes, dataset_size: int) -> Figure:
    """Histogram of how often prompts were rolled out."""
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
    """Number of prompts that were rolled out never, once, twice, …; counts from [`MANY`] on are merged."""
    times = np.bincount(outcomes.rows, minlength=dataset_size)
    return np.bincount(np.minimum(times, MANY)).tolist()


# ---- Figures --------------------------------------------------------------------------------------------------------


def figures_of(run: Run) -> dict[str, Figure]:
    """All figures of a run for which its records have data, by name."""
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
    """Tables of agreement between selectors, each with its lowest possible value."""
    lowest = {CORRELATIONS: -1.0, OVERLAPS: 0.0}
    return {name: (table, lowest[name]) for name, table in run.agreement.items()}


def agreement_figure(table: pd.DataFrame, low: float) -> Figure:
    """Heatmap of the agreement between selectors, with numbers.

    Args:
        table (`pandas.DataFrame`): Square, by selector; up to 1, NaN where unknown.
        low (`float`): Its lowest possible value: the end of the colour scale.
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
            # Not from the page's palette, because the background does not change in dark mode either.
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
    # Labels that begin with "_" are not in the legend, so that each kind of line appears once.
    labels = ("training reward", "smoothed")
    for phase in run.phases:
        # Phases are smoothed separately, because their rewards are of different prompts.
        pairs = [pair for pair in logged if phase.start < pair[0] <= phase.end]
        if pairs:
            _draw_rewards(axes, pairs, labels)
            labels = ("_reward", "_smoothed")
    if run.accuracies:
        _draw_accuracies(axes, run.accuracies)
    legend_above(axes)
    return figure


def _draw_rewards(axes: Axes, pairs: Sequence[tuple[int, float]], labels: tuple[str, str]) -> None:
    """Draw the rewards of a phase; a single point is drawn without a line."""
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
        **connection(),
        capsize=2.5,
        elinewidth=1,
        label="held-out accuracy",
    )


def cost_figure(run: Run) -> Figure:
    """Compute of each phase, to choose prompts and to train on them, in tokens of a forward pass."""
    figure, axes = new_axes()
    entries = run.ledger.entries
    names = list(entries)
    places = range(len(names))
    starts = np.zeros(len(names))
    accounts = (
        (SCORING_ACCOUNT, "choosing prompts", "accent"),
        (TRAINING_ACCOUNT, "training", "selected"),
    )
    for account, label, colour in accounts:
        costs = [entries[name].get(account, Cost()) for name in names]
        values = np.array(list(map(run.ledger.compute, costs)), dtype=np.float64)
        axes.barh(places, values, left=starts, height=0.6, color=COLOURS[colour], label=label)
        starts += values
    axes.set_yticks(places, [title_of(name) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("compute (tokens of a forward pass)")
    axes.xaxis.set_major_formatter(short_numbers())
    legend_above(axes)
    return figure


# ---- Files ----------------------------------------------------------------------------------------------------------


def svg_of(figure: Figure, name: str, label: str) -> str:
    """A figure as an `<svg>` element for a page that defines the CSS variables of [`COLOURS`].

    Args:
        figure (`Figure`): The figure.
        name (`str`): Makes the ids inside the figure unique on the page.
        label (`str`): Description for screen readers; plain ASCII letters, digits and punctuation.
    """
    sink = io.StringIO()
    with style(), matplotlib.rc_context({"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(sink, format="svg", metadata=metadata)
    # The layout is reused for the PNG, because computing it again takes as long.
    figure.set_layout_engine("none")
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(<svg [^>]*?) width=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg [^>]*?) height=\"[^\"]*\"", r"\1", text, count=1)
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    # Group ids ("figure_1", "axes_1") are the same in every figure, and nothing refers to them.
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
        write_atomically(paths[name], picture.getvalue())  # replaces a link instead of following it
    return paths
