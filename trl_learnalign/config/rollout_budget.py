"""How many rollouts scoring may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from trl_learnalign.config.base import setting
from trl_learnalign.config.checks import memory, ranged, whole
from trl_learnalign.config.ordering import Ordering
from trl_learnalign.config.selection import Selection


@dataclass
class RolloutBudget(Ordering, Selection):
    """A rollout budget: few candidates are rolled out, those that are believed to teach most."""

    rollout_budget: Annotated[float | None, memory] = setting(
        None,
        "Share of a stage's candidates that are rolled out to score it, in rounds: a random sample first, then rather "
        "those whose learnability is believed to be large, by all rollouts so far. The others have no score and are "
        "selected only to fill a larger stage. Default: all candidates, as the paper. What is believed follows "
        "adaptive_embeddings and the settings beside it.",
    )
    budget_rounds: Annotated[int, whole(1)] = setting(
        4, "Rounds that rollout_budget is spent in, equally large. 1: a random sample alone."
    )
    budget_exponent: Annotated[float, ranged(0, 100)] = setting(
        2.0,
        "Prompts of a round after the first are drawn with probabilities in proportion to their expected learnability "
        "to this power. 0: anybody; the larger, the more often the best, and the fewer kinds of prompts.",
    )

    @property
    def keeps_belief(self) -> bool:
        """Whether something is believed of every prompt's success rate: by an adaptive order or a rollout budget."""
        return self.is_adaptive or self.rollout_budget is not None

    def _check_together(self) -> None:
        super()._check_together()
        if self.rollout_budget is None:
            return
        if self.pool_sample is not None:
            raise ValueError(
                f"rollout_budget={self.rollout_budget} and pool_sample={self.pool_sample} both say how many "
                "candidates are scored: leave one of them unset."
            )
        if self.leaves_the_order:
            raise ValueError(
                f"rollout_budget={self.rollout_budget} with order='trainer': nothing is scored there; leave "
                "rollout_budget unset, or choose 'shuffled' or 'adaptive'."
            )
