"""How much of a ranking is signal: the rollouts in two halves, a ranking from each, and how well they agree.

A ranking that another draw of rollouts would not reproduce is not worth the training it decides. Each prompt's `G`
rollouts are cut into two halves; the sketch is linear, so that two half features cost no further pass and add up to
the whole one. The selector scores the pool with the success rates and features of either half.

Spearman–Brown: if two halves correlate with `r`, rankings from `k` times as many rollouts as a half correlate with
`k r / (1 + (k - 1) r)` (Spearman, 1910; Brown, 1910). It holds for averages of independent measurements. Learnability
is none: of few rollouts it takes a few values only, so halves agree less than the formula expects and the prediction
is mostly too low (`benchmarks/ranking_reliability.py` compares it with a second scoring). Advantages compare a half
with all `G` rollouts, which works the other way, but less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trl_learnalign.pool import FeatureChunks, JoinedChunks, Pool
from trl_learnalign.ranking.ranking import Ranking
from trl_learnalign.records.note_parts import Reliability
from trl_learnalign.selectors import GRADIENTS, ROLLOUTS
from trl_learnalign.statistics import spearman

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
