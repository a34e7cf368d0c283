"""Sums and products of large sets of vectors that come out the same to the last bit, however the rows are split.

Scores decide which prompts are trained on, and equal candidates must be ranked equally by one process and by many:
additions are made in fixed point, and rows are reduced one by one, a block of them at a time.

Axes: `P` rows, `D` dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

Chunks = Iterable[tuple[torch.Tensor, torch.Tensor]]
AllSum = Callable[[torch.Tensor], torch.Tensor]

_FRACTION_BITS = 42  # see `FixedPointSum`
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
        self._recent: torch.Tensor | None = None
        self._recent_rows = 0

    @property
    def units(self) -> torch.Tensor:
        """The sum in units of 2^-42, `(D,)` int64."""
        if self._recent is not None:
            self._units += self._recent.to(torch.int64).cpu()
        self._recent, self._recent_rows = None, 0
        return self._units

    def add(self, terms: torch.Tensor) -> None:
        """Add the rows of `terms`, `(P, D)` with entries of at most 1 in size."""
        for start in range(0, len(terms), _MAX_ROWS):
            self.add_scaled(
                terms[start : start + _MAX_ROWS].to(torch.float64, copy=True),
                torch.ones(
                    min(_MAX_ROWS, len(terms) - start), dtype=torch.float64, device=terms.device
                ),
            )

    def add_scaled(self, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """Add `scales·rows`, with products of at most 1 in size.

        Args:
            rows (`torch.Tensor`): `(P, D)` float64, overwritten; at most 1024 rows.
            scales (`torch.Tensor`): `(P,)` float64.
        """
        if self._recent is None or self._recent_rows + len(rows) > _MAX_ROWS:
            self._units = self.units
            self._recent = rows.new_zeros(rows.shape[1])
        whole = rows.mul_((scales * 2.0**_FRACTION_BITS).unsqueeze(1)).round_()
        self._recent.addmv_(whole.T, torch.ones_like(scales))
        self._recent_rows += len(rows)

    def value(self, all_sum: AllSum = lambda tensor: tensor) -> torch.Tensor:
        """The sum over all ranks, `(D,)` float64."""
        return all_sum(self.units).double() / 2.0**_FRACTION_BITS


def row_sums(rows: torch.Tensor) -> torch.Tensor:
    """Sum of each row, the same however many rows there are: a single long one would be split over threads."""
    return rows.sum(dim=1) if len(rows) > 1 else rows.expand(2, -1).sum(dim=1)[:1]


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Norm of each row; as [`row_sums`]."""
    return torch.linalg.vector_norm(rows if len(rows) > 1 else rows.expand(2, -1), dim=1)[
        : len(rows)
    ]


def blocks(chunks: Chunks) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Chunks in float64, a few rows at a time in one piece of memory that is used again and may be overwritten."""
    buffer: torch.Tensor | None = None
    for positions, features in chunks:
        step = min(_MAX_ROWS, max(2, _BLOCK // max(1, features.shape[1])))
        if buffer is None or buffer.shape[1] != features.shape[1]:
            buffer = torch.empty(
                step, features.shape[1], dtype=torch.float64, device=features.device
            )
        for start in range(0, len(features), step):
            block = features[start : start + step]
            yield positions[start : start + step], buffer[: len(block)].copy_(block)
