"""Greedy choices that cover `S_ij = V_i V_j cos(φ_i, φ_j)`; from directions, the `n × n` matrix is never built.

Both functions return the gain of each prompt: for those that were chosen, what each added when it was; for the rest,
at most what it would add. Gains fall from one choice to the next, so that they serve as scores: sorted by them, the
prompts come in the order in which they were chosen, and the first k of a choice of N are the choice of k. Of equal
gains, the first in the order of the rows wins: give them in the order that ties are broken in, and the choice does
not depend on their order in the pool.

Axes: `n` prompts, `D` dimensions, `N` chosen, `K` neighbours, `m` prompts that are covered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trl_learnalign.directions import products

NEIGHBOURS = 2048
"""K: of so many prompts a prompt can be covered, its nearest; all of them in pools that are no larger."""

COVERED = 20_000
"""m: so many prompts have to be covered at most, the first of the rows; anyone can be chosen to cover them."""

_UNITS = 2.0**32  # of similarities: at most 1/4 (V is at most 1/2), so that they fit into 32 bits
_BLOCK = 1 << 23  # similarities worked on at once: 64 MiB in float64
_FEWEST = 16  # candidates looked at again at once
_GAIN = 2.0**-32  # log-det gains are multiples of it: far above rounding, far below what matters


def facility_location(
    rows: Tensor,
    weights: Tensor,
    size: int,
    neighbours: int = NEIGHBOURS,
    covered: int = COVERED,
) -> np.ndarray:
    """Greedy maximum of `Σ_j max_{i∈A} max(S_ij, 0)`: every prompt should have one like it in the choice.

    The greedy choice reaches 1 - 1/e of the best one's value (Nemhauser, Wolsey & Fisher, 1978). Beyond
    `neighbours` prompts, each is covered by its nearest alone, which loses little (Lindgren, Wu & Dimakis, 2016);
    beyond `covered`, a sample of them has to be covered. `O(m n D)` time, `O(m K)` memory beside the rows. Whole
    numbers throughout: the same on any machine.

    Args:
        rows (`torch.Tensor`): Directions, `(n, D)` float32, from `trl_learnalign.directions`.
        weights (`torch.Tensor`): V, `(n,)` float64, from 0 to 1/2.
        size (`int`): N, at most n.
        neighbours (`int`, *optional*): K.
        covered (`int`, *optional*): m.

    Returns:
        `np.ndarray`: Gains, `(n,)` float64.
    """
    lists = _Neighbours.of(rows, weights, min(neighbours, len(rows)), covered)
    gains = lists.values_of_single_prompts(len(rows))
    cover = torch.zeros(len(lists.prompts), dtype=torch.int32)
    scores = np.empty(len(rows))
    is_chosen = np.zeros(len(rows), dtype=bool)
    for _ in range(size):
        best = int(gains.numpy().argmax())
        if gains[best] <= 0:  # everything is covered as well as it can be
            break
        scores[best], is_chosen[best] = float(gains[best]), True
        lists.cover_with(best, cover, gains)
    scores[~is_chosen] = gains.double().numpy()[~is_chosen]
    return scores / _UNITS


@dataclass(frozen=True)
class _Neighbours:
    """Of each prompt that is to be covered, the K that are most like it.

    Args:
        prompts (`torch.Tensor`): Their rows, ascending, `(m, K)` int32.
        values (`torch.Tensor`): Similarities of at least 0 in units, `(m, K)` int32.
    """

    prompts: Tensor
    values: Tensor

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor, count: int, covered: int) -> _Neighbours:
        targets = min(covered, len(rows))
        prompts = torch.empty(targets, count, dtype=torch.int32)
        values = torch.empty(targets, count, dtype=torch.int32)
        step = max(1, _BLOCK // max(1, len(rows)))
        for start in range(0, targets, step):
            part = slice(start, min(start + step, targets))
            cosines = products(rows[part], rows)
            pair_weights = weights[part].unsqueeze(1) * weights
            similarities = cosines.mul_(pair_weights).mul_(_UNITS).round_().clamp_(min=0).int()
            nearest = similarities.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
            prompts[part] = nearest.int()
            values[part] = similarities.gather(1, nearest)
        return cls(prompts, values)

    def values_of_single_prompts(self, count: int) -> Tensor:
        """What each prompt covers by itself, `(n,)` int64."""
        gains = torch.zeros(count, dtype=torch.int64)
        step = max(1, _BLOCK // max(1, self.prompts.shape[1]))
        for start in range(0, len(self.prompts), step):
            part = slice(start, start + step)
            gains.index_add_(0, self.prompts[part].flatten(), self.values[part].flatten().long())
        return gains

    def cover_with(self, chosen: int, cover: Tensor, gains: Tensor) -> None:
        """Choose a prompt: what it covers better than before, no other gains by covering again.

        Args:
            chosen (`int`): Its row.
            cover (`torch.Tensor`): Largest similarity to a chosen prompt, `(m,)` int32; brought up to date.
            gains (`torch.Tensor`): What each prompt would add, `(n,)` int64; brought up to date.
        """
        wanted = torch.full((len(self.prompts), 1), chosen, dtype=torch.int32)
        places = torch.searchsorted(self.prompts, wanted).clamp_(max=self.prompts.shape[1] - 1)
        is_near = self.prompts.gather(1, places) == wanted
        similarity = torch.where(is_near, self.values.gather(1, places), 0).squeeze(1)
        better = (similarity > cover).nonzero().squeeze(1)
        step = max(1, _BLOCK // max(1, self.prompts.shape[1]))
        for start in range(0, len(better), step):
            part = better[start : start + step]
            before, now = cover[part].unsqueeze(1), similarity[part].unsqueeze(1)
            # max(S - before, 0) - max(S - now, 0)
            losses = torch.minimum(self.values[part], now).sub_(before).clamp_(min=0)
            gains.index_add_(0, self.prompts[part].flatten(), losses.flatten().long(), alpha=-1)
        cover[better] = similarity[better]


def log_determinant(rows: Tensor, weights: Tensor, size: int, ridge: float) -> np.ndarray:
    """Greedy maximum of `log det(I + S_AA / λ)`: every prompt should add a direction that the choice lacks.

    Greedy MAP of a determinantal point process with incremental Cholesky factors (Chen, Zhang & Zhou, 2018), lazy
    (Minoux, 1978): the gain of a prompt can only fall, so that only those are looked at again that may still be
    the best. `O(N n D)` time at worst, `O(n N)` memory beside the rows, both mostly far less.

    Args:
        rows (`torch.Tensor`): Directions, `(n, D)` float32, from `trl_learnalign.directions`.
        weights (`torch.Tensor`): V, `(n,)` float64.
        size (`int`): N, at most n.
        ridge (`float`): λ over the mean of the diagonal of `S`; above 0.

    Returns:
        `np.ndarray`: Gains, `(n,)` float64; of those left out, what they would have added when last looked at.
    """
    factors = _Factors(rows, weights, size, ridge)
    bounds = factors.gains
    scores = np.zeros(len(rows))
    is_left = np.ones(len(rows), dtype=bool)
    last = np.inf
    for _ in range(size):
        best = _best(factors, bounds)
        # Rounding must not let a later gain pass an earlier one.
        last = min(bounds[best], last - _GAIN)
        if last <= 0:
            break
        scores[best], is_left[best] = last, False
        factors.choose(best)
        bounds[best] = -np.inf
    scores[is_left] = np.minimum(bounds[is_left], max(0.0, last - _GAIN))
    return scores


def _best(factors: _Factors, bounds: np.ndarray) -> int:
    """The first of the largest gains; `bounds` are brought up to date as far as it takes."""
    width = _FEWEST
    while True:
        best = int(bounds.argmax())
        if factors.is_current(best):
            return best
        width = min(width, len(bounds))
        top = np.argpartition(-bounds, width - 1)[:width]
        stale = factors.stale(np.union1d(top, best))
        stale = stale[np.isfinite(bounds[stale])]  # the others are chosen
        bounds[stale] = factors.updated(stale)
        width *= 2


class _Factors:
    """Rows of the Cholesky factor of `λ I + S`: of the chosen prompts, and of others as far as they were looked at.

    Args:
        rows (`torch.Tensor`): Directions, `(n, D)`.
        weights (`torch.Tensor`): V, `(n,)`.
        size (`int`): N.
        ridge (`float`): λ over the mean of the diagonal.
    """

    def __init__(self, rows: Tensor, weights: Tensor, size: int, ridge: float):
        self._rows, self._weights = rows, weights
        lengths = torch.cat([part.double().square().sum(dim=1) for part in rows.split(1024)])
        diagonal = weights.square() * lengths
        mean = float(diagonal.mean()) or 1.0  # without any signal, nothing has a gain
        self._ridge = ridge * mean
        self._diagonal = diagonal + self._ridge
        # Memory that is never written to is never taken: only who is looked at has a row.
        self._factors = torch.zeros(len(rows), size, dtype=torch.float64)
        self._known = np.zeros(len(rows), dtype=np.int64)
        self._chosen: list[int] = []
        self._triangle = torch.zeros(size, size, dtype=torch.float64)

    @property
    def gains(self) -> np.ndarray:
        """What each prompt adds to an empty choice, `(n,)` float64."""
        return self._gains(self._diagonal)

    def _gains(self, residuals: Tensor) -> np.ndarray:
        gains = torch.log(residuals / self._ridge).clamp(min=0)
        return ((gains / _GAIN).round() * _GAIN).numpy()

    def is_current(self, row: int) -> bool:
        """Whether its last gain was that beside all that are chosen now."""
        return bool(self._known[row] == len(self._chosen))

    def stale(self, rows: np.ndarray) -> np.ndarray:
        """Those of some rows that are not current."""
        return rows[self._known[rows] < len(self._chosen)]

    def updated(self, rows: np.ndarray) -> np.ndarray:
        """What some prompts would add to the choice, `(b,)` float64.

        Args:
            rows (`np.ndarray`): Their rows, `(b,)`.
        """
        gains = np.empty(len(rows))
        # Those that were looked at at about the same time have about as much to catch up with.
        by_time = np.argsort(self._known[rows], kind="stable")
        for start in range(0, len(rows), 256):
            part = by_time[start : start + 256]
            gains[part] = self._catch_up(torch.from_numpy(rows[part]), self._known[rows[part]][0])
        return gains

    def _catch_up(self, rows: Tensor, known: int) -> np.ndarray:
        count = len(self._chosen)
        news = torch.tensor(self._chosen[known:])
        similarities = products(self._rows[rows], self._rows[news])
        similarities *= self._weights[rows].unsqueeze(1) * self._weights[news]
        triangle = self._triangle[known:count]
        similarities -= self._factors[rows, :known] @ triangle[:, :known].T
        square = triangle[:, known:count]
        solved = torch.linalg.solve_triangular(square, similarities.T, upper=False).T
        self._factors[rows, known:count] = solved
        self._known[rows.numpy()] = count
        explained = self._factors[rows, :count].square().sum(dim=1)
        return self._gains(self._diagonal[rows] - explained)

    def choose(self, row: int) -> None:
        """Choose a prompt whose gain is current."""
        count = len(self._chosen)
        factor = self._factors[row, :count]
        residual = self._diagonal[row] - factor.square().sum()
        self._triangle[count, :count] = factor
        self._triangle[count, count] = residual.sqrt()
        self._chosen.append(row)
