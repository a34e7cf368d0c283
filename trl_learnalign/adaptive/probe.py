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
        left = self.memory**generations
        if left < 1:
            later.precision = left * self.precision + (1 - left) * self.prior
            later.mean = cho_solve(cho_factor(later.precision), left * (self.precision @ self.mean))
        variance = self.drift**2 * generations
        if variance > 0:
            # The intercept's variance grows (Sherman & Morrison, 1950): training lifts all success rates at once, and
            # what is known of the differences between prompts need not be forgotten for that.
            column = later.precision[:, -1]
            later.precision = later.precision - np.outer(column, column) / (
                1 / variance + column[-1]
            )
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
        reached = self._log_posterior(weights, inputs, right, wrong)
        for _ in range(NEWTON_STEPS):
            slope, curvature = self._derivatives(weights, inputs, right, wrong)
            step = cho_solve(cho_factor(curvature), slope)
            new = self._log_posterior(weights + step, inputs, right, wrong)
            while new < reached and np.abs(step).max() > CONVERGED:
                step = step / 2  # the log posterior is concave: a shorter step climbs
                new = self._log_posterior(weights + step, inputs, right, wrong)
            if new - reached < CONVERGED:
                break
            weights, reached = weights + step, new
        _, self.precision = self._derivatives(weights, inputs, right, wrong)
        self.mean = weights

    def success_rates(self, features: np.ndarray) -> np.ndarray:
        """Predicted success rates, `(P,)`: the mean over what the weights may be (MacKay's approximation, 1992).

        Args:
            features (`np.ndarray`): `(P, D)`.
        """
        inputs = with_intercept(features)
        solved = cho_solve(cho_factor(self.precision), inputs.T)
        variances = np.einsum("pk,kp->p", inputs, solved)
        return expit(inputs @ self.mean / np.sqrt(1 + np.pi * variances / 8))

    def _log_posterior(
        self, weights: np.ndarray, inputs: np.ndarray, right: np.ndarray, wrong: np.ndarray
    ) -> float:
        logits = inputs @ weights
        moved = weights - self.mean
        return float(
            right @ log_expit(logits)
            + wrong @ log_expit(-logits)
            - moved @ self.precision @ moved / 2
        )

    def _derivatives(
        self, weights: np.ndarray, inputs: np.ndarray, right: np.ndarray, wrong: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Slope `(K,)` of the log posterior, and its curvature `(K, K)`, negated."""
        rates, total = expit(inputs @ weights), right + wrong
        slope = inputs.T @ (right - total * rates) - self.precision @ (weights - self.mean)
        curvature = self.precision + (inputs.T * (total * rates * (1 - rates))) @ inputs
        return slope, curvature


def with_intercept(features: np.ndarray) -> np.ndarray:
    """Features with a last column of ones, `(P, K)` float64."""
    return np.concatenate([features, np.ones((len(features), 1))], axis=1, dtype=np.float64)
