"""The continual part of `docs/results.md` and its plot from the finished cells of the continual table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from selection.report import interval, markdown, signed, triple

from continual.cells import LINES, SHOWN, compute_to_reach
from trl_learnalign.records.store import write_atomically

BEGIN = (
    "<!-- made by benchmarks/continual/table.py --report: edit the words around it, not this -->"
)
END = "<!-- end of the continual tables -->"

NAMES = {
    "full": "whole pool, shuffled",
    "skip": "whole pool, skipping",
    "dynamic_sampling": "dynamic sampling",
    "posterior": "posterior for each prompt",
    "adaptive": "**adaptive**",
    "adaptive_oversampled": "adaptive, 1.5 × oversampled",
    "learnalign": "LearnAlign",
    "learnalign_adaptive": "LearnAlign, adaptive order",
    "learnalign_coverage": "LearnAlign, coverage",
    "learnalign_coverage_adaptive": "LearnAlign, coverage, adaptive order",
}
ADAPTIVE, FULL = "adaptive", "full"
IN_PRINT_ALONE = ("adaptive_oversampled", "learnalign_adaptive", "learnalign_coverage_adaptive")
"""Lines that the page leaves out."""

PLOTTED = ("full", "skip", "dynamic_sampling", "posterior", "adaptive", "learnalign")


def write(results: Path, page: Path) -> str:
    """Write the main tables into a page between its marks, and the plot beside the cells.

    Args:
        results (`Path`): The Parquet file of finished cells.
        page (`Path`): `docs/results.md`.

    Returns:
        `str`: All tables: both prices, the curves, the belief.

    Raises:
        `ValueError`: If the page has no marks.
    """
    table = pq.read_table(results)
    cells, origin = table.to_pandas(), json.loads(table.schema.metadata[b"origin"])
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(
            f"{page} lacks the marks {BEGIN!r} and {END!r} between which the tables go."
        )
    before, after = text.split(BEGIN)[0], text.split(END, 1)[1]
    made = "\n\n".join(main_sections(cells, origin))
    write_atomically(page, f"{before}{BEGIN}\n\n{made}\n\n{END}{after}".encode())
    plot(cells, results.with_name("continual_curves.png"))
    return "\n\n".join(sections(cells, origin))


def main_sections(cells: pd.DataFrame, origin: dict[str, Any]) -> list[str]:
    """What stands between the marks: the end of the budget, at the lowest price."""
    is_main = ~cells["selector"].isin(IN_PRINT_ALONE)
    own = cells[is_main & (cells["price"] == cells["price"].min())]
    return _facts(cells, origin) + _final(own) + _differences(own)[:2] + _compute(own)


def _facts(cells: pd.DataFrame, origin: dict[str, Any]) -> list[str]:
    runs = cells.groupby(["regime", "selector", "seed"]).ngroups
    facts = [
        f"{runs} training runs, seeds {cells['seed'].min()} to {cells['seed'].max()}.",
        *(f"{name.capitalize()}: `{json.dumps(value)}`." for name, value in origin.items()),
    ]
    return ["#### Runs", "\n".join(f"- {fact}" for fact in facts)]


def sections(cells: pd.DataFrame, origin: dict[str, Any]) -> list[str]:
    """All tables."""
    found = _facts(cells, origin)
    for price in sorted(cells["price"].unique()):
        own = cells[cells["price"] == price]
        found += [
            f"#### A generated token costs {price} forward equivalents"
            if price > 1
            else "#### A generated token costs 1 forward equivalent"
        ]
        found += _final(own) + _differences(own) + _compute(own)
    return found + _curves(cells) + _beliefs(cells)


def final_accuracy(cells: pd.DataFrame, regime: str, selector: str) -> pd.Series:
    """Accuracy when the budget is spent, by seed."""
    return _by_seed(cells[cells["mark"] == SHOWN[-1]], regime, selector)


def mean_accuracy(cells: pd.DataFrame, regime: str, selector: str) -> pd.Series:
    """Mean accuracy over the fifths of the budget, by seed."""
    return _by_seed(cells[cells["mark"].isin(SHOWN)], regime, selector)


def _by_seed(cells: pd.DataFrame, regime: str, selector: str) -> pd.Series:
    own = cells[(cells["regime"] == regime) & (cells["selector"] == selector)]
    return own.groupby("seed")["accuracy"].mean()


def difference(ours: pd.Series, theirs: pd.Series) -> tuple[float, float, float]:
    """Paired by seed: mean and its 95 % interval."""
    return interval((ours - theirs).dropna().to_numpy())


def _regimes(cells: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(cells["regime"]))


def _lines(cells: pd.DataFrame) -> list[str]:
    present = set(cells["selector"])
    return [name for name in LINES if name in present]


def _final(cells: pd.DataFrame) -> list[str]:
    rows = []
    for name in _lines(cells):
        figures = [final_accuracy(cells, regime, name) for regime in _regimes(cells)]
        rows.append([NAMES[name], *(triple(interval(values.to_numpy())) for values in figures)])
    words = "Held-out accuracy when the budget is spent, mean over seeds in %, ± half of the 95 % interval:"
    return [words, markdown(["line", *_regimes(cells)], rows)]


def _differences(cells: pd.DataFrame) -> list[str]:
    found = []
    for words, accuracy in (
        ("when the budget is spent", final_accuracy),
        ("mean over the fifths of the budget", mean_accuracy),
    ):
        rows = []
        for name in _lines(cells):
            if name == ADAPTIVE:
                continue
            pairs = [
                difference(accuracy(cells, regime, ADAPTIVE), accuracy(cells, regime, name))
                for regime in _regimes(cells)
            ]
            rows.append([NAMES[name], *map(signed, pairs)])
        found += [
            f"Adaptive minus each other line, points of accuracy {words}, paired by seed, with 95 % intervals:",
            markdown(["against", *_regimes(cells)], rows),
        ]
    return found


def mean_compute_to_full(cells: pd.DataFrame, regime: str, selector: str) -> float | None:
    """Part of the budget at which a line's mean curve reaches the whole pool's mean final accuracy.

    Args:
        cells (`pd.DataFrame`): Cells at one price.
        regime (`str`): Regime.
        selector (`str`): Line.
    """
    wanted = float(final_accuracy(cells, regime, FULL).mean())
    own = cells[(cells["regime"] == regime) & (cells["selector"] == selector)]
    curve = own.groupby("mark")["accuracy"].mean()
    return compute_to_reach(list(curve.index), list(curve), wanted)


def _compute(cells: pd.DataFrame) -> list[str]:
    rows = []
    for name in _lines(cells):
        if name == FULL:
            continue
        row = [NAMES[name]]
        for regime in _regimes(cells):
            reached = mean_compute_to_full(cells, regime, name)
            own = cells[(cells["regime"] == regime) & (cells["selector"] == name)]
            per_seed = own.groupby("seed")["compute_to_full"].first()
            count = f"{per_seed.notna().sum()} of {len(per_seed)}"
            row.append(f"{'not reached' if reached is None else f'{reached:.2f}'} ({count})")
        rows.append(row)
    words = (
        "Part of the compute at which the mean curve reaches the whole pool's mean final accuracy, and in brackets "
        "how many seeds reach it:"
    )
    return [words, markdown(["line", *_regimes(cells)], rows)]


def _curves(cells: pd.DataFrame) -> list[str]:
    found = ["#### Curves", "Mean accuracy in % after each fifth of the budget, at price 1 / 3."]
    header = ["line", *(f"{100 * mark:.0f} %" for mark in SHOWN)]
    for regime in _regimes(cells):
        own = cells[cells["regime"] == regime]
        means = own.groupby(["selector", "mark", "price"])["accuracy"].mean()
        prices = sorted(own["price"].unique())
        rows = [
            [
                NAMES[name],
                *(
                    " / ".join(f"{100 * means[name, mark, price]:.1f}" for price in prices)
                    for mark in SHOWN
                ),
            ]
            for name in _lines(own)
        ]
        found += [f"{regime}:", markdown(header, rows)]
    return found


def _beliefs(cells: pd.DataFrame) -> list[str]:
    rows = []
    for name in _lines(cells):
        for regime in _regimes(cells):
            own = cells[(cells["selector"] == name) & (cells["regime"] == regime)]
            notes = own.groupby("seed")["notes"].first().map(json.loads)
            if any("auc" not in note for note in notes):
                continue
            names = "predicted", "seen", "brier", "auc", "calibration_error"
            means = [np.mean([note[key] for note in notes]) for key in names]
            useful = own.groupby("seed")["useful"].first().mean()
            rows.append([NAMES[name], regime, f"{useful:.2f}", *(f"{mean:.2f}" for mean in means)])
    header = [
        "line",
        "regime",
        "useful groups",
        "predicted",
        "seen",
        "Brier",
        "AUC",
        "calibration error",
    ]
    words = "What was believed of each group before it was rolled out, over whole runs, mean over seeds:"
    return ["#### The belief", words, markdown(header, rows)] if rows else []


def plot(cells: pd.DataFrame, path: Path) -> None:
    """Accuracy over compute; a row of panels for each price, a panel for each regime."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    regimes, prices = _regimes(cells), sorted(cells["price"].unique())
    size = (3.6 * len(regimes), 3.0 * len(prices))
    figure, axes = pyplot.subplots(len(prices), len(regimes), figsize=size, squeeze=False)
    for row, price in zip(axes, prices, strict=True):
        for axis, regime in zip(row, regimes, strict=True):
            own = cells[(cells["regime"] == regime) & (cells["price"] == price)]
            for name in PLOTTED:
                curve = own[own["selector"] == name].groupby("mark")["accuracy"].mean()
                width = 2.4 if name == ADAPTIVE else 1.2
                label = NAMES[name].strip("*")
                axis.plot(curve.index, 100 * curve, lw=width, marker=".", label=label)
            axis.set(title=f"{regime}, price {price}", xlabel="part of the budget")
        row[0].set_ylabel("held-out accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(PLOTTED), fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
