"""Features and success rates → scores and selections. Pure tensor maths.

Axes: `P` prompts of the pool, `G` rollouts per prompt, `D` feature dimensions. Equation numbers: Li et al., 2026
(arXiv 2506.11480).

The score of a prompt is the row average of `S_ij = V_i V_j cos(φ_i, φ_j)` (Eq. 9). With `φ̂ = φ / ‖φ‖` and
`m = Σ_j V_j φ̂_j` it is `(V_i / P) ⟨φ̂_i, m⟩`: O(P·D) time, and O(D) memory in addition to the features.
The P×P matrix is never built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from trl_learnalign.distributed import Ranks

# ---- Sums that do not depend on the order ---------------------------------------------------------------------------
# Scores decide which prompts are trained on, and equal candidates must be ranked equally by any number of processes.
# So additions are made in fixed point, and rows are reduced one by one, a block of them at a time.
#
# Axes: `P` rows, `D` dimensions.

Chunks = Iterable[tuple[Tensor, Tensor]]
AllSum = Callable[[Tensor], Tensor]

_SUM_UNITS = 2.0**42  # units per 1, i.e. 42 fraction bits, see `FixedPointSum`
_MAX_ROWS = 1024
_BLOCK = 1 << 17  # entries per block: 1 MiB in float64, which fits into a CPU's cache


class FixedPointSum:
    """A sum of vectors in 64-bit fixed point: addition is exact, so it does not depend on order, chunks or ranks.

    With 42 fraction bits the rounding of one term is 2^-43 (an entry of φ̂ is about 2^-7 at D = 8192). 2^21 terms of
    size 1, or 2^23 terms of the largest learnability 1/4, fit before the 64-bit integers could overflow.

    Args:
        dim (`int`): D.
    """

    def __init__(self, dim: int):
        self._units = torch.zeros(dim, dtype=torch.int64)
        # Sums of up to 2^10 whole numbers of up to 2^42 are exact in float64, in any order, including BLAS's.
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
        """Add the rows of `terms`, `(P, D)`, whose entries have absolute values of at most 1."""
        for start in range(0, len(terms), _MAX_ROWS):
            part = terms[start : start + _MAX_ROWS]
            rows = part.to(torch.float64, copy=True)
            self.add_scaled(rows, rows.new_ones(len(rows)))

    def add_scaled(self, rows: Tensor, scales: Tensor) -> None:
        """Add `scales·rows`, whose products have absolute values of at most 1.

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
        # A product with ones adds the rows in one BLAS pass, exactly, since they are whole numbers.
        self._recent.addmv_(whole.T, torch.ones_like(scales))
        self._recent_rows += len(rows)

    def value(self, all_sum: AllSum = lambda tensor: tensor) -> Tensor:
        """Return the sum over all ranks, `(D,)` float64."""
        total = all_sum(self.units)
        return total.double() / _SUM_UNITS


def row_sums(rows: Tensor) -> Tensor:
    """Return the sum of each row, `(P,)`, which does not depend on the number of rows."""
    return _two_or_more(rows).sum(dim=1)[: len(rows)]


def row_norms(rows: Tensor) -> Tensor:
    """Return the norm of each row, `(P,)`; as in [`row_sums`]."""
    norms = torch.linalg.vector_norm(_two_or_more(rows), dim=1)
    return norms[: len(rows)]


def _two_or_more(rows: Tensor) -> Tensor:
    # BLAS would split a single long row over threads and add its parts in another order.
    return rows if len(rows) > 1 else rows.expand(2, -1)


def blocks(chunks: Chunks) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks in float64, a few rows at a time, in one buffer that is reused and may be overwritten."""
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


# ---- Scores ---------------------------------------------------------------------------------------------------------


def success_rate(successes: Tensor) -> Tensor:
    """Return the share of successful rollouts among those that can be scored.

    Args:
        successes (`torch.Tensor`): `(P, G)` of 0, 1 (with a graded reward, fractions in between), and NaN for a
            rollout that the success reward cannot judge.

    Returns:
        `torch.Tensor`: `(P,)` float64, NaN where no rollout can be scored.
    """
    return torch.nanmean(successes.double(), dim=1)


def learnability(successes: Tensor, unbiased: bool = False) -> Tensor:
    """Return `V_i = p_i (1 - p_i)` (Definition 4.2), 0 where no rollout can be scored.

    This is the variance of the successes. That of fractions x is smaller, by the mean of `x (1 - x)`.

    Args:
        successes (`torch.Tensor`): As in [`success_rate`].
        unbiased (`bool`, *optional*, defaults to `False`): Return `k (G - k) / (G (G - 1))` instead, with `k`
            successes in `G` scored rollouts. Its expectation is `p (1 - p)` of the true rate. It is 0 with a single
            scored rollout.

    Returns:
        `torch.Tensor`: `(P,)` float64, from 0 to 1/4, or to 1/2 (one success in two) if unbiased.
    """
    values = successes.double()
    partial = values * (1 - values)
    if unbiased:
        scorable = (~torch.isnan(values)).sum(dim=1).double()
        right = torch.nansum(values, dim=1)
        pairs = scorable * (scorable - 1)
        differing = right * (scorable - right) - scorable * torch.nansum(partial, dim=1)
        return differing / pairs.clamp(min=1)
    p = success_rate(values)
    variance = p * (1 - p) - torch.nanmean(partial, dim=1)
    return torch.nan_to_num(variance, nan=0.0).clamp(min=0)


def outcome_sums(successes: Tensor, graded: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return right and wrong rollouts of each prompt, and the sum of x(1 - x) over their successes x, `(P,)` each.

    Args:
        successes (`torch.Tensor`): As in [`success_rate`].
        graded (`bool`): Whether successes are fractions. Right and wrong are then float64, and int64 otherwise.
    """
    values = successes.double()
    sums = [torch.nansum(each, dim=1) for each in (values, 1 - values, values * (1 - values))]
    kind = torch.float64 if graded else torch.int64
    right, wrong = (each.to(kind).numpy() for each in sums[:2])
    return right, wrong, sums[2].numpy()


def normalised(features: Tensor) -> Tensor:
    """Return `φ̂ = φ / ‖φ‖` in float64; rows that are zero or not finite become zero.

    Args:
        features (`torch.Tensor`): `(P, D)`.
    """
    rows = features.to(torch.float64, copy=True)
    return rows.mul_(inverse_norms(rows).unsqueeze(1))


def inverse_norms(rows: Tensor) -> Tensor:
    """Return `1 / ‖φ‖`, or 0 where a row is zero or not finite.

    A zero gradient has no direction: cos = 0/0 would be NaN, and NaN times a learnability of 0 is still NaN.

    Args:
        rows (`torch.Tensor`): `(P, D)` float64. Rows that are not finite are set to zero in place.

    Returns:
        `torch.Tensor`: `(P,)` float64; times `rows`, these are the directions `φ̂`.
    """
    norms = row_norms(rows)
    # In this range all squares are normal numbers; comparisons with NaN are false.
    if ((norms > 1e-100) & (norms < 1e100)).all():
        return norms.reciprocal_()
    keep_finite(rows)
    # Rows are scaled by their largest entry first, since the squares would leave float64's range.
    largest = rows.abs().amax(dim=1)
    divisors = torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    norms = largest * row_norms(rows / divisors)
    return torch.where(norms > 0, 1 / norms, 0.0)


def keep_finite(rows: Tensor, scale: float = 1.0) -> Tensor:
    """Set rows that are not finite to zero, in place.

    Args:
        rows (`torch.Tensor`): `(P, D)` float64.
        scale (`float`, *optional*, defaults to 1.0): The returned factor.

    Returns:
        `torch.Tensor`: `scale` for every row, `(P,)` float64: a scaling for [`row_average`] that does not normalise.
    """
    is_finite = torch.isfinite(rows).all(dim=1, keepdim=True)
    rows.masked_fill_(~is_finite, 0.0)
    return rows.new_full((len(rows),), scale)


def largest_entry(
    chunks: Chunks,
    most: Callable[[list[float]], list[float]] = lambda values: values,
) -> float:
    """Return the largest absolute value of all finite features, over all ranks; 1 if all are zero.

    Args:
        chunks (iterable of pairs): As in [`row_average`].
        most (callable, *optional*): Maximum over ranks of each number of a list.
    """
    largest = 0.0
    for _, rows in blocks(chunks):
        keep_finite(rows)
        largest = max(largest, float(rows.abs().max()))
    return most([largest])[0] or 1.0


def mean_feature(
    chunks: Chunks,
    count: int,
    dim: int,
    all_sum: AllSum = lambda tensor: tensor,
    most: Callable[[list[float]], list[float]] = lambda values: values,
) -> Tensor:
    """Return the mean feature of `count` prompts; missing features, and those that are not finite, count as zero.

    Args:
        chunks (iterable of pairs): As in [`row_average`].
        count (`int`): Number of prompts.
        dim (`int`): D.
        all_sum (callable, *optional*): As in [`row_average`].
        most (callable, *optional*): As in [`largest_entry`].

    Returns:
        `torch.Tensor`: `(D,)` float64; it does not depend on how prompts are split over chunks and ranks.
    """
    # Fixed point needs terms with absolute values of at most 1.
    scale = largest_entry(chunks, most)
    total = FixedPointSum(dim)
    for _, rows in blocks(chunks):
        scales = keep_finite(rows, 1 / scale)
        total.add_scaled(rows, scales)
    return total.value(all_sum) * (scale / count)


def row_average(
    weights: Tensor,
    chunks: Chunks,
    dim: int,
    all_sum: AllSum = lambda tensor: tensor,
    scaling: Callable[[Tensor], Tensor] = inverse_norms,
    exclude_self: bool = False,
) -> Tensor:
    """Return row averages of `S_ij = w_i w_j ⟨φ̂_i, φ̂_j⟩` (Eq. 9 with `w = V`).

    Args:
        weights (`torch.Tensor`): `(P,)`, absolute values of at most 1: learnabilities, or ones for the plain
            alignment.
        chunks (iterable of pairs): `(positions (c,), features (c, D))` of this rank, iterated twice. Prompts that are
            in no chunk have no gradient.
        dim (`int`): D.
        all_sum (callable, *optional*): Sum of a tensor over ranks. With it, this function is collective over all
            ranks.
        scaling (callable, *optional*): Returns the factor of each row that turns `φ` into `φ̂`, see [`inverse_norms`].
        exclude_self (`bool`, *optional*, defaults to `False`): Leave out the term `j = i`:
            `(w_i ⟨φ̂_i, m⟩ - w_i² ‖φ̂_i‖²) / (P - 1)`.

    Returns:
        `torch.Tensor`: `(P,)` float64; exactly 0 where the weight is 0 or the feature is missing, zero or not finite.
    """
    weights = weights.double()
    total = FixedPointSum(dim)
    row_scales = torch.full_like(weights, torch.nan)
    for positions, rows in blocks(chunks):
        scales = scaling(rows)
        row_scales[positions] = scales.cpu()
        total.add_scaled(rows, scales * weights[positions].to(rows.device))
    target = total.value(all_sum)  # m in the module's docstring
    self_weights = weights if exclude_self else torch.zeros_like(weights)
    alignments = alignment(target, chunks, self_weights, all_sum, scaling, row_scales)
    terms = len(weights) - exclude_self
    return weights * alignments / max(1, terms)


def alignment(
    target: Tensor,
    chunks: Chunks,
    self_weights: Tensor,
    all_sum: AllSum = lambda tensor: tensor,
    scaling: Callable[[Tensor], Tensor] = inverse_norms,
    row_scales: Tensor | None = None,
) -> Tensor:
    """Return inner products `⟨φ̂_i, target - w_i φ̂_i⟩` with a vector without each prompt's own share of it.

    Args:
        target (`torch.Tensor`): `(D,)` float64.
        chunks (iterable of pairs): As in [`row_average`].
        self_weights (`torch.Tensor`): `w`, `(P,)`: weight of each prompt's own direction to leave out.
        all_sum (callable, *optional*): As in [`row_average`].
        scaling (callable, *optional*): As in [`row_average`].
        row_scales (`torch.Tensor`, *optional*): `(P,)` float64: results of an earlier call of `scaling`, which saves
            computing them again.

    Returns:
        `torch.Tensor`: `(P,)` float64, on every rank; 0 where there is no feature.
    """
    products = torch.zeros_like(self_weights)
    has_self = bool(self_weights.any())
    if row_scales is not None and bool((row_scales == 0).any()):
        # Rows that are not finite have to be set to zero again, which the scaling does.
        row_scales = None
    for positions, rows in blocks(chunks):
        target = target.to(rows.device)
        scales = scaling(rows) if row_scales is None else row_scales[positions].to(rows.device)
        # Computed before the product below, which overwrites the rows.
        squares = row_sums(rows.square()) * scales.square() if has_self else None
        # A product and a sum per row: unlike a matrix product, the result does not change with the number of rows.
        products[positions] = (row_sums(rows.mul_(target)) * scales).cpu()
        if squares is not None:
            products[positions] -= self_weights[positions] * squares.cpu()
    return all_sum(products)


def rank(scores: np.ndarray, ties: np.ndarray, ahead: np.ndarray | None = None) -> np.ndarray:
    """Return positions in descending order of score, shape `(P,)`; NaN last, equal scores by `ties` ascending.

    Args:
        scores (`np.ndarray`): `(P,)` float64.
        ties (`np.ndarray`): `(P,)` of distinct numbers, from `plan.tie_order`.
        ahead (`np.ndarray`, *optional*): `(P,)` bool: whether a prompt ranks before all others, whatever the scores.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    behind = np.zeros(len(scores), dtype=bool) if ahead is None else ~ahead
    return np.lexsort((ties, -scores, behind))


def select(
    scores: np.ndarray,
    eligible: np.ndarray,
    ties: np.ndarray,
    size: int,
    on_shortfall: str,
    ahead: np.ndarray | None = None,
) -> np.ndarray:
    """Return the positions of the selected prompts, best first.

    Args:
        scores (`np.ndarray`): `(P,)` float64; NaN ranks last.
        eligible (`np.ndarray`): `(P,)` bool: whether a prompt has its own score (for the method: learnability above
            0).
        ties (`np.ndarray`): `(P,)`, as in [`rank`].
        size (`int`): Number of prompts to select, at most P.
        on_shortfall (`str`): If fewer than `size` are eligible: `"fill"` still selects the best `size`, in the order
            of [`rank`]; `"shrink"` selects only the eligible ones.
        ahead (`np.ndarray`, *optional*): `(P,)`, as in [`rank`].

    Returns:
        `np.ndarray`: `int64` of shape `(size,)`, or shorter with `"shrink"`.
    """
    order = rank(scores, ties, ahead)
    if on_shortfall == "shrink" and eligible.sum() < size:
        order = order[eligible[order]]
    return order[:size]


# ---- Directions in fixed point --------------------------------------------------------------------------------------
# Selections that compare prompts pair by pair must not depend on how a matrix product is split over blocks, threads or
# ranks. Entries of `φ̂ = φ / ‖φ‖` are rounded to multiples of 2^-24, which float32 represents. A product of two is a
# multiple of 2^-48. By Cauchy–Schwarz, no partial sum of an inner product exceeds 1 by more than its rounding. So
# float64 adds all of them exactly, in any order.
#
# Axes: `P` candidates of a pool, `n` of them that are compared, `D` dimensions.

_DIRECTION_UNITS = 2.0**24
_ROWS = 1024  # rows converted, or sent to other ranks, at once


def directions(rows: Tensor) -> Tensor:
    """Return `φ̂` in fixed point, `(c, D)` float32; zero where a row is zero or not finite.

    Args:
        rows (`torch.Tensor`): `(c, D)` float64, overwritten.
    """
    scales = inverse_norms(rows) * _DIRECTION_UNITS
    whole = rows.mul_(scales.unsqueeze(1)).round_()
    return whole.div_(_DIRECTION_UNITS).float()


def chunk_directions(chunks: Chunks) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions and their directions `(c, D)`, at most 1024 at a time and never more than a chunk.

    Args:
        chunks (iterable of pairs): `(positions (c,), features (c, D))`.
    """
    for positions, features in chunks:
        for start in range(0, len(features), _ROWS):
            part = slice(start, start + _ROWS)
            rows = features[part].to(torch.float64, copy=True)
            yield positions[part], directions(rows).cpu()


def products(first: Tensor, second: Tensor) -> Tensor:
    """Return inner products of directions, `(a, b)` float64, exact.

    Args:
        first (`torch.Tensor`): `(a, D)`, from [`directions`]; preferably in float64 if it is used again.
        second (`torch.Tensor`): `(b, D)`, the same.
    """
    left = first.double()
    found = left.new_empty(len(first), len(second))
    for start in range(0, len(second), _ROWS):
        part = slice(start, start + _ROWS)
        found[:, part] = left @ second[part].double().T
    return found


def has_direction(chunks: Chunks, pool_size: int, ranks: Ranks) -> np.ndarray:
    """Return which candidates have a direction, on any rank; collective over all ranks.

    Args:
        chunks (iterable of pairs): `(positions (c,), features (c, D))` of this rank.
        pool_size (`int`): P.
        ranks (`Ranks`): The distributed processes.

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
    """Gather the directions of some candidates on the main rank; collective over all ranks.

    Args:
        chunks (iterable of pairs): `(positions (c,), features (c, D))` of this rank.
        positions (`np.ndarray`): Distinct positions in the pool, `(n,)`, in the order of the result.
        pool_size (`int`): P.
        dim (`int`): D.
        ranks (`Ranks`): The distributed processes.
        everywhere (`bool`, *optional*, defaults to `False`): Gather on every rank instead.

    Returns:
        `torch.Tensor`: `(n, D)` float32, zero for candidates without a feature. Other ranks than the main one get only
        the rows that they hold themselves.
    """
    places = torch.full((pool_size,), -1)
    places[torch.from_numpy(positions)] = torch.arange(len(positions))
    # Memory is allocated when it is written to, so another rank's rows cost nothing here.
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
