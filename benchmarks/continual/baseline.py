"""The belief as baseline of groups of 2, on development tasks.

    python benchmarks/continual/baseline.py            # all cells; interrupt it at will and call it again
    python benchmarks/continual/baseline.py --report   # the table, from the finished cells

Lines: the order is adaptive or shuffled, and the baseline is the group, the belief, or a tracker for each prompt (a
belief without features). In adaptive order the belief is also run with other thresholds and ways of pruning. Cells are
run by the quick driver (`continual.quick`) as in `group_size.py`, with the same rollouts a step and the same prices.
"""

from __future__ import annotations

import sys
from dataclasses import replace
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

ADAPTIVE, SHUFFLED = {}, {"adaptive_exploration": 1.0}
LINES = {
    f"{order}, {name}": replace(
        Line(LearnAlignConfig.adaptive(**given, baseline=baseline), rollouts=2), features=features
    )
    for (order, given), (name, baseline, features) in product(
        {"adaptive": ADAPTIVE, "shuffled": SHUFFLED}.items(),
        (("group", "group", True), ("belief", "belief", True), ("tracker", "belief", False)),
    )
}
PRUNED = {
    f"adaptive, belief, {pruning} {threshold:g}": Line(
        LearnAlignConfig.adaptive(
            baseline="belief", baseline_pruning=pruning, baseline_threshold=threshold
        ),
        rollouts=2,
    )
    for pruning, thresholds in {"drop": (0.0, 0.6, 0.9, 1.2), "roulette": (0.3, 0.6)}.items()
    for threshold in thresholds
}
"""The defaults are to drop what is below 0.3."""
LINES |= PRUNED
REGIMES = ("longtail", "balanced")


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
    pending = {
        Cell(regime, name, seed): LINES[name]
        for order, seed, regime, name in product(
            ("adaptive", "shuffled"), TUNING_SEEDS[:2], REGIMES, LINES
        )
        if name.startswith(order) and (name not in PRUNED or seed == TUNING_SEEDS[0])
    }
    run_all(pending, rows, QUICK, "dev", given.workers, PRICES)


if __name__ == "__main__":
    main()
