"""Directions of features in fixed point, and their inner products, which are exact.

Choices that compare prompts pair by pair must not depend on how a matrix product is split over blocks, threads or
ranks. Entries of `φ̂ = φ / ‖φ‖` are rounded to multiples of 2^-24, which float32 holds; a product of two is a multiple
of 2^-48, and by Cauchy–Schwarz no partial sum of an inner product leaves 1 by more than its rounding: float64 adds all
of them up exactly, in any order.

Axes: `P` candidates of a pool, `n` of them that are compared, `D` dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trl_learnalign import scoring
from trl_learnalign.distributed import Ranks
from trl_learnalign.exact_sum import Chunks

_DIRECTION_UNITS = 2.0**24
_ROWS = 1024  # converted, or sent to other ranks, at once


def directions(rows: Tensor) -> Tensor:
    """`φ̂` in fixed point, `(c, D)` float32; zero where a row is zero or not finite.

    Args:
        rows (`torch.Tensor`): `(c, D)` float64, overwritten.
    """
    scales = scoring.inverse_norms(rows) * _DIRECTION_UNITS
    whole = rows.mul_(scales.unsqueeze(1)).round_()
    return whole.div_(_DIRECTION_UNITS).float()


def chunk_directions(chunks: Chunks) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions and their directions `(c, D)`, as many at a time as a chunk holds, at most 1024.

    Args:
        chunks (iterable of pairs): `(positions (c,), features (c, D))`.
    """
    for positions, features in chunks:
        for start in range(0, len(features), _ROWS):
            part = slice(start, start + _ROWS)
            rows = features[part].to(torch.float64, copy=True)
            yield positions[part], directions(rows).cpu()


def products(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of directions, `(a, b)` float64, exact.

    Args:
        first (`torch.Tensor`): `(a, D)`, from [`directions`]; best in float64 if it is used again.
        second (`torch.Tensor`): `(b, D)`, the same.
    """
    left = first.double()
    found = left.new_empty(len(first), len(second))
    for start in range(0, len(second), _ROWS):
        part = slice(start, start + _ROWS)
        found[:, part] = left @ second[part].double().T
    return found


def has_direction(chunks: Chunks, pool_size: int, ranks: Ranks) -> np.ndarray:
    """Which candidates have a direction, on whatever rank; all ranks call it together.

    Args:
        chunks (iterable of pairs): `(positions (c,), features (c, D))` of this rank.
        pool_size (`int`): P.
        ranks (`Ranks`): The processes.

    Returns:
        `np.ndarray`: `(P,)` bool.
    """
    found = torch.zeros(pool_size, dtype=torch.int64)
    for positions, rows in chunk_directions(chunks):
        is_present = rows.any(dim=1)
        found[positions] = is_present.long()
    of_all_ranks = ranks.all_sum(found)
    return of_all_ranks.numpy() > 0


def collect(
    chunks: Chunks,
    positions: np.ndarray,
    pool_size: int,
    dim: int,
    ranks: Ranks,
    everywhere: bool = False,
) -> Tensor:
    """Directions of some candidates, brought together on the main rank; all ranks call it together.

    Args:
        chunks (iterable of pairs): `(positions (c,), features (c, D))` of this rank.
        positions (`np.ndarray`): Distinct positions in the pool, `(n,)`, in the order of the result.
        pool_size (`int`): P.
        dim (`int`): D.
        ranks (`Ranks`): The processes.
        everywhere (`bool`, *optional*, defaults to `False`): On every rank instead.

    Returns:
        `torch.Tensor`: `(n, D)` float32, zero for candidates without a feature. On other ranks than the main one,
        only the rows that they hold themselves.
    """
    places = torch.full((pool_size,), -1)
    places[torch.from_numpy(positions)] = torch.arange(len(positions))
    # Memory that is never written to is never taken: another rank's rows cost nothing here.
    rows = torch.zeros(len(positions), dim)
    for block_positions, block in chunk_directions(chunks):
        at = places[block_positions]
        is_wanted = at >= 0
        rows[at[is_wanted]] = block[is_wanted]
    if ranks.count == 1:
        return rows
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        total = ranks.all_sum(rows[part])
        if ranks.is_main or everywhere:
            rows[part] = total
    return rows
