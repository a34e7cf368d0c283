"""Selectors on the reward history of a previous run."""

from __future__ import annotations

import numpy as np

from trl_learnalign.pool import Pool


def limr(pool: Pool) -> np.ndarray:
    """Learning impact (LIMR, Li et al., 2025): `s_i = 1 - Σ_t (r_it - r̄_t)² / Σ_t (1 - r̄_t)²`, largest first.

    `r_it` is the success rate of prompt `i` in pass `t`, `r̄_t` its mean over all prompts of the recorded run, also
    those that are no candidates here. A pass that lacks a prompt is left out of both of that prompt's sums. (The paper
    has no such gaps. LIMR's code fills one from the following pass and drops prompts with longer ones; that of
    One-Shot-RLVR cuts all prompts to the shortest history.) NaN without a history, and if every prompt was always
    solved: then nothing tells prompts apart.
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
    """Standard deviation (the population's) of the success rate over passes, largest first (Wang et al., 2025).

    NaN without a history; passes that lack the prompt are left out.
    """
    assert pool.history is not None
    scores = np.full(len(pool), np.nan)
    is_recorded = ~np.isnan(pool.history)
    has_history = is_recorded.any(axis=1)
    # NumPy warns of rows without any number.
    rates = pool.history[has_history]
    scores[has_history] = np.nanstd(rates, axis=1)
    return scores
