"""Group sizes and their learning rates, on development tasks: what the lines of the continual table are run with.

    python benchmarks/continual/group_size.py --workers 2   # all cells; interrupt it at will and call it again
    python benchmarks/continual/group_size.py --report      # the tables, from the finished cells

A line is a way to choose prompts, a number of rollouts a prompt, and a multiple of the learning rate. All lines roll
out as many completions a step. Cells are run by the quick driver (`continual.quick`) until LearnAlign's total compute
is spent at each price of a generated token, and evaluated on the split "dev". The most informative cells come first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from selection.cells import RESULTS_FOLDER

from continual.cells import Line, compute_to_reach
from continual.table import (
    LINES,
    QUICK,
    REGIMES,
    TUNING_SEEDS,
    Cell,
    Rows,
    run_all,
    tuning_arguments,
)

RESULTS = RESULTS_FOLDER / "group_size_tuning.parquet"
PRICES = (1, 3, 8)
"""Forward equivalents of a generated token: one teacher-forced read, and decoding at a half and at two thirds of a
step's time."""

WAYS = {
    "full": LINES["full"],
    "skip": LINES["skip"],
    "adaptive": LINES["adaptive"],
    "posterior": LINES["posterior"],
    "dynamic_sampling": LINES["dynamic_sampling"],
}
SIZES = (2, 4, 8)
RATES = (1.0, 2.0, 0.5)
MAIN = ("adaptive", "skip", "full")


def named(way: str, rollouts: int, rate: float) -> str:
    """A line's name, e.g. `adaptive, G = 2, rate × 1`."""
    return f"{way}, G = {rollouts}, rate × {rate:g}"


def lines() -> dict[str, Line]:
    """All lines by name."""
    return {
        named(way, rollouts, rate): replace(line, rollouts=rollouts, rate=rate)
        for (way, line), rollouts, rate in product(WAYS.items(), SIZES, RATES)
    }


def cells() -> Iterator[Cell]:
    """The most informative first: the three main lines, rate after rate, then more seeds, then the other lines."""
    rounds = [(MAIN, seed) for seed in TUNING_SEEDS[:2]]
    rounds += [(tuple(WAYS)[3:], TUNING_SEEDS[0])]
    rounds += [(MAIN, seed) for seed in TUNING_SEEDS[2:]]
    rounds += [(tuple(WAYS)[3:], seed) for seed in TUNING_SEEDS[1:]]
    for ways, seed in rounds:
        for rate, rollouts, regime, way in product(RATES, SIZES, REGIMES[:3], ways):
            yield Cell(regime, named(way, rollouts, rate), seed)


def summary(table: pd.DataFrame) -> str:
    """Mean accuracy of the curve of each line by regime and price, and the number of seeds."""
    parts = table["selector"].str.extract(r"(?P<way>.+), G = (?P<G>\d+), rate × (?P<rate>.+)")
    keys = ["price", "regime", "way", "G", "rate"]
    table = table.join(parts)
    means = table.groupby(keys)["accuracy"].mean().unstack("rate").round(4)
    means["seeds"] = table.groupby(keys)["seed"].nunique().groupby(keys[:-1]).min()
    return means.to_string()


def compute_to_best_full(table: pd.DataFrame) -> pd.DataFrame:
    """Part of the compute at which each line's mean curve reaches the final accuracy of the best `full` line there is.

    A row for each price and line, a column for each regime; missing where it is not reached.
    """
    by_mark = table.groupby(["price", "regime", "selector", "mark"])["accuracy"].mean()
    found: dict[tuple[float, str], dict[str, float | None]] = {}
    for (price, regime), own in by_mark.groupby(["price", "regime"]):
        curves = {name: curve.droplevel([0, 1, 2]) for name, curve in own.groupby("selector")}
        finals = [curve.iloc[-1] for name, curve in curves.items() if name.startswith("full,")]
        if not finals:
            continue
        for name, curve in curves.items():
            reached = compute_to_reach(list(curve.index), list(curve), max(finals))
            found.setdefault((price, name), {})[regime] = reached
    index = pd.MultiIndex.from_tuples(list(found), names=["price", "line"])
    return pd.DataFrame(list(found.values()), index).astype(float)


def main() -> None:
    given = tuning_arguments(__doc__, RESULTS)
    rows = Rows(given.output, QUICK)
    if given.report:
        print(summary(rows.frame()))
        print(compute_to_best_full(rows.frame()).round(2).to_string(na_rep="not reached"))
        return
    known = lines()
    pending = {cell: known[cell.selector] for cell in cells()}
    run_all(pending, rows, QUICK, "dev", given.workers, PRICES)


if __name__ == "__main__":
    main()
