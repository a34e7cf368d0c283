"""How broad a choice is: in how many directions it points, and how much of the pool it stands for.

A choice of many like prompts teaches one thing many times. Each figure stands beside that of a seeded random choice of
as many prompts, since all of them depend on how many are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trl_learnalign import hashing
from trl_learnalign.directions import collect, directions, products
from trl_learnalign.exact_sum import Chunks, blocks
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
    has_direction = features.present()
    chosen = chosen[has_direction[chosen]]
    if len(chosen) < 2:
        return None
    candidates = np.flatnonzero(has_direction)
    at_random = _shuffled(pool, "random choice", candidates)[: len(chosen)]
    targets = _shuffled(pool, "stood for", candidates)[:STOOD_FOR]
    covered, covered_random = features.covered(targets, chosen, at_random)
    ours = features.compared(_shuffled(pool, "compared", chosen)[:COMPARED])
    random = features.compared(at_random[:COMPARED])
    return Breadth(
        prompts=len(chosen),
        directions=ours.directions,
        directions_random=random.directions,
        covered=covered,
        covered_random=covered_random,
        similarity=ours.similarity,
        similarity_random=random.similarity,
    )


def _shuffled(pool: Pool, purpose: str, positions: np.ndarray) -> np.ndarray:
    """Positions in a seeded order that depends on their prompts."""
    stream = hashing.key(pool.seed, purpose, pool.phase)
    ranks = np.empty(len(pool.dataset), dtype=np.int64)
    rows = hashing.permutation(stream, pool.prompts[positions])
    ranks[rows] = np.arange(len(rows))
    return positions[np.argsort(ranks[pool.prompts[positions]])]


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

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions and directions, a few at a time."""
        for positions, rows in blocks(self.chunks):
            yield positions, directions(rows).cpu()

    def present(self) -> np.ndarray:
        """`(P,)` bool: has a direction, and learnability if that is known."""
        found = torch.zeros(len(self.pool), dtype=torch.int64)
        for positions, rows in self.blocks():
            found[positions] = rows.any(dim=1).long()
        everyone = self.pool.ranks.all_sum(found).numpy() > 0
        return everyone & (self._weights() > 0)

    def _weights(self) -> np.ndarray:
        if self.pool.successes is None:
            return np.ones(len(self.pool))
        return self.pool.learnability

    def _collected(self, positions: np.ndarray) -> Tensor:
        """Directions of some candidates, `(n, D)`, on every rank."""
        pool = self.pool
        return collect(self.chunks, positions, len(pool), self.dim, pool.ranks, everywhere=True)

    def covered(self, targets: np.ndarray, *choices: np.ndarray) -> list[float]:
        """`Σ_j max_{i∈A} max(S_ij, 0)` over some prompts, as a share of what the whole pool reaches, for each choice.

        Args:
            targets (`np.ndarray`): Positions of the prompts that should be stood for.
            choices (`np.ndarray`): Positions of each choice.
        """
        pool = self.pool
        rows = self._collected(targets).double()  # converted once, not for each block
        weights = torch.from_numpy(self._weights())
        groups = torch.zeros(len(choices) + 1, len(pool), dtype=torch.bool)
        groups[-1] = True
        for group, choice in zip(groups, choices, strict=False):
            group[torch.from_numpy(choice)] = True
        best = torch.zeros(len(groups), len(targets), dtype=torch.float64)
        for positions, block in self.blocks():
            similarities = products(rows, block) * weights[positions]
            for group, so_far in zip(groups, best, strict=True):
                members = similarities[:, group[positions]]
                if members.shape[1]:
                    torch.maximum(so_far, members.amax(dim=1), out=so_far)
        of_all_ranks = torch.tensor(pool.ranks.most(best.flatten().tolist()), dtype=best.dtype)
        # The weight of the prompt that is stood for: a factor of all its similarities.
        values = of_all_ranks.view_as(best) @ weights[torch.from_numpy(targets)]
        return (values[:-1] / values[-1]).tolist()

    def compared(self, positions: np.ndarray) -> _Compared:
        """Directions of some prompts among each other.

        Args:
            positions (`np.ndarray`): Positions in the pool, two or more.
        """
        rows = self._collected(np.sort(positions))
        cosines = products(rows, rows)
        # Participation ratio of the spectrum λ of the Gram matrix: (Σ λ)² / Σ λ², and Σ λ² = Σ_ij cos².
        directions_ = float(cosines.diagonal().sum() ** 2 / cosines.square().sum())
        nearest = cosines.fill_diagonal_(-1).amax(dim=1)
        return _Compared(directions_, float(nearest.mean()))
