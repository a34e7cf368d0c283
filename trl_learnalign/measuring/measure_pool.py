"""Runs the measurements that a selector needs, and builds its pool.

A selector declares names (`trl_learnalign.selectors.NEEDS`). Each name becomes a [`Requirement`]: the measures that
can satisfy it, and a function that puts their results into the pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trl_learnalign import scoring
from trl_learnalign.measuring import base
from trl_learnalign.measuring.base import Context, Measure, MeasureJob, MeasureResult, Validation
from trl_learnalign.measuring.rollouts import GradientMeasure, RolloutMeasure
from trl_learnalign.measuring.text_measures import HiddenMeasure, solutions, text_measures
from trl_learnalign.pool import Pool, RolloutTexts
from trl_learnalign.records import layout
from trl_learnalign.records.history import read_history
from trl_learnalign.records.notes import CoverageEntry, ScoringEntry
from trl_learnalign.selectors import (
    GRADIENTS,
    HISTORY,
    ROLLOUTS,
    VALIDATION,
    Selector,
    needs_solutions,
    solution_column,
)

logger = logging.getLogger(__name__)


_SUMS = {
    "tokens_generated": "lengths",
    "tokens_prompt": "prompt_tokens",
    "tokens_captured": "tokens_captured",
}
"""Token counts of [`ScoringEntry`] → the results that they are sums of."""


def _amounts(measured: MeasureResult) -> dict[str, float]:
    """Return seconds and tokens of a measure, by the fields of [`ScoringEntry`]."""
    amounts = {"seconds": measured.seconds, "tokens_read": measured.tokens_read}
    for name, result in _SUMS.items():
        if result in measured.values:
            amounts[name] = int(measured.values[result].sum())
    return amounts


@dataclass(frozen=True)
class Requirement:
    """One requirement of a selector.

    Args:
        work (`MeasureJob`): The candidates to measure.
        choices (`tuple[Measure]`): Measures that satisfy it. One that is on disk already is used, otherwise the first.
        answer (callable): `answer(pool, measure, measured)` puts the results into the pool.
        label (`str`): Name in the report, after the measure's name.
        free (`tuple[str]`): Amounts of the report that are not charged, since another selector has caused them.
    """

    work: MeasureJob
    choices: tuple[Measure, ...]
    answer: Callable[[Pool, Any, MeasureResult], None]
    label: str = ""
    free: tuple[str, ...] = ()


def asks(
    context: Context,
    selector: Selector,
    work: MeasureJob,
    validation: Validation | None = None,
) -> Iterator[Requirement]:
    """Yield the requirements of a selector, in the order in which they are measured.

    Args:
        context (`Context`): Trainer and options for measuring.
        selector (`Selector`): The selector, with `needs`.
        work (`MeasureJob`): The candidates.
        validation (`Validation`, *optional*): Trusted prompts, for selectors that compare with them.

    Raises:
        `ValueError`, `OSError`: If a tokenizer does not fit, or cannot be loaded.
    """
    if GRADIENTS in selector.needs:
        # Features of all prompts also serve selectors that need those of learnable prompts only.
        kinds = (True, False) if selector.only_learnable else (False,)
        yield Requirement(
            work, tuple(GradientMeasure(context, only) for only in kinds), _take_features
        )
    elif ROLLOUTS in selector.needs:
        choices = (
            RolloutMeasure(context),
            GradientMeasure(context, True),
            GradientMeasure(context, False),
        )
        # Existing gradient measurements are used for their rollouts; this selector needs no captures.
        yield Requirement(work, choices, _take_rollouts, free=("tokens_captured",))
    if VALIDATION in selector.needs:
        assert validation is not None
        yield _validation_ask(context, work, validation)
    for measure in text_measures(context, selector):
        yield Requirement(work, (measure,), _take_texts)


def _validation_ask(context: Context, work: MeasureJob, validation: Validation) -> Requirement:
    count = len(validation.dataset)
    validation_work = replace(
        work,
        name=f"{work.name} (validation set)",
        candidates=np.arange(count),
        folder=work.folder / layout.VALIDATION,
        fingerprint={**work.fingerprint, "dataset": validation.digest, "candidates": count},
    )
    context = context.of_phase(f"{context.phase} validation", validation.dataset)
    # All prompts, learnable or not: the mean is the gradient of the objective on the validation set.
    measure = GradientMeasure(context, only_learnable=False)
    return Requirement(validation_work, (measure,), _take_target, label=" of the validation set")


def measure_pool(
    context: Context,
    selector: Selector,
    work: MeasureJob,
    validation: Validation | None = None,
) -> tuple[Pool, ScoringEntry]:
    """Measure what a selector needs of some candidates; collective over all ranks.

    Args:
        context (`Context`): Trainer and options for measuring; the trainer's state is restored.
        selector (`Selector`): The selector that will score the pool.
        work (`MeasureJob`): The candidates.
        validation (`Validation`, *optional*): Trusted prompts, for selectors that compare with them.
    """
    pool = Pool(
        prompts=work.candidates,
        dataset=context.dataset,
        seed=context.config.selection_seed,
        phase=context.phase,
        ranks=context.ranks,
        config=context.config,
    )
    measures: dict[str, dict[str, float]] = {}
    checked: dict[str, Any] = {}
    for ask in asks(context, selector, work, validation):
        measure = _finished(ask, context) or ask.choices[0]
        measured = base.run(ask.work, measure, context.ranks)
        ask.answer(pool, measure, measured)
        measures[measure.name + ask.label] = {**_amounts(measured), **dict.fromkeys(ask.free, 0)}
        if isinstance(measure, GradientMeasure) and ask.answer is _take_features:
            coverage = CoverageEntry(**measure.coverage) if measure.coverage else None
            checked = {"coverage": coverage, "self_check": measure.self_check}
    if needs_solutions(selector, context.config):
        _warn_of_missing_solutions(context, work)
    if HISTORY in selector.needs:
        _add_history(context, pool)
    return pool, ScoringEntry.of(measures, **checked)


def is_measured(
    context: Context,
    selector: Selector,
    work: MeasureJob,
    validation: Validation | None = None,
) -> bool:
    """Whether all that a selector needs is on disk; collective over all ranks, arguments as in [`measure_pool`]."""
    # A list and no generator: each check is collective, also after a measure that is missing.
    measures: Sequence[Measure | None] = [
        _finished(ask, context) for ask in asks(context, selector, work, validation)
    ]
    return None not in measures


def _finished(ask: Requirement, context: Context) -> Measure | None:
    """Return the measure that is already complete on disk, if there is one."""
    for measure in ask.choices:
        if base.is_finished(ask.work, measure, context.ranks):
            return measure
    return None


def _take_rollouts(pool: Pool, measure: Measure, measured: MeasureResult) -> None:
    pool.successes = measured.values["successes"]
    pool.lengths = measured.values["lengths"]
    pool.rewards = measured.values["rewards"]
    chunks = measured.features
    pool.texts = RolloutTexts(chunks.store, chunks.numbers, chunks.shard_size, pool.ranks)


def _take_features(pool: Pool, measure: GradientMeasure, measured: MeasureResult) -> None:
    _take_rollouts(pool, measure, measured)
    pool.features, pool.feature_dim = measured.features, measure.projection.dim
    pool.finite = measured.values["finite"]


def _take_target(pool: Pool, measure: GradientMeasure, measured: MeasureResult) -> None:
    count, dim = len(measured.values["finite"]), measure.projection.dim
    pool.target = scoring.mean_feature(
        measured.features, count, dim, pool.ranks.all_sum, pool.ranks.most
    )
    if not pool.target.any():
        logger.warning(
            "%s: no validation prompt has a gradient, because all rollouts of each earned the same reward. All "
            "scores are therefore 0. Use more validation prompts, or easier or harder ones.",
            pool.phase,
        )


def _take_texts(pool: Pool, measure: Measure, measured: MeasureResult) -> None:
    # Results have the names of the pool's fields.
    for name, values in measured.values.items():
        setattr(pool, name, values)
    if isinstance(measure, HiddenMeasure):
        pool.hidden = measured.features
        pool.hidden_dim = measure.dimensions(measure.trainer.model)


def _warn_of_missing_solutions(context: Context, work: MeasureJob) -> None:
    column = solution_column(context.dataset.column_names, context.config)
    assert column is not None
    blank_count = solutions(context.dataset, work.candidates, column).count(None)
    if blank_count and context.ranks.is_main:
        logger.warning(
            "%s: %d of %d candidates have no solution in column %r. They cannot be scored and rank last.",
            work.name,
            blank_count,
            len(work.candidates),
            column,
        )


def _add_history(context: Context, pool: Pool) -> None:
    path = context.config.reward_history
    assert path is not None
    rates_and_mean = None
    if context.ranks.is_main:
        history = read_history(path)
        rates = history.of(pool.dataset, pool.prompts)
        unknown_count = int(np.isnan(rates).all(axis=1).sum())
        if unknown_count:
            logger.warning(
                "%s has no entry for %d of %d candidates. They cannot be scored and rank last.",
                path,
                unknown_count,
                len(pool),
            )
        rates_and_mean = rates, history.mean
    pool.history, pool.history_mean = context.ranks.from_main(rates_and_mean)
