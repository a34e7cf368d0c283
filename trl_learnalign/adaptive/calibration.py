"""How right a belief was: predicted success rates against the rollouts that came after.

Axes: `P` predictions, each of one prompt's success rate before its rollouts. A prompt's rollouts count one by one: ten
right of sixteen are ten events that happened and six that did not, all predicted with the same probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bin:
    """Predictions between two bounds.

    Args:
        low (`float`): Lower bound, included.
        high (`float`): Upper bound; included in the last bin alone.
        prompts (`int`): Predictions in it.
        rollouts (`int`): Rollouts of these prompts.
        predicted (`float`): Mean prediction over rollouts; NaN without any.
        seen (`float`): Share of right rollouts; NaN without any.
    """

    low: float
    high: float
    prompts: int
    rollouts: int
    predicted: float
    seen: float


def reliability_bins(
    predicted: np.ndarray,
    right: np.ndarray,
    wrong: np.ndarray,
    count: int = 10,
) -> list[Bin]:
    """The reliability diagram: in each of equally wide bins, what was predicted and what was seen.

    Args:
        predicted (`np.ndarray`): `(P,)` from 0 to 1.
        right (`np.ndarray`): Right rollouts of each, `(P,)`.
        wrong (`np.ndarray`): Wrong ones.
        count (`int`, *optional*, defaults to `10`): Bins.

    Raises:
        `ValueError`: If the arrays differ in shape or a prediction is no probability.
    """
    predicted, right, wrong = _checked(predicted, right, wrong)
    places = np.minimum((predicted * count).astype(int), count - 1)
    total = right + wrong
    bins = []
    for place in range(count):
        inside = places == place
        rollouts = total[inside].sum()
        mean = share = np.nan
        if rollouts:
            mean = (predicted[inside] * total[inside]).sum() / rollouts
            share = right[inside].sum() / rollouts
        bins.append(
            Bin(
                low=place / count,
                high=(place + 1) / count,
                prompts=int(inside.sum()),
                rollouts=int(rollouts),
                predicted=float(mean),
                seen=float(share),
            )
        )
    return bins


def calibration_error(bins: list[Bin]) -> float:
    """Mean distance of predicted and seen over bins, weighted by rollouts (ECE, Naeini et al., 2015); NaN of none."""
    filled = [bin_ for bin_ in bins if bin_.rollouts]
    if not filled:
        return float("nan")
    distances = [abs(bin_.predicted - bin_.seen) for bin_ in filled]
    return float(np.average(distances, weights=[bin_.rollouts for bin_ in filled]))


def brier_score(predicted: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> float:
    """Mean squared distance of the prediction and each rollout's outcome (Brier, 1950); NaN without rollouts.

    Args:
        predicted (`np.ndarray`): `(P,)` from 0 to 1.
        right (`np.ndarray`): Right rollouts of each, `(P,)`.
        wrong (`np.ndarray`): Wrong ones.

    Raises:
        `ValueError`: If the arrays differ in shape or a prediction is no probability.
    """
    predicted, right, wrong = _checked(predicted, right, wrong)
    total = (right + wrong).sum()
    if not total:
        return float("nan")
    distances = right * (1 - predicted) ** 2 + wrong * predicted**2
    return float(distances.sum() / total)


def area_under_curve(scores: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> float:
    """Chance that a right rollout was scored higher than a wrong one, ties counted half (area under the ROC curve).

    Args:
        scores (`np.ndarray`): `(P,)`, of any scale.
        right (`np.ndarray`): Right rollouts of each, `(P,)`.
        wrong (`np.ndarray`): Wrong ones.

    Returns:
        `float`: From 0 to 1, 0.5 if scores tell nothing; NaN if all rollouts came out alike.

    Raises:
        `ValueError`: If the arrays differ in shape.
    """
    scores, right, wrong = _checked(scores, right, wrong, probabilities=False)
    _, places = np.unique(scores, return_inverse=True)
    rights, wrongs = np.bincount(places, right), np.bincount(places, wrong)
    below = np.cumsum(wrongs) - wrongs
    pairs = rights.sum() * wrongs.sum()
    if not pairs:
        return float("nan")
    lower = below + wrongs / 2  # wrong rollouts of a lower score than each right one's, ties half
    return float((rights * lower).sum() / pairs)


def _checked(
    predicted: np.ndarray,
    right: np.ndarray,
    wrong: np.ndarray,
    probabilities: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    predicted = np.asarray(predicted, dtype=float)
    right = np.asarray(right, dtype=float)
    wrong = np.asarray(wrong, dtype=float)
    if not predicted.shape == right.shape == wrong.shape or predicted.ndim != 1:
        raise ValueError(
            f"Predictions {predicted.shape}, right {right.shape} and wrong {wrong.shape} rollouts must be one of each "
            "for every prompt."
        )
    is_probability = (predicted >= 0) & (predicted <= 1)
    if probabilities and not is_probability.all():
        outside = predicted[~is_probability][0]
        raise ValueError(
            f"A predicted success rate is {outside:g}: give probabilities from 0 to 1."
        )
    return predicted, right, wrong
