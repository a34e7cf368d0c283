"""A stage selects: candidates are measured, ranked, taken, and all of it is noted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from trl_learnalign import bridge
from trl_learnalign.curriculum import Phase, Plan, is_scored
from trl_learnalign.data.categories import Grouping
from trl_learnalign.measuring.needs import Report
from trl_learnalign.measuring.stage import StageMeasurer
from trl_learnalign.planning.forecast import scored_prompts
from trl_learnalign.ranking.breadth import breadth
from trl_learnalign.ranking.ranking import Choice, Ranking
from trl_learnalign.ranking.reliability import reliability
from trl_learnalign.ranking.stage_table import overlap
from trl_learnalign.ranking.subset import subset_of
from trl_learnalign.records.note_parts import Reliability
from trl_learnalign.records.notes import SelectionNote
from trl_learnalign.records.run import RunRecord
from trl_learnalign.selectors import Selector
from trl_learnalign.training.interruption import interruption_told
from trl_learnalign.training.metrics import scoring_line, selection_lines, selection_metrics
from trl_learnalign.training.reasons import (
    ChoiceTables,
    shares_of_choice,
    warn_of_narrow,
    warn_of_shortfall,
)

logger = logging.getLogger(__name__)


class StageSelection:
    """Selects the prompts of stages.

    Args:
        measurer (`StageMeasurer`): Measures and ranks candidates.
        record (`RunRecord`): Where selections are noted.
        plan (`Plan`): The run's plan.
        groupings (sequence of `Grouping`, *optional*): Columns by which a choice is told.
    """

    def __init__(
        self,
        measurer: StageMeasurer,
        record: RunRecord,
        plan: Plan,
        groupings: Sequence[Grouping] = (),
    ):
        self.measurer = measurer
        self.record = record
        self.stages, self.geometry = plan.stages, plan.geometry
        self.is_scoring = False
        self._context = measurer.context
        self._groupings = groupings
        trackers = bridge.TrackerTables(self._context.trainer)
        self._tables = ChoiceTables(trackers, self._context.config.log_prompt_table, groupings)

    def select(
        self, phase: Phase, step: int, candidates: np.ndarray, selector: Selector
    ) -> np.ndarray:
        """Rows of the dataset for a stage, `(N,)`; all ranks call it together and get the same.

        Args:
            phase (`Phase`): The stage.
            step (`int`): Optimizer step that the policy has reached.
            candidates (`np.ndarray`): Rows that may be taken, ascending.
            selector (`Selector`): Who ranks them.
        """
        config = self._context.config
        if not is_scored(config, phase.size, len(candidates), len(self._context.dataset)):
            self.record.note(
                phase.name, SelectionNote(step=step, scored=False, selected=len(candidates))
            )
            return candidates
        count = len(candidates)
        scored = scored_prompts(count, config, selector.needs) or count
        line = scoring_line(selector, scored, self.geometry.rollouts)
        logger.info("%s: %s", phase.name, line)
        with self._scoring(), interruption_told(self._context.trainer):
            pool, report = self.measurer.measure(phase.name, step, candidates, [selector])
            size = min(phase.size, len(pool))
            ranking = self.measurer.rank(pool, selector, size)
            agreement = reliability(ranking, size) if config.reliability else None
        # A stage of no prompts cannot be trained on: even a shrunk one fills its first generation.
        least = self.geometry.prompts_per_generation
        choice = ranking.take(phase.size, candidates, config.on_shortfall, least)
        shortfall = ranking.shortfall(choice, phase.size)
        warn_of_shortfall(phase.name, shortfall, config.on_shortfall)
        self._note(phase, step, ranking, choice, report, agreement, candidates)
        return choice.rows

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        self.is_scoring = True
        try:
            yield
        finally:
            self.is_scoring = False

    def _note(
        self,
        phase: Phase,
        step: int,
        ranking: Ranking,
        choice: Choice,
        report: Report,
        agreement: Reliability | None,
        candidates: np.ndarray,
    ) -> None:
        trainer = self._context.trainer
        table = ranking.table(choice)
        self.record.write_stage(phase.name, table)
        self._keep(phase, table, choice)
        self.record.write_examples(phase.name, ranking.examples())
        note = SelectionNote(
            step=step,
            scored=True,
            overlap=self._overlap(phase, ranking, choice),
            not_scored=len(candidates) - len(ranking.pool),
            unscored_selected=len(choice.unscored),
            shortfall=ranking.shortfall(choice, phase.size),
            no_signal=self._context.no_signal(ranking.pool.rewards, ranking.pool.lengths),
            scoring=report.entry(),
            cost=report.cost(bridge.extra_forwards(trainer)),
            reliability=agreement,
            breadth=breadth(ranking.pool, choice.positions),
            shares=shares_of_choice(ranking, choice, candidates, self._groupings),
            **vars(ranking.summary(choice)),
        )
        if note.breadth is not None and note.breadth.narrowness:
            logger.warning("%s: %s.", phase.name, note.breadth.narrowness)
        warn_of_narrow(phase.name, note.shares)
        self.record.note(phase.name, note)
        bridge.log_apart(trainer, selection_metrics(note, self._number(phase)))
        self._tables.show(phase.name, table, note.shares)
        for line in selection_lines(note):
            logger.info("%s: %s", phase.name, line)

    def _keep(self, phase: Phase, table: pa.Table, choice: Choice) -> None:
        """The chosen prompts with all their columns: what can be published later, without the dataset."""
        if self.record.writes:
            subset = subset_of(self._context.dataset, table, choice.rows)
            self.record.write_selected(phase.name, subset.data.table)

    def _overlap(self, phase: Phase, ranking: Ranking, choice: Choice) -> float | None:
        """How much of the choice the ranking of the stage before would have made too."""
        before, ranks = self._number(phase) - 2, self._context.ranks
        table = None
        if before >= 0 and ranks.is_main:
            table = self.record.read_stage(self.stages[before].name)
        share = None if table is None else overlap(table, choice.rows, ranking.pool.prompts)
        return ranks.from_main(share)

    def _number(self, phase: Phase) -> int:
        """Which stage it is, from 1."""
        return [stage.name for stage in self.stages].index(phase.name) + 1
