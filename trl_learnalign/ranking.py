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
from trl_learnalign.scoring import outcome_sums
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
    """Return the table of a stage.

    Args:
        pool (`Pool`): Its candidates.
        scores (`np.ndarray`): `(P,)`.
        alignment (`np.ndarray`): Mean alignment of each gradient, `(P,)`; NaN where there is none.
        order (`np.ndarray`): Positions from best to worst, `(P,)`.
        selected (`np.ndarray`): Positions of the selected prompts.
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
    return pa.table(
        {
            "index": pool.prompts,
            "prompt_id": [prompt_id(prompt) for prompt in prompts],
            "prompt": [prompt_text(prompt) for prompt in prompts],
            **_sums(pool),
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


def _sums(pool: Pool) -> dict[str, Any]:
    """Return the columns of outcomes; nulls where no rollouts were made."""
    names = ["right", "wrong", *(["partial"] if pool.config.is_graded else [])]
    if pool.successes is None:
        kind = pa.float64() if pool.config.is_graded else pa.int64()
        return {name: pa.nulls(len(pool), kind) for name in names}
    sums = outcome_sums(pool.successes, pool.config.is_graded)
    return dict(zip(names, sums, strict=False))


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def overlap(previous: pa.Table, selected: np.ndarray, candidates: np.ndarray) -> float | None:
    """Return the share of selected prompts that the previous stage's ranking would have selected too.

    Args:
        previous (`pyarrow.Table`): The previous stage's table.
        selected (`np.ndarray`): Rows of the dataset that are selected now.
        candidates (`np.ndarray`): Rows that could be selected; both selections are from these.

    Returns:
        `float`, *optional*: `None` if all candidates were selected, or the previous stage scored none of them.
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
    """The selected prompts.

    Args:
        positions (`np.ndarray`): Positions in the pool of the scored ones, best first.
        unscored (`np.ndarray`): Rows of the dataset that fill the remaining places.
        rows (`np.ndarray`): All of them as rows of the dataset, best first.
    """

    positions: np.ndarray
    unscored: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Ranking:
    """The result of a selector for a pool.

    Args:
        selector (`Selector`): The selector.
        pool (`Pool`): The scored candidates, P of them.
        scores (`np.ndarray`): `(P,)` float64; NaN for prompts that cannot be ranked.
        ties (`np.ndarray`): Distinct numbers for all rows of the dataset, `(n,)`, which order equal scores.
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
        """Prompts that rank before all others, unless scores alone decide (`LearnAlignConfig.zero_learnability`)."""
        return self.eligible if self.pool.config.zero_learnability == "last" else None

    @property
    def eligible(self) -> np.ndarray:
        """`(P,)` bool: has its own score (for the method: learnability above 0)."""
        if self.selector.only_learnable:
            return self.pool.learnability > 0
        return ~np.isnan(self.scores)

    def take(self, size: int, candidates: np.ndarray, on_shortfall: str, least: int) -> Selection:
        """Select the best prompts; with `"fill"`, larger selections contain the smaller ones.

        Args:
            size (`int`): Number of prompts, at most `len(candidates)`.
            candidates (`np.ndarray`): Rows that may be selected: the pool's, and those that were not scored
                (`pool_sample`, `rollout_budget`), which come last, in tie order.
            on_shortfall (`str`): `"fill"` always selects `size` prompts, `"shrink"` only the eligible ones.
            least (`int`): Minimum number of selected prompts, also with `"shrink"`.
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
        """Return one row per scored candidate; columns as in `trl_learnalign.records.run_record`."""
        alignment = self.selector.alignment(self.pool, self.scores)
        return stage_table(self.pool, self.scores, alignment, self.order, choice.positions)

    def examples(self) -> list[dict[str, Any]]:
        """Return representative candidates with a few of their rollouts; collective over all ranks.

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
        """Return what a selection lacks, as the end of a sentence that begins with its name; `None` if nothing.

        Args:
            choice (`Selection`): The selection.
            size (`int`): The requested number of prompts.
        """
        is_eligible = self.eligible
        eligible_count, total = int(is_eligible.sum()), len(self.pool)
        unranked_taken = int((~is_eligible[choice.positions]).sum())
        eligible_taken = len(choice.positions) - unranked_taken
        passed_over = ""
        if unranked_taken and eligible_count > eligible_taken:
            passed_over = (
                f"{eligible_count - eligible_taken} learnable prompts with negative scores rank below them (Eq. 9) "
                "and are left out; zero_learnability='last' prefers the learnable ones"
            )
        if eligible_count < size:
            can, cannot = "have a score", "without a score"
            if self.selector.only_learnable:
                can, cannot = "are learnable", "with learnability 0"
            message = f"only {eligible_count} of {total} candidates {can}, "
            message += f"fewer than the requested {size}; selected: {len(choice)}"
            if unranked_taken:
                message += f", {unranked_taken} {cannot}"
            if len(choice.unscored):
                message += f", {len(choice.unscored)} unscored"
            return f"{message}; {passed_over}" if passed_over else message
        if passed_over:
            return (
                f"{unranked_taken} selected prompts have learnability 0 (p = 0 or 1); {passed_over}"
            )
        return None

    def summary(self, choice: Selection) -> SelectionStatistics:
        """Return counts and means of selected and left-out candidates, for record, log and table."""
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
    """Return candidates for display, by group: the top and the bottom of the ranking, and prompts without a signal.

    Args:
        order (sequence of `int`): Positions from best to worst, `(P,)`.
        eligible (sequence of `bool`): `(P,)`: has its own score.
        success_rate (sequence of `float`): `(P,)`; NaN where there is none.
        best (`int`, *optional*, defaults to `5`): Number of prompts in each of `"top"` and `"bottom"`.
        extremes (`int`, *optional*, defaults to `2`): Number of prompts in each of `"always right"` and `"always
            wrong"`.
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
# A ranking that a second set of rollouts would not reproduce is not worth the training that it decides. Each prompt's
# `G` rollouts are split into two halves. The projection is linear, so features of halves need no further pass and sum
# to the whole feature. The selector scores the pool with the success rates and features of either half.
#
# Spearman–Brown: if two halves correlate with `r`, rankings from `k` times as many rollouts as a half correlate with
# `k r / (1 + (k - 1) r)` (Spearman, 1910; Brown, 1910). It holds for averages of independent measurements.
# Learnability is no such average. With few rollouts it has only a few values, so halves agree less than the formula
# expects, and the prediction is mostly too low (`benchmarks/ranking_reliability.py` compares it with a second
# scoring). Advantages compare a half with all `G` rollouts. This has the opposite effect, but a smaller one.

MULTIPLES = (1, 2, 4)
"""Multiples of `G` for which agreement is predicted."""


def reliability(ranking: Ranking, size: int) -> Reliability | None:
    """Return the agreement of two half rankings; collective over all ranks.

    Args:
        ranking (`Ranking`): Ranking of a pool that was measured with `LearnAlignConfig.reliability`.
        size (`int`): N of the top-N overlap.

    Returns:
        `Reliability` or `None`: `None` if the selector uses no rollouts, since then nothing varies.
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
        # A half has G / 2 rollouts, so G are twice as many.
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

    Alone, these rollouts would have no advantages. Their actual advantages compare them with the other half. Keeping
    them would make both halves agree on which prompts have a gradient at all.
    """

    features: FeatureChunks | JoinedChunks
    silent: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for positions, values in self.features:
            yield positions, torch.where(self.silent[positions].unsqueeze(1), 0.0, values)


def _all_equal(rewards: Tensor) -> Tensor:
    """Map `(P, G', F)` rewards to `(P,)` bool; missing rewards (NaN) are left out."""
    lowest = torch.nan_to_num(rewards, nan=float("inf")).amin(dim=1)
    highest = torch.nan_to_num(rewards, nan=float("-inf")).amax(dim=1)
    return (lowest >= highest).all(dim=1)


def half_pool(pool: Pool, half: int) -> Pool:
    """Return the pool as if only one half of the rollouts had been made.

    Args:
        pool (`Pool`): A pool with an even number of rollouts.
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
    """Return the correlation of `times` as many measurements; `None` if the given correlation is not positive."""
    if correlation is None or correlation <= 0:
        return None
    return times * correlation / (1 + (times - 1) * correlation)


# ---- Agreement of selectors -----------------------------------------------------------------------------------------


def rank_correlations(scores: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return Spearman's rank correlation between selectors.

    Args:
        scores (mapping of `str` to `np.ndarray`): Scores of the same P candidates by each selector, `(P,)`. NaN marks
            candidates that it cannot rank, which are left out of its correlations. Equal scores share a rank.

    Returns:
        `pandas.DataFrame`: Square, by name; NaN where a selector ranks fewer than two candidates, or all equally.
    """
    table = pd.DataFrame(dict(scores))
    return table.corr(method="spearman", min_periods=2)


def overlaps(choices: Mapping[str, Sequence[int] | np.ndarray]) -> pd.DataFrame:
    """Return the share of prompts that selectors have in common.

    Args:
        choices (mapping of `str` to sequence of `int`): Rows that each selector selects, equally many.

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
    """Return the share of the first rows that are among the others; 0 if there are none."""
    if not len(rows):
        return 0.0
    return float(np.isin(rows, others).mean())


# ---- Selection as a dataset -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRows:
    """Rows of a file, from which the prompts were made.

    Args:
        rows (`datasets.Dataset`): All rows that were read.
        numbers (`np.ndarray`): Position of each row in the file, ascending.
    """

    rows: Dataset
    numbers: np.ndarray

    def at(self, numbers: list[int]) -> Dataset:
        """Return the rows with these numbers, in their order."""
        places = np.searchsorted(self.numbers, numbers)
        return self.rows.with_format(None).select(places)


def subset_of(
    dataset: Dataset, table: pa.Table, rows: np.ndarray, originals: FileRows | None = None
) -> Dataset:
    """Return the selected rows, best first, with all their columns and those of the selection.

    Added columns: `selection_index` (row of the file, or of the dataset if no file is known), `selection_rank` (from
    1), `selection_score`, `selection_success_rate`, `selection_learnability` and `selection_alignment`; unknown values
    are missing.

    Args:
        dataset (`datasets.Dataset`): The dataset of the prompts.
        table (`pyarrow.Table`): The candidates (`trl_learnalign.records.run_record`).
        rows (`np.ndarray`): Selected rows of the dataset, `(N,)`, best first.
        originals (`FileRows`, *optional*): Rows from which the dataset's were made; they are written instead.
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
        # Prompts that fill a larger selection were not scored.
        column = [by_row.get(row) for row in rows.tolist()]
        made = _with_column(made, name, column, "float64")
    return made


def _with_column(dataset: Dataset, name: str, values: list[Any], kind: str) -> Dataset:
    feature = Value(kind)
    return dataset.add_column(PREFIX + name, values, feature=feature)


def _of_file(originals: FileRows, indices: list[int]) -> Dataset:
    """Return those rows in memory, without the columns of an earlier selection."""
    found = originals.at(indices)
    stale = [name for name in found.column_names if name.startswith(PREFIX)]
    kept = found.remove_columns(stale).with_format("arrow")[:]
    return Dataset(InMemoryTable(kept), info=DatasetInfo(features=_without(found.features, stale)))


def _without(features: Features, names: list[str]) -> Features:
    return Features({name: kind for name, kind in features.items() if name not in names})


def _rows_alone(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """Return those rows in memory, without the columns of an earlier selection."""
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
    # A dataset transform makes the prompts when they are read.
    prompts = list(prompts_of(dataset, rows))
    return made.add_column("prompt", prompts)
