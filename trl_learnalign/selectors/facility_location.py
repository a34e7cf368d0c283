"""Facility location on `S_ij = V_i V_j cos(φ_i, φ_j)`: every prompt should have one like it in the choice.

Greedy: one prompt after the other, each for what it adds to those before (Nemhauser, Wolsey & Fisher, 1978: at least
1 - 1/e of the best choice's value). Gains are whole numbers, so that equal ones are equal on any machine, and fall
from one choice to the next. They serve as scores: sorted by them, prompts come in the order in which they were chosen,
and the first k of a choice of N are the choice of k.

The `n × n` matrix is never built: each prompt keeps the K that are most like it, which loses little (Lindgren, Wu &
Dimakis, 2016).

Axes: `n` prompts, `D` dimensions, `N` chosen, `K` neighbours, `m` prompts that are to be covered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trl_learnalign.directions import products

NEIGHBOURS = 2048
"""K: a prompt can be covered by so many, the most like it; by any in pools that are no larger."""

COVERED = 20_000
"""m: so many prompts are to be covered at most, the first ones; anyone can be chosen to cover them."""

_UNITS = 2.0**32  # of similarities: at most 1/4 (V is at most 1/2), they fit into 32 bits
_BLOCK = 1 << 23  # similarities worked on at once: 64 MiB in float64


def facility_location(
    rows: Tensor,
    weights: Tensor,
    size: int,
    neighbours: int = NEIGHBOURS,
    covered: int = COVERED,
) -> np.ndarray:
    """Greedy maximum of `Σ_j max_{i∈A} max(S_ij, 0)`; `O(m n D)` time, `O(m K)` memory beside the rows.

    Args:
        rows (`torch.Tensor`): Directions, `(n, D)` float32, from `trl_learnalign.directions`, in the order that ties
            are broken in: of equal gains the first wins.
        weights (`torch.Tensor`): V, `(n,)` float64, from 0 to 1/2.
        size (`int`): N, at most n.
        neighbours (`int`, *optional*): K.
        covered (`int`, *optional*): m.

    Returns:
        `np.ndarray`: Gains, `(n,)` float64: of the chosen, what each added; of the rest, what they would add.
    """
    to_cover = min(covered, len(rows))
    lists = nearest(rows, weights, to_cover, min(neighbours, len(rows)))
    return greedy_cover(lists, len(rows), size)


def greedy_cover(lists: Neighbours, count: int, size: int) -> np.ndarray:
    """The greedy choice by lists of neighbours.

    Args:
        lists ([`Neighbours`]): Of the m prompts that are to be covered.
        count (`int`): n.
        size (`int`): N, at most n.

    Returns:
        `np.ndarray`: Gains, as of [`facility_location`].
    """
    gains = lists.values_alone(count)
    cover = torch.zeros(len(lists.prompts), dtype=torch.int32)
    chosen: dict[int, int] = {}
    for _ in range(size):
        best = int(gains.numpy().argmax())
        gain = int(gains[best])
        if gain == 0:  # everything is covered as well as it can be
            break
        chosen[best] = gain
        lists.cover_with(best, cover, gains)
    scores = gains.double().numpy()
    for row, gain in chosen.items():
        scores[row] = gain
    return scores / _UNITS


@dataclass(frozen=True)
class Neighbours:
    """Of each prompt that is to be covered, those that are most like it.

    Args:
        prompts (`torch.Tensor`): Their rows, ascending, `(m, K)` int32.
        values (`torch.Tensor`): `max(S_ij, 0)` in units of 2^-32, `(m, K)` int32.
    """

    prompts: Tensor
    values: Tensor

    def values_alone(self, count: int) -> Tensor:
        """What each prompt covers by itself, `(n,)` int64.

        Args:
            count (`int`): n.
        """
        gains = torch.zeros(count, dtype=torch.int64)
        for part in parts(len(self.prompts), self.prompts.shape[1]):
            prompts = self.prompts[part].flatten()
            values = self.values[part].flatten()
            gains.index_add_(0, prompts, values.long())
        return gains

    def cover_with(
        self,
        chosen: int,
        cover: Tensor,
        gains: Tensor,
    ) -> None:
        """Choose a prompt: what it covers better than before, no other gains by covering again.

        Args:
            chosen (`int`): Its row.
            cover (`torch.Tensor`): Largest similarity to a chosen prompt, `(m,)` int32; brought up to date.
            gains (`torch.Tensor`): What each prompt would add, `(n,)` int64; brought up to date.
        """
        similarity = self._similarity_to(chosen)
        is_better = similarity > cover
        better = is_better.nonzero().squeeze(1)
        for part in parts(len(better), self.prompts.shape[1]):
            targets = better[part]
            before = cover[targets].unsqueeze(1)
            now = similarity[targets].unsqueeze(1)
            # max(S - before, 0) - max(S - now, 0)
            losses = torch.minimum(self.values[targets], now)
            losses.sub_(before).clamp_(min=0)
            prompts = self.prompts[targets].flatten()
            gains.index_add_(0, prompts, losses.flatten().long(), alpha=-1)
        cover[better] = similarity[better]

    def _similarity_to(self, chosen: int) -> Tensor:
        """Similarity of each prompt that is to be covered, `(m,)`; 0 where it is no neighbour."""
        wanted = torch.full((len(self.prompts), 1), chosen, dtype=torch.int32)
        last = self.prompts.shape[1] - 1
        places = torch.searchsorted(self.prompts, wanted)
        places.clamp_(max=last)
        is_near = self.prompts.gather(1, places) == wanted
        similarity = self.values.gather(1, places)
        similarity[~is_near] = 0
        return similarity.squeeze(1)


def nearest(
    rows: Tensor,
    weights: Tensor,
    to_cover: int,
    count: int,
) -> Neighbours:
    """Find each prompt's neighbours, a block of prompts at a time.

    Args:
        rows (`torch.Tensor`): Directions, `(n, D)`.
        weights (`torch.Tensor`): V, `(n,)`.
        to_cover (`int`): m: the first of the rows.
        count (`int`): K, at most n.
    """
    prompts = torch.empty(to_cover, count, dtype=torch.int32)
    values = torch.empty(to_cover, count, dtype=torch.int32)
    for part in parts(to_cover, len(rows)):
        similarities = products(rows[part], rows)
        # A direction has length 1: its rounding must not decide between prompts of equal V.
        own = similarities[:, part].diagonal()
        own.copy_(rows[part].any(dim=1))
        similarities *= weights[part].unsqueeze(1) * weights
        similarities.mul_(_UNITS).round_().clamp_(min=0)
        units = similarities.int()
        best = units.topk(count, dim=1, sorted=False).indices
        ascending = best.sort(dim=1).values
        prompts[part] = ascending.int()
        values[part] = units.gather(1, ascending)
    return Neighbours(prompts, values)


def parts(count: int, width: int) -> Iterator[slice]:
    """Cut rows of some width into blocks that fit into memory."""
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
