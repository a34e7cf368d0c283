"""Which prompts are alike: the nearest neighbours of each in a space of embeddings.

Axes: `n` prompts, `H` entries of an embedding, `k` neighbours.

Similarities are computed in whole numbers: unit vectors are rounded to multiples of some 1/4000, so that every product
and every partial sum is a whole number below 2^24, which float32 holds exactly. So a similarity (good to 1e-4) does
not depend on the order of addition: neighbours are the same to the bit for any block size, thread count and device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

EXACT_LIMIT = 150_000
"""Prompts up to which `method="auto"` compares all pairs."""

LARGEST_SUM = 2**24
SUM_BITS = 38
"""Bits of an embedding's entry in the exact sum that the mean is taken from: 2^24 of them fit into an int64."""

CELLS, POINTS_PER_CELL, SEARCHED_CELLS = 4, 64, 16
"""Of the approximate search: cells by the root of the prompts, prompts per cell that place it, cells searched."""

METHODS = ("auto", "exact", "approximate")


@dataclass(frozen=True)
class Neighbours:
    """The most similar prompts of each prompt, the most similar first; a prompt is none of its own.

    Args:
        rows (`np.ndarray`): `(n, k)` int32: rows of the dataset.
        weights (`np.ndarray`): `(n, k)` float32 from 0 to 1: how much an outcome of theirs tells.
    """

    rows: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.shape != self.weights.shape:
            raise ValueError(
                f"rows {self.rows.shape} and weights {self.weights.shape} of neighbours must both be (n, k)."
            )
        if self.rows.size and not 0 <= self.rows.min() <= self.rows.max() < len(self.rows):
            raise ValueError(
                f"Neighbours are numbered {self.rows.min()} to {self.rows.max()}, and there are {len(self.rows)} "
                "prompts: give rows of the dataset, counted from 0."
            )

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def none(prompt_count: int) -> Neighbours:
        """Prompts that tell nothing about each other."""
        return Neighbours(np.empty((prompt_count, 0), dtype=np.int32), np.empty((prompt_count, 0), dtype=np.float32))


def nearest_neighbours(
    embeddings: np.ndarray | torch.Tensor,
    count: int = 64,
    power: float = 4.0,
    method: str = "auto",
    block_rows: int = 256,
    device: torch.device | str = "cpu",
) -> Neighbours:
    """Neighbours by the cosine of centred embeddings; equally similar ones in the order of their rows.

    Args:
        embeddings (`np.ndarray` or `torch.Tensor`): `(n, H)`, any floating type.
        count (`int`, *optional*, defaults to `64`): k; fewer if there are not so many other prompts.
        power (`float`, *optional*, defaults to `4.0`): The weight is the cosine to this power, 0 if it is negative.
        method (`str`, *optional*, defaults to `"auto"`):
            `"exact"` compares all pairs, O(n² H) time and O(n k) memory; `"approximate"` the prompts of like cells
            only, with faiss; `"auto"` is exact up to `EXACT_LIMIT` prompts.
        block_rows (`int`, *optional*, defaults to `256`): Prompts compared at a time; the result does not depend on
            it.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where all pairs are compared.

    Returns:
        `Neighbours`: A prompt whose centred embedding is zero (all prompts alike, or just one) has no weight anywhere.

    Raises:
        `ValueError`: If the embeddings are not finite or of another shape, or a setting is out of range.
        `ImportError`: If faiss is needed and missing.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(map(repr, METHODS))}.")
    for name, value, least in (("count", count, 0), ("block_rows", block_rows, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: give a number of at least {least}.")
    if not power > 0:
        raise ValueError(f"power={power}: give a number above 0.")
    vectors = torch.as_tensor(embeddings)
    _check_embeddings(vectors)
    count = min(count, len(vectors) - 1)
    if not count:
        return Neighbours.none(len(vectors))
    if method == "auto":
        method = "exact" if len(vectors) <= EXACT_LIMIT else "approximate"
    units, scale = whole_units(vectors)
    if method == "exact":
        rows, products = _compare_all(units.to(device), count, block_rows)
    else:
        rows, products = _compare_cells(units.numpy(), count)
    cosines = np.clip(products / scale**2, 0, 1)
    return Neighbours(rows, (cosines**power).astype(np.float32))


def _check_embeddings(vectors: torch.Tensor) -> None:
    if vectors.ndim != 2 or not vectors.is_floating_point() or not len(vectors):
        raise ValueError(
            f"Embeddings have the shape {tuple(vectors.shape)} and the type {vectors.dtype}: give floating-point "
            "numbers, one row for each prompt of the pool."
        )
    for start in range(0, len(vectors), 65536):
        finite = torch.isfinite(vectors[start : start + 65536]).all(dim=1)
        if not finite.all():
            row = start + int(torch.argmin(finite.int()))
            raise ValueError(
                f"The embedding of prompt {row} is not finite: leave such prompts out, or embed them with another "
                "model or in float32."
            )


def whole_units(vectors: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Centred vectors of length `scale`, rounded to whole numbers.

    Args:
        vectors (`torch.Tensor`): `(n, H)`, finite.

    Returns:
        `tuple[torch.Tensor, int]`: `(n, H)` float32 of whole numbers, zero for a vector that lies in the centre; and
        the scale, such that a product of two is less than 2^24 with all its partial sums.
    """
    # Rounding moves an entry by at most 1/2, and so a vector's length by at most √H / 2.
    scale = int(np.sqrt(LARGEST_SUM) - 0.5 * np.sqrt(vectors.shape[1])) - 1
    mean, largest = _exact_mean(vectors)
    units = torch.empty(vectors.shape, dtype=torch.float32)
    for start in range(0, len(vectors), 65536):
        block = vectors[start : start + 65536].detach().cpu().double() - mean
        lengths = block.norm(dim=1, keepdim=True)
        # What is left of equal vectors after centring is rounding, and has no direction.
        lengths[lengths <= 1e-9 * largest] = torch.inf
        units[start : start + 65536] = torch.round(block * (scale / lengths))
    return units, scale


def _exact_mean(vectors: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean, from an exact sum of fixed-point numbers: it does not depend on the order; and the largest entry."""
    largest = float(vectors.abs().max())
    if largest == 0:
        return torch.zeros(vectors.shape[1], dtype=torch.float64), largest
    unit = 2.0**SUM_BITS / largest
    total = torch.zeros(vectors.shape[1], dtype=torch.int64)
    for start in range(0, len(vectors), 65536):
        block = vectors[start : start + 65536].detach().cpu().double()
        total += torch.round(block * unit).to(torch.int64).sum(dim=0)
    return total.double() / (unit * len(vectors)), largest


def _compare_all(units: torch.Tensor, count: int, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest products of each vector with the others, `(n, k)` each: rows and products."""
    total = len(units)
    rows = np.empty((total, count), dtype=np.int32)
    products = np.empty((total, count), dtype=np.float32)
    buffer = units.new_empty(min(block_rows, total), total)
    with _full_float32():
        for start in range(0, total, block_rows):
            stop = min(start + block_rows, total)
            block = torch.matmul(units[start:stop], units.T, out=buffer[: stop - start])
            block[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
            values, chosen = largest_in_rows(block, count)
            rows[start:stop], products[start:stop] = chosen.cpu().numpy(), values.cpu().numpy()
    return rows, products


@contextmanager
def _full_float32() -> Iterator[None]:
    """Whole numbers of 24 bits need all bits of float32: no TF32, no bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def largest_in_rows(block: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entries of each row, the largest first; of equal ones those of the lower columns, in their order.

    Args:
        block (`torch.Tensor`): `(R, C)`.
        count (`int`): k, at most C.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Values and columns, `(R, k)` each.
    """
    values, columns = torch.topk(block, count, dim=1)
    last = values[:, -1:]
    # `topk` takes any of equal values: where more columns than it took have the last one, take the lowest of them.
    taken, there = (values == last).sum(dim=1), (block == last).sum(dim=1)
    for row in torch.nonzero(taken < there).flatten().tolist():
        wanted = int(taken[row])
        columns[row, count - wanted :] = torch.nonzero(block[row] == last[row]).flatten()[:wanted]
    by_column = torch.argsort(columns, dim=1)
    values, columns = values.gather(1, by_column), columns.gather(1, by_column)
    by_value = torch.argsort(values, dim=1, descending=True, stable=True)
    return values.gather(1, by_value), columns.gather(1, by_value)


def _compare_cells(units: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_compare_all`, but each vector is compared with those of the cells around it alone."""
    try:
        import faiss
    except ImportError as error:  # an optional dependency: most pools are compared exactly
        raise ImportError(
            f"Neighbours of {len(units)} prompts are searched with faiss: pip install faiss-cpu, or compare all pairs "
            "with method='exact'."
        ) from error
    cells = max(1, int(CELLS * np.sqrt(len(units))))
    index = faiss.index_factory(units.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    inverted = faiss.extract_index_ivf(index)
    inverted.cp.max_points_per_centroid = POINTS_PER_CELL
    inverted.nprobe = min(SEARCHED_CELLS, cells)
    index.train(units)
    index.add(units)
    rows = np.empty((len(units), count), dtype=np.int32)
    products = np.empty((len(units), count), dtype=np.float32)
    for start in range(0, len(units), 4096):
        own = np.arange(start, min(start + 4096, len(units)))[:, None]
        values, columns = index.search(units[own[:, 0]], count + 1)
        # The prompt itself comes last, as do the missing ones (-1) where the cells hold fewer than `count`.
        missing = (columns < 0) | (columns == own)
        columns, values = np.where(missing, own, columns), np.where(missing, -np.inf, values)
        order = np.lexsort((columns, -values), axis=1)[:, :count]
        rows[own[:, 0]] = np.take_along_axis(columns, order, axis=1)
        products[own[:, 0]] = np.take_along_axis(values, order, axis=1)
    return rows, products
