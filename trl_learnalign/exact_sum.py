"""Sums and products of large sets of vectors that come out the same to the last bit, however the rows are split.

Scores decide which prompts are trained on, and equal candidates must be ranked equally by one process and by many:
additions are made in fixed point, and rows are reduced one by one, a block of them at a time.

Axes: `P` rows, `D` dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Chunks = Iterable[tuple[Tensor, Tensor]]
AllSum = Callable[[Tensor], Tensor]

_SUM_UNITS = 2.0**42  # of which 1 is made up: 42 fraction bits, see `FixedPointSum`
_MAX_ROWS = 1024
_BLOCK = 1 << 17  # entries worked on at once: 1 MiB in float64, which a CPU's cache holds


class FixedPointSum:
    """A sum of vectors in 64-bit fixed point: exact addition, so it does not depend on order, chunks or ranks.

    With 42 fraction bits the rounding of one term is 2^-43 (an entry of φ̂ is about 2^-7 at D = 8192), and 2^21 terms
    of size 1, or 2^23 of the largest learnability 1/4, fit before the 64-bit integers could overflow.

    Args:
        dim (`int`): D.
    """

    def __init__(self, dim: int):
        self._units = torch.zeros(dim, dtype=torch.int64)
        # Sums of up to 2^10 whole numbers of up to 2^42 are exact in float64, in any order: also in BLAS's.
        self._recent: Tensor | None = None
        self._recent_rows = 0

    @property
    def units(self) -> Tensor:
        """The sum in units of 2^-42, `(D,)` int64."""
        if self._recent is not None:
            self._units += self._recent.to(torch.int64).cpu()
        self._recent = None
        self._recent_rows = 0
        return self._units

    def add(self, terms: Tensor) -> None:
        """Add the rows of `terms`, `(P, D)` with entries of at most 1 in size."""
        for start in range(0, len(terms), _MAX_ROWS):
            part = terms[start : start + _MAX_ROWS]
            rows = part.to(torch.float64, copy=True)
            self.add_scaled(rows, rows.new_ones(len(rows)))

    def add_scaled(self, rows: Tensor, scales: Tensor) -> None:
        """Add `scales·rows`, with products of at most 1 in size.

        Args:
            rows (`torch.Tensor`): `(P, D)` float64, overwritten; at most 1024 rows.
            scales (`torch.Tensor`): `(P,)` float64.
        """
        row_count = self._recent_rows + len(rows)
        if self._recent is None or row_count > _MAX_ROWS:
            self._units = self.units
            self._recent = rows.new_zeros(rows.shape[1])
        factors = scales * _SUM_UNITS
        whole = rows.mul_(factors.unsqueeze(1)).round_()
        # A product with ones adds up the rows in one pass of BLAS; of whole numbers, it does so exactly.
        self._recent.addmv_(whole.T, torch.ones_like(scales))
        self._recent_rows += len(rows)

    def value(self, all_sum: AllSum = lambda tensor: tensor) -> Tensor:
        """The sum over all ranks, `(D,)` float64."""
        total = all_sum(self.units)
        return total.double() / _SUM_UNITS


def row_sums(rows: Tensor) -> Tensor:
    """Sum of each row, `(P,)`, the same however many rows there are."""
    return _two_or_more(rows).sum(dim=1)[: len(rows)]


def row_norms(rows: Tensor) -> Tensor:
    """Norm of each row, `(P,)`; as [`row_sums`]."""
    norms = torch.linalg.vector_norm(_two_or_more(rows), dim=1)
    return norms[: len(rows)]


def _two_or_more(rows: Tensor) -> Tensor:
    # A single long row would be split over threads, and its parts added in another order.
    return rows if len(rows) > 1 else rows.expand(2, -1)


def blocks(chunks: Chunks) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks in float64, a few rows at a time in one piece of memory that is used again and may be overwritten."""
    buffer: Tensor | None = None
    for positions, features in chunks:
        dim = features.shape[1]
        rows_at_once = _BLOCK // max(1, dim)
        step = max(2, min(_MAX_ROWS, rows_at_once))
        if buffer is None or buffer.shape[1] != dim:
            buffer = torch.empty(step, dim, dtype=torch.float64, device=features.device)
        for start in range(0, len(features), step):
            part = slice(start, start + step)
            block = features[part]
            memory = buffer[: len(block)]
            yield positions[part], memory.copy_(block)
