"""Needs of a selector → a measured pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from trl_learnalign import scoring
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring import shards
from trl_learnalign.measuring.hidden import HiddenMeasure
from trl_learnalign.measuring.likelihoods import LengthMeasure, LikelihoodMeasure
from trl_learnalign.measuring.ratings import RatingMeasure
from trl_learnalign.measuring.rollouts import GradientMeasure, RolloutMeasure
from trl_learnalign.measuring.shards import Measure, Measured, Work
from trl_learnalign.measuring.texts import solutions
from trl_learnalign.pool import Pool, RolloutTexts
from trl_learnalign.records import layout
from trl_learnalign.records.history import read_history
from trl_learnalign.records.ledger import Cost
from trl_learnalign.records.notes import CoverageEntry, ScoringEntry
from trl_learnalign.selectors import (
    GRADIENTS,
    HIDDEN,
    HISTORY,
    LENGTHS,
    LIKELIHOODS,
    RATINGS,
    ROLLOUTS,
    VALIDATION,
    Selector,
    needs_solutions,
    solution_column,
)

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

AnyMeasure = TypeVar("AnyMeasure", bound=Measure)


@dataclass
class Report:
    """What measuring took; tokens are over all ranks, and over the runs that it continued.

    Args:
        seconds (`float`): Wall time.
        tokens_generated (`int`): Completion tokens of all rollouts.
        tokens_prompt (`int`): Prompt tokens, once for each rollout.
        tokens_captured (`int`): Tokens, prompt and completion, that went through gradient capture.
        tokens_read (`int`): Tokens of solutions, prompts and rating prompts that were read without rollouts.
        coverage (`dict`): Share of the trainable entries in the features, and parameters captured otherwise or not.
        self_check (`dict`): What comparing captured gradients with the trainer's own found, by measure.
        measures (`dict`): Seconds and tokens of each measure, by its name.
    """

    seconds: float = 0.0
    tokens_generated: int = 0
    tokens_prompt: int = 0
    tokens_captured: int = 0
    tokens_read: int = 0
    coverage: dict[str, Any] = field(default_factory=dict)
    self_check: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, measure: str, **amounts: float) -> None:
        """Count a measure's seconds and tokens, named as the fields."""
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)
        self.measures[measure] = amounts

    def cost(self, extra_forwards: int) -> Cost:
        """For the ledger; `extra_forwards` passes without a gradient go over each rollout."""
        return Cost(
            tokens_generated=self.tokens_generated,
            tokens_prompt=self.tokens_prompt,
            tokens_forward=self.tokens_read + extra_forwards * (self.tokens_generated + self.tokens_prompt),
            tokens_trained=self.tokens_captured,
            seconds=self.seconds,
        )

    def entry(self) -> ScoringEntry:
        """For the record."""
        coverage = CoverageEntry(**self.coverage) if self.coverage else None
        return ScoringEntry(**{**vars(self), "coverage": coverage})


def _amounts(measured: Measured) -> dict[str, float]:
    """Seconds and tokens of a measure, by the fields of [`Report`]."""
    sums = {"tokens_generated": "lengths", "tokens_prompt": "prompt_tokens", "tokens_captured": "tokens_captured"}
    counted = {name: int(measured.values[of].sum()) for name, of in sums.items() if of in measured.values}
    return {"seconds": measured.seconds, "tokens_read": measured.tokens_read, **counted}


def text_measures(trainer: GRPOTrainer, config: LearnAlignConfig, selector: Selector) -> list[Measure]:
    """The measures that read texts for a selector; no model is loaded.

    Raises:
        `ValueError`, `OSError`: If a tokenizer does not fit, or is not there.
    """
    column = solution_column(trainer.train_dataset.column_names, config)
    reader = config.likelihood_model
    measures: list[Measure] = []
    if LIKELIHOODS in selector.needs:
        measures.append(LikelihoodMeasure(trainer, config, column, reader))
    if RATINGS in selector.needs:
        measures.append(RatingMeasure(trainer, config, column, reader))
    if HIDDEN in selector.needs:
        measures.append(HiddenMeasure(trainer, config, column))
    if LENGTHS in selector.needs and LIKELIHOODS not in selector.needs:
        assert column is not None
        measures.append(LengthMeasure(trainer, column))
    return measures


@dataclass(frozen=True)
class Validation:
    """A trusted validation set.

    Args:
        dataset (`datasets.Dataset`): Its prompts, with the columns of training.
        digest (`str`): `dataset_digest` of it.
    """

    dataset: Any
    digest: str


@dataclass(frozen=True)
class PoolMeasurer:
    """Measures what a selector needs, with a trainer that is left as found.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        config (`LearnAlignConfig`): Settings.
        ranks (`Ranks`): The processes.
        phase (`str`): `Phase.name`.
        success_index (`int`): Which reward function decides success.
        rollout_prompts (`int`): Prompts of one generation call.
        validation (`Validation`, *optional*): Trusted prompts, for selectors that compare with them.
    """

    trainer: GRPOTrainer
    config: LearnAlignConfig
    ranks: Ranks
    phase: str
    success_index: int
    rollout_prompts: int
    validation: Validation | None = None

    def measure(self, work: Work, selector: Selector) -> tuple[Pool, Report]:
        """Measure the candidates of some work; all ranks call it together."""
        pool = Pool(
            prompts=work.candidates,
            dataset=self.trainer.train_dataset,
            seed=self.config.selection_seed,
            phase=self.phase,
            ranks=self.ranks,
            config=self.config,
        )
        report = Report()
        if GRADIENTS in selector.needs:
            self._add_gradients(work, selector.only_learnable, pool, report)
        elif ROLLOUTS in selector.needs:
            self._add_rollouts(work, pool, report)
        if VALIDATION in selector.needs:
            self._add_target(work, pool, report)
        for measure in text_measures(self.trainer, self.config, selector):
            self._add_texts(work, measure, pool, report)
        if needs_solutions(selector, self.config):
            self._warn_of_missing_solutions(work)
        if HISTORY in selector.needs:
            self._add_history(pool)
        return pool, report

    def is_measured(self, work: Work, selector: Selector) -> bool:
        """Whether all that a selector needs is on disk already; all ranks call it together."""
        wanted: list[tuple[Work, Sequence[Measure]]] = []
        if GRADIENTS in selector.needs:
            wanted.append((work, self._gradient_choices(selector.only_learnable)))
        elif ROLLOUTS in selector.needs:
            wanted.append((work, self._rollout_choices()))
        if VALIDATION in selector.needs:
            wanted.append(self._validation_work(work))
        wanted += [(work, [measure]) for measure in text_measures(self.trainer, self.config, selector)]
        return all(any(shards.is_finished(own, measure, self.ranks) for measure in choices) for own, choices in wanted)

    def _gradient_choices(self, only_learnable: bool) -> list[GradientMeasure]:
        # Features of all prompts serve those who need the learnable ones' only.
        return [self._gradients(only) for only in ((True, False) if only_learnable else (False,))]

    def _rollout_choices(self) -> list[RolloutMeasure]:
        return [RolloutMeasure(*self._settings), self._gradients(True), self._gradients(False)]

    def _finished(self, work: Work, choices: Sequence[AnyMeasure]) -> AnyMeasure:
        """The one that is there already, or the first."""
        return next((measure for measure in choices if shards.is_finished(work, measure, self.ranks)), choices[0])

    def _add_gradients(self, work: Work, only_learnable: bool, pool: Pool, report: Report) -> None:
        measure = self._finished(work, self._gradient_choices(only_learnable))
        measured = shards.run(work, measure, self.ranks)
        self._take_rollouts(measured, pool)
        pool.features, pool.feature_dim = measured.features, measure.projection.dim
        pool.finite = measured.values["finite"]
        report.add(measure.name, **_amounts(measured))
        report.coverage, report.self_check = measure.coverage, measure.self_check

    def _validation_work(self, work: Work) -> tuple[Work, list[GradientMeasure]]:
        validation = self.validation
        assert validation is not None
        count = len(validation.dataset)
        own = replace(
            work,
            name=f"{work.name} (validation set)",
            candidates=np.arange(count),
            folder=work.folder / layout.VALIDATION,
            fingerprint={**work.fingerprint, "dataset": validation.digest, "candidates": count},
        )
        # All of them: what is learnt or not, the mean is of the objective on the validation set.
        return own, [self._gradients(False, f"{self.phase} validation", validation.dataset)]

    def _add_target(self, work: Work, pool: Pool, report: Report) -> None:
        own, (measure,) = self._validation_work(work)
        measured = shards.run(own, measure, self.ranks)
        dim = measure.projection.dim
        pool.target = scoring.mean_feature(
            measured.features, len(own.candidates), dim, self.ranks.all_sum, self.ranks.most
        )
        if not pool.target.any():
            logger.warning(
                "%s: no validation prompt has a gradient (all of its rollouts earn the same), so no direction is "
                "better than another and all scores are 0. Use more, or easier or harder, validation prompts.",
                work.name,
            )
        report.add(f"{measure.name} of the validation set", **_amounts(measured))

    def _add_rollouts(self, work: Work, pool: Pool, report: Report) -> None:
        measure = self._finished(work, self._rollout_choices())
        measured = shards.run(work, measure, self.ranks)
        self._take_rollouts(measured, pool)
        # Gradients that are there already are taken for their rollouts; this selector needs no captures.
        report.add(measure.name, **{**_amounts(measured), "tokens_captured": 0})

    def _take_rollouts(self, measured: Measured, pool: Pool) -> None:
        pool.successes, pool.lengths, pool.rewards, _ = (measured.values[name] for name in RolloutMeasure.small)
        chunks = measured.features
        pool.texts = RolloutTexts(chunks.store, chunks.numbers, chunks.shard_prompts, self.ranks)

    def _add_texts(self, work: Work, measure: Measure, pool: Pool, report: Report) -> None:
        measured = shards.run(work, measure, self.ranks)
        for name, values in measured.values.items():
            setattr(pool, name, values)
        if isinstance(measure, HiddenMeasure):
            pool.hidden, pool.hidden_dim = measured.features, measure.dimensions(self.trainer.model)
        report.add(measure.name, **_amounts(measured))

    def _warn_of_missing_solutions(self, work: Work) -> None:
        dataset = self.trainer.train_dataset
        column = solution_column(dataset.column_names, self.config)
        assert column is not None
        missing = solutions(dataset, work.candidates, column).count(None)
        if missing and self.ranks.is_main:
            logger.warning(
                "%s: %d of %d candidates have no solution in column %r and cannot be ranked: they come last.",
                *(work.name, missing, len(work.candidates), column),
            )

    def _add_history(self, pool: Pool) -> None:
        assert self.config.reward_history is not None
        found = None
        if self.ranks.is_main:
            history = read_history(self.config.reward_history)
            found = history.of(pool.dataset, pool.prompts), history.mean
            unknown = int(np.isnan(found[0]).all(axis=1).sum())
            if unknown:
                logger.warning(
                    "%s knows nothing of %d of %d candidates: they cannot be ranked and come last.",
                    *(self.config.reward_history, unknown, len(pool)),
                )
        pool.history, pool.history_mean = self.ranks.from_main(found)

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.trainer, self.config, self.ranks, self.phase, self.success_index, self.rollout_prompts

    def _gradients(self, only_learnable: bool, phase: str | None = None, dataset: Any = None) -> GradientMeasure:
        trainer, config, ranks, own_phase, *rest = self._settings
        settings = (trainer, config, ranks, phase or own_phase, *rest, dataset)
        return GradientMeasure(*settings, only_learnable=only_learnable)
