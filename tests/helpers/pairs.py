"""A few combinations of many settings, in which each value of each setting meets each of every other one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(settings: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations, the one that brings most new pairs first; the same at each call.

    Args:
        settings (mapping): Name → values, which need not be hashable.
    """
    names = list(settings)
    rows = list(itertools.product(*(range(len(settings[name])) for name in names)))
    left = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(left & _pairs(row)))
        left -= _pairs(best)
        chosen.append(best)
    return [
        {name: settings[name][place] for name, place in zip(names, row, strict=True)}
        for row in chosen
    ]


def _pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
    return {
        (one, row[one], other, row[other])
        for one, other in itertools.combinations(range(len(row)), 2)
    }
