"""Needs of a selector → a measured pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measures import runner
from trl_learnalign.measures.rollouts import GradientMeasure, RolloutMeasure
from trl_learnalign.measures.runner import Measured, Work
from trl_learnalign.pool import Pool
from trl_learnalign.selectors import GRADIENTS, ROLLOUTS, Selector

if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass
class Report:
    """What measuring took; tokens are over all ranks, and over the runs that it continued.

    Args:
        seconds (`float`): Wall time of this run.
        tokens_generated (`int`): Completion tokens of all rollouts.
        tokens_captured (`int`): Tokens, prompt and completion, that went through gradient capture.
        coverage (`dict`): Share of the trainable entries in the features, and parameters captured otherwise or not.
    """

    seconds: float = 0.0
    tokens_generated: int = 0
    tokens_captured: int = 0
    coverage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolMeasurer:
    """Measures what a selector needs, with a trainer that is left as found.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        config (`LearnAlignConfig`): Settings.
        ranks (`Ranks`): The processes.
        phase (`int`): `Phase.index`.
        success_index (`int`): Which reward function decides success.
        rollout_prompts (`int`): Prompts of one generation call.
    """

    trainer: GRPOTrainer
    config: LearnAlignConfig
    ranks: Ranks
    phase: int
    success_index: int
    rollout_prompts: int

    def measure(self, work: Work, selector: Selector) -> tuple[Pool, Report]:
        """Measure the candidates of some work; all ranks call it together."""
        pool = Pool(
            prompts=work.candidates,
            dataset=self.trainer.train_dataset,
            seed=self.config.selection_seed,
            phase=self.phase,
            ranks=self.ranks,
        )
        report = Report()
        if GRADIENTS in selector.needs:
            self._add_gradients(work, selector.only_learnable, pool, report)
        elif ROLLOUTS in selector.needs:
            self._add_rollouts(work, pool, report)
        return pool, report

    def _add_gradients(self, work: Work, only_learnable: bool, pool: Pool, report: Report) -> None:
        measure = self._gradients(only_learnable)
        # Features of all prompts serve those who need the learnable ones' only.
        if only_learnable and runner.is_finished(work, everything := self._gradients(False), self.ranks):
            measure = everything
        measured = runner.run(work, measure, self.ranks)
        self._take_rollouts(measured, pool, report)
        pool.features, pool.feature_dim = measured.features, measure.projection.dim
        pool.finite = measured.values["finite"]
        report.tokens_captured += int(measured.values["tokens_captured"].sum())
        report.coverage = measure.coverage

    def _add_rollouts(self, work: Work, pool: Pool, report: Report) -> None:
        choices = [RolloutMeasure(*self._settings), self._gradients(True), self._gradients(False)]
        finished = (measure for measure in choices if runner.is_finished(work, measure, self.ranks))
        self._take_rollouts(runner.run(work, next(finished, choices[0]), self.ranks), pool, report)

    def _take_rollouts(self, measured: Measured, pool: Pool, report: Report) -> None:
        pool.successes, pool.lengths, pool.rewards = (measured.values[name] for name in RolloutMeasure.small)
        report.seconds += measured.seconds
        report.tokens_generated += int(pool.lengths.sum())

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.trainer, self.config, self.ranks, self.phase, self.success_index, self.rollout_prompts

    def _gradients(self, only_learnable: bool) -> GradientMeasure:
        return GradientMeasure(*self._settings, only_learnable=only_learnable)
