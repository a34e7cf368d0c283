"""Log-determinant of `S_ij = V_i V_j cos(φ_i, φ_j)`: every prompt should add a direction that the choice lacks.

Greedy MAP of a determinantal point process, with rows of a Cholesky factor that grow with the choice (Chen, Zhang &
Zhou, 2018). Lazy (Minoux, 1978): the gain of a prompt can only fall, so that only those are looked at again that may
still be the best. The `n × n` matrix is never built. Gains fall from one choice to the next and serve as scores, as in
`trl_learnalign.selectors.facility_location`.

Axes: `n` prompts, `D` dimensions, `N` chosen, `t` chosen so far.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trl_learnalign.directions import products

_UNIT = 2.0**-32  # gains are multiples of it: far above rounding errors, far below what matters
_FEWEST = 16  # prompts looked at again at once, then twice as many, and so on
_TOGETHER = 256


def log_determinant(
    rows: Tensor,
    weights: Tensor,
    size: int,
    ridge: float,
) -> np.ndarray:
    """Greedy maximum of `log det(I + S_AA / λ)`.

    At worst `O(N n D)` time and `O(N n)` memory beside the rows; mostly far less, since few are looked at again.

    Args:
        rows (`torch.Tensor`): Directions, `(n, D)` float32, from `trl_learnalign.directions`, in the order that ties
            are broken in: of equal gains the first wins.
        weights (`torch.Tensor`): V, `(n,)` float64.
        size (`int`): N, at most n.
        ridge (`float`): λ over the mean of the diagonal of `S`; above 0.

    Returns:
        `np.ndarray`: Gains, `(n,)` float64: of the chosen, what each added; of the rest, what they would have added
        when they were last looked at.
    """
    choice = _Choice(rows, weights, size, ridge)
    scores = np.zeros(len(rows))
    is_left = np.ones(len(rows), dtype=bool)
    ceiling = np.inf
    for _ in range(size):
        best = choice.best()
        gain = min(choice.bounds[best], ceiling)
        if gain <= 0:
            break
        choice.add(best)
        scores[best] = gain
        is_left[best] = False
        ceiling = gain - _UNIT  # rounding must not let a later gain pass an earlier one
    rest = choice.bounds[is_left]
    scores[is_left] = np.minimum(rest, max(0.0, ceiling))
    return scores


class _Choice:
    """The choice so far: rows of the Cholesky factor of `λ I + S`, and what each prompt would add.

    Args:
        rows (`torch.Tensor`): Directions, `(n, D)`.
        weights (`torch.Tensor`): V, `(n,)`.
        size (`int`): N.
        ridge (`float`): λ over the mean of the diagonal.
    """

    def __init__(
        self,
        rows: Tensor,
        weights: Tensor,
        size: int,
        ridge: float,
    ):
        self._rows = rows
        self._weights = weights
        # A direction has length 1: its rounding must not decide between prompts of equal V.
        diagonal = weights.square() * rows.any(dim=1)
        mean = float(diagonal.mean())
        self._ridge = ridge * (mean or 1.0)  # without any signal, nothing has a gain
        self._diagonal = diagonal + self._ridge
        # Memory that is never written to is never taken: only who is looked at again has a row.
        self._factors = torch.zeros(len(rows), size, dtype=torch.float64)
        self._triangle = torch.zeros(size, size, dtype=torch.float64)  # rows of the chosen
        self._chosen: list[int] = []
        self._known_until = np.zeros(len(rows), dtype=np.int64)
        self.bounds = self._gains(self._diagonal)
        """What each prompt would add at most, `(n,)` float64; -inf for the chosen."""

    def _gains(self, residuals: Tensor) -> np.ndarray:
        # No residual is less than λ, but for rounding, which a tiny λ would magnify without end.
        residuals = residuals.nan_to_num(nan=self._ridge).clamp_(min=self._ridge)
        gains = torch.log(residuals / self._ridge)
        units = gains.div_(_UNIT).round_()
        return (units * _UNIT).numpy()

    def best(self) -> int:
        """The first of those that add most; bounds are brought up to date as far as it takes to know."""
        width = _FEWEST
        while True:
            best = int(self.bounds.argmax())
            if self._known_until[best] == len(self._chosen):
                return best
            self._look_again_at(best, width)
            width *= 2

    def _look_again_at(self, best: int, width: int) -> None:
        """Bring the largest bounds up to date.

        Args:
            best (`int`): The first of the largest.
            width (`int`): How many.
        """
        width = min(width, len(self.bounds))
        by_bound = np.argpartition(-self.bounds, width - 1)
        top = by_bound[:width]
        rows = np.union1d(top, best)
        is_stale = self._known_until[rows] < len(self._chosen)
        is_free = np.isfinite(self.bounds[rows])
        stale = rows[is_stale & is_free]
        # Those that were looked at at about the same time have about as much to catch up with.
        order = np.argsort(self._known_until[stale], kind="stable")
        stale = stale[order]
        for start in range(0, len(stale), _TOGETHER):
            part = stale[start : start + _TOGETHER]
            self._catch_up(part)

    def _catch_up(self, rows: np.ndarray) -> None:
        """Bring some prompts' factors and bounds up to date; the first of them is the furthest behind."""
        count = len(self._chosen)
        known = self._known_until[rows[0]]
        at = torch.from_numpy(rows)
        factors = self._factors[at, :count]
        rest = self._similarities(at, self._chosen[known:])
        new_rows = self._triangle[known:count]
        rest -= factors[:, :known] @ new_rows[:, :known].T
        square = new_rows[:, known:count]
        solved = torch.linalg.solve_triangular(square, rest.T, upper=False)
        factors[:, known:] = solved.T
        explained = factors.square().sum(dim=1)
        residuals = self._diagonal[at] - explained
        self._factors[at, :count] = factors
        self._known_until[rows] = count
        self.bounds[rows] = self._gains(residuals)

    def _similarities(self, rows: Tensor, others: list[int]) -> Tensor:
        """`S` between some prompts, `(a, b)` float64."""
        columns = torch.tensor(others)
        cosines = products(self._rows[rows], self._rows[columns])
        weights = self._weights[rows].unsqueeze(1)
        return cosines * (weights * self._weights[columns])

    def add(self, row: int) -> None:
        """Choose a prompt that is up to date."""
        count = len(self._chosen)
        factor = self._factors[row, :count]
        explained = factor.square().sum()
        residual = self._diagonal[row] - explained
        new_row = self._triangle[count]
        new_row[:count] = factor
        new_row[count] = residual.clamp(min=self._ridge).sqrt()
        self._chosen.append(row)
        self.bounds[row] = -np.inf
