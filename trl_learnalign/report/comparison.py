"""Compares several runs: table rows, figures and a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_learnalign import markup
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.intervals import Estimate
from trl_learnalign.markup import headline
from trl_learnalign.records.notes import BASE, SCORING_ACCOUNT, BeliefNote, RolloutsNote
from trl_learnalign.records.run_record import RunContents
from trl_learnalign.records.store import write_atomically
from trl_learnalign.records.summary import Accuracy, rollouts_of_run
from trl_learnalign.report.contrast import (
    FEW,
    Differences,
    Variant,
    compute_of,
    conclusion,
    contrast,
    seconds_of,
    setting_shown,
    variants_of,
)
from trl_learnalign.report.drawing import COLOURS, HEIGHT, SERIES, WIDE, bars_of, new_axes, style
from trl_learnalign.report.figures import connection, short_numbers, svg_of
from trl_learnalign.report.page import environment
from trl_learnalign.report.run_data import Run, read_run

# ---- Figures of a comparison ----------------------------------------------------------------------------------------

_MARKERS = "os^DvPX*"
_DASHES = (":", "-.", "--")
_LEGEND_ROW = 0.19  # inches
_NAME = 60  # characters


def comparison_figure(
    variants: Sequence[Variant],
    x: Callable[[Run, Accuracy], float | None],
    xlabel: str,
) -> Figure:
    """Held-out accuracy of several variants over a quantity that grows during a run.

    Points are connected, by thin dotted lines, only if all variants were measured after the same steps. Otherwise a
    line would span stretches in which only one variant was measured, and would suggest a lead that was never measured.

    Args:
        variants (sequence of `Variant`): Runs by configuration.
        x (callable): Maps a run and a measurement to its x value; `None` omits it.
        xlabel (`str`): Label of the x axis.
    """
    labels = []
    for number, variant in enumerate(variants):
        labels.append(f"{run_label(number)}: {headline(variant.name, _NAME)}")
    # Legend entries are put in two columns if both fit below the axes.
    columns = 2 if max(map(len, labels)) <= _NAME // 2 else 1
    legend_rows = math.ceil(len(variants) / columns)
    with style():
        figure, axes = new_axes(WIDE, HEIGHT * 1.1 + _LEGEND_ROW * legend_rows)
        has_bars = len(variants) <= FEW  # more could not be distinguished
        joined = are_measured_alike(variants)
        for number, variant in enumerate(variants):
            places, accuracies = variant.curve(x)
            if places:
                _draw(axes, number, labels[number], places, accuracies, has_bars, joined)
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_formatter(short_numbers())
        axes.set_ylabel("held-out accuracy")
        axes.legend(ncols=columns, loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


def are_measured_alike(variants: Sequence[Variant]) -> bool:
    """Whether accuracy was measured after the same steps in all variants.

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
    """Draw points with a unique combination of colour and marker."""
    bars = bars_of(accuracies)
    if not has_bars:
        of_others = [0.0] * (len(places) - 1)
        bars = [[*of_others, reach[-1]] for reach in bars]
    rounds = number // len(SERIES)
    line = {**connection(), "linestyle": _DASHES[rounds % len(_DASHES)] if joined else "none"}
    axes.errorbar(
        places,
        [accuracy.value for accuracy in accuracies],
        yerr=bars,
        color=COLOURS[SERIES[number % len(SERIES)]],
        marker=_MARKERS[(number + rounds) % len(_MARKERS)],
        markersize=4.5,
        **line,
        capsize=2.5,
        elinewidth=1,
        label=label,
    )


def run_label(number: int) -> str:
    """Name of a compared run in figures and tables: a letter, as long as there are enough."""
    return chr(ord("A") + number) if number < 26 else str(number + 1)


# ---- Comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A comparison of runs; runs that differ only in their seeds form one variant.

    Args:
        variants (`list[Variant]`): Runs by configuration; the others are compared with the first.
        rows (`list[dict[str, str]]`): For each variant, heading → cell.
        notes (`list[str]`): Why the comparison may be unfair, in words.
        differences (`list[tuple[str, list]]`): Settings that differ, with the value of each variant; `None` where it
            has no effect.
        conclusion (`str`): The result, in one sentence.
    """

    variants: list[Variant]
    rows: list[dict[str, str]]
    notes: list[str]
    differences: Differences
    conclusion: str

    @property
    def headings(self) -> list[str]:
        """Headings of the columns."""
        return list(self.rows[0])

    @property
    def legend(self) -> str:
        """The meaning of those headings that are no common words."""
        shown = self.main_headings if self.is_broad else self.headings
        meant = [f"{name}: {LEGEND[name]}." for name in shown if name in LEGEND]
        return " ".join(f"{sentence[0].upper()}{sentence[1:]}" for sentence in meant)

    @property
    def differences_in_words(self) -> list[tuple[str, str]]:
        """Settings that differ, and each of their values with the letters of its runs."""
        return [(name, _by_value(values)) for name, values in self.differences]

    @property
    def is_broad(self) -> bool:
        """Whether there are more variants than fit side by side."""
        return len(self.variants) > FEW

    @property
    def main_headings(self) -> list[str]:
        """Headings of the compact table with one row per variant."""
        return [heading for heading in MAIN if heading in self.rows[0]]


def compare(folders: Sequence[str | Path], generation_price: float | None = None) -> Comparison:
    """Read and compare runs.

    Args:
        folders (sequence of `str` or `Path`): Output folders.
        generation_price (`float`, *optional*): Forward equivalents of a generated token, for all runs; defaults to the
            value in their settings.

    Raises:
        `ValueError`: If there are fewer than two runs, or if the price is out of range, or missing while settings
            differ.
        `FileNotFoundError`: If a folder has no run.
    """
    if len(folders) < 2:
        raise ValueError(
            f"{len(folders)} run(s) given: a comparison needs at least two output folders."
        )
    runs = _priced([read_run(folder) for folder in folders], generation_price)
    variants, differences = variants_of(runs)
    rows = _without_empty([_row(variant, variants[0]) for variant in variants])
    notes = _notes(runs)
    return Comparison(variants, rows, notes, differences, conclusion(variants, notes))


def _priced(runs: Sequence[Run], price: float | None) -> list[Run]:
    """The runs, all with the same price of a generated token."""
    prices = sorted({run.ledger.price for run in runs})
    if price is None:
        if len(prices) > 1:
            raise ValueError(
                f"The runs have generation_price {' and '.join(map('{:g}'.format, prices))}, so their compute "
                "cannot be compared. Give one price for all, e.g. --generation_price 1."
            )
        return list(runs)
    checked = LearnAlignConfig(generation_price=price)
    return [run.at_price(checked.generation_price) for run in runs]


def _by_value(values: Sequence[Any]) -> str:
    """Distinct values of a setting, and which runs have them: "1.0 (A, B), 0.8 (C)"."""
    letters: dict[str, list[str]] = {}
    for number, value in enumerate(values):
        letters.setdefault(setting_shown(value), []).append(run_label(number))
    return ", ".join(f"{value} ({', '.join(of_value)})" for value, of_value in letters.items())


# ---- Rows -----------------------------------------------------------------------------------------------------------


def _row(variant: Variant, first: Variant) -> dict[str, str]:
    contents = variant.contents
    accuracy = variant.accuracy
    cells = {
        "run": variant.name,
        "final accuracy": markup.number(accuracy.value if accuracy else None),
        "95 % interval": f"{accuracy.low:.3f} – {accuracy.high:.3f}" if accuracy else "",
        "interval over": variant.basis,
        DIFFERENCE: _difference(first, variant),
        "before training": markup.number(variant.mean(_base)),
        "folder": variant.folders,
        "seeds": _seeds(variant),
        "selector": contents.selector if contents.selects else "none",
        "stages": markup.setting(contents.config["stages"]) if contents.selects else "the pool",
        "order": ", ".join(contents.orders),
    }
    for heading, (figure, shown) in FIGURES.items():
        cells[heading] = shown(variant.mean(figure))
    return cells


def _difference(first: Variant, variant: Variant) -> str:
    """Difference to the first variant, with its interval."""
    found = None if variant is first else contrast(first, variant)
    return "" if found is None else found.points


def _seeds(variant: Variant) -> str:
    """Training seeds, and the number of unfinished runs."""
    seeds = sorted({run.seed for run in variant.runs})
    shown = ", ".join(map(str, seeds))
    if len(seeds) > 4:
        shown = f"{len(seeds)} seeds"
    finished = [run.finished for run in variant.runs]
    if all(finished):
        return shown
    return f"{shown} ({finished.count(False)} not finished)"


def _base(run: Run) -> float | None:
    return run.accuracies[0].value if run.accuracies else None


def _best(run: Run) -> float | None:
    return max((accuracy.value for accuracy in run.accuracies), default=None)


def _steps(run: Run) -> float | None:
    return sum(phase.steps for phase in run.phases)


def _of_rollouts(figure: Callable[[RolloutsNote], float | None]) -> Callable[[Run], float | None]:
    """A figure computed from the rollout statistics of a run."""

    def of_run(run: Run) -> float | None:
        rollouts = rollouts_of_run(run.contents)
        return None if rollouts is None else figure(rollouts)

    return of_run


def _rolled_out_per_trained(rollouts: RolloutsNote) -> float | None:
    if not rollouts.groups_trained or rollouts.groups == rollouts.groups_trained:
        return None
    return rollouts.groups / rollouts.groups_trained


def _brier(run: Run) -> float | None:
    contents: RunContents = run.contents
    scores = []
    rollouts = []
    for phase in contents.plan.phases:
        note = contents.note(phase.name, BeliefNote)
        if note is not None and note.brier is not None:
            scores.append(note.brier)
            rollouts.append(note.rollouts)
    if not any(rollouts):
        return None
    return float(np.average(scores, weights=rollouts))


def _tokens(run: Run) -> float | None:
    return run.ledger.total.tokens_generated if run.ledger.entries else None


def _scoring(run: Run) -> float | None:
    """Share of scoring in a run's compute."""
    compute = compute_of(run)
    if not compute:
        return None
    return run.ledger.compute(run.ledger.sum(SCORING_ACCOUNT)) / compute


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


ComparedFigure = tuple[Callable[[Run], float | None], Callable[[float | None], str]]

COMPUTE = "compute (tokens of a forward pass)"
"""Compute as counted by `Ledger.compute`, at the price used for the comparison."""

DIFFERENCE = "difference to A, points"
CHOOSING = "to choose prompts"
GROUPS = "groups per trained one"
"""Headings of rows."""

FIGURES: dict[str, ComparedFigure] = {
    "best accuracy": (_best, markup.number),
    "steps": (_steps, markup.count),
    "useful groups": (_of_rollouts(lambda rollouts: rollouts.useful_share), markup.percent),
    "tokens skipped": (_of_rollouts(lambda rollouts: rollouts.skipped_share), markup.percent),
    GROUPS: (_of_rollouts(_rolled_out_per_trained), markup.number),
    "Brier score": (_brier, markup.number),
    "generated tokens": (_tokens, markup.count),
    COMPUTE: (compute_of, markup.count),
    CHOOSING: (_scoring, markup.percent),
    "time": (seconds_of, _duration),
}
"""Headings, and how a figure is read from a run and formatted; the table shows the mean over the runs of a variant."""

LEGEND = {
    DIFFERENCE: "final accuracy minus that of A in percentage points, with its 95 % interval",
    "useful groups": "share of the groups of rollouts that have a gradient",
    "tokens skipped": "share of the tokens left out of training, which changes no gradient",
    GROUPS: "groups of rollouts made for each one that is trained on",
    "Brier score": "mean squared error of the predicted success rates, 0 at best",
    CHOOSING: "share of the compute spent to score or read prompts",
}
"""Meaning of headings."""

MAIN = (
    *("run", "final accuracy", "95 % interval", DIFFERENCE),
    *(COMPUTE, CHOOSING),
)
"""Headings of the compact table with one row per variant, which is used for many variants."""

OPTIONAL = (DIFFERENCE, "useful groups", "tokens skipped", GROUPS, "Brier score")
"""Columns that are omitted if they are empty for all runs."""


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows without empty optional columns, and without the order if all runs are shuffled."""
    empty = {name for name in OPTIONAL if not any(row[name] for row in rows)}
    if {row["order"] for row in rows} == {"shuffled"}:
        empty.add("order")
    return [{name: cell for name, cell in row.items() if name not in empty} for row in rows]


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    models = {run.contents.trainer.model for run in runs}
    counts: set[int] = set()
    for run in runs:
        counts.update(accuracy.count for accuracy in run.accuracies)
    if not all(run.finished for run in runs):
        notes.append("are not all finished")
    if _mixes_datasets(runs):
        notes.append("were trained on different datasets")
    if len(models) > 1:
        notes.append("started from different models")
    if len(counts) > 1:
        notes.append("were evaluated on different numbers of problems")
    return [f"These runs {what}: their accuracies cannot be compared." for what in notes]


def _mixes_datasets(runs: Sequence[Run]) -> bool:
    """Whether runs of one seed have different pools; different seeds may have different pools."""
    by_seed: dict[int, set[str | None]] = {}
    for run in runs:
        datasets = by_seed.setdefault(run.seed, set())
        datasets.add(run.contents.identity.get("dataset"))
    return any(len(datasets) > 1 for datasets in by_seed.values())


# ---- The page -------------------------------------------------------------------------------------------------------


def write_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Write a comparison as one self-contained page.

    Args:
        comparison (`Comparison`): The runs.
        path (`str` or `Path`): The page.

    Raises:
        `StoreError`: If it cannot be written.
    """
    table = []
    for heading in comparison.headings:
        cells = [row[heading] for row in comparison.rows]
        table.append((heading, cells))
    main_rows = []
    for row in comparison.rows:
        main_rows.append([row[heading] for heading in comparison.main_headings])
    templates = environment()
    template = templates.get_template("compare.html")
    page = template.render(
        letters=[run_label(number) for number in range(len(comparison.rows))],
        table=table,
        is_broad=comparison.is_broad,
        main_headings=comparison.main_headings,
        main_rows=main_rows,
        runs=sum(len(variant.runs) for variant in comparison.variants),
        notes=comparison.notes,
        conclusion=comparison.conclusion,
        differences=comparison.differences_in_words,
        legend=comparison.legend,
        figures=_figures(comparison.variants),
    )
    path = Path(path)
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def _figures(variants: Sequence[Variant]) -> list[tuple[str, Markup]]:
    """Captions and figures, those that the runs have data for."""
    runs = [run for variant in variants for run in variant.runs]
    if not any(run.accuracies for run in runs):
        return []
    between = _CONNECTED if are_measured_alike(variants) else _NOT_MEASURED
    by_steps = comparison_figure(variants, lambda run, accuracy: accuracy.step, "optimizer step")
    svg = Markup(svg_of(by_steps, "steps", "accuracy over steps"))
    figures = [(f"Held-out accuracy at equal steps.{between}", svg)]
    if all(run.ledger.entries for run in runs):
        by_cost = comparison_figure(variants, compute_at, COMPUTE)
        svg = Markup(svg_of(by_cost, "compute", "accuracy over compute"))
        unit = markup.unit_of_compute(runs[0].ledger.price)
        figures.append((f"{_AT_COMPUTE} {unit} Equal compute is not equal time.{between}", svg))
    return figures


_AT_COMPUTE = "Held-out accuracy at equal compute, including the compute for scoring."
_CONNECTED = " Dotted lines only connect the measurements of a run."
_NOT_MEASURED = (
    " Points are what was measured. The runs were measured after different steps, and nothing is known of what lies "
    "between."
)


def compute_at(run: Run, accuracy: Accuracy) -> float | None:
    """Compute used up to an accuracy measurement, scoring included."""
    compute = 0.0
    if accuracy.phase == BASE:
        return compute
    for phase in run.phases:
        costs = run.ledger.entries.get(phase.name, {})
        compute += sum(map(run.ledger.compute, costs.values()))
        if phase.name == accuracy.phase:
            return compute
    return None
