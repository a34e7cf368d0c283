"""What is noted of a phase's rollouts when it ends: what they came to, and how right the belief about them was."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from trl_learnalign.adaptive.calibration import (
    area_under_curve,
    brier_score,
    calibration_error,
    reliability_bins,
)
from trl_learnalign.curriculum import Phase
from trl_learnalign.data.prompts import prompt_text, prompts_of
from trl_learnalign.measuring.examples import clipped
from trl_learnalign.ranking.shares import shares_of
from trl_learnalign.records.history import HistoryRecorder
from trl_learnalign.records.note_parts import CalibrationBin, RepeatedPrompt
from trl_learnalign.records.notes import BeliefNote, Note, RolloutsNote
from trl_learnalign.records.outcomes import Outcomes
from trl_learnalign.records.shares import Shares
from trl_learnalign.training.additions import Additions
from trl_learnalign.training.metrics import phase_line
from trl_learnalign.training.order import EpochOrder
from trl_learnalign.training.tally import Tally

logger = logging.getLogger(__name__)

REPEATED = 5
"""Prompts that are named as rolled out most often."""

CHARACTERS = 500
"""Of the text of such a prompt."""


class PhaseEnd:
    """Sums up the rollouts of phases.

    Args:
        dataset (`datasets.Dataset`): With a `prompt` column.
        order (`EpochOrder`): Which prompts were rolled out, and what was believed of them.
        history (`HistoryRecorder`): What came out.
        additions (`Additions`): What was skipped.
        tally (`Tally`): What came out where the history does not know it, in the trainer's own order.
    """

    def __init__(
        self,
        dataset: Any,
        order: EpochOrder,
        history: HistoryRecorder,
        additions: Additions,
        tally: Tally,
    ):
        self.dataset = dataset
        self.order, self.history, self.additions, self.tally = order, history, additions, tally

    def notes(self, phase: Phase) -> list[Note]:
        """Notes of a phase that has just ended; all ranks call it together and get the same."""
        ranks, found = self.order.ranks, None
        if ranks.is_main:
            outcomes = Outcomes.of(self.history.table()).of_phase(phase.name)
            rollouts, belief = self._rollouts(phase, outcomes), self._belief(phase, outcomes)
            found = [rollouts] if belief is None else [rollouts, belief]
            config = self.order.config
            if config.goes_by_outcomes or config.skip_zero_advantages or config.samples_dynamically:
                logger.info("%s: %s", phase.name, phase_line(rollouts, belief))
        return ranks.from_main(found)

    def _belief(self, phase: Phase, outcomes: Outcomes) -> BeliefNote | None:
        if self.order.adaptive is None:
            return None
        belief = self.order.adaptive.belief
        return belief_note(phase.end, outcomes, belief.concentration)

    def _rollouts(self, phase: Phase, outcomes: Outcomes) -> RolloutsNote:
        geometry = self.order.geometry
        tokens: dict[str, Any] = {**self.additions.skipped()}
        repeated: tuple[RepeatedPrompt, ...] = ()
        shares: tuple[Shares, ...] = ()
        if self.order.order_of(phase) not in ("shuffled", "trainer"):
            repeated = most_often(outcomes, self.dataset)
            pool, seed = self.order.run.pool_of(phase), self.order.config.selection_seed
            shares = shares_of(self.order.groupings, pool, outcomes.rows, seed, phase.name)
        if self.order.config.leaves_the_order:
            return RolloutsNote(
                step=phase.end,
                groups=self.tally.groups,
                useful=self.tally.useful,
                mixed=self.tally.mixed,
                groups_trained=self.tally.trained,
                **tokens,
                not_skipped=self.additions.not_skipped,
            )
        return RolloutsNote(
            step=phase.end,
            groups=len(outcomes),
            useful=int(outcomes.useful.sum()),
            mixed=int(outcomes.mixed.sum()),
            prompts=len(np.unique(outcomes.rows)),
            groups_trained=geometry.prompts_in(phase.steps),
            **tokens,
            not_skipped=self.additions.not_skipped,
            repeated=repeated,
            shares=shares,
        )


def belief_note(step: int, outcomes: Outcomes, concentration: float) -> BeliefNote:
    """How right the belief was.

    Args:
        step (`int`): Optimizer step that the phase has ended at.
        outcomes (`Outcomes`): Its groups of rollouts.
        concentration (`float`): The value that is used.
    """
    held = outcomes.predictions
    predicted, right, wrong = held.predicted, held.right, held.wrong
    rollouts = int(held.judged.sum())
    bins = reliability_bins(predicted, right, wrong)
    entries = tuple(
        CalibrationBin(
            low=one.low,
            high=one.high,
            groups=one.prompts,
            rollouts=one.rollouts,
            predicted=_known(one.predicted),
            seen=_known(one.seen),
        )
        for one in bins
    )
    return BeliefNote(
        step=step,
        rollouts=rollouts,
        predicted=float(predicted @ held.judged / rollouts) if rollouts else None,
        seen=float(right.sum() / rollouts) if rollouts else None,
        brier=_known(brier_score(predicted, right, wrong)),
        auc=_known(area_under_curve(predicted, right, wrong)),
        calibration_error=_known(calibration_error(bins)),
        bins=entries,
        concentration=concentration,
    )


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def most_often(outcomes: Outcomes, dataset: Any) -> tuple[RepeatedPrompt, ...]:
    """Prompts that were rolled out most often, and more than once; of equal ones the earlier rows.

    Args:
        outcomes (`Outcomes`): Groups of rollouts.
        dataset (`datasets.Dataset`): With a `prompt` column.
    """
    rows, counts = np.unique(outcomes.rows, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:REPEATED]
    places = [place for place in order.tolist() if counts[place] > 1]
    texts = prompts_of(dataset, rows[places]) if places else []
    found = []
    for place, prompt in zip(places, texts, strict=True):
        rates = outcomes.success_rates[outcomes.rows == rows[place]]
        entry = RepeatedPrompt(
            index=int(rows[place]),
            prompt=clipped(prompt_text(prompt), CHARACTERS),
            times=int(counts[place]),
            first=_known(float(rates[0])),
            last=_known(float(rates[-1])),
        )
        found.append(entry)
    return tuple(found)
