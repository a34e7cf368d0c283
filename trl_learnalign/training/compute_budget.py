"""When a run has spent what it may: methods are compared at equal total compute."""

from __future__ import annotations

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.curriculum import Phase, Plan
from trl_learnalign.records.ledger import Cost
from trl_learnalign.records.run import RunRecord


class ComputeBudget:
    """Watches what the whole run has cost.

    Args:
        config (`LearnAlignConfig`): With `compute_budget`.
        record (`RunRecord`): Whose ledger has what phases before, and the stage's scoring, have cost.
    """

    def __init__(self, config: LearnAlignConfig, record: RunRecord):
        self._budget = config.compute_budget
        self._record = record

    def is_limited(self, plan: Plan, phase: Phase) -> bool:
        """Whether a phase may end by it: earlier ones than the last are charged and not cut."""
        return self._budget is not None and phase.index == plan.phases[-1].index

    def is_spent(self, training: Cost) -> bool:
        """Whether the budget is spent.

        Args:
            training (`Cost`): Of the phase that is being trained, so far.
        """
        assert self._budget is not None
        ledger = self._record.contents.ledger
        return ledger.compute(ledger.total + training) >= self._budget
