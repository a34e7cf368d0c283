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
    return pd.DataFrame(dict(scores)).corr(method="spearman", min_periods=2)


def overlaps(choices: Mapping[str, Sequence[int] | np.ndarray]) -> pd.DataFrame:
    """Share of prompts that selectors choose in common.

    Args:
        choices (mapping of `str` to sequence of `int`): Rows that each selector chooses, equally many.

    Returns:
        `pandas.DataFrame`: Square, by name.
    """
    sets = {name: set(np.asarray(rows).tolist()) for name, rows in choices.items()}
    table = {
        one: {other: len(sets[one] & sets[other]) / max(1, len(sets[one])) for other in sets}
        for one in sets
    }
    return pd.DataFrame(table).T
