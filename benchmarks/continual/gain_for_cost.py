"""Gain for cost: the expected gain of a prompt divided by the expected cost of a rollout, on development tasks.

    python benchmarks/continual/gain_for_cost.py            # all cells; interrupt it at will and call it again
    python benchmarks/continual/gain_for_cost.py --report   # paired differences to the adaptive order as it is

The lines are the adaptive order with `adaptive_gain_per_cost`, at a price of a generated token of 1 and 8, and without
it. The pool `lengths` of `continual.pools` has completions of two and of ten tokens. On the pool `balanced`, whose
lengths differ little, the setting must do no harm. Cells are run as in `by_need.py`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from selection.cells import RESULTS_FOLDER, Settings

from continual import pools
from continual.by_need import ByNeedDriver, measures, paired
from continual.cells import Line
from continual.group_size import PRICES
from continual.loop import Policy, Rollouts
from continual.quick import Run
from continual.table import LINES, Cell, Rows, run_all, tuning_arguments
from trl_learnalign.adaptive.belief import Belief
from trl_learnalign.adaptive.order import AdaptiveOrder
from trl_learnalign.config import LearnAlignConfig

RESULTS = RESULTS_FOLDER / "gain_for_cost_tuning.parquet"
DRIVER = "continual.gain_for_cost:GainForCostDriver"
SEEDS = range(100, 104)

PLAIN = "adaptive, G = 2"
PER_COST = {
    f"gain per cost, price {price}": replace(
        LINES[PLAIN],
        adaptive=LearnAlignConfig.adaptive(adaptive_gain_per_cost=True, generation_price=price),
    )
    for price in (1, 8)
}
COMPARED = {PLAIN: LINES[PLAIN], **PER_COST}


class RunForCost(Run):
    """A run that counts what kinds of prompts it rolls out."""

    def _chooser(self, adaptive: LearnAlignConfig) -> tuple[Belief, AdaptiveOrder]:
        names, self.kinds = np.unique(self.problems.dataset["family"], return_inverse=True)
        self.names, self.rolled_out = names.tolist(), np.zeros(len(names), dtype=np.int64)
        return super()._chooser(adaptive)

    def _roll_out(self, rows: np.ndarray, number: int) -> Rollouts:
        rollouts = super()._roll_out(rows, number)
        np.add.at(self.rolled_out, self.kinds[rows], self.settings.rollouts)
        return rollouts

    def notes(self) -> dict[str, Any]:
        """As of any run, and the rollouts of each kind."""
        rolled_out = dict(zip(self.names, self.rolled_out.tolist(), strict=True))
        return {**super().notes(), "rollouts": rolled_out}


class GainForCostDriver(ByNeedDriver):
    """The quick driver on the pools of `continual.pools`."""

    def begun(self, settings: Settings, policy: Policy, regime: str, seed: int, line: Line) -> Run:
        """A run before its first step."""
        return RunForCost(settings, policy, regime, seed, line)


def main() -> None:
    given = tuning_arguments(__doc__, RESULTS)
    rows = Rows(given.output, DRIVER)
    if given.report:
        table = rows.frame()
        keys = ["regime", "price", "selector"]
        print(measures(table).groupby(keys).mean().round(4).to_string())
        for name in PER_COST:
            print(f"{name} against {PLAIN}")
            print(paired(table, name, PLAIN).to_string())
        return
    pending = {
        Cell(regime, name, seed): line
        for regime, seed, (name, line) in product(
            (pools.LENGTHS, "balanced"), SEEDS, COMPARED.items()
        )
    }
    run_all(pending, rows, DRIVER, "dev", given.workers, PRICES)


if __name__ == "__main__":
    main()
