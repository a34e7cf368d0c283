"""Seeded random projections of gradients to `D` dimensions that preserve inner products.

Axes: `P` prompts, `R` tokens of a prompt's rollouts, `O`×`I` a weight matrix (`O` rows, `I` columns), `D` feature
dimensions. A weight gradient is a sum of outer products over tokens, `Σ_r rows_r ⊗ columns_r`. Projections take the
two factors, so that a fast one does not need the product.

Every random number is a function of (seed, parameter name, index). Features are therefore the same on every device,
rank and batching, and weights that two modules share (tied embedding and head) add up exactly.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from trl_learnalign import rng

# Elements of the largest temporary matrix; larger products are formed piecewise. On a CPU a piece should stay in cache
# between operations (4 MiB in float32); on other devices few large kernels are faster (64 MiB).
_MAX_ELEMENTS_CPU = 1 << 20
_MAX_ELEMENTS = 1 << 24

AUTO_LEAST = 192  # see `layer_rank`
AUTO_SHARE = 8


class Projection(ABC):
    """A linear map of all gradients of a model to `D` dimensions, accumulated parameter by parameter.

    Args:
        dim (`int`): D.
        seed (`int`): Seed of the projection.
    """

    def __init__(self, dim: int, seed: int):
        self.dim = dim
        self.seed = seed

    @property
    @abstractmethod
    def version(self) -> str:
        """Identifies comparable features: kind, algorithm version and settings."""

    @abstractmethod
    def add_dense(self, out: Tensor, name: str, gradients: Tensor) -> None:
        """Add the projection of explicit gradients.

        Args:
            out (`torch.Tensor`): `(P, D)` float32, added to in place.
            name (`str`): Canonical parameter name.
            gradients (`torch.Tensor`): `(P, *parameter shape)`.
        """

    def release(self) -> None:  # noqa: B027 (most have nothing to release)
        """Free the memory that is kept between calls; called when a capture ends."""

    def add_outer(
        self,
        out: Tensor,
        name: str,
        rows: Tensor,
        columns: Tensor,
    ) -> None:
        """Add the projection of `Σ_r rows_r ⊗ columns_r`.

        Args:
            out (`torch.Tensor`): `(P, D)` float32, added to in place.
            name (`str`): Canonical parameter name.
            rows (`torch.Tensor`): `(P, R, O)`.
            columns (`torch.Tensor`): `(P, R, I)`.
        """
        for p in range(len(rows)):
            gradient = rows[p].float().T @ columns[p].float()
            self.add_dense(out[p : p + 1], name, gradient.unsqueeze(0))

    def add_rows(
        self,
        out: Tensor,
        name: str,
        indices: Tensor,
        columns: Tensor,
        row_count: int,
    ) -> None:
        """Add the projection of `Σ_r onehot(indices_r) ⊗ columns_r`, the gradient of an embedding.

        Args:
            out (`torch.Tensor`): `(P, D)` float32, added to in place.
            name (`str`): Canonical parameter name.
            indices (`torch.Tensor`): `(P, R)` integers below `row_count`.
            columns (`torch.Tensor`): `(P, R, I)`.
            row_count (`int`): O.
        """
        for p in range(len(indices)):
            gradient = torch.zeros(row_count, columns.shape[-1], device=out.device)
            _index_add(gradient, indices[p], columns[p].float())
            self.add_dense(out[p : p + 1], name, gradient.unsqueeze(0))


class CountSketch(Projection):
    """Signed count-sketch: each gradient entry is added to one bucket with a random sign.

    It is unbiased for inner products, with `Var⟨Sx, Sy⟩ ≤ (‖x‖²‖y‖² + ⟨x, y⟩²) / D` (Charikar, Chen & Farach-Colton,
    2002; Weinberger et al., 2009). The error of a cosine is about `1/√D`.

    Signs and buckets are *separable* (as in TensorSketch, Pham & Pagh, 2013). Entry `(i, j)` has sign `s(i)·t(b, j)`,
    with `b = i div q`, and bucket `(i·I + j) mod q`, shifted by an offset of the parameter. `q` is the largest prime
    up to D that does not divide I. Signs are therefore applied to the factors instead of the product, and bucketing is
    one reshape-and-sum of the product's memory. Unlike in TensorSketch, two entries of one row or of one column never
    collide (`i·I mod q` is different for all rows of a block, and blocks have their own signs). The sign products of
    colliding entries are thus independent, and the variance is that of a sketch with a full table of random signs.

    *Factored* (`rank=k`): rows and columns are first folded to between k and 2k dimensions with the same signs, which
    reduces the size of the product. The error of a layer is about `√(2/k)`, and averages out over layers of similar
    norm. A single layer with much of the norm (embedding and head) keeps its error; `rank="auto"` gives large layers a
    larger k.

    Args:
        dim (`int`): D, at least 2.
        seed (`int`): Seed of signs and offsets.
        rank (`int` or `"auto"`, *optional*): k; `"auto"` chooses it for each layer, see [`layer_rank`]; `None`
            projects the exact gradient.
    """

    _VERSION = 1

    def __init__(self, dim: int, seed: int, rank: int | str | None = None):
        super().__init__(dim, seed)
        self.rank = rank
        self._tables: dict[tuple[str, int, int], _Table] = {}
        self._scratch = _Scratch()

    @property
    @override
    def version(self) -> str:
        return f"count_sketch-{self._VERSION} dim={self.dim} seed={self.seed} rank={self.rank}"

    @override
    def release(self) -> None:
        self._scratch = _Scratch()

    @override
    def add_outer(
        self,
        out: Tensor,
        name: str,
        rows: Tensor,
        columns: Tensor,
    ) -> None:
        height, width = rows.shape[-1], columns.shape[-1]
        table = self._table(name, height, width, out.device)
        # Number of prompts whose factors and products together stay below the maximum size.
        most = _most_elements(out.device)
        product_size = min(height * width, most)
        largest = max(rows[0].numel(), columns[0].numel(), product_size)
        together = max(1, most // largest)
        for p in range(0, len(out), together):
            part = slice(p, p + together)
            if table.pieces is None:
                self._add_exact(out[part], table, rows[part], columns[part])
                continue
            row_pieces, column_pieces = table.pieces
            folded_rows = self._folded("rows", rows[part], table.row_signs, row_pieces)
            folded_columns = self._folded(
                "columns", columns[part], table.column_signs[0], column_pieces
            )
            product = self._product(folded_rows, folded_columns)
            table.add_product(out[part], product, 0)

    def _add_exact(
        self,
        out: Tensor,
        table: _Table,
        rows: Tensor,
        columns: Tensor,
    ) -> None:
        tokens, height = rows.shape[1:]
        width = columns.shape[-1]
        # Signs are applied to whichever has fewer entries, a factor or the product (the result is bit-identical).
        sign_rows = tokens <= width
        sign_columns = tokens <= min(height, table.period)
        # Split to keep the product small; each piece continues in the bucket where the previous one ended.
        rows_at_once = _most_elements(out.device) // width
        step = max(1, min(table.period, rows_at_once))
        for block, start in enumerate(range(0, height, table.period)):
            end = min(start + table.period, height)
            column_signs = table.column_signs[block]
            right = self._signed("columns", columns, column_signs if sign_columns else None)
            for first in range(start, end, step):
                part = slice(first, min(first + step, end))
                row_signs = table.row_signs[part]
                left = self._signed("rows", rows[..., part], row_signs if sign_rows else None)
                product = self._product(left, right)
                if not sign_rows:
                    product *= row_signs.unsqueeze(-1)
                if not sign_columns:
                    product *= column_signs
                table.add_product(out, product, (first - start) * width)

    def _signed(self, slot: str, values: Tensor, signs: Tensor | None) -> Tensor:
        if signs is None:
            return values.float()
        memory = self._scratch(slot, values.shape, values.device)
        return torch.mul(values, signs, out=memory)

    def _folded(self, slot: str, values: Tensor, signs: Tensor, pieces: int) -> Tensor:
        """Multiply `(P, R, size)` by signs and fold it to `(P, R, width)`: entry `i` is added to `i mod width`."""
        *shape, size = values.shape
        width = math.ceil(size / pieces)
        folded = self._scratch(slot, (*shape, width), values.device)
        torch.mul(values[..., :width], signs[:width], out=folded)
        for start in range(width, size, width):
            part = slice(start, start + width)
            piece = values[..., part].float()
            # The last piece may be shorter.
            target = folded[..., : piece.shape[-1]]
            target.addcmul_(piece, signs[part])
        return folded

    def _product(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`Σ_r rows_r ⊗ columns_r`, `(P, O, I)`."""
        height, width = rows.shape[-1], columns.shape[-1]
        memory = self._scratch("product", (len(rows), height, width), rows.device)
        return torch.bmm(rows.transpose(1, 2), columns, out=memory)

    @override
    def add_rows(
        self,
        out: Tensor,
        name: str,
        indices: Tensor,
        columns: Tensor,
        row_count: int,
    ) -> None:
        table = self._table(name, row_count, columns.shape[-1], out.device)
        if table.pieces is None:
            self._add_exact_rows(out, table, indices, columns)
            return
        row_pieces, column_pieces = table.pieces
        height = math.ceil(row_count / row_pieces)
        folded = self._folded("columns", columns, table.column_signs[0], column_pieces)
        folded *= table.row_signs[indices].unsqueeze(-1)
        for p in range(len(out)):
            shape = (height, folded.shape[-1])
            product = self._scratch("product", shape, out.device).zero_()
            _index_add(product, indices[p] % height, folded[p])
            table.add_product(out[p : p + 1], product.unsqueeze(0), 0)

    def _add_exact_rows(
        self,
        out: Tensor,
        table: _Table,
        indices: Tensor,
        columns: Tensor,
    ) -> None:
        prompts, width, period = len(out), columns.shape[-1], table.period
        signs = table.row_signs[indices].unsqueeze(-1)
        local = torch.zeros(prompts, period, device=out.device)
        # In the flat view, prompt p has the buckets p·q to (p+1)·q.
        numbers = torch.arange(prompts, device=out.device)
        owner = numbers.view(-1, 1, 1) * period
        first_buckets = (indices % period) * width % period
        entries = torch.arange(width, device=out.device)
        # Four tensors of that size exist at once: values, signs, buckets, owners.
        step = max(1, _most_elements(out.device) // (4 * prompts * width))
        for start in range(0, indices.shape[1], step):
            part = slice(start, start + step)
            values = columns[:, part].float() * signs[:, part]
            values *= table.column_signs[indices[:, part] // period]
            buckets = (first_buckets[:, part].unsqueeze(-1) + entries) % period + owner
            _index_add(local.view(-1), buckets.reshape(-1), values.reshape(-1))
        table.add_local(out, local)

    @override
    def add_dense(self, out: Tensor, name: str, gradients: Tensor) -> None:
        width = gradients.shape[-1] if gradients.ndim > 1 else 1
        matrix = gradients.float().reshape(len(gradients), -1, width)
        table = self._table(name, matrix.shape[1], width, out.device)
        # A vector is one row: its entries differ in bucket or sign, and folding it would save nothing.
        if table.pieces is not None and gradients.ndim > 2:
            # The same map as for a product: fold the columns of every row, then the rows.
            row_pieces, column_pieces = table.pieces
            folded = self._folded("columns", matrix, table.column_signs[0], column_pieces)
            columns_first = folded.transpose(1, 2)
            folded = self._folded("rows", columns_first, table.row_signs, row_pieces)
            table.add_product(out, folded.transpose(1, 2).contiguous(), 0)
            return
        for block, start in enumerate(range(0, matrix.shape[1], table.period)):
            rows = slice(start, start + table.period)
            row_signs = table.row_signs[rows].unsqueeze(-1)
            signed = matrix[:, rows] * row_signs * table.column_signs[block]
            local = _fold_flat(signed.flatten(1), table.period, 0)
            table.add_local(out, local)

    def _table(self, name: str, row_count: int, width: int, device: torch.device) -> _Table:
        key = (name, row_count, width)
        if key not in self._tables:
            rank = layer_rank(self.rank, row_count, width)
            self._tables[key] = _Table(self.dim, self.seed, rank, name, row_count, width, device)
        return self._tables[key]


class _Table:
    """Signs, bucket period and offset of one parameter."""

    def __init__(
        self,
        dim: int,
        seed: int,
        rank: int | None,
        name: str,
        row_count: int,
        width: int,
        device: torch.device,
    ):
        self.dim = dim
        self.pieces = _pieces(dim, rank, row_count, width)
        self.period = _period(dim, width)
        blocks = math.ceil(row_count / self.period)
        row_stream = rng.key(seed, "row signs", name)
        row_signs = rng.signs(row_stream, row_count)
        column_stream = rng.key(seed, "column signs", name)
        column_signs = rng.signs(column_stream, blocks * width).reshape(blocks, width)
        self.row_signs = torch.from_numpy(row_signs).to(device)  # (O,)
        self.column_signs = torch.from_numpy(column_signs).to(device)  # (blocks, I)
        self.offset = rng.key(seed, "offset", name) % dim

    def add_product(self, out: Tensor, product: Tensor, start: int) -> None:
        """Add a signed matrix `(P, rows, columns)` to the buckets; its first entry has flat index `start`."""
        # The period depends on the product's own width, which is smaller if it was folded.
        period = _period(self.dim, product.shape[-1])
        self.add_local(out, _fold_flat(product.flatten(1), period, start))

    def add_local(self, out: Tensor, local: Tensor) -> None:
        """Add `(P, q)` local buckets to `(P, D)`, shifted by the parameter's offset."""
        # Buckets beyond the end wrap around to the beginning.
        behind = out[:, self.offset :]
        head = min(local.shape[1], behind.shape[1])
        tail = local.shape[1] - head
        # Not `+=`, which would copy the slice onto itself afterwards.
        behind[:, :head].add_(local[:, :head])
        out[:, :tail].add_(local[:, head:])


class _Scratch:
    """Reusable memory for intermediate results, because allocating new pages costs as much as the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def __call__(self, slot: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """A float32 tensor that is valid until the next call for the same slot."""
        size = math.prod(shape)
        buffer = self._buffers.get((slot, device))
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[slot, device] = torch.empty(size, device=device)
        return buffer[:size].view(*shape)


def _most_elements(device: torch.device) -> int:
    return _MAX_ELEMENTS_CPU if device.type == "cpu" else _MAX_ELEMENTS


@functools.cache
def _period(dim: int, width: int) -> int:
    """The largest prime up to `dim` that does not divide `width`."""
    candidate = dim
    while width % candidate == 0 or not _is_prime(candidate):
        candidate -= 1
    return candidate


def _is_prime(number: int) -> bool:
    divisors = range(2, math.isqrt(number) + 1)
    return all(number % divisor for divisor in divisors)


def layer_rank(rank: int | str | None, row_count: int, width: int) -> int | None:
    """The k of one layer.

    `"auto"` gives `√(O·I) / 8`, at least 192. A layer's share of the gradient grows with its size, and its error is
    weighted by the square of that share, so large layers need a larger k. Their product is still at most a sixteenth
    of the exact one.

    Args:
        rank (`int` or `"auto"`, *optional*): `LearnAlignConfig.capture_rank`.
        row_count (`int`): O.
        width (`int`): I.
    """
    if rank is None or isinstance(rank, int):
        return rank
    return max(AUTO_LEAST, math.isqrt(row_count * width) // AUTO_SHARE)


def _pieces(dim: int, rank: int | None, row_count: int, width: int) -> tuple[int, int] | None:
    """Numbers of pieces from which rows and columns of a layer are folded; `None` if it is projected exactly."""
    if rank is None or max(row_count, width) < 2 * rank:
        return None
    columns = max(1, width // rank)
    # There are at most as many rows as buckets, because rows with equal buckets would also share the product of signs.
    most = _period(dim, math.ceil(width / columns))
    rows = max(1, row_count // rank, math.ceil(row_count / most))
    return rows, columns


def _fold_flat(flat: Tensor, period: int, start: int) -> Tensor:
    """Sum `(P, n)` into `(P, period)` buckets: entry `f` is added to `(start + f) mod period`."""
    buckets = torch.zeros(len(flat), period, device=flat.device)
    # Three parts: up to the last bucket, whole rounds over all buckets, and the remainder.
    behind = buckets[:, start % period :]
    head = min(flat.shape[1], behind.shape[1])
    behind[:, :head].copy_(flat[:, :head])
    rest = flat[:, head:]
    rounds = rest.shape[1] // period
    whole = rounds * period
    if rounds:
        parts = rest[:, :whole].unflatten(1, (rounds, period))
        buckets += parts.sum(dim=1)
    tail = rest[:, whole:]
    buckets[:, : tail.shape[1]].add_(tail)
    return buckets


def _index_add(target: Tensor, indices: Tensor, values: Tensor) -> None:
    """`target[indices] += values` in a deterministic order (`index_add_` on a GPU is not deterministic)."""
    if target.device.type == "cpu":
        target.index_add_(0, indices, values)
    else:
        target.index_put_((indices,), values, accumulate=True)  # sorts first


class Rademacher(Projection):
    """Dense random signs over `√D`, generated block by block: the construction of TRAK and LESS.

    It is the reference for tests and the choice faithful to the paper for small models; its cost grows with D times
    the number of parameters.

    Args:
        dim (`int`): D.
        seed (`int`): Seed of the signs.
    """

    _VERSION = 1
    _BLOCK = 1024

    @property
    @override
    def version(self) -> str:
        return f"rademacher-{self._VERSION} dim={self.dim} seed={self.seed}"

    @override
    def add_dense(self, out: Tensor, name: str, gradients: Tensor) -> None:
        flat = gradients.float().reshape(len(gradients), -1)
        stream = rng.key(self.seed, "rademacher", name)
        for start in range(0, flat.shape[1], self._BLOCK):
            part = flat[:, start : start + self._BLOCK]
            signs = self._signs(stream, start, part.shape[1]).to(out.device)
            out += part @ signs / math.sqrt(self.dim)

    def _signs(self, stream: int, start: int, count: int) -> Tensor:
        """Signs of the entries from `start` on, `(count, D)` float32; each entry uses whole words of 64 bits."""
        words = math.ceil(self.dim / 64)
        counters = np.arange(start * words, (start + count) * words)
        content = rng.random_bits(stream, counters).astype("<u8")  # same byte order on any machine
        bits = np.unpackbits(content.view(np.uint8)).reshape(count, words * 64)
        return 1 - 2 * torch.from_numpy(bits[:, : self.dim]).float()


class Unprojected(Projection):
    """The full gradient without projection, all parameters concatenated: for tests and very small models.

    Args:
        sizes (mapping of `str` to `int`): Number of elements of each trainable parameter, in canonical order.
    """

    def __init__(self, sizes: Mapping[str, int]):
        super().__init__(sum(sizes.values()), 0)
        self._slices = {}
        start = 0
        for name, size in sizes.items():
            self._slices[name] = slice(start, start + size)
            start += size

    @property
    @override
    def version(self) -> str:
        return f"none dim={self.dim}"

    @override
    def add_dense(self, out: Tensor, name: str, gradients: Tensor) -> None:
        flat = gradients.float().reshape(len(gradients), -1)
        out[:, self._slices[name]] += flat


def make_projection(
    kind: str,
    dim: int,
    seed: int,
    rank: int | str | None,
    sizes: Mapping[str, int],
) -> Projection:
    """The projection named by `LearnAlignConfig.projection`.

    Args:
        kind (`str`): `"count_sketch"`, `"rademacher"` or `"none"`.
        dim (`int`): D (not used by `"none"`).
        seed (`int`): Seed.
        rank (`int` or `"auto"`, *optional*): Folding rank of `"count_sketch"`.
        sizes (mapping of `str` to `int`): Number of elements of each trainable parameter, in canonical order.
    """
    if kind == "count_sketch":
        return CountSketch(dim, seed, rank)
    if kind == "rademacher":
        return Rademacher(dim, seed)
    if kind == "none":
        return Unprojected(sizes)
    raise ValueError(f"projection={kind!r}: choose one of 'count_sketch', 'rademacher', 'none'.")
