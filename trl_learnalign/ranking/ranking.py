"""Scores → a ranking and a selection, its table and its reliability."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset, DatasetInfo, Features, Value
from datasets.table import InMemoryTable
from torch import Tensor

from trl_learnalign import scoring
from trl_learnalign.data.prompts import SOURCE_ROW, prompt_id, prompt_text, prompts_of, source_rows
from trl_learnalign.intervals import spearman
from trl_learnalign.pool import FeatureChunks, JoinedChunks, Pool
from trl_learnalign.records.export import FIGURES, PREFIX
from trl_learnalign.records.notes import Reliability, SelectionStatistics
from trl_learnalign.selectors import GRADIENTS, ROLLOUTS, Selector

if TYPE_CHECKING:
    import pyarrow as pa


# ---- Table of a stage -----------------------------------------------------------------------------------------------


def stage_table(
    pool: Pool,
    scores: np.ndarray,
    alignment: np.ndarray,
    order: np.ndarray,
    selected: np.ndarray,
) -> pa.Table:
    """The table of a stage.

    Args:
        pool (`Pool`): Its candidates.
        scores (`np.ndarray`): `(P,)`.
        alignment (`np.ndarray`): Mean alignment of each gradient, `(P,)`; NaN where there is none.
        order (`np.ndarray`): Positions from best to worst, `(P,)`.
        selected (`np.ndarray`): Positions of the selected ones.
    """
    size = len(pool)
    ranks = np.empty(size, dtype=np.int64)
    ranks[order] = np.arange(1, size + 1)
    is_selected = np.zeros(size, dtype=bool)
    is_selected[selected] = True
    prompts = list(prompts_of(pool.dataset, pool.prompts))
    lengths = np.full(size, np.nan)
    if pool.lengths is not None:
        lengths = pool.lengths.double().mean(dim=1).numpy()
    is_finite = np.ones(size, dtype=bool) if pool.finite is None else pool.finite.numpy()
    right, wrong = (_count(pool, outcome) for outcome in (1, 0))
    return pa.table(
        {
            "index": pool.prompts,
            "prompt_id": [prompt_id(prompt) for prompt in prompts],
            "prompt": [prompt_text(prompt) for prompt in prompts],
            "right": right,
            "wrong": wrong,
            "success_rate": _nullable(pool.success_rate),
            "learnability": _nullable(pool.learnability),
            "alignment": _nullable(alignment),
            "score": _nullable(scores),
            "rank": ranks,
            "selected": is_selected,
            "mean_completion_length": _nullable(lengths),
            "gradient_finite": is_finite,
        }
    )


def _count(pool: Pool, outcome: int) -> pa.Array:
    """Rollouts of each prompt with an outcome, 1 or 0; nulls where none were made."""
    if pool.successes is None:
        return pa.nulls(len(pool), pa.int64())
    return pa.array((pool.successes == outcome).sum(dim=1).numpy())


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def overlap(previous: pa.Table, selected: np.ndarray, candidates: np.ndarray) -> float | None:
    """Share of the chosen prompts that the previous stage's ranking would have taken of the same candidates.

    Args:
        previous (`pyarrow.Table`): The previous stage's table.
        selected (`np.ndarray`): Rows of the dataset that are chosen now.
        candidates (`np.ndarray`): Rows that could be.

    Returns:
        `float`, *optional*: `None` where there was no choice, or the previous stage scored none of the candidates.
    """
    rows, ranks = previous["index"].to_pylist(), previous["rank"].to_pylist()
    rank_of = dict(zip(rows, ranks, strict=True))
    in_both = [row for row in candidates.tolist() if row in rank_of]
    in_both.sort(key=rank_of.__getitem__)
    now = set(selected.tolist()) & set(in_both)
    if not now or len(now) == len(in_both):
        return None
    then = set(in_both[: len(now)])
    return len(now & then) / len(now)


# ---- Ranking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """The prompts that are taken.

    Args:
        positions (`np.ndarray`): Positions in the pool of those that were scored, best first.
        unscored (`np.ndarray`): Rows of the dataset that fill up what the scored ones leave free.
        rows (`np.ndarray`): All of them as rows of the dataset, best first.
    """

    positions: np.ndarray
    unscored: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Ranking:
    """What a selector makes of a pool.

    Args:
        selector (`Selector`): The selector.
        pool (`Pool`): The scored candidates, P of them.
        scores (`np.ndarray`): `(P,)` float64; NaN for those that cannot be ranked.
        ties (`np.ndarray`): Distinct numbers for all rows of the dataset, `(n,)`: equal scores are ordered by them.
    """

    selector: Selector
    pool: Pool
    scores: np.ndarray
    ties: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """Positions from best to worst, `(P,)`."""
        return scoring.rank(self.scores, self.ties[self.pool.prompts], self._ahead)

    @property
    def _ahead(self) -> np.ndarray | None:
        """Who ranks before all others, unless scores alone decide (`LearnAlignConfig.zero_learnability`)."""
        return self.eligible if self.pool.config.zero_learnability == "last" else None

    @property
    def eligible(self) -> np.ndarray:
        """`(P,)` bool: has a score of its own (for the method: learnability above 0)."""
        if self.selector.only_learnable:
            return self.pool.learnability > 0
        return ~np.isnan(self.scores)

    def take(self, size: int, candidates: np.ndarray, on_shortfall: str, least: int) -> Selection:
        """The best prompts; with `"fill"`, larger choices contain the smaller ones.

        Args:
            size (`int`): How many are wanted, at most `len(candidates)`.
            candidates (`np.ndarray`): Rows that may be taken; the pool's, and those that were not scored
                (`pool_sample`, `rollout_budget`), which come last, in tie order.
            on_shortfall (`str`): `"fill"` takes `size` prompts all the same, `"shrink"` those that are eligible.
            least (`int`): Prompts to take at least, also with `"shrink"`.
        """
        least = size if on_shortfall == "fill" else min(size, least)
        prompts, eligible, ahead = self.pool.prompts, self.eligible, self._ahead
        ties = self.ties[prompts]
        positions = scoring.select(self.scores, eligible, ties, size, on_shortfall, ahead)
        if len(positions) < least:
            positions = scoring.select(self.scores, eligible, ties, least, "fill", ahead)
        others = np.setdiff1d(candidates, prompts)
        others = others[np.argsort(self.ties[others])]
        unscored = others[: max(0, least - len(positions))]
        rows = np.concatenate([prompts[positions], unscored])
        return Selection(positions, unscored, rows)

    def table(self, choice: Selection) -> pa.Table:
        """One row per scored candidate; columns as in `trl_learnalign.records.run`."""
        alignment = self.selector.alignment(self.pool, self.scores)
        return stage_table(self.pool, self.scores, alignment, self.order, choice.positions)

    def examples(self) -> list[dict[str, Any]]:
        """The most telling candidates with a few of their rollouts; all ranks call it together.

        Returns:
            `list[dict]`: `group` (`"top"`, `"bottom"`, `"always right"`, `"always wrong"`), `index` (row of the
            dataset) and `rollouts` (`text`, `right`, `tokens` of each).
        """
        groups = representative_positions(
            self.order.tolist(), self.eligible.tolist(), self.pool.success_rate.tolist()
        )
        positions = list(itertools.chain.from_iterable(groups.values()))
        texts = {} if self.pool.texts is None else self.pool.texts.of(positions)
        examples = []
        for name, group in groups.items():
            for position in group:
                row = int(self.pool.prompts[position])
                rollouts = texts.get(position, [])
                examples.append({"group": name, "index": row, "rollouts": rollouts})
        return examples

    def shortfall(self, choice: Selection, size: int) -> str | None:
        """What a choice lacks, as the end of a sentence that begins with its name; `None` if nothing.

        Args:
            choice (`Choice`): The prompts that are taken.
            size (`int`): How many were asked for.
        """
        is_eligible = self.eligible
        eligible_count, total = int(is_eligible.sum()), len(self.pool)
        unranked_taken = int((~is_eligible[choice.positions]).sum())
        eligible_taken = len(choice.positions) - unranked_taken
        passed_over = ""
        if unranked_taken and eligible_count > eligible_taken:
            passed_over = (
                f"{eligible_count - eligible_taken} learnable ones of negative score are left out for them, as Eq. 9 "
                "ranks them; zero_learnability='last' takes the learnable ones first"
            )
        if eligible_count < size:
            can, cannot = "have a score", "without one"
            if self.selector.only_learnable:
                can, cannot = "are learnable", "of learnability 0"
            message = f"only {eligible_count} of {total} candidates {can}, "
            message += f"fewer than the {size} wanted; taken: {len(choice)}"
            if unranked_taken:
                message += f", {unranked_taken} of them {cannot}"
            if len(choice.unscored):
                message += f", {len(choice.unscored)} of them unscored"
            return f"{message}; {passed_over}" if passed_over else message
        if passed_over:
            return (
                f"{unranked_taken} prompts of learnability 0 (p = 0 or 1) are taken; {passed_over}"
            )
        return None

    def summary(self, choice: Selection) -> SelectionStatistics:
        """Counts and means of selected and left-out candidates, for record, log and table."""
        pool, selected = self.pool, choice.positions
        rest = np.setdiff1d(np.arange(len(pool)), selected)
        rate, learnability = pool.success_rate, pool.learnability
        statistics = SelectionStatistics(
            candidates=len(pool),
            selected=len(selected),
            success_rate=_mean(rate),
            success_rate_selected=_mean(rate[selected]),
            success_rate_left_out=_mean(rate[rest]),
            score_selected=_mean(self.scores[selected]),
            score_left_out=_mean(self.scores[rest]),
            gradients_not_finite=0 if pool.finite is None else int((~pool.finite).sum()),
        )
        if np.isnan(learnability).all():  # no rollouts were made
            return statistics
        is_learnable = learnability > 0
        return replace(
            statistics,
            learnable_share=float(is_learnable.mean()),
            unlearnable_selected=int((~is_learnable[selected]).sum()),
            learnable_left_out=int(is_learnable[rest].sum()),
        )


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def representative_positions(
    order: Sequence[int],
    eligible: Sequence[bool],
    success_rate: Sequence[float],
    best: int = 5,
    extremes: int = 2,
) -> dict[str, list[int]]:
    """Candidates worth showing, by group: the top and the bottom of the ranking, and prompts without a signal.

    Args:
        order (sequence of `int`): Positions from best to worst, `(P,)`.
        eligible (sequence of `bool`): `(P,)`: has a score of its own.
        success_rate (sequence of `float`): `(P,)`; NaN where there is none.
        best (`int`, *optional*, defaults to `5`): Prompts in each of `"top"` and `"bottom"`.
        extremes (`int`, *optional*, defaults to `2`): Prompts in each of `"always right"` and `"always wrong"`.
    """
    ranking = [int(position) for position in order if eligible[position]]
    top = ranking[:best]
    bottom = [position for position in ranking[-best:] if position not in top]
    groups = {"top": top, "bottom": bottom}
    at_the_ends = {*top, *bottom}
    for name, rate in (("always right", 1.0), ("always wrong", 0.0)):
        same = (int(position) for position in order if success_rate[position] == rate)
        others = (position for position in same if position not in at_the_ends)
        groups[name] = list(itertools.islice(others, extremes))
    return {name: positions for name, positions in groups.items() if positions}


# ---- Reliability ----------------------------------------------------------------------------------------------------
# A ranking that another draw of rollouts would not reproduce is not worth the training it decides. Each prompt's `G`
# rollouts are cut into two halves; the sketch is linear, so that two half features cost no further pass and add up to
# the whole one. The selector scores the pool with the success rates and features of either half.
#
# Spearman–Brown: if two halves correlate with `r`, rankings from `k` times as many rollouts as a half correlate with
# `k r / (1 + (k - 1) r)` (Spearman, 1910; Brown, 1910). It holds for averages of independent measurements.
# Learnability
# is none: of few rollouts it takes a few values only, so halves agree less than the formula expects and the prediction
# is mostly too low (`benchmarks/ranking_reliability.py` compares it with a second scoring). Advantages compare a half
# with all `G` rollouts, which works the other way, but less.

MULTIPLES = (1, 2, 4)
"""Times `G` for which agreement is predicted."""


def reliability(ranking: Ranking, size: int) -> Reliability | None:
    """Agreement of two half rankings; all ranks call it together.

    Args:
        ranking (`Ranking`): Of a pool that was measured with `LearnAlignConfig.reliability`.
        size (`int`): N of the top-N overlap.

    Returns:
        `Reliability` or `None`: `None` if the selector uses no rollouts, so that nothing varies.
    """
    if not {ROLLOUTS, GRADIENTS} & ranking.selector.needs:
        return None
    pool = ranking.pool
    assert pool.successes is not None
    rollouts = pool.successes.shape[1]
    pools = [half_pool(pool, half) for half in (0, 1)]
    scores = [pool.ranks.from_main(ranking.selector.score(half)) for half in pools]
    halves = [
        replace(ranking, pool=half, scores=values)
        for half, values in zip(pools, scores, strict=True)
    ]
    best = [set(half.order[:size].tolist()) for half in halves]
    correlation = spearman(*scores)
    predictions = {}
    for multiple in MULTIPLES:
        # A half has G / 2 rollouts: G are twice as many.
        times = 2 * multiple
        predictions[str(multiple * rollouts)] = spearman_brown(correlation, times)
    return Reliability(
        rollouts=rollouts,
        spearman_halves=correlation,
        overlap_halves=len(best[0] & best[1]) / size,
        overlap_by_chance=size / len(pool),
        overlap_size=size,
        spearman=predictions,
    )


@dataclass(frozen=True)
class _HalfFeatures:
    """Features of a half, zero for prompts whose rewards in it are all equal.

    Alone, these rollouts would have no advantages. Those that they have compare with the other half: kept, they would
    make both halves agree on which prompts have a gradient at all.
    """

    features: FeatureChunks | JoinedChunks
    silent: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for positions, values in self.features:
            yield positions, torch.where(self.silent[positions].unsqueeze(1), 0.0, values)


def _all_equal(rewards: Tensor) -> Tensor:
    """`(P, G', F)` rewards → `(P,)` bool; missing ones (NaN) are left out."""
    lowest = torch.nan_to_num(rewards, nan=float("inf")).amin(dim=1)
    highest = torch.nan_to_num(rewards, nan=float("-inf")).amax(dim=1)
    return (lowest >= highest).all(dim=1)


def half_pool(pool: Pool, half: int) -> Pool:
    """The pool as if only one half of the rollouts had been made.

    Args:
        pool (`Pool`): With an even number of rollouts.
        half (`int`): 0 or 1.
    """
    assert pool.successes is not None
    middle = pool.successes.shape[1] // 2
    rollouts = slice(middle) if half == 0 else slice(middle, None)
    features = pool.features
    if isinstance(features, FeatureChunks | JoinedChunks):
        assert pool.rewards is not None
        silent = _all_equal(pool.rewards[:, rollouts])
        features = _HalfFeatures(features.of_half(half), silent)
    return replace(
        pool,
        features=features,
        successes=pool.successes[:, rollouts],
        lengths=None if pool.lengths is None else pool.lengths[:, rollouts],
        rewards=None if pool.rewards is None else pool.rewards[:, rollouts],
    )


def spearman_brown(correlation: float | None, times: float) -> float | None:
    """Correlation of measurements that are `times` as long; `None` if there is no positive one to start from."""
    if correlation is None or correlation <= 0:
        return None
    return times * correlation / (1 + (times - 1) * correlation)


# ---- Agreement of selectors -----------------------------------------------------------------------------------------


def rank_correlations(scores: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Spearman's rank correlation between selectors.

    Args:
        scores (mapping of `str` to `np.ndarray`): Scores of the same P candidates by each selector, `(P,)`; NaN for
            those that it cannot rank, which are left out of its correlations. Equal scores share a rank.

    Returns:
        `pandas.DataFrame`: Square, by name; NaN where a selector ranks fewer than two candidates, or all alike.
    """
    table = pd.DataFrame(dict(scores))
    return table.corr(method="spearman", min_periods=2)


def overlaps(choices: Mapping[str, Sequence[int] | np.ndarray]) -> pd.DataFrame:
    """Share of prompts that selectors choose in common.

    Args:
        choices (mapping of `str` to sequence of `int`): Rows that each selector chooses, equally many.

    Returns:
        `pandas.DataFrame`: Square, by name.
    """
    names = list(choices)
    table = pd.DataFrame(index=names, columns=names, dtype=float)
    for first in names:
        for second in names:
            table.loc[first, second] = _share_in(choices[first], choices[second])
    return table


def _share_in(rows: Sequence[int] | np.ndarray, others: Sequence[int] | np.ndarray) -> float:
    """Share of the first rows that are among the others; 0 of none."""
    if not len(rows):
        return 0.0
    return float(np.isin(rows, others).mean())


# ---- Selection as a dataset -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRows:
    """Rows as their file has them, of which the prompts were made.

    Args:
        rows (`datasets.Dataset`): All that were read.
        numbers (`np.ndarray`): Where each stands in the file, ascending.
    """

    rows: Dataset
    numbers: np.ndarray

    def at(self, numbers: list[int]) -> Dataset:
        """The rows of these numbers, in their order."""
        places = np.searchsorted(self.numbers, numbers)
        return self.rows.with_format(None).select(places)


def subset_of(
    dataset: Dataset, table: pa.Table, rows: np.ndarray, originals: FileRows | None = None
) -> Dataset:
    """The chosen rows, best first, with all their columns and what the selection says of them.

    Added columns: `selection_index` (row of the file, or of the dataset if no file is known), `selection_rank` (from
    1), `selection_score`, `selection_success_rate`, `selection_learnability` and `selection_alignment`; missing values
    where nothing is known.

    Args:
        dataset (`datasets.Dataset`): Where the prompts are.
        table (`pyarrow.Table`): The candidates (`trl_learnalign.records.run`).
        rows (`np.ndarray`): Rows of the dataset that were chosen, `(N,)`, best first.
        originals (`FileRows`, *optional*): Rows to write in place of the dataset's, which were made of them.
    """
    indices = source_rows(dataset, rows)
    ranks = list(range(1, len(rows) + 1))
    made = _rows_alone(dataset, rows) if originals is None else _of_file(originals, indices)
    made = _with_column(made, "index", indices, "int64")
    made = _with_column(made, "rank", ranks, "int64")
    scored = table["index"].to_pylist()
    for name in FIGURES:
        values = table[name].to_pylist()
        by_row = dict(zip(scored, values, strict=True))
        # What fills up a larger choice was not scored.
        column = [by_row.get(row) for row in rows.tolist()]
        made = _with_column(made, name, column, "float64")
    return made


def _with_column(dataset: Dataset, name: str, values: list[Any], kind: str) -> Dataset:
    feature = Value(kind)
    return dataset.add_column(PREFIX + name, values, feature=feature)


def _of_file(originals: FileRows, indices: list[int]) -> Dataset:
    """Those rows in memory, without what an earlier selection said of them."""
    found = originals.at(indices)
    stale = [name for name in found.column_names if name.startswith(PREFIX)]
    kept = found.remove_columns(stale).with_format("arrow")[:]
    return Dataset(InMemoryTable(kept), info=DatasetInfo(features=_without(found.features, stale)))


def _without(features: Features, names: list[str]) -> Features:
    return Features({name: kind for name, kind in features.items() if name not in names})


def _rows_alone(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """Those rows in memory, without what an earlier selection said of them."""
    stale = []
    for name in dataset.column_names:
        if name.startswith(PREFIX) or name == SOURCE_ROW:
            stale.append(name)
    plain = dataset.with_format(None)
    subset = plain.remove_columns(stale).select(rows)
    kept = {name: subset[name] for name in subset.column_names}
    features = subset.features.copy()
    made = Dataset.from_dict(kept, features=features)
    if "prompt" in made.column_names:
        return made
    # A transform makes the prompts as they are read.
    prompts = list(prompts_of(dataset, rows))
    return made.add_column("prompt", prompts)
