"""The belief as baseline: rewards are compared with what was expected of the prompt.

The baseline of GRPO is the mean reward of a group, so a group whose rewards are all equal has no gradient. The belief
predicts the success rate of a prompt before its rollouts are made. Here the baseline of a rollout is the mean over the
other rollouts of its group, shrunk to that prediction by the belief's own weight: with the posterior Beta(a, b), and k
of the n other rollouts right, it is (a + k) / (a + b + n). The baseline does not depend on the rollout itself, so the
expected gradient does not depend on the belief. A surprising outcome has a gradient even if the whole group shares it.

The belief only predicts success. The rest of the rewards (other functions, and what a graded reward says beyond right
or wrong) has the mean of the group's other rollouts as its baseline.

SPO (arXiv 2509.13232) has a posterior for each prompt and no groups; this belief is shared by all prompts.

Axes: `P` prompts, `G` rollouts of each, `F` reward functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from trl_learnalign import rng
from trl_learnalign.adaptive.belief import Posterior

EQUAL = 1e-9
"""Relative difference that is rounding: advantages that are equal but for that are kept or pruned together."""


@dataclass(frozen=True)
class BeliefBaseline:
    """Turns the rewards of a generation into advantages.

    Args:
        success (`int`): Number of the reward function that decides success.
        weights (`np.ndarray`): Weights of the reward functions, `(F,)`.
        scaled (`bool`): Divide advantages by their root mean square over the generation.
        scaled_each (`bool`): Divide the advantages of each reward function by their own root mean square before they
            are summed.
        share (`float`): Share of the rollouts that keep their advantages, those with the largest ones; above 0, at
            most 1. The others are pruned.
        scale (`float`): Reward of a right rollout minus that of a wrong one: the width of a graded reward's range.
        roulette (`bool`): Prune without bias: an advantage of a fraction q of the smallest one that is kept is raised
            to that one with probability q, and otherwise set to 0. `False` sets all of them to 0.
    """

    success: int
    weights: np.ndarray
    scaled: bool
    scaled_each: bool
    share: float
    roulette: bool
    scale: float = 1.0

    def advantages(
        self, rewards: np.ndarray, successes: np.ndarray, prior: Posterior, stream: int
    ) -> np.ndarray:
        """Return the advantages of a generation, `(P, G)` float64; 0 where no function gave a reward.

        Args:
            rewards (`np.ndarray`): `(P, G, F)`, NaN where a function gave none.
            successes (`np.ndarray`): `(P, G)`: 1 for right, 0 for wrong, NaN where it is unknown.
            prior (`Posterior`): The belief about the P prompts before their rollouts.
            stream (`int`): Key of the random numbers, from `rng.key`.
        """
        parts = self._differences(rewards, successes, prior)
        judged = np.isfinite(parts).any(axis=2)
        if self.scaled_each:
            sizes = [
                _root_mean_square(part[np.isfinite(part)]) for part in np.moveaxis(parts, 2, 0)
            ]
            parts = parts / np.where(np.array(sizes) > 0, sizes, 1.0)
        values = np.nansum(parts * self.weights, axis=2)
        size = _root_mean_square(values[judged])
        if size > 0 and self.scaled:
            values = values / size
        return self._pruned(values, judged, stream) if judged.any() else values

    def explained(
        self, rewards: np.ndarray, successes: np.ndarray, prior: Posterior
    ) -> tuple[float, float] | None:
        """Return the shares of the variance of the weighted reward that two baselines explain; `None` if it has none.

        A share is 1 minus the mean squared difference from the baseline over the variance within the generation. It
        is below 0 if the generation's mean would be a better baseline.

        Args:
            rewards, successes, prior: As in [`advantages`].

        Returns:
            `tuple[float, float]`: Of this baseline, and of the mean of the group's other rollouts.
        """
        parts = self._differences(rewards, successes, prior)
        judged = np.isfinite(parts).any(axis=2)
        total, own, group = (
            np.nansum(np.where(np.isfinite(values), values, np.nan) * self.weights, axis=2)[judged]
            for values in (rewards, parts, beyond_others(rewards))
        )
        variance = total.var() if judged.any() else 0.0
        if variance == 0:
            return None
        return float(1 - np.mean(own**2) / variance), float(1 - np.mean(group**2) / variance)

    def _differences(
        self, rewards: np.ndarray, successes: np.ndarray, prior: Posterior
    ) -> np.ndarray:
        """Return the difference of each reward from its baseline, `(P, G, F)`, NaN where there is no reward."""
        parts = beyond_others(rewards)
        rest = rewards[..., self.success] - self.scale * successes  # 0 for a reward of 0 and 1
        expected = self.scale * beyond_others(successes, prior)
        parts[..., self.success] = expected + beyond_others(rest)
        return parts

    def _pruned(self, values: np.ndarray, judged: np.ndarray, stream: int) -> np.ndarray:
        sizes = np.abs(values)
        kept = max(1, math.ceil(self.share * judged.sum() - EQUAL))
        threshold = np.sort(sizes[judged])[-kept]
        is_small = sizes < threshold * (1 - EQUAL)
        if not self.roulette:
            return np.where(is_small, 0.0, values)
        bits = rng.random_bits(stream, np.arange(values.size)).reshape(values.shape)
        draws = (bits >> np.uint64(11)) * 2.0**-53
        raised = np.where(draws * threshold < sizes, np.copysign(threshold, values), 0.0)
        return np.where(is_small, raised, values)


def beyond_others(values: np.ndarray, prior: Posterior | None = None) -> np.ndarray:
    """Return each value minus the mean of the other values of its group, shrunk to a prior mean.

    Args:
        values (`np.ndarray`): `(P, G, …)`; values that are not finite are unknown.
        prior (`Posterior`, *optional*): For values from 0 to 1, `(P, G)`. Its parameters count as numbers of earlier
            values: of those that were 1, and of those that were 0.

    Returns:
        `np.ndarray`: As `values`: NaN where a value is unknown, 0 where there is nothing to compare it with.
    """
    known = np.isfinite(values)
    # Measured from the smallest value, so that equal values give exactly 0 whatever the rounding of their sum.
    lowest = np.where(known, values, np.inf).min(axis=1, keepdims=True)
    above = np.where(known, values - np.where(np.isfinite(lowest), lowest, 0.0), 0.0)
    others = above.sum(axis=1, keepdims=True) - above
    count = known.sum(axis=1, keepdims=True) - known.astype(np.float64)
    if prior is not None:
        weight = (prior.right + prior.wrong)[:, None]
        others = others + prior.right[:, None] - weight * np.where(np.isfinite(lowest), lowest, 0.0)
        count = count + weight
    baseline = np.divide(others, count, out=above.copy(), where=count > 0)
    return np.where(known, above - baseline, np.nan)


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0
