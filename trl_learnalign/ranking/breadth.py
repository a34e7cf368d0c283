"""How broad a choice is: in how many directions it points, and how much of the pool it stands for.

A choice of many like prompts teaches one thing many times. Each figure stands beside that of a seeded random choice of
as many prompts, since all of them depend on how many are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trl_learnalign import hashing
from trl_learnalign.directions import chunk_directions, collect, has_direction, products
from trl_learnalign.exact_sum import Chunks
from trl_learnalign.pool import Pool
from trl_learnalign.records.note_parts import Breadth

COMPARED = 2048
"""Prompts of a choice that are compared with each other at most: a seeded sample."""

STOOD_FOR = 1024
"""Prompts that a choice should stand for at most: a seeded sample."""


def breadth(pool: Pool, chosen: np.ndarray) -> Breadth | None:
    """Breadth of a choice by the features that were measured; all ranks call it together.

    Args:
        pool (`Pool`): The candidates, P.
        chosen (`np.ndarray`): Positions of the chosen ones.

    Returns:
        `Breadth` or `None`: `None` without features, or with fewer than two among the chosen.
    """
    features = _Features.of(pool)
    if features is None:
        return None
    is_present = features.present()
    chosen = chosen[is_present[chosen]]
    size = len(chosen)
    if size < 2:
        return None
    candidates = np.flatnonzero(is_present)
    at_random = _drawn(pool, "random choice", candidates, size)
    targets = _drawn(pool, "stood for", candidates, STOOD_FOR)
    covered, covered_random = features.covered(targets, chosen, at_random)
    sample = _drawn(pool, "compared", chosen, COMPARED)
    ours = features.compared(sample)
    random = features.compared(at_random[:COMPARED])
    return Breadth(
        prompts=size,
        directions=ours.directions,
        directions_random=random.directions,
        covered=covered,
        covered_random=covered_random,
        similarity=ours.similarity,
        similarity_random=random.similarity,
    )


def _drawn(
    pool: Pool,
    purpose: str,
    positions: np.ndarray,
    size: int,
) -> np.ndarray:
    """Some of the positions, in a seeded order of their prompts; all of them if there are no more."""
    stream = hashing.key(pool.seed, purpose, pool.phase)
    rows = pool.prompts[positions]
    shuffled = hashing.permutation(stream, rows)
    position_of = dict(zip(rows.tolist(), positions.tolist(), strict=True))
    sample = [position_of[row] for row in shuffled[:size].tolist()]
    return np.array(sample, dtype=np.int64)


@dataclass(frozen=True)
class _Compared:
    directions: float
    similarity: float


@dataclass(frozen=True)
class _Features:
    """Features of a pool, those of this rank.

    Args:
        pool (`Pool`): The pool.
        chunks (iterable of pairs): `(positions (c,), features (c, D))`.
        dim (`int`): D.
    """

    pool: Pool
    chunks: Chunks
    dim: int

    @classmethod
    def of(cls, pool: Pool) -> _Features | None:
        """Those of gradients, else those of hidden states, else none."""
        if pool.feature_dim:
            return cls(pool, pool.features, pool.feature_dim)
        if pool.hidden_dim:
            return cls(pool, pool.hidden, pool.hidden_dim)
        return None

    def present(self) -> np.ndarray:
        """`(P,)` bool: has a direction, and learnability if that is known."""
        found = has_direction(self.chunks, len(self.pool), self.pool.ranks)
        has_weight = self._weights() > 0
        return has_weight & found

    def _weights(self) -> np.ndarray:
        if self.pool.successes is None:
            return np.ones(len(self.pool))
        return self.pool.learnability

    def _collected(self, positions: np.ndarray) -> Tensor:
        """Directions of some candidates, `(n, D)`, on every rank."""
        pool = self.pool
        return collect(
            self.chunks,
            positions,
            len(pool),
            self.dim,
            pool.ranks,
            everywhere=True,
        )

    def covered(self, targets: np.ndarray, *choices: np.ndarray) -> list[float]:
        """`Σ_j max_{i∈A} max(S_ij, 0)` over some prompts, as a share of what the whole pool reaches, for each choice.

        Args:
            targets (`np.ndarray`): Positions of the prompts that should be stood for.
            choices (`np.ndarray`): Positions of each choice.
        """
        pool = self.pool
        rows = self._collected(targets).double()  # converted once, not for each block
        weights = torch.from_numpy(self._weights())
        everyone = np.arange(len(pool))
        groups = [np.isin(everyone, choice) for choice in (*choices, everyone)]
        best = torch.zeros(len(groups), len(targets), dtype=torch.float64)
        for positions, block in chunk_directions(self.chunks):
            similarities = products(rows, block)
            similarities *= weights[positions]
            for number, group in enumerate(groups):
                is_member = torch.from_numpy(group[positions.numpy()])
                # Zeros in the place of the others: less than 0 does not count anyhow.
                of_members = similarities * is_member
                best[number] = torch.maximum(best[number], of_members.amax(dim=1))
        largest = pool.ranks.most(best.flatten().tolist())
        of_all_ranks = torch.tensor(largest, dtype=torch.float64)
        # The weight of the prompt that is stood for is a factor of all its similarities.
        target_weights = weights[torch.from_numpy(targets)]
        values = of_all_ranks.view_as(best) @ target_weights
        shares = values[:-1] / values[-1]
        return shares.tolist()

    def compared(self, positions: np.ndarray) -> _Compared:
        """Directions of some prompts among each other.

        Args:
            positions (`np.ndarray`): Positions in the pool, two or more.
        """
        rows = self._collected(np.sort(positions))
        cosines = products(rows, rows)
        # Participation ratio of the spectrum λ of the Gram matrix: (Σ λ)² / Σ λ², and Σ λ² = Σ_ij cos².
        trace = float(cosines.diagonal().sum())
        squares = float(cosines.square().sum())
        nearest = cosines.fill_diagonal_(-1).amax(dim=1)
        return _Compared(trace**2 / squares, float(nearest.mean()))
