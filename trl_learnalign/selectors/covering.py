"""Selectors whose choice covers `S_ij = V_i V_j cos(φ_i, φ_j)` in place of averaging its rows.

The row average of Eq. 9 rewards the largest group of like prompts: each of them is like all the others. These choose
one prompt after the other, each for what the choice so far lacks. The score of a prompt is its gain, see
`trl_learnalign.selectors.facility_location` and `log_determinant`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trl_learnalign import curriculum
from trl_learnalign.directions import collect
from trl_learnalign.pool import Pool
from trl_learnalign.selectors.facility_location import facility_location
from trl_learnalign.selectors.log_determinant import log_determinant


def learnalign_coverage(pool: Pool) -> np.ndarray:
    """Facility location: the choice `A` maximises `Σ_j max_{i∈A} max(S_ij, 0)`, greedily."""
    return gains_by(pool, facility_location)


def learnalign_logdet(pool: Pool) -> np.ndarray:
    """Log-determinant: the choice `A` maximises `log det(I + S_AA / λ)`, greedily.

    `λ` is `LearnAlignConfig.logdet_ridge` times the mean of `S_ii` over the learnable prompts.
    """

    def gains(rows: Tensor, weights: Tensor, size: int) -> np.ndarray:
        return log_determinant(rows, weights, size, pool.config.logdet_ridge)

    return gains_by(pool, gains)


def gains_by(pool: Pool, greedy: Callable[[Tensor, Tensor, int], np.ndarray]) -> np.ndarray:
    """Scores of a pool by a greedy choice among its learnable prompts; all ranks call it together.

    Args:
        pool (`Pool`): The candidates, P.
        greedy (callable): Called on the main rank as `greedy(rows, weights, size)`: directions `(n, D)` of the
            learnable prompts, in the order that ties are broken in; V, `(n,)`; how many are chosen. Returns their
            gains, `(n,)`.

    Returns:
        `np.ndarray`: `(P,)` float64; 0 for prompts that are not learnable.
    """
    learnability = pool.learnability
    learnable = np.flatnonzero(learnability > 0)
    # In the order that ties are broken in, nothing depends on the order of the pool.
    ties = curriculum.tie_order(pool.seed, pool.phase, len(pool.dataset))
    ties_of_learnable = ties[pool.prompts[learnable]]
    order = np.argsort(ties_of_learnable)
    positions = learnable[order]
    rows = collect(
        pool.features,
        positions,
        len(pool),
        pool.feature_dim,
        pool.ranks,
    )
    scores = np.zeros(len(pool))
    size = len(positions)
    if pool.wanted is not None:
        size = min(size, pool.wanted)
    if pool.ranks.is_main and size:
        weights = torch.from_numpy(learnability[positions])
        scores[positions] = greedy(rows, weights, size)
    return pool.ranks.from_main(scores)
