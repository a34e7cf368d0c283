"""Selectors that need little or nothing to be measured."""

from __future__ import annotations

import numpy as np

from trl_learnalign import hashing
from trl_learnalign.pool import Pool


def random(pool: Pool) -> np.ndarray:
    """A seeded permutation."""
    order = hashing.permutation(
        hashing.key(pool.seed, "random selection", pool.phase), pool.prompts
    )
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
