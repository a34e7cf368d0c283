"""Selectors on the likelihood of the reference solution."""

from __future__ import annotations

import numpy as np

from trl_learnalign.pool import Pool


def ppl_top(pool: Pool) -> np.ndarray:
    """Perplexity `exp(mean NLL)` of the solution given the prompt, highest first; NaN without a solution."""
    assert pool.nll is not None
    return np.exp(pool.nll.double().numpy())


def ppl_middle(pool: Pool) -> np.ndarray:
    """Nearest to the median perplexity of the candidates first (Ankner et al., 2024).

    `ppl_middle="value"` (default) measures the distance in perplexity. Ankner et al. keep the percentiles around the
    50th, which is the distance in rank, `"rank"`: on a skewed pool `"value"` takes more from below the median, where
    perplexities lie closer together. Equal perplexities share a rank.
    """
    perplexity = ppl_top(pool)
    has_solution = ~np.isnan(perplexity)
    if not has_solution.any():
        return perplexity
    if pool.config.ppl_middle == "value":
        median = np.median(perplexity[has_solution])
        distance = np.abs(perplexity / median - 1)
        # Of an even number the two in the middle are equally far from the median: the tie order decides, not rounding.
        return -median * distance.round(12)
    ascending = np.sort(perplexity[has_solution])
    first = np.searchsorted(ascending, perplexity, "left")
    behind = np.searchsorted(ascending, perplexity, "right")
    # Equal values take the places from `first` to `behind - 1`: their rank is the middle of these.
    ranks = np.where(has_solution, (first + behind - 1) / 2, np.nan)
    middle = (len(ascending) - 1) / 2
    return -np.abs(ranks - middle)


def ifd(pool: Pool) -> np.ndarray:
    """Instruction-following difficulty: mean NLL of the solution given the prompt over that of the solution alone.

    Li et al., 2024 (Cherry_LLM). It is a ratio of losses, not of perplexities. As in the code, ratios above 1 (the
    prompt makes the solution less likely) and solutions that are not read whole are dropped: they cannot be ranked.
    What precedes the solution when it is read alone differs between code and paper: see `solution_start` and
    `trl_learnalign.measuring.likelihoods`.
    """
    assert pool.nll is not None
    assert pool.nll_alone is not None
    assert pool.truncated is not None
    with np.errstate(divide="ignore", invalid="ignore"):  # without a solution, both are NaN
        ratio = pool.nll.numpy() / pool.nll_alone.numpy()
    is_whole = ~pool.truncated.numpy()
    return np.where((ratio <= 1) & is_whole, ratio, np.nan)
