"""A small model of success rates that generalises over prompts: Bayesian logistic regression, online, that forgets.

Axes: `P` prompts, `D` features, and one more entry for the intercept: `K = D + 1`.

The logit of a prompt's success rate is linear in its features. What is known of the weights is a normal distribution.
After each generation it becomes the normal distribution that fits the posterior best at its peak (Laplace;
Spiegelhalter & Lauritzen, 1990). Since the policy moves, what was learned fades towards the prior between generations
(stabilised forgetting; Kulhavý & Zarrop, 1993). An update takes O(P K² + K³), whatever the size of the pool.
"""

from __future__ import annotations

import copy

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit, log_expit

INTERCEPT_SPREAD = 2.0
"""Standard deviation of the intercept before anything is known: mean success rates from 2 % to 98 %."""

NEWTON_STEPS, CONVERGED = 30, 1e-8
"""Most steps to the peak, and what a last step may still gain in log posterior."""


class SuccessProbe:
    """Predicts success rates from features.

    Args:
        dimensions (`int`): D; 0: the intercept alone, one rate for all prompts.
        spread (`float`): Standard deviation of the logits between prompts before anything is known, for features of
            mean squared length 1.
        memory (`float`): What an outcome still counts one generation later.
        drift (`float`): Standard deviation of what the logits of all prompts move together from one generation to the
            next, in either direction.
    """

    def __init__(self, dimensions: int, spread: float, memory: float, drift: float = 0.0):
        spreads = np.append(np.full(dimensions, spread), INTERCEPT_SPREAD)
        self.memory, self.drift = memory, drift
        self.prior = np.diag(spreads**-2)
        """Precision before anything is known, `(K, K)`."""
        self.precision = self.prior.copy()
        self.mean = np.zeros(dimensions + 1)

    def faded(self, generations: int) -> SuccessProbe:
        """This probe some generations later, if nothing is learned in between."""
        later = copy.copy(self)  # arrays are replaced, never changed
        weight = self.memory**generations
        if weight < 1:
            later.precision = weight * self.precision + (1 - weight) * self.prior
            target = weight * (self.precision @ self.mean)
            later.mean = cho_solve(cho_factor(later.precision), target)
        variance = self.drift**2 * generations
        if variance > 0:
            # The intercept's variance grows (Sherman & Morrison, 1950): training lifts all success rates at once, and
            # what is known of the differences between prompts need not be forgotten for that.
            column = later.precision[:, -1]
            divisor = 1 / variance + column[-1]
            later.precision = later.precision - np.outer(column, column) / divisor
        return later

    def update(self, features: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> None:
        """Learn from outcomes.

        Args:
            features (`np.ndarray`): `(P, D)`.
            right (`np.ndarray`): Right rollouts of each, `(P,)`.
            wrong (`np.ndarray`): Wrong ones.
        """
        inputs = with_intercept(features)
        weights = self.mean
        height = self._log_posterior(weights, inputs, right, wrong)
        for _ in range(NEWTON_STEPS):
            slope, curvature = self._derivatives(weights, inputs, right, wrong)
            step = cho_solve(cho_factor(curvature), slope)
            new_height = self._log_posterior(weights + step, inputs, right, wrong)
            while new_height < height and np.abs(step).max() > CONVERGED:
                # The log posterior is concave: a shorter step climbs.
                step = step / 2
                new_height = self._log_posterior(weights + step, inputs, right, wrong)
            if new_height - height < CONVERGED:
                break
            weights, height = weights + step, new_height
        _, self.precision = self._derivatives(weights, inputs, right, wrong)
        self.mean = weights

    def success_rates(self, features: np.ndarray) -> np.ndarray:
        """Predicted success rates, `(P,)`: the mean over what the weights may be (MacKay's approximation, 1992).

        Args:
            features (`np.ndarray`): `(P, D)`.
        """
        inputs = with_intercept(features)
        # The logit of each prompt is normal, with x·mean and x·precision⁻¹·x.
        covariances = cho_solve(cho_factor(self.precision), inputs.T)
        variances = np.einsum("pk,kp->p", inputs, covariances)
        widths = np.sqrt(1 + np.pi * variances / 8)
        return expit(inputs @ self.mean / widths)

    def _log_posterior(
        self,
        weights: np.ndarray,
        inputs: np.ndarray,
        right: np.ndarray,
        wrong: np.ndarray,
    ) -> float:
        logits = inputs @ weights
        likelihood = right @ log_expit(logits) + wrong @ log_expit(-logits)
        distance = weights - self.mean
        penalty = distance @ self.precision @ distance / 2
        return float(likelihood - penalty)

    def _derivatives(
        self,
        weights: np.ndarray,
        inputs: np.ndarray,
        right: np.ndarray,
        wrong: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Slope `(K,)` of the log posterior, and its curvature `(K, K)`, negated."""
        rates, total = expit(inputs @ weights), right + wrong
        residuals = right - total * rates
        slope = inputs.T @ residuals - self.precision @ (weights - self.mean)
        variances = total * rates * (1 - rates)
        curvature = self.precision + (inputs.T * variances) @ inputs
        return slope, curvature


def with_intercept(features: np.ndarray) -> np.ndarray:
    """Features with a last column of ones, `(P, K)` float64."""
    ones = np.ones((len(features), 1))
    return np.concatenate([features, ones], axis=1, dtype=np.float64)
