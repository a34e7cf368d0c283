"""How far selectors agree on one pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd


def rank_correlations(scores: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Spearman's rank correlation between selectors.

    Args:
        scores (mapping of `str` to `np.ndarray`): Scores of the same P candidates by each selector, `(P,)`; NaN for
            those that it cannot rank, which are left out of its correlations. Equal scores share a rank.

    Returns:
        `pandas.DataFrame`: Square, by name; NaN where a selector ranks fewer than two candidates, or all alike.
    """
    table = pd.DataFrame(dict(scores))
    return table.corr(method="spearman", min_periods=2)


def overlaps(choices: Mapping[str, Sequence[int] | np.ndarray]) -> pd.DataFrame:
    """Share of prompts that selectors choose in common.

    Args:
        choices (mapping of `str` to sequence of `int`): Rows that each selector chooses, equally many.

    Returns:
        `pandas.DataFrame`: Square, by name.
    """
    names = list(choices)
    table = pd.DataFrame(index=names, columns=names, dtype=float)
    for first in names:
        for second in names:
            table.loc[first, second] = _share_in(choices[first], choices[second])
    return table


def _share_in(rows: Sequence[int] | np.ndarray, others: Sequence[int] | np.ndarray) -> float:
    """Share of the first rows that are among the others; 0 of none."""
    if not len(rows):
        return 0.0
    return float(np.isin(rows, others).mean())
