"""`docs/results/continual.md` and its plots from the finished cells of the continual table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from selection.report import interval, markdown, signed, triple

from continual.cells import LINES, MARKS, SHOWN, SMALL_GROUPS, Spent, compute_to_reach
from trl_learnalign.records.notes import PRICES
from trl_learnalign.records.store import write_atomically

PAGE = "continual.md"
HEADER = """# Continual selection at equal compute: all tables

Made by `python benchmarks/continual/table.py --report`: do not edit. What the tables show, and the four pools
(`sparse`, `balanced`, `longtail`, `graded`): [results.md](../results.md#continual-selection-at-equal-compute).

A *line* is a way to choose prompts. The *price* is what a generated token costs in forward equivalents; a token that
is read costs 1, one that is trained on 3. A *useful group* has a gradient. *Brier* is the mean squared distance of the
predicted success rate and the outcome, 0 at best.

Runs were evaluated at parts of the budgets of prices 1 and 3. At price 8 the same runs are read on straight lines
between these evaluations, and the budget is what every run of a pool has spent: 0.86 to 0.98 of LearnAlign's compute.
"""

KEYS = ["regime", "selector", "seed"]

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
SMALL_NAMES = NAMES | {"belief": "adaptive, the belief as baseline"}
NAMES |= {
    name: f"{SMALL_NAMES[name.partition(',')[0]]}, {line.rollouts} rollouts"
    for name, line in SMALL_GROUPS.items()
}
ADAPTIVE, FULL = "adaptive", "full"
SMALL_ADAPTIVE = "adaptive, G = 2"
NOT_RUN = "not run"
BEST_FULL = "full, G = 4"
"""The whole pool, shuffled, at the group size that was the best for it on development tasks."""
PLOTTED = ("full", "skip", "dynamic_sampling", "posterior", "adaptive", "learnalign")
IN_BRIEF = ("full", "adaptive", "adaptive, G = 2")
"""Lines of the README's figure, and its price."""
PRICE_IN_BRIEF = 8


def write(results: Path) -> Path:
    """Write all tables and the plots beside the cells.

    Args:
        results (`Path`): The Parquet file of finished cells.

    Returns:
        `Path`: The page.
    """
    table = pq.read_table(results)
    origin = json.loads(table.schema.metadata[b"origin"])
    cells = at_all_prices(table.to_pandas())
    page = results.with_name(PAGE)
    found = [HEADER, *sections(cells, origin)]
    write_atomically(page, ("\n\n".join(found) + "\n").encode())
    plot(cells, results.with_name("continual_curves.png"))
    plot_in_brief(cells, results.with_name("accuracy_over_compute.png"))
    return page


def _facts(cells: pd.DataFrame, origin: dict[str, Any]) -> list[str]:
    runs = cells.groupby(KEYS).ngroups
    facts = [
        f"{runs} training runs, seeds {cells['seed'].min()} to {cells['seed'].max()}.",
        *(f"{name.capitalize()}: `{json.dumps(value)}`." for name, value in origin.items()),
    ]
    return ["## Runs", "\n".join(f"- {fact}" for fact in facts)]


def sections(cells: pd.DataFrame, origin: dict[str, Any]) -> list[str]:
    """All tables."""
    found = _facts(cells, origin) + _compute_at_prices(cells)
    for price in sorted(cells["price"].unique()):
        own = cells[cells["price"] == price]
        found += [
            f"## A generated token costs {price:g} forward equivalents"
            if price > 1
            else "## A generated token costs 1 forward equivalent"
        ]
        found += _final(own) + _differences(own) + _compute(own)
    return found + _curves(cells) + _beliefs(cells)


def at_all_prices(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with rows at each of [`PRICES`]: those that a run was not evaluated for lie between its evaluations.

    Args:
        cells (`pd.DataFrame`): Cells with the tokens of each evaluation.
    """
    missing = [price for price in PRICES if price not in set(cells["price"])]
    found = pd.concat([cells, *(_at_price(cells, price) for price in missing)], ignore_index=True)
    return with_compute_to_full(found)


def _at_price(cells: pd.DataFrame, price: float) -> pd.DataFrame:
    """Rows at another price, on straight lines between all evaluations of a run.

    The budget is what every run of a regime has spent. The curve is not known before the first evaluation, and is
    taken to be level there.
    """
    tokens = {name: cells[name] for name in ("generated", "read", "trained", "forward")}
    cells = cells.assign(spent=Spent(**tokens).compute(price))
    budgets = cells.groupby(KEYS)["spent"].max().groupby("regime").min()
    found = []
    for (regime, _, _), cell in cells.groupby(KEYS, sort=False):
        points = cell.sort_values("spent")
        budget = budgets[regime]
        accuracy = np.interp(budget * np.array(MARKS), points["spent"], points["accuracy"])
        values = {"price": price, "mark": MARKS, "accuracy": accuracy, "budget_compute": budget}
        own = [name for name in (*KEYS, "rollouts", "useful", "notes") if name in cell]
        found.append(pd.DataFrame({**cell.iloc[0][own], **values}))
    return pd.concat(found)


def with_compute_to_full(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the quotient of compute at which a cell reaches the whole pool's mean final accuracy; missing if never."""
    table = table.drop(columns="compute_to_full", errors="ignore")
    last = table[(table["selector"] == FULL) & (table["mark"] == SHOWN[-1])]
    wanted = last.groupby(["regime", "price"])["accuracy"].mean()
    found = []
    for (regime, selector, seed, price), group in table.groupby([*KEYS, "price"]):
        if (regime, price) not in wanted.index:
            continue
        curve = group.sort_values("mark")
        reached = compute_to_reach(
            list(curve["mark"]), list(curve["accuracy"]), wanted[regime, price]
        )
        found.append((regime, selector, seed, price, reached))
    columns = [*KEYS, "price", "compute_to_full"]
    return table.merge(pd.DataFrame(found, columns=columns), on=columns[:-1], how="left")


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
        shown = [
            triple(interval(values.to_numpy())) if len(values) else NOT_RUN for values in figures
        ]
        rows.append([NAMES[name], *shown])
    words = "Held-out accuracy when the budget is spent, mean over seeds in %, ± half of the 95 % interval:"
    return [words, markdown(["line", *_regimes(cells)], rows)]


def _differences(cells: pd.DataFrame) -> list[str]:
    """Differences of the lines to the shuffled pool, then to the adaptive order."""
    ends = "when the budget is spent", final_accuracy
    means = "as a mean over the fifths of the budget", mean_accuracy
    found = []
    against_full = [(measure, other, 1) for other in (FULL, BEST_FULL) for measure in (ends, means)]
    against_lines = [
        (measure, own, -1) for own in (ADAPTIVE, SMALL_ADAPTIVE) for measure in (ends, means)
    ]
    for (words, accuracy), other, sign in against_full + against_lines:
        if other not in _lines(cells):
            continue
        title = f"Each line minus {NAMES[other]}" if sign > 0 else f"{NAMES[other]} minus each line"
        rows = []
        for name in _lines(cells):
            if name == other:
                continue
            pairs = [
                [accuracy(cells, regime, line) for line in (name, other)[::sign]]
                for regime in _regimes(cells)
            ]
            rows.append([NAMES[name], *(_signed_difference(*pair) for pair in pairs)])
        found += [
            f"{title}: points of accuracy {words}, paired by seed, with 95 % intervals:",
            markdown(["line" if sign > 0 else "against", *_regimes(cells)], rows),
        ]
    return found


def _signed_difference(ours: pd.Series, theirs: pd.Series) -> str:
    """The difference in points; in brackets the number of pairs where not all seeds were run."""
    pairs = (ours - theirs).dropna()
    if not len(pairs):
        return NOT_RUN
    count = "" if len(pairs) == max(len(ours), len(theirs)) else f" ({len(pairs)} seeds)"
    return signed(difference(ours, theirs)) + count


def mean_compute_to_full(
    cells: pd.DataFrame, regime: str, selector: str, reference: str = FULL
) -> float | None:
    """Part of the budget at which a line's mean curve reaches the whole pool's mean final accuracy.

    Args:
        cells (`pd.DataFrame`): Cells at one price.
        regime (`str`): Regime.
        selector (`str`): Line.
        reference (`str`): Line of the whole pool.
    """
    wanted = float(final_accuracy(cells, regime, reference).mean())
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
            if name not in _lines(cells[cells["regime"] == regime]):
                row.append(NOT_RUN)
                continue
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


def _compute_at_prices(cells: pd.DataFrame) -> list[str]:
    """The same at each price, without the seeds; and against the whole pool at its best group size."""
    found = ["## All prices"]
    for reference in (FULL, BEST_FULL):
        if reference not in _lines(cells):
            continue
        words = (
            f"Part of the compute at which the mean curve reaches the mean final accuracy of “{NAMES[reference]}”, at "
            f"price {_prices(cells)} (–: not reached):"
        )
        found += [words, _compute_to(cells, reference)]
    return found


def _compute_to(cells: pd.DataFrame, reference: str) -> str:
    by_price = [own for _, own in cells.groupby("price")]
    rows = []
    for name in _lines(cells):
        if name == reference:
            continue
        row = [NAMES[name]]
        for regime in _regimes(cells):
            if name not in _lines(cells[cells["regime"] == regime]):
                row.append(NOT_RUN)
                continue
            reached = [mean_compute_to_full(own, regime, name, reference) for own in by_price]
            row.append(" / ".join("–" if part is None else f"{part:.2f}" for part in reached))
        rows.append(row)
    return markdown(["line", *_regimes(cells)], rows)


def _prices(cells: pd.DataFrame) -> str:
    return " / ".join(f"{price:g}" for price in sorted(cells["price"].unique()))


def _curves(cells: pd.DataFrame) -> list[str]:
    words = f"Mean accuracy in % after each fifth of the budget, at price {_prices(cells)}."
    found = ["## Curves", words]
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
    return ["## The belief", words, markdown(header, rows)] if rows else []


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
                label = NAMES[name].replace("*", "")
                axis.plot(curve.index, 100 * curve, lw=width, marker=".", label=label)
            axis.set(title=f"{regime}, price {price:g}", xlabel="part of the budget")
        row[0].set_ylabel("held-out accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(PLOTTED), fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_in_brief(cells: pd.DataFrame, path: Path) -> None:
    """Accuracy over compute at one price, with bands of 95 %: a panel for each regime, few lines."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    own = cells[cells["price"] == PRICE_IN_BRIEF]
    regimes = _regimes(own)
    figure, axes = pyplot.subplots(
        1, len(regimes), figsize=(3.0 * len(regimes), 2.9), squeeze=False
    )
    for axis, regime in zip(axes[0], regimes, strict=True):
        for number, name in enumerate(IN_BRIEF):
            line = own[(own["regime"] == regime) & (own["selector"] == name)]
            by_mark = line.groupby("mark")["accuracy"]
            curve = [interval(values.to_numpy()) for _, values in by_mark]
            if not curve:
                continue
            mean, low, high = 100 * np.array(curve).T
            marks = 100 * np.array(sorted(by_mark.groups))
            label = NAMES[name].replace("*", "")
            axis.plot(marks, mean, lw=1.8, marker=".", color=f"C{number}", label=label)
            axis.fill_between(marks, low, high, color=f"C{number}", alpha=0.15, lw=0)
        axis.set(title=regime, xlabel="compute (% of the budget)")
    axes[0][0].set_ylabel("held-out accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(IN_BRIEF), fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
