"""Seeded random projections of gradients to `D` dimensions that preserve inner products.

Axes: `P` prompts, `R` tokens of a prompt's rollouts, `O`×`I` a weight matrix (`O` rows, `I` columns), `D` feature
dimensions. A weight gradient is a sum of outer products over tokens, `Σ_r rows_r ⊗ columns_r`; projections take the
two factors, so that a fast one need not see the product.

Every random number is a function of (seed, parameter name, index): features are the same on every device, rank and
batching, and weights that two modules share (tied embedding and head) add up exactly.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from typing_extensions import override

from trl_learnalign import hashing

# Elements of the largest temporary matrix; larger products are formed piece by piece. On a CPU a piece should stay in
# its cache from one operation to the next (4 MiB in float32), elsewhere few large kernels are faster (64 MiB).
_MAX_ELEMENTS_CPU = 1 << 20
_MAX_ELEMENTS = 1 << 24

AUTO_LEAST = 192  # see `layer_rank`
AUTO_SHARE = 8


class Projection(ABC):
    """A linear map of all gradients of a model to `D` dimensions, filled in parameter by parameter.

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
        """What makes features comparable: kind, algorithm version and settings."""

    @abstractmethod
    def add_dense(self, out: torch.Tensor, name: str, gradients: torch.Tensor) -> None:
        """Add the projection of explicit gradients.

        Args:
            out (`torch.Tensor`): `(P, D)` float32, added to in place.
            name (`str`): Canonical parameter name.
            gradients (`torch.Tensor`): `(P, *parameter shape)`.
        """

    def release(self) -> None:  # noqa: B027 (most have nothing to release)
        """Give back memory that is kept from call to call; called when a capture ends."""

    def add_outer(
        self, out: torch.Tensor, name: str, rows: torch.Tensor, columns: torch.Tensor
    ) -> None:
        """Add the projection of `Σ_r rows_r ⊗ columns_r`.

        Args:
            out (`torch.Tensor`): `(P, D)` float32, added to in place.
            name (`str`): Canonical parameter name.
            rows (`torch.Tensor`): `(P, R, O)`.
            columns (`torch.Tensor`): `(P, R, I)`.
        """
        for p in range(len(rows)):
            self.add_dense(
                out[p : p + 1], name, (rows[p].float().T @ columns[p].float()).unsqueeze(0)
            )

    def add_rows(
        self,
        out: torch.Tensor,
        name: str,
        indices: torch.Tensor,
        columns: torch.Tensor,
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
    """Signed count-sketch: each gradient entry goes to one bucket with a random sign.

    Unbiased for inner products, `Var⟨Sx, Sy⟩ ≤ (‖x‖²‖y‖² + ⟨x, y⟩²) / D` (Charikar, Chen & Farach-Colton, 2002;
    Weinberger et al., 2009): cosine error about `1/√D`.

    Signs and buckets are *separable* (as in TensorSketch, Pham & Pagh, 2013): entry `(i, j)` has sign
    `s(i)·t(b, j)`, with `b = i div q`, and bucket `(i·I + j) mod q` shifted by an offset of the parameter, with `q`
    the largest prime up to D that does not divide I. So signs are applied to the factors instead of the product, and
    bucketing is one reshape-and-sum of the product's memory. Unlike in TensorSketch, two entries of one row or of
    one column never collide (`i·I mod q` is different for all rows of a block, and blocks have their own signs), so
    the sign products of colliding entries are independent and the variance is that of a sketch with a full table of
    random signs.

    *Factored* (`rank=k`): rows and columns are first folded to between k and 2k dimensions with the same signs, which
    shrinks the product. Error of a layer about `√(2/k)`, which averages out over layers of like norm. A single layer
    with much of the norm (embedding and head) keeps its error: `rank="auto"` gives large layers a larger k.

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
        self, out: torch.Tensor, name: str, rows: torch.Tensor, columns: torch.Tensor
    ) -> None:
        height, width = rows.shape[-1], columns.shape[-1]
        table = self._table(name, height, width, out.device)
        most = _most_elements(out.device)
        together = max(
            1, most // max(rows[0].numel(), columns[0].numel(), min(height * width, most))
        )
        for p in range(0, len(out), together):
            part = slice(p, p + together)
            if (pieces := table.pieces) is None:
                self._add_exact(out[part], table, rows[part], columns[part])
            else:
                folded_rows = _fold(rows[part], table.row_signs, pieces[0], self._scratch, "rows")
                folded_columns = _fold(
                    columns[part], table.column_signs[0], pieces[1], self._scratch, "columns"
                )
                table.add_product(out[part], self._product(folded_rows, folded_columns), 0)

    def _add_exact(
        self, out: torch.Tensor, table: _Table, rows: torch.Tensor, columns: torch.Tensor
    ) -> None:
        tokens, height, width = *rows.shape[1:], columns.shape[-1]
        # Signs go to whatever has fewer entries: a factor, or the product (the result is the same to the last bit).
        sign_rows, sign_columns = tokens <= width, tokens <= min(height, table.period)
        # Split so that the product stays small; each piece continues where the last one ended in the buckets.
        step = max(1, min(table.period, _most_elements(out.device) // width))
        for block, start in enumerate(range(0, height, table.period)):
            column_signs = table.column_signs[block]
            left = self._signed("columns", columns, column_signs if sign_columns else None)
            for first in range(start, min(start + table.period, height), step):
                last = min(first + step, start + table.period, height)
                row_signs = table.row_signs[first:last]
                right = self._signed(
                    "rows", rows[..., first:last], row_signs if sign_rows else None
                )
                product = self._product(right, left)
                if not sign_rows:
                    product *= row_signs.unsqueeze(-1)
                if not sign_columns:
                    product *= column_signs
                table.add_product(out, product, (first - start) * width)

    def _signed(self, slot: str, values: torch.Tensor, signs: torch.Tensor | None) -> torch.Tensor:
        if signs is None:
            return values.float()
        return torch.mul(values, signs, out=self._scratch(slot, values.shape, values.device))

    def _product(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """`Σ_r rows_r ⊗ columns_r`, `(P, O, I)`."""
        shape = (len(rows), rows.shape[-1], columns.shape[-1])
        return torch.bmm(
            rows.transpose(1, 2), columns, out=self._scratch("product", shape, rows.device)
        )

    @override
    def add_rows(
        self,
        out: torch.Tensor,
        name: str,
        indices: torch.Tensor,
        columns: torch.Tensor,
        row_count: int,
    ) -> None:
        width = columns.shape[-1]
        table = self._table(name, row_count, width, out.device)
        signs = table.row_signs[indices].unsqueeze(-1)
        if (pieces := table.pieces) is not None:
            height = math.ceil(row_count / pieces[0])
            folded = _fold(columns, table.column_signs[0], pieces[1], self._scratch, "columns")
            folded *= signs
            width = folded.shape[-1]
            for p in range(len(out)):
                product = self._scratch("product", (height, width), out.device).zero_()
                _index_add(product, indices[p] % height, folded[p])
                table.add_product(out[p : p + 1], product.unsqueeze(0), 0)
            return
        local = torch.zeros(len(out), table.period, device=out.device)
        # Prompt p owns the buckets p·q to (p+1)·q of the flat view.
        first = (indices % table.period) * width % table.period
        owner = torch.arange(len(out), device=out.device).unsqueeze(1) * table.period
        step = max(1, _most_elements(out.device) // (4 * len(out) * width))
        for start in range(0, indices.shape[1], step):
            part = slice(start, start + step)
            values = columns[:, part].float() * signs[:, part]
            values *= table.column_signs[indices[:, part] // table.period]
            buckets = (
                first[:, part].unsqueeze(-1) + torch.arange(width, device=out.device)
            ) % table.period
            _index_add(
                local.view(-1), (buckets + owner.unsqueeze(-1)).reshape(-1), values.reshape(-1)
            )
        table.add_local(out, local)

    @override
    def add_dense(self, out: torch.Tensor, name: str, gradients: torch.Tensor) -> None:
        # A vector is one row: its entries differ in bucket or sign, and folding it would save nothing.
        matrix = gradients.float().reshape(
            len(gradients), -1, gradients.shape[-1] if gradients.ndim > 1 else 1
        )
        table = self._table(name, matrix.shape[1], matrix.shape[2], out.device)
        pieces = table.pieces if gradients.ndim > 2 else None
        if pieces is not None:
            # The same map as for a product: fold the columns of every row, then the rows.
            folded = _fold(
                matrix, table.column_signs[0], pieces[1], self._scratch, "columns"
            ).transpose(1, 2)
            folded = (
                _fold(folded, table.row_signs, pieces[0], self._scratch, "rows")
                .transpose(1, 2)
                .contiguous()
            )
            table.add_product(out, folded, 0)
            return
        for block, start in enumerate(range(0, matrix.shape[1], table.period)):
            rows = slice(start, start + table.period)
            signed = (
                matrix[:, rows] * table.row_signs[rows].unsqueeze(-1) * table.column_signs[block]
            )
            table.add_local(out, _fold_flat(signed.flatten(1), table.period, 0))

    def _table(self, name: str, row_count: int, width: int, device: torch.device) -> _Table:
        key = (name, row_count, width)
        if key not in self._tables:
            self._tables[key] = _Table(
                self.dim, self.seed, self.rank, name, row_count, width, device
            )
        return self._tables[key]


class _Table:
    """Signs, bucket period and offset of one parameter."""

    def __init__(
        self,
        dim: int,
        seed: int,
        rank: int | str | None,
        name: str,
        row_count: int,
        width: int,
        device: torch.device,
    ):
        self.dim = dim
        self.pieces = _pieces(dim, layer_rank(rank, row_count, width), row_count, width)
        self.period = _period(dim, width)
        blocks = math.ceil(row_count / self.period)
        row_signs = hashing.signs(hashing.key(seed, "row signs", name), row_count)
        column_signs = hashing.signs(hashing.key(seed, "column signs", name), blocks * width)
        self.row_signs = torch.from_numpy(row_signs).to(device)  # (O,)
        self.column_signs = (
            torch.from_numpy(column_signs).view(blocks, width).to(device)
        )  # (blocks, I)
        self.offset = hashing.key(seed, "offset", name) % dim

    def add_product(self, out: torch.Tensor, product: torch.Tensor, start: int) -> None:
        """Bucket a matrix `(P, rows, columns)` with its signs, whose first entry has flat index `start`."""
        self.add_local(
            out, _fold_flat(product.flatten(1), _period(self.dim, product.shape[-1]), start)
        )

    def add_local(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """Add `(P, q)` local buckets to `(P, D)`, shifted by the parameter's offset."""
        head = min(local.shape[1], self.dim - self.offset)
        # Not `+=`, which would copy the slice onto itself once more.
        out[:, self.offset : self.offset + head].add_(local[:, :head])
        out[:, : local.shape[1] - head].add_(local[:, head:])


class _Scratch:
    """Memory for intermediate results, kept from call to call: fresh pages would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], torch.Tensor] = {}

    def __call__(self, slot: str, shape: Sequence[int], device: torch.device) -> torch.Tensor:
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
    while (
        any(candidate % k == 0 for k in range(2, math.isqrt(candidate) + 1))
        or width % candidate == 0
    ):
        candidate -= 1
    return candidate


def layer_rank(rank: int | str | None, row_count: int, width: int) -> int | None:
    """The k of one layer.

    `"auto"`: `√(O·I) / 8`, at least 192. A layer's share of the gradient grows with its size, and its error enters
    with that share squared, so that large layers need a larger k; their product still shrinks to a sixteenth of
    the exact one or less.

    Args:
        rank (`int` or `"auto"`, *optional*): `LearnAlignConfig.capture_rank`.
        row_count (`int`): O.
        width (`int`): I.
    """
    if rank is None or isinstance(rank, int):
        return rank
    return max(AUTO_LEAST, math.isqrt(row_count * width) // AUTO_SHARE)


def _pieces(dim: int, rank: int | None, row_count: int, width: int) -> tuple[int, int] | None:
    """Numbers of pieces that rows and columns of a layer are folded from; `None` if it stays exact."""
    if rank is None or max(row_count, width) < 2 * rank:
        return None
    columns = max(1, width // rank)
    # No more rows than buckets: rows that share all their buckets would share their signs' product too.
    most = _period(dim, math.ceil(width / columns))
    return max(1, row_count // rank, math.ceil(row_count / most)), columns


def _fold(
    values: torch.Tensor, signs: torch.Tensor, pieces: int, scratch: _Scratch, slot: str
) -> torch.Tensor:
    """`(P, R, size)` with signs, folded from pieces to `(P, R, width)`: entry `i` goes to `i mod width`."""
    width = math.ceil(values.shape[-1] / pieces)
    folded = scratch(slot, (*values.shape[:-1], width), values.device)
    torch.mul(values[..., :width], signs[:width], out=folded)
    for start in range(width, values.shape[-1], width):
        part = slice(start, start + width)
        tail = values[..., part]
        folded[..., : tail.shape[-1]].addcmul_(tail.float(), signs[part])
    return folded


def _fold_flat(flat: torch.Tensor, period: int, start: int) -> torch.Tensor:
    """Sum `(P, n)` into `(P, period)` buckets: entry `f` goes to `(start + f) mod period`."""
    out = torch.zeros(len(flat), period, device=flat.device)
    begin = start % period
    head = min(flat.shape[1], period - begin)
    out[:, begin : begin + head].copy_(flat[:, :head])
    rest = flat[:, head:]
    whole = rest.shape[1] // period * period
    if whole:
        out += rest[:, :whole].unflatten(1, (-1, period)).sum(dim=1)
    out[:, : rest.shape[1] - whole].add_(rest[:, whole:])
    return out


def _index_add(target: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    """`target[indices] += values`, in the same order every time (`index_add_` on a GPU is not deterministic)."""
    if target.device.type == "cpu":
        target.index_add_(0, indices, values)
    else:
        target.index_put_((indices,), values, accumulate=True)  # sorts first


class Rademacher(Projection):
    """Dense random signs over `√D`, generated block by block: the construction of TRAK and LESS.

    The oracle and the paper-faithful choice for small models: its cost grows with D times the parameters.

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
    def add_dense(self, out: torch.Tensor, name: str, gradients: torch.Tensor) -> None:
        flat = gradients.float().reshape(len(gradients), -1)
        words = math.ceil(self.dim / 64)
        stream = hashing.key(self.seed, "rademacher", name)
        for start in range(0, flat.shape[1], self._BLOCK):
            part = flat[:, start : start + self._BLOCK]
            counters = np.arange(start * words, (start + part.shape[1]) * words)
            bits = np.unpackbits(hashing.random_bits(stream, counters).astype("<u8").view(np.uint8))
            signs = (
                torch.from_numpy(bits).view(part.shape[1], words * 64)[:, : self.dim].to(out.device)
            )
            out += part @ (1 - 2 * signs.float()) / math.sqrt(self.dim)


class Unprojected(Projection):
    """The full gradient itself, parameters one after the other: for tests and very small models.

    Args:
        sizes (mapping of `str` to `int`): Entries of each trainable parameter, in canonical order.
    """

    def __init__(self, sizes: Mapping[str, int]):
        super().__init__(sum(sizes.values()), 0)
        ends = np.cumsum(list(sizes.values())).tolist()
        self._slices = {
            name: slice(end - size, end)
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }

    @property
    @override
    def version(self) -> str:
        return f"none dim={self.dim}"

    @override
    def add_dense(self, out: torch.Tensor, name: str, gradients: torch.Tensor) -> None:
        out[:, self._slices[name]] += gradients.float().reshape(len(gradients), -1)


def make_projection(
    kind: str, dim: int, seed: int, rank: int | str | None, sizes: Mapping[str, int]
) -> Projection:
    """The projection named by `LearnAlignConfig.projection`.

    Args:
        kind (`str`): `"count_sketch"`, `"rademacher"` or `"none"`.
        dim (`int`): D (not used by `"none"`).
        seed (`int`): Seed.
        rank (`int` or `"auto"`, *optional*): Folding rank of `"count_sketch"`.
        sizes (mapping of `str` to `int`): Entries of each trainable parameter, in canonical order.
    """
    if kind == "count_sketch":
        return CountSketch(dim, seed, rank)
    if kind == "rademacher":
        return Rademacher(dim, seed)
    if kind == "none":
        return Unprojected(sizes)
    raise ValueError(f"projection={kind!r}: choose one of 'count_sketch', 'rademacher', 'none'.")
