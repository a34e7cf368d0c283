"""Why these prompts: which categories a choice comes from, beside its pool and random choices of as many.

A choice of one category's prompts alone may have every prompt of a high score and still leave most of the pool
untaught. How many categories it is spread over depends on how many prompts it has: the effective number of its
categories stands beside that of seeded random choices.

Axes: `n` rows of the dataset, `L` categories.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trl_learnalign import hashing
from trl_learnalign.data.categories import Grouping
from trl_learnalign.records.shares import CategoryCount, Shares

DRAWS = 100
"""Random choices that a choice is held against."""

NOTED = 50
"""Categories that are noted one by one at most: the largest."""


def effective_number(counts: np.ndarray) -> float:
    """`exp` of the entropy of shares: how many equal categories are spread as far.

    Args:
        counts (`np.ndarray`): Members of each category, `(L,)`, one or more in all.
    """
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    return float(np.exp(entropy))


def shares_of(
    groupings: Sequence[Grouping],
    pool: np.ndarray,
    chosen: np.ndarray,
    seed: int,
    purpose: str,
) -> tuple[Shares, ...]:
    """A choice by categories, beside its pool.

    Args:
        groupings (sequence of `Grouping`): Ways to put prompts into categories.
        pool (`np.ndarray`): Rows that might have been chosen, distinct.
        chosen (`np.ndarray`): Rows that were; a row may come several times, as training comes back to it.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        purpose (`str`): What is chosen for, e.g. `Phase.name`; part of the random choices' seeds.

    Returns:
        `tuple[Shares]`: One for each grouping that knows a prompt of the pool and one of the choice.
    """
    found = []
    for grouping in groupings:
        pool_codes = _known(grouping.codes[pool])
        chosen_codes = _known(grouping.codes[chosen])
        if not len(pool_codes) or not len(chosen_codes):
            continue
        found.append(
            _shares(grouping, pool_codes, chosen_codes, hashing.key(seed, "groups", purpose))
        )
    return tuple(found)


def _known(codes: np.ndarray) -> np.ndarray:
    return codes[codes >= 0]


def _shares(
    grouping: Grouping, pool_codes: np.ndarray, chosen_codes: np.ndarray, stream: int
) -> Shares:
    length = len(grouping.labels)
    in_pool = np.bincount(pool_codes, minlength=length)
    in_choice = np.bincount(chosen_codes, minlength=length)
    size = len(chosen_codes)
    at_random = [
        effective_number(_random_counts(in_pool, pool_codes, size, hashing.key(stream, draw)))
        for draw in range(DRAWS)
    ]
    return Shares(
        by=grouping.by,
        pool=len(pool_codes),
        chosen=size,
        distinct=int((in_pool > 0).sum()),
        categories=_largest(grouping.labels, in_pool, in_choice),
        effective=effective_number(in_choice),
        effective_pool=effective_number(in_pool),
        effective_random=float(np.mean(at_random)),
        effective_random_low=min(at_random),
    )


def _random_counts(
    in_pool: np.ndarray, pool_codes: np.ndarray, size: int, stream: int
) -> np.ndarray:
    """Members of each category in a random choice, `(L,)`: whole passes over the pool, and a part of the next one."""
    passes, rest = divmod(size, len(pool_codes))
    counts = passes * in_pool
    if rest:
        draws = hashing.random_bits(stream, np.arange(len(pool_codes)))
        places = np.argpartition(draws, rest - 1)[:rest]
        counts = counts + np.bincount(pool_codes[places], minlength=len(in_pool))
    return counts


def _largest(
    labels: Sequence[str], in_pool: np.ndarray, in_choice: np.ndarray
) -> tuple[CategoryCount, ...]:
    """The categories of pool or choice, those with the largest share in either first."""
    shares = np.maximum(in_pool / in_pool.sum(), in_choice / in_choice.sum())
    order = np.argsort(-shares, kind="stable")[:NOTED]
    counts = []
    for code in order.tolist():
        if shares[code] > 0:
            count = CategoryCount(
                name=labels[code], pool=int(in_pool[code]), chosen=int(in_choice[code])
            )
            counts.append(count)
    return tuple(counts)
