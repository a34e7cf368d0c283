"""Group sizes, their learning rates, and the order's constants, on development tasks: what the table is run with.

    python benchmarks/continual/group_size.py --workers 2   # all cells; interrupt it at will and call it again
    python benchmarks/continual/group_size.py --report      # the tables, from the finished cells

A line is a way to choose prompts, a number of rollouts a prompt, and a multiple of the learning rate. The adaptive
order is also run with one of its constants changed, at each group size. All lines roll out as many completions a step.
Cells are run by the quick driver (`continual.quick`) until LearnAlign's total compute is spent at each price of a
generated token, and evaluated on the split "dev". The most informative cells come first.
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
from trl_learnalign.config import LearnAlignConfig

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
CONSTANTS = {
    f"adaptive, {name} {value:g}": {f"adaptive_{name}": value}
    for name, values in {
        "exploration": (0.25, 0.75),
        "candidates_per_slot": (4, 16),
        "gain_exponent": (0.0, 2.0),
        "cool_down": (0,),
    }.items()
    for value in values
}
"""What differs from the defaults."""

CHANGED = {
    way: replace(LINES["adaptive"], adaptive=LearnAlignConfig.adaptive(**changes))
    for way, changes in CONSTANTS.items()
}
SIZES = (2, 4, 8)
LARGE = 16
"""A group size for the adaptive order alone."""
RATES = (1.0, 2.0, 0.5)
MAIN = ("adaptive", "skip", "full")


def named(way: str, rollouts: int, rate: float) -> str:
    """A line's name, e.g. `adaptive, G = 2, rate × 1`."""
    return f"{way}, G = {rollouts}, rate × {rate:g}"


def lines() -> dict[str, Line]:
    """All lines by name."""
    return {
        named(way, rollouts, rate): replace(line, rollouts=rollouts, rate=rate)
        for (way, line), rollouts, rate in product((WAYS | CHANGED).items(), (*SIZES, LARGE), RATES)
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
    for seed, rollouts in ((0, 2), (0, LARGE), (1, 2), (0, 4), (0, 8)):
        for way, regime in product(("adaptive", *CHANGED), REGIMES[:3]):
            yield Cell(regime, named(way, rollouts, 1.0), TUNING_SEEDS[seed])


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """What changing a constant gives to the mean accuracy of the curve, in points: mean over regimes and seeds.

    A row for each constant, a column for each group size and price.
    """
    parts = table["selector"].str.extract(r"(?P<way>.+), G = (?P<G>\d+), rate × 1$")
    own = table.join(parts).dropna(subset="way")
    own = own[own["way"].isin(["adaptive", *CHANGED])].astype({"G": int})
    means = own.groupby(["way", "G", "price", "regime", "seed"])["accuracy"].mean().unstack("way")
    differences = 100 * means[[way for way in CHANGED if way in means]].sub(
        means["adaptive"], axis=0
    )
    return differences.groupby(["G", "price"]).mean().T


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
        print(changes(rows.frame()).round(2).to_string())
        print(compute_to_best_full(rows.frame()).round(2).to_string(na_rep="not reached"))
        return
    known = lines()
    pending = {cell: known[cell.selector] for cell in cells()}
    run_all(pending, rows, QUICK, "dev", given.workers, PRICES)


if __name__ == "__main__":
    main()
