"""Advantages against the belief, written once more: rollout by rollout, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

Rewards = Sequence[Sequence[Sequence[float]]]


def difference(own: float, others: Sequence[float], earlier: float, weight: float) -> float:
    """A value minus the mean of others and of `weight` earlier ones that sum to `earlier`; 0 if there are none."""
    known = [value for value in others if not math.isnan(value)]
    if len(known) + weight == 0:
        return 0.0
    return own - (math.fsum(known) + earlier) / (len(known) + weight)


def rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values)) if values else 0.0


def differences(
    rewards: Rewards, success: int, right: Sequence[float], wrong: Sequence[float], threshold: float
) -> list[list[list[float | None]]]:
    """Of each reward from its baseline; `None` where there is no reward."""
    result = []
    for group, a, b in zip(rewards, right, wrong, strict=True):
        rows: list[list[float | None]] = []
        for i, row in enumerate(group):
            columns: list[float | None] = []
            for f, own in enumerate(row):
                others = [other[f] for j, other in enumerate(group) if j != i]
                if math.isnan(own):
                    columns.append(None)
                elif f != success:
                    columns.append(difference(own, others, 0.0, 0.0))
                else:
                    outcomes = [math.nan if math.isnan(x) else float(x > threshold) for x in others]
                    rest = [x - outcome for x, outcome in zip(others, outcomes, strict=True)]
                    outcome = float(own > threshold)
                    columns.append(
                        difference(outcome, outcomes, a, a + b)
                        + difference(own - outcome, rest, 0.0, 0.0)
                    )
            rows.append(columns)
        result.append(rows)
    return result


def advantages(
    rewards: Rewards,
    success: int,
    right: Sequence[float],
    wrong: Sequence[float],
    weights: Sequence[float],
    *,
    threshold: float = 0.5,
    scaled: bool = True,
    scaled_each: bool = False,
    share: float = 0.25,
) -> list[list[float]]:
    """Of each rollout, small ones dropped: `share` of those that could be judged keep theirs.

    Args:
        rewards (sequences of `float`): Prompt by prompt, rollout by rollout, function by function; NaN where there is
            none.
        success (`int`): The function that decides success.
        right, wrong (sequences of `float`): Parameters of the belief about each prompt.
        weights (sequence of `float`): Of the functions.
        threshold (`float`): Above it a rollout is right.
        scaled, scaled_each (`bool`): Whether sums, and whether the functions' parts, are divided by their root mean
            square.
        share (`float`): Of 10 rollouts and a share of 0.25, 3 keep their advantages, and those that equal the third.
    """
    parts = differences(rewards, success, right, wrong, threshold)
    sizes = [1.0] * len(weights)
    if scaled_each:
        for f in range(len(weights)):
            column = [row[f] for group in parts for row in group if row[f] is not None]
            sizes[f] = rms(column) or 1.0
    sums = [
        [
            math.fsum(
                w * x / size
                for w, x, size in zip(weights, row, sizes, strict=True)
                if x is not None
            )
            for row in group
        ]
        for group in parts
    ]
    judged = [
        value
        for values, group in zip(sums, parts, strict=True)
        for value, row in zip(values, group, strict=True)
        if any(x is not None for x in row)
    ]
    size = rms(judged)
    unit = size if scaled or scaled_each else 1.0
    ranked = sorted((abs(value) for value in judged), reverse=True)
    smallest = ranked[max(1, math.ceil(share * len(ranked) - 1e-9)) - 1] if ranked else 0.0
    return [
        [0.0 if abs(value) < smallest - 1e-9 else value / (unit or 1.0) for value in values]
        for values in sums
    ]
