"""Gain for cost: the expected gain of a prompt divided by the expected tokens of its rollouts, on development tasks.

    python benchmarks/continual/gain_for_cost.py            # all cells; interrupt it at will and call it again
    python benchmarks/continual/gain_for_cost.py --report   # paired differences to the adaptive order as it is

The pool is `lengths` of `continual.pools`, whose completions have two or ten tokens. A rollout is expected to have the
tokens of its prompt and a completion as long as those of its kind (`family`) were on average; of a kind that was never
rolled out, as those of all kinds. Cells are run as in `by_need.py`.
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
from trl_learnalign.adaptive.belief import Belief, Posterior
from trl_learnalign.adaptive.order import AdaptiveOrder
from trl_learnalign.config import LearnAlignConfig

RESULTS = RESULTS_FOLDER / "gain_for_cost_tuning.parquet"
DRIVER = "continual.gain_for_cost:GainForCostDriver"
SEEDS = range(100, 104)
PRIOR_ROLLOUTS = 2.0
"""Weight of all kinds' mean length in the mean of one kind."""

PLAIN = "adaptive, G = 2"
PER_TOKEN = "gain per token"
COMPARED = {PLAIN: LINES[PLAIN], PER_TOKEN: replace(LINES[PLAIN], per_token=True)}


class BeliefPerToken(Belief):
    """A belief whose posteriors have the variance for each token, which the order then compares prompts by.

    Args:
        features, config: As in the class above.
        prompt_tokens (`np.ndarray`): Tokens of each prompt, `(n,)`.
        kinds (`np.ndarray`): Its kind, whole numbers from 0, `(n,)`.
    """

    def __init__(
        self,
        features: np.ndarray,
        config: LearnAlignConfig,
        prompt_tokens: np.ndarray,
        kinds: np.ndarray,
    ):
        super().__init__(features, config)
        self.prompt_tokens, self.kinds = prompt_tokens, kinds
        self.tokens, self.rollouts = np.zeros((2, kinds.max() + 1))

    def see(self, rows: np.ndarray, tokens: np.ndarray, rollouts: int) -> None:
        """Count the tokens generated for prompts, `(P,)`, by so many rollouts of each."""
        np.add.at(self.tokens, self.kinds[rows], tokens)
        np.add.at(self.rollouts, self.kinds[rows], rollouts)

    def expected_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of a rollout of each prompt, the prompt's included, `(P,)`."""
        mean = self.tokens.sum() / max(self.rollouts.sum(), 1)
        lengths = (self.tokens + PRIOR_ROLLOUTS * mean) / (self.rollouts + PRIOR_ROLLOUTS)
        return self.prompt_tokens[rows] + lengths[self.kinds[rows]]

    def posterior(self, rows: np.ndarray, generation: int) -> Posterior:
        """As of the belief, the variance divided by the expected tokens."""
        found = super().posterior(rows, generation)
        return replace(found, share=found.share / self.expected_tokens(np.asarray(rows)))


class RunForCost(Run):
    """A run that counts what kinds of prompts it rolls out, and divides the gain if the line says so."""

    def _chooser(self, adaptive: LearnAlignConfig) -> tuple[Belief, AdaptiveOrder]:
        belief, order = super()._chooser(adaptive)
        names, self.kinds = np.unique(self.problems.dataset["family"], return_inverse=True)
        self.names, self.rolled_out = names.tolist(), np.zeros(len(names), dtype=np.int64)
        if self.line.per_token:
            lengths = np.array([len(prompt) for prompt in self.problems.prompts])
            belief = BeliefPerToken(belief.features, adaptive, lengths, self.kinds)
        return belief, order

    def _roll_out(self, rows: np.ndarray, number: int) -> Rollouts:
        rollouts = super()._roll_out(rows, number)
        np.add.at(self.rolled_out, self.kinds[rows], self.settings.rollouts)
        if isinstance(self.chooser[0], BeliefPerToken):
            self.chooser[0].see(rows, rollouts.generated, self.settings.rollouts)
        return rollouts

    def notes(self) -> dict[str, Any]:
        """As of any run, and the rollouts of each kind."""
        rolled_out = dict(zip(self.names, self.rolled_out.tolist(), strict=True))
        return {**super().notes(), "rollouts": rolled_out}


class GainForCostDriver(ByNeedDriver):
    """The quick driver on the pools of `continual.pools`, with the gain for the cost where a line asks for it."""

    def begun(self, settings: Settings, policy: Policy, regime: str, seed: int, line: Line) -> Run:
        """A run before its first step."""
        return RunForCost(settings, policy, regime, seed, line)


def main() -> None:
    given = tuning_arguments(__doc__, RESULTS)
    rows = Rows(given.output, DRIVER)
    if given.report:
        table = rows.frame()
        print(measures(table).groupby(["price", "selector"]).mean().round(4).to_string())
        print(f"{PER_TOKEN} against {PLAIN}")
        print(paired(table, PER_TOKEN, PLAIN).to_string())
        return
    pending = {
        Cell(pools.LENGTHS, name, seed): line
        for seed, (name, line) in product(SEEDS, COMPARED.items())
    }
    run_all(pending, rows, DRIVER, "dev", given.workers, PRICES)


if __name__ == "__main__":
    main()
