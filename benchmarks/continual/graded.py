"""Graded rewards: what the belief should see of them, on development tasks.

    python benchmarks/continual/graded.py            # all cells; interrupt it at will and call it again
    python benchmarks/continual/graded.py --report   # paired differences between the lines

The reward is the share of an answer's digits that stand in their place, and all lines train on it, with 2 rollouts a
prompt. The belief of a line sees these fractions (`success_range`), or whether a reward is above a threshold. The
control is the shuffled pool with skipping. What is evaluated is the mean reward of greedy answers. In the pool
`lengths` of `continual.pools` half of the answers have nine digits, and the others have one. Cells are run as in
`by_need.py`.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from selection.cells import RESULTS_FOLDER

from continual import pools
from continual.by_need import ByNeedDriver, measures, paired
from continual.cells import Line
from continual.group_size import PRICES
from continual.loop import Policy
from continual.table import LINES, Cell, Rows, run_all, tuning_arguments
from trl_learnalign.config import LearnAlignConfig

RESULTS = RESULTS_FOLDER / "graded_tuning.parquet"
DRIVER = "continual.graded:GradedDriver"
SEEDS = range(100, 104)
REGIMES = (pools.LENGTHS, "balanced", "longtail")

FRACTIONS, HALF, WHOLE, CONTROL = "fractions", "above a half", "all right", "skip, G = 2"
COMPARED = {
    FRACTIONS: Line(LearnAlignConfig.adaptive(success_range=[0.0, 1.0]), rollouts=2),
    HALF: LINES["adaptive, G = 2"],
    WHOLE: Line(LearnAlignConfig.adaptive(success_threshold=0.99), rollouts=2),
    CONTROL: LINES[CONTROL],
}


def digits_in_place(text: str, answer: str) -> float:
    """Share of digits that stand in their place, of the longer one of answer and text.

    Args:
        text (`str`): What the policy wrote.
        answer (`str`): The right answer.
    """
    own = text.strip()
    there = sum(ours == theirs for ours, theirs in zip(own, answer, strict=False))
    return there / max(len(own), len(answer))


class GradedPolicy(Policy):
    """The toy model with a graded reward."""

    def reward(self, text: str, answer: str) -> float:
        """From 0 to 1."""
        return digits_in_place(text, answer)


class GradedDriver(ByNeedDriver):
    """The quick driver on the pools of `continual.pools`, with a graded reward."""

    policy = GradedPolicy


def main() -> None:
    given = tuning_arguments(__doc__, RESULTS)
    rows = Rows(given.output, DRIVER)
    if given.report:
        table = rows.frame()
        keys = ["regime", "price", "selector"]
        print(measures(table).groupby(keys).mean().round(4).to_string())
        for theirs in (HALF, WHOLE, CONTROL):
            print(f"{FRACTIONS} against {theirs}")
            print(paired(table, FRACTIONS, theirs).to_string())
        return
    pending = {
        Cell(regime, name, seed): line
        for seed, regime, (name, line) in product(SEEDS, REGIMES, COMPARED.items())
    }
    run_all(pending, rows, DRIVER, "dev", given.workers, PRICES)


if __name__ == "__main__":
    main()
