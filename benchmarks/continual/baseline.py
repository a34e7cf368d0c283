"""The belief as baseline of groups of 2, on development tasks.

    python benchmarks/continual/baseline.py            # all cells; interrupt it at will and call it again
    python benchmarks/continual/baseline.py --report   # the table, from the finished cells

Lines: the order is adaptive or shuffled, and the baseline is the group, the belief, or a tracker for each prompt (a
belief without features), with the share of the rollouts that is kept and a way of pruning. Cells are run by the quick
driver (`continual.quick`) as in `group_size.py`, with the same rollouts a step and the same prices.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from selection.cells import RESULTS_FOLDER

from continual.cells import Line
from continual.group_size import PRICES
from continual.table import QUICK, TUNING_SEEDS, Cell, Rows, run_all, tuning_arguments
from trl_learnalign.config import LearnAlignConfig

RESULTS = RESULTS_FOLDER / "baseline_tuning.parquet"

ORDERS = {"adaptive": {}, "shuffled": {"adaptive_exploration": 1.0}}
PRUNED = {
    "adaptive, belief": (
        ("drop", 0.25),
        ("drop", 0.125),
        ("drop", 0.5),
        ("drop", 1.0),
        ("roulette", 0.5),
    ),
    "adaptive, tracker": (("drop", 0.25),),
    "shuffled, belief": (("drop", 0.25),),
    "shuffled, tracker": (("drop", 0.25),),
}
"""Ways of pruning and the shares that are kept."""

LINES = {
    f"{order}, group": Line(LearnAlignConfig.adaptive(**given), rollouts=2)
    for order, given in ORDERS.items()
}
for name, ways in PRUNED.items():
    order, _, kind = name.partition(", ")
    for pruning, share in ways:
        config = LearnAlignConfig.adaptive(
            **ORDERS[order], baseline="belief", baseline_pruning=pruning, baseline_share=share
        )
        LINES[f"{name}, {pruning} {share:g}"] = Line(config, kind == "belief", rollouts=2)
CHOSEN = "adaptive, belief, drop 0.25"
REGIMES = ("longtail", "balanced")
LAST = "sparse"
"""A regime for the line that was best elsewhere."""


def cells() -> Iterator[Cell]:
    """All cells: the first seed, the last regime, the second seed of the lines with the best share."""
    first, second = TUNING_SEEDS[:2]
    for regime, name in product(REGIMES, LINES):
        yield Cell(regime, name, first)
    for seed, name in product((first, second), (CHOSEN, "adaptive, group")):
        yield Cell(LAST, name, seed)
    for regime, name in product(REGIMES, LINES):
        if name.endswith(("group", "drop 0.25")):
            yield Cell(regime, name, second)


def summary(table: pd.DataFrame) -> str:
    """Mean accuracy of the curve, and its end, of each line by regime and price."""
    ends = table[table["mark"] >= 0.9]
    keys = ["regime", "selector", "price"]
    found = {
        "curve": table.groupby(keys)["accuracy"].mean(),
        "end": ends.groupby(keys)["accuracy"].mean(),
    }
    seeds = table.groupby(keys)["seed"].nunique().groupby(keys[:2]).min()
    frame = pd.concat(found, axis=1).unstack("price").round(3)
    frame["seeds", ""] = seeds
    return frame.to_string()


def main() -> None:
    given = tuning_arguments(__doc__, RESULTS)
    rows = Rows(given.output, QUICK)
    if given.report:
        print(summary(rows.frame()))
        return
    run_all(
        {cell: LINES[cell.selector] for cell in cells()}, rows, QUICK, "dev", given.workers, PRICES
    )


if __name__ == "__main__":
    main()
