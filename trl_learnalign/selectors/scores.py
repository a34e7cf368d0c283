"""The scores of selectors: functions of a pool, the first ones for each prompt by itself.

The others cover `S_ij = V_i V_j cos(φ_i, φ_j)` instead of averaging its rows. The row average of Eq. 9 favours the
largest group of similar prompts, since each of them is similar to all the others. These selectors pick one prompt
after the other, each for what the selection lacks so far. The score of a prompt is its gain, see
[`facility_location`] and [`log_determinant`].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trl_learnalign import plan, rng, scoring
from trl_learnalign.pool import Pool
from trl_learnalign.scoring import collect, products


def random(pool: Pool) -> np.ndarray:
    """A seeded permutation."""
    order = rng.permutation(rng.key(pool.seed, "random selection", pool.phase), pool.prompts)
    scores = np.empty(len(pool))
    scores[np.searchsorted(pool.prompts, order)] = np.linspace(1, 0, len(pool), endpoint=False)
    return scores


def learnability(pool: Pool) -> np.ndarray:
    """`V_i = p_i (1 - p_i)` alone (Definition 4.2)."""
    return pool.learnability


def token_length(pool: Pool) -> np.ndarray:
    """Tokens of the reference solution, longest first; NaN without one."""
    assert pool.solution_tokens is not None
    tokens = pool.solution_tokens.double().numpy()
    return np.where(tokens > 0, tokens, np.nan)


# ---- Gradient features ----------------------------------------------------------------------------------------------


def learnalign(pool: Pool) -> np.ndarray:
    """The method: row average of `S_ij = V_i V_j cos(φ_i, φ_j)` (Eq. 9)."""
    return _row_average(pool, pool.learnability)


def alignment(pool: Pool) -> np.ndarray:
    """Row average of `cos(φ_i, φ_j)` alone: the ablation "w/o learnability" (Table 3)."""
    return _row_average(pool, np.ones(len(pool)))


def gradient_dot(pool: Pool) -> np.ndarray:
    """Row average of the raw inner product `⟨φ_i, φ_j⟩` (Eq. 6), which favours large gradients: the length bias.

    Gradients that are not finite count as zero.
    """
    # One scale for the whole pool keeps inner products comparable and the fixed-point sum in range.
    scale = scoring.largest_entry(pool.features, pool.ranks.most)
    scaling = partial(scoring.keep_finite, scale=1 / scale)
    return _row_average(pool, np.ones(len(pool)), scaling) * scale**2


def validation_alignment(pool: Pool) -> np.ndarray:
    """`V_i cos(φ_i, g)` with the mean gradient `g` of a trusted validation set: the same engine with another target.

    It is the influence on a validation set as in LESS (Xia et al., 2024), weighted by learnability instead of the
    learning rate. As in LESS, `g` is the mean of the validation prompts' own gradients and not of their directions, so
    prompts with more to learn count for more. `exclude_self` has no effect here, since the validation set is separate.

    Raises:
        `ValueError`: If no validation set was measured.
    """
    if pool.target is None:
        raise ValueError(
            "selector='validation_alignment' compares prompts with the mean gradient of a validation set, but none "
            "was given: pass validation_dataset, or choose 'learnalign', which compares the prompts with each "
            "other."
        )
    target = scoring.normalised(pool.target.unsqueeze(0))[0]
    no_self = torch.zeros(len(pool), dtype=torch.float64)
    cosines = scoring.alignment(target, pool.features, no_self, pool.ranks.all_sum)
    return pool.learnability * cosines.numpy()


def _row_average(
    pool: Pool,
    weights: np.ndarray,
    scaling: Callable[[Tensor], Tensor] = scoring.inverse_norms,
) -> np.ndarray:
    return scoring.row_average(
        torch.from_numpy(weights),
        pool.features,
        pool.feature_dim,
        pool.ranks.all_sum,
        scaling,
        pool.config.exclude_self,
    ).numpy()


# ---- Hidden states --------------------------------------------------------------------------------------------------


def feature_similarity(pool: Pool) -> np.ndarray:
    """Row average of `V_i V_j cos(h_i, h_j)` with RDS+ representations `h` instead of gradients (Table 3).

    `h` is the position-weighted mean of the last hidden layer (RDS+, Ivison et al., 2025, after SGPT). The paper does
    not specify the text. `hidden_text="prompt"` (default) is our choice: an RL prompt has no response.
    `"prompt_and_solution"` is RDS+'s choice for instruction data; with it, a prompt without a solution cannot be
    ranked. RDS+ also gives weight to padding; here the result does not depend on it.
    """
    assert pool.has_text is not None
    scores = scoring.row_average(
        torch.from_numpy(pool.learnability),
        pool.hidden,
        pool.hidden_dim,
        pool.ranks.all_sum,
        exclude_self=pool.config.exclude_self,
    ).numpy()
    return np.where(pool.has_text.numpy(), scores, np.nan)


# ---- Reward history -------------------------------------------------------------------------------------------------


def limr(pool: Pool) -> np.ndarray:
    """Learning impact (LIMR, Li et al., 2025): `s_i = 1 - Σ_t (r_it - r̄_t)² / Σ_t (1 - r̄_t)²`, largest first.

    `r_it` is the success rate of prompt `i` in pass `t`. `r̄_t` is its mean over all prompts of the recorded run, also
    those that are not candidates here. A pass that lacks a prompt is left out of both of that prompt's sums. (The
    paper has no such gaps. LIMR's code fills one from the following pass and drops prompts with longer gaps; that of
    One-Shot-RLVR cuts all prompts to the shortest history.) The score is NaN without a history. It is also NaN if
    every prompt was always solved, since then nothing distinguishes prompts.
    """
    assert pool.history is not None
    assert pool.history_mean is not None
    is_recorded = ~np.isnan(pool.history)
    from_mean = (pool.history - pool.history_mean) ** 2
    most_from_mean = (1 - pool.history_mean) ** 2
    distance = np.where(is_recorded, from_mean, 0).sum(axis=1)
    furthest = np.where(is_recorded, most_from_mean, 0).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        impact = 1 - distance / furthest
    return np.where(furthest > 0, impact, np.nan)


def reward_variance(pool: Pool) -> np.ndarray:
    """Population standard deviation of the success rate over passes, largest first (Wang et al., 2025).

    The score is NaN without a history; passes that lack the prompt are left out.
    """
    assert pool.history is not None
    scores = np.full(len(pool), np.nan)
    is_recorded = ~np.isnan(pool.history)
    has_history = is_recorded.any(axis=1)
    # NumPy warns about rows without any number.
    rates = pool.history[has_history]
    scores[has_history] = np.nanstd(rates, axis=1)
    return scores


# ---- Likelihood -----------------------------------------------------------------------------------------------------


def ppl_top(pool: Pool) -> np.ndarray:
    """Perplexity `exp(mean NLL)` of the solution given the prompt, highest first; NaN without a solution."""
    assert pool.nll is not None
    return np.exp(pool.nll.double().numpy())


def ppl_middle(pool: Pool) -> np.ndarray:
    """Nearest to the median perplexity of the candidates first (Ankner et al., 2024).

    `ppl_middle="value"` (default) measures the distance in perplexity. Ankner et al. keep the percentiles around the
    50th, which is the distance in rank, `"rank"`. On a skewed pool `"value"` selects more from below the median, where
    perplexities are closer together. Equal perplexities share a rank.
    """
    perplexity = ppl_top(pool)
    has_solution = ~np.isnan(perplexity)
    if not has_solution.any():
        return perplexity
    if pool.config.ppl_middle == "value":
        median = np.median(perplexity[has_solution])
        distance = np.abs(perplexity / median - 1)
        # If the number is even, the two middle values are equally far from the median: tie order decides, not
        # rounding.
        return -median * distance.round(12)
    ascending = np.sort(perplexity[has_solution])
    first = np.searchsorted(ascending, perplexity, "left")
    behind = np.searchsorted(ascending, perplexity, "right")
    # Equal values take the places from `first` to `behind - 1`; their rank is the mean of these.
    ranks = np.where(has_solution, (first + behind - 1) / 2, np.nan)
    middle = (len(ascending) - 1) / 2
    return -np.abs(ranks - middle)


def ifd(pool: Pool) -> np.ndarray:
    """Instruction-following difficulty: mean NLL of the solution given the prompt over that of the solution alone.

    The source is Li et al., 2024 (Cherry_LLM). It is a ratio of losses, not of perplexities. As in the code, ratios
    above 1 (the prompt makes the solution less likely) and solutions that are not read whole are dropped: they cannot
    be ranked. What precedes the solution when it is read alone differs between code and paper: see `solution_start`
    and `trl_learnalign.measuring.text_measures`.
    """
    assert pool.nll is not None
    assert pool.nll_alone is not None
    assert pool.truncated is not None
    with np.errstate(divide="ignore", invalid="ignore"):  # without a solution, both are NaN
        ratio = pool.nll.numpy() / pool.nll_alone.numpy()
    is_whole = ~pool.truncated.numpy()
    return np.where((ratio <= 1) & is_whole, ratio, np.nan)


# ---- Ratings --------------------------------------------------------------------------------------------------------

_UNCERTAINTY = 0.2  # alpha of the paper: penalty for disagreement between the rating prompts


def selectit(pool: Pool) -> np.ndarray:
    """SelectIT (Liu et al., 2024) with a single model: token-level scores, then sentence level over rating prompts.

    The probabilities of "1".."5" become shares `P_k`. Token level: with the best rating `b = argmax P_k`, the score
    is `b · Σ_k (P_b - P_k) / (K - 1)`. Sentence level: the mean over the five rating prompts, divided by
    `1 + 0.2 · std`. NaN without a solution to rate.

    Shares are `p / Σp` in the code (`selectit_shares="ratio"`, default) and `exp(p) / Σexp(p)` in the paper
    (`"softmax"`), which flattens them. The standard deviation is the population's, as in the code.
    """
    assert pool.ratings is not None
    rating_shares = shares(pool.ratings.numpy(), pool.config.selectit_shares)
    token_scores = token_level(rating_shares)
    return sentence_level(token_scores)


def shares(probabilities: np.ndarray, kind: str) -> np.ndarray:
    """Return probabilities of the K ratings, `(..., K)`, as shares that sum to 1."""
    weights = np.exp(probabilities) if kind == "softmax" else probabilities
    return weights / weights.sum(axis=-1, keepdims=True)


def token_level(rating_shares: np.ndarray) -> np.ndarray:
    """Map `(..., K)` shares to `(...)` scores from 0 to K."""
    largest = rating_shares.max(axis=-1, keepdims=True)
    others = rating_shares.shape[-1] - 1
    lead = (largest - rating_shares).sum(axis=-1) / others
    best_rating = rating_shares.argmax(axis=-1) + 1  # ratings count from 1
    return best_rating * lead


def sentence_level(scores: np.ndarray) -> np.ndarray:
    """Map `(P, prompts)` to `(P,)`."""
    mean = scores.mean(axis=-1)
    disagreement = scores.std(axis=-1)
    return mean / (1 + _UNCERTAINTY * disagreement)


# ---- Facility location ----------------------------------------------------------------------------------------------
# The greedy algorithm picks one prompt after the other by its marginal gain (Nemhauser, Wolsey & Fisher, 1978: at
# least 1 - 1/e of the optimal value). Gains are whole numbers, so that equal gains are equal on any machine, and they
# decrease from one pick to the next. They serve as scores: sorted by them, prompts are in the order in which they were
# picked, and the first k of a selection of N are the selection of k.
#
# The `n × n` matrix is never built. Each prompt keeps its K most similar prompts, which loses little (Lindgren, Wu &
# Dimakis, 2016).
#
# Axes: `n` prompts, `D` dimensions, `N` selected, `K` neighbours, `m` prompts to cover.

NEIGHBOURS = 2048
"""K: number of most similar prompts that can cover a prompt; in pools that are no larger, any prompt can."""

COVERED = 20_000
"""m: maximum number of prompts to cover, the first ones; any prompt can be picked to cover them."""

_UNITS = 2.0**32  # of similarities: at most 1/4 (V is at most 1/2), so they fit into 32 bits
_BLOCK = 1 << 23  # similarities per block: 64 MiB in float64


def facility_location(
    rows: Tensor,
    weights: Tensor,
    size: int,
    neighbours: int = NEIGHBOURS,
    covered: int = COVERED,
) -> np.ndarray:
    """Greedily maximise `Σ_j max_{i∈A} max(S_ij, 0)`; `O(m n D)` time, `O(m K)` memory in addition to the rows.

    Args:
        rows (`torch.Tensor`): Directions, `(n, D)` float32, from `trl_learnalign.scoring`, in tie order: of equal
            gains the first one is picked.
        weights (`torch.Tensor`): V, `(n,)` float64, from 0 to 1/2.
        size (`int`): N, at most n.
        neighbours (`int`, *optional*): K.
        covered (`int`, *optional*): m.

    Returns:
        `np.ndarray`: Gains, `(n,)` float64: for selected prompts, what each has added; for the others, what they would
        add.
    """
    to_cover = min(covered, len(rows))
    lists = nearest(rows, weights, to_cover, min(neighbours, len(rows)))
    return greedy_cover(lists, len(rows), size)


def greedy_cover(lists: Neighbours, count: int, size: int) -> np.ndarray:
    """Pick prompts greedily by lists of neighbours.

    Args:
        lists ([`Neighbours`]): Neighbours of the m prompts to cover.
        count (`int`): n.
        size (`int`): N, at most n.

    Returns:
        `np.ndarray`: Gains, as in [`facility_location`].
    """
    gains = lists.values_alone(count)
    cover = torch.zeros(len(lists.prompts), dtype=torch.int32)
    chosen: dict[int, int] = {}
    for _ in range(size):
        best = int(gains.numpy().argmax())
        gain = int(gains[best])
        if gain == 0:  # no pick covers anything better
            break
        chosen[best] = gain
        lists.cover_with(best, cover, gains)
    scores = gains.double().numpy()
    for row, gain in chosen.items():
        scores[row] = gain
    return scores / _UNITS


@dataclass(frozen=True)
class Neighbours:
    """The most similar prompts of each prompt to cover.

    Args:
        prompts (`torch.Tensor`): Their rows, ascending, `(m, K)` int32.
        values (`torch.Tensor`): `max(S_ij, 0)` in units of 2^-32, `(m, K)` int32.
    """

    prompts: Tensor
    values: Tensor

    def values_alone(self, count: int) -> Tensor:
        """Return what each prompt covers alone, `(n,)` int64.

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
        """Pick a prompt: other prompts no longer gain by what it now covers better.

        Args:
            chosen (`int`): Its row.
            cover (`torch.Tensor`): Largest similarity to a selected prompt, `(m,)` int32; updated in place.
            gains (`torch.Tensor`): What each prompt would add, `(n,)` int64; updated in place.
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
        """Return the similarity to each prompt to cover, `(m,)`; 0 where it is no neighbour."""
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
        to_cover (`int`): m; the first m rows are to be covered.
        count (`int`): K, at most n.
    """
    prompts = torch.empty(to_cover, count, dtype=torch.int32)
    values = torch.empty(to_cover, count, dtype=torch.int32)
    for part in parts(to_cover, len(rows)):
        similarities = products(rows[part], rows)
        # A direction has length 1; its rounding must not decide between prompts of equal V.
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
    """Split rows of some width into blocks that fit into memory."""
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


# ---- Log-determinant ------------------------------------------------------------------------------------------------
# Greedy MAP of a determinantal point process, with rows of a Cholesky factor that grow with the selection (Chen, Zhang
# & Zhou, 2018). Lazy (Minoux, 1978): the gain of a prompt can only decrease, so only prompts that may still be the
# best are recomputed. The `n × n` matrix is never built. Gains decrease from one pick to the next and serve as scores,
# as in facility location.
#
# Axes: `n` prompts, `D` dimensions, `N` selected, `t` selected so far.

_UNIT = 2.0**-32  # unit of gains: far above rounding errors, far below what matters
_FEWEST = 16  # prompts recomputed at first; the number then doubles each time
_TOGETHER = 256


def log_determinant(
    rows: Tensor,
    weights: Tensor,
    size: int,
    ridge: float,
) -> np.ndarray:
    """Greedily maximise `log det(I + S_AA / λ)`.

    The worst case is `O(N n D)` time and `O(N n)` memory in addition to the rows. It is mostly far less, since few
    prompts are recomputed.

    Args:
        rows (`torch.Tensor`): Directions, `(n, D)` float32, from `trl_learnalign.scoring`, in tie order: of equal
            gains the first one is picked.
        weights (`torch.Tensor`): V, `(n,)` float64.
        size (`int`): N, at most n.
        ridge (`float`): λ over the mean of the diagonal of `S`; above 0.

    Returns:
        `np.ndarray`: Gains, `(n,)` float64: for selected prompts, what each has added; for the others, what they would
        have added when they were last computed.
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
        ceiling = gain - _UNIT  # rounding must not make a later gain larger than an earlier one
    rest = choice.bounds[is_left]
    scores[is_left] = np.minimum(rest, max(0.0, ceiling))
    return scores


class _Choice:
    """The selection so far: Cholesky rows of `λ I + S` with λ = `ridge` · mean `S_ii`, and each prompt's gain."""

    def __init__(
        self,
        rows: Tensor,
        weights: Tensor,
        size: int,
        ridge: float,
    ):
        self._rows = rows
        self._weights = weights
        # A direction has length 1; its rounding must not decide between prompts of equal V.
        diagonal = weights.square() * rows.any(dim=1)
        mean = float(diagonal.mean())
        self._ridge = ridge * (mean or 1.0)  # without any signal, all gains are 0
        self._diagonal = diagonal + self._ridge
        # Memory is allocated when it is written to, so only recomputed prompts take a row.
        self._factors = torch.zeros(len(rows), size, dtype=torch.float64)
        self._triangle = torch.zeros(size, size, dtype=torch.float64)  # rows of the selected
        self._chosen: list[int] = []
        self._known_until = np.zeros(len(rows), dtype=np.int64)
        self.bounds = self._gains(self._diagonal)
        """Upper bound of each prompt's gain, `(n,)` float64; -inf for the selected ones."""

    def _gains(self, residuals: Tensor) -> np.ndarray:
        # No residual is less than λ except by rounding, which a tiny λ would magnify without limit.
        residuals = residuals.nan_to_num(nan=self._ridge).clamp_(min=self._ridge)
        gains = torch.log(residuals / self._ridge)
        units = gains.div_(_UNIT).round_()
        return (units * _UNIT).numpy()

    def best(self) -> int:
        """Return the first prompt with the largest gain; bounds are updated only as far as needed."""
        width = _FEWEST
        while True:
            best = int(self.bounds.argmax())
            if self._known_until[best] == len(self._chosen):
                return best
            self._reevaluate(best, width)
            width *= 2

    def _reevaluate(self, best: int, width: int) -> None:
        """Update the `width` largest bounds, of which `best` is the first."""
        width = min(width, len(self.bounds))
        by_bound = np.argpartition(-self.bounds, width - 1)
        top = by_bound[:width]
        rows = np.union1d(top, best)
        is_stale = self._known_until[rows] < len(self._chosen)
        is_free = np.isfinite(self.bounds[rows])
        stale = rows[is_stale & is_free]
        # Prompts that were last updated at about the same time have about equally many picks to process.
        order = np.argsort(self._known_until[stale], kind="stable")
        stale = stale[order]
        for start in range(0, len(stale), _TOGETHER):
            part = stale[start : start + _TOGETHER]
            self._catch_up(part)

    def _catch_up(self, rows: np.ndarray) -> None:
        """Update the factors and bounds of some prompts; the first prompt is the furthest behind."""
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
        """Return `S` between some prompts, `(a, b)` float64."""
        columns = torch.tensor(others)
        cosines = products(self._rows[rows], self._rows[columns])
        weights = self._weights[rows].unsqueeze(1)
        return cosines * (weights * self._weights[columns])

    def add(self, row: int) -> None:
        """Pick a prompt whose factors are up to date."""
        count = len(self._chosen)
        factor = self._factors[row, :count]
        explained = factor.square().sum()
        residual = self._diagonal[row] - explained
        new_row = self._triangle[count]
        new_row[:count] = factor
        new_row[count] = residual.clamp(min=self._ridge).sqrt()
        self._chosen.append(row)
        self.bounds[row] = -np.inf


# ---- Selectors ------------------------------------------------------------------------------------------------------


def learnalign_coverage(pool: Pool) -> np.ndarray:
    """Facility location: the selection `A` maximises `Σ_j max_{i∈A} max(S_ij, 0)`, greedily."""
    return gains_by(pool, facility_location)


def learnalign_logdet(pool: Pool) -> np.ndarray:
    """Log-determinant: the selection `A` maximises `log det(I + S_AA / λ)`, greedily.

    `λ` is `LearnAlignConfig.logdet_ridge` times the mean of `S_ii` over the learnable prompts.
    """

    def gains(rows: Tensor, weights: Tensor, size: int) -> np.ndarray:
        return log_determinant(rows, weights, size, pool.config.logdet_ridge)

    return gains_by(pool, gains)


def gains_by(pool: Pool, greedy: Callable[[Tensor, Tensor, int], np.ndarray]) -> np.ndarray:
    """Return scores of a pool by a greedy selection among its learnable prompts; collective over all ranks.

    Args:
        pool (`Pool`): The candidates, P.
        greedy (callable): Called on the main rank as `greedy(rows, weights, size)`: directions `(n, D)` of the
            learnable prompts, in tie order; V, `(n,)`; number of prompts to select. It returns their gains, `(n,)`.

    Returns:
        `np.ndarray`: `(P,)` float64; 0 for prompts that are not learnable.
    """
    learnability = pool.learnability
    learnable = np.flatnonzero(learnability > 0)
    # In tie order, the result does not depend on the order of the pool.
    ties = plan.tie_order(pool.seed, pool.phase, len(pool.dataset))
    ties_of_learnable = ties[pool.prompts[learnable]]
    order = np.argsort(ties_of_learnable)
    positions = learnable[order]
    rows = collect(
        pool.features,
        positions,
        len(pool),
        pool.feature_dim,
        pool.ranks,
    )
    scores = np.zeros(len(pool))
    size = len(positions)
    if pool.wanted is not None:
        size = min(size, pool.wanted)
    if pool.ranks.is_main and size:
        weights = torch.from_numpy(learnability[positions])
        scores[positions] = greedy(rows, weights, size)
    return pool.ranks.from_main(scores)
