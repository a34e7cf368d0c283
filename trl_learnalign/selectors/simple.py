"""Selectors that need no gradients."""

from __future__ import annotations

import numpy as np

from trl_learnalign import hashing
from trl_learnalign.pool import Pool


def random(pool: Pool) -> np.ndarray:
    """A seeded permutation."""
    order = hashing.permutation(hashing.key(pool.seed, "random selection", pool.phase), pool.prompts)
    scores = np.empty(len(pool))
    scores[np.searchsorted(pool.prompts, order)] = np.linspace(1, 0, len(pool), endpoint=False)
    return scores


def learnability(pool: Pool) -> np.ndarray:
    """`V_i = p_i (1 - p_i)` alone (Definition 4.2)."""
    return pool.learnability
