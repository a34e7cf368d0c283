"""The selector on the policy's own ratings."""

from __future__ import annotations

import numpy as np

from trl_learnalign.pool import Pool

_UNCERTAINTY = 0.2  # alpha of the paper: how much disagreement of the rating prompts costs


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
    """Probabilities of the K ratings, `(..., K)`, as shares that add up to 1."""
    weights = np.exp(probabilities) if kind == "softmax" else probabilities
    return weights / weights.sum(axis=-1, keepdims=True)


def token_level(rating_shares: np.ndarray) -> np.ndarray:
    """`(..., K)` shares → `(...)` scores from 0 to K."""
    largest = rating_shares.max(axis=-1, keepdims=True)
    others = rating_shares.shape[-1] - 1
    lead = (largest - rating_shares).sum(axis=-1) / others
    best_rating = rating_shares.argmax(axis=-1) + 1  # ratings count from 1
    return best_rating * lead


def sentence_level(scores: np.ndarray) -> np.ndarray:
    """`(P, prompts)` → `(P,)`."""
    mean = scores.mean(axis=-1)
    disagreement = scores.std(axis=-1)
    return mean / (1 + _UNCERTAINTY * disagreement)
