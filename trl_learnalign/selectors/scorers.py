"""Selectors that score each prompt independently."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trl_learnalign import rng, scoring
from trl_learnalign.pool import Pool


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
