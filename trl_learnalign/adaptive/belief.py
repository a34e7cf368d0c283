"""The posterior of every prompt's success rate: features, model, update and calibration.

Axes: `n` prompts, `D` features, `C` values of `concentration`, `P` prompts in a query.

The posterior combines two sources. A model, fitted to the outcomes of all prompts, predicts a success rate m from a
prompt's features ([`SuccessRateModel`]). And the prompt's own right and wrong rollouts count. Old rollouts count less,
since training has changed the policy since: their counts decay. The remaining counts are shifted with the prediction:
if the logit of m has risen by 1 since the rollouts, so has the logit of their rate. So a prompt that was harder than
similar prompts is still predicted to be harder.

A prompt's own rate is distributed around the predicted one as Beta(c m, c (1 - m)); a larger `concentration` c means a
narrower distribution. So the posterior is Beta(c m + right, c (1 - m) + wrong). How well features predict success
rates differs from pool to pool, so c can have several values. Before the outcomes of a generation are counted, each
value predicts them (beta-binomial likelihood). The value that has predicted best so far is used (prequential choice;
Dawid, 1984). This takes no extra rollouts.

A graded reward gives fractions (`outcomes`), and the posterior is that of their mean. The gain of training on a prompt
depends on their variance, which is a share of p(1 - p). The share is estimated from the prompt's own groups and, with
the weight c, from those of all prompts. It is 1 if every rollout is right or wrong.

If the order compares gain with cost, a second model predicts the cost of a rollout ([`CostModel`]).

Without features, this is a separate posterior for each prompt, as in MoPPS (arXiv 2507.04632). GPS (arXiv 2602.01970)
also generalises over prompts, with another model.

The belief is a function of the outcomes alone. A resumed run rebuilds it by recording them again, and all processes
have the same belief. The cost of updates and queries does not depend on n: an update changes only the prompts of the
generation and the model, and the decay is computed in queries.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import betaincinv, betaln, expit, log_expit, logit

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.config import BACKWARD, LearnAlignConfig

# ---- Model: Bayesian logistic regression, online, with forgetting ---------------------------------------------------
# Axes: `P` prompts, `D` features, and one more entry for the intercept: `K = D + 1`.
#
# The logit of a prompt's success rate is linear in its features. The weights have a normal posterior. After each
# generation it is replaced by the normal distribution that fits the new posterior best at its mode (Laplace;
# Spiegelhalter & Lauritzen, 1990). Since the policy changes, the posterior decays towards the prior between
# generations (stabilised forgetting; Kulhavý & Zarrop, 1993). An update takes O(P K² + K³), whatever the size of the
# pool.

INTERCEPT_SPREAD = 2.0
"""Prior standard deviation of the intercept: mean success rates from 2 % to 98 %."""

NEWTON_STEPS, CONVERGED = 30, 1e-8
"""Maximum number of Newton steps, and the gain in log posterior below which they stop."""


class SuccessRateModel:
    """Predicts success rates from features.

    Args:
        dimensions (`int`): D; with 0, the intercept alone, one rate for all prompts.
        spread (`float`): Prior standard deviation of the logits between prompts, for features of mean squared length
            1.
        memory (`float`): Decay of an outcome's weight per generation.
        drift (`float`): Standard deviation, per generation, of the drift common to all prompts' logits.
    """

    def __init__(self, dimensions: int, spread: float, memory: float, drift: float = 0.0):
        spreads = np.append(np.full(dimensions, spread), INTERCEPT_SPREAD)
        self.memory, self.drift = memory, drift
        self.prior = np.diag(spreads**-2)
        """Prior precision, `(K, K)`."""
        self.precision = self.prior.copy()
        self.mean = np.zeros(dimensions + 1)

    def faded(self, generations: int) -> SuccessRateModel:
        """Return the model some generations later, without outcomes in between."""
        later = copy.copy(self)  # arrays are replaced, never changed
        weight = self.memory**generations
        if weight < 1:
            later.precision = weight * self.precision + (1 - weight) * self.prior
            target = weight * (self.precision @ self.mean)
            later.mean = cho_solve(cho_factor(later.precision), target)
        variance = self.drift**2 * generations
        if variance > 0:
            # The intercept's variance grows (Sherman & Morrison, 1950): training lifts all success rates together, and
            # what is known about differences between prompts need not be forgotten for that.
            column = later.precision[:, -1]
            divisor = 1 / variance + column[-1]
            later.precision = later.precision - np.outer(column, column) / divisor
        return later

    def update(self, features: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> None:
        """Learn from outcomes.

        Args:
            features (`np.ndarray`): `(P, D)`.
            right (`np.ndarray`): Right rollouts of each prompt, `(P,)`.
            wrong (`np.ndarray`): Wrong rollouts of each prompt, `(P,)`.
        """
        inputs = with_intercept(features)
        weights = self.mean
        height = self._log_posterior(weights, inputs, right, wrong)
        for _ in range(NEWTON_STEPS):
            slope, curvature = self._derivatives(weights, inputs, right, wrong)
            step = cho_solve(cho_factor(curvature), slope)
            new_height = self._log_posterior(weights + step, inputs, right, wrong)
            while new_height < height and np.abs(step).max() > CONVERGED:
                # The log posterior is concave, so a shorter step increases it.
                step = step / 2
                new_height = self._log_posterior(weights + step, inputs, right, wrong)
            if new_height - height < CONVERGED:
                break
            weights, height = weights + step, new_height
        _, self.precision = self._derivatives(weights, inputs, right, wrong)
        self.mean = weights

    def success_rates(self, features: np.ndarray) -> np.ndarray:
        """Return predicted success rates, `(P,)`: the mean over the weights' posterior (MacKay's approximation, 1992).

        Args:
            features (`np.ndarray`): `(P, D)`.
        """
        inputs = with_intercept(features)
        # The logit of each prompt is normal, with mean x·mean and variance x·precision⁻¹·x.
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
        """Return gradient `(K,)` and negative Hessian `(K, K)` of the log posterior."""
        rates, total = expit(inputs @ weights), right + wrong
        residuals = right - total * rates
        slope = inputs.T @ residuals - self.precision @ (weights - self.mean)
        variances = total * rates * (1 - rates)
        curvature = self.precision + (inputs.T * variances) @ inputs
        return slope, curvature


def with_intercept(features: np.ndarray) -> np.ndarray:
    """Return the features with a last column of ones, `(P, K)` float64."""
    ones = np.ones((len(features), 1))
    return np.concatenate([features, ones], axis=1, dtype=np.float64)


# ---- Model: cost of a rollout, Bayesian linear regression with forgetting -------------------------------------------
# The logarithm of a rollout's cost is linear in the features. As above, the posterior of the weights is normal, and
# decays towards the prior between generations.

COST_SPREAD, COST_NOISE = 1.0, 0.5
"""Prior standard deviation of log costs between prompts, and that of a group's log cost around its prediction: a
completion may be a few times as long as another one, or one and a half times as long as expected."""

BASE_SPREAD = 20.0
"""Prior standard deviation of the intercept: any cost."""

OWN_WEIGHT = 1.0
"""Weight of the prediction from features, as a number of the prompt's own groups."""

COST_STEPS = 2.0**20
"""Log costs are rounded to multiples of 1 over this number, as in [`PREDICTED_STEPS`]."""


class CostModel:
    """Predicts the cost of a rollout of each prompt, in tokens of a forward pass.

    A token of a prompt is read once and trained on, one of a completion is generated and trained on.

    Args:
        features (`np.ndarray`): `(n, D)`, those of the belief.
        config (`LearnAlignConfig`): `generation_price` and the decays of the belief.
    """

    def __init__(self, features: np.ndarray, config: LearnAlignConfig):
        self.features, self.config = features, config
        spreads = np.append(np.full(features.shape[1], COST_SPREAD), BASE_SPREAD)
        self.prior = np.diag((COST_NOISE / spreads) ** 2)
        self.precision, self.sums = self.prior, np.zeros(len(spreads))
        # Log cost of each prompt's groups, summed, and their number, `(n, 2)`; decayed to its last group.
        self._own = np.zeros((len(features), 2))
        self._last = np.zeros(len(features), dtype=np.int64)
        self._generation = 0

    def record(self, outcomes: Outcomes, generation: int) -> None:
        """Count the tokens of a generation; groups of unknown length are left out."""
        costs = self.observed(outcomes)
        known = costs > 0  # False for NaN
        rows, logs = np.asarray(outcomes.rows)[known], np.log(costs[known])
        kept = self.config.adaptive_decay ** (generation - self._generation)
        inputs = with_intercept(self.features[rows])
        self.precision = kept * self.precision + (1 - kept) * self.prior + inputs.T @ inputs
        self.sums = kept * self.sums + inputs.T @ logs
        own = self._of(rows, generation)
        self._own[rows], self._last[rows], self._generation = own, generation, generation
        np.add.at(self._own, rows, np.stack([logs, np.ones(len(rows))], axis=1))

    def observed(self, outcomes: Outcomes) -> np.ndarray:
        """Return the mean cost of a rollout of each group, `(P,)`; NaN if lengths are unknown."""
        trained = 1 + BACKWARD
        read = (1 + trained) * outcomes.prompt_tokens
        return read + (self.config.generation_price + trained) * outcomes.completion_tokens

    def expected(self, rows: np.ndarray, generation: int) -> np.ndarray:
        """Return the expected cost of a rollout, `(P,)`; the same for all prompts until lengths are known."""
        weights = cho_solve(cho_factor(self.precision), self.sums)
        predicted = with_intercept(self.features[rows]) @ weights
        total, count = self._of(rows, generation).T
        logs = (total + OWN_WEIGHT * predicted) / (count + OWN_WEIGHT)
        return np.exp(np.round(logs * COST_STEPS) / COST_STEPS)

    def copy(self) -> CostModel:
        """Return an independent copy; the features are shared."""
        twin = copy.copy(self)  # the other arrays are replaced, never changed
        twin._own, twin._last = self._own.copy(), self._last.copy()
        return twin

    def _of(self, rows: np.ndarray, generation: int) -> np.ndarray:
        """Return a prompt's own log costs and their number, decayed, `(P, 2)`."""
        elapsed = (generation - self._last[rows]).astype(float)
        return self._own[rows] * (self.config.adaptive_prompt_decay**elapsed)[:, np.newaxis]


# ---- Belief ---------------------------------------------------------------------------------------------------------

LEAST = 0.01
"""Pseudo-rollouts, right and wrong, of every prompt: however certain a prediction is, both outcomes stay possible."""

LEAST_SHARE = 1e-3
"""Least variance of outcomes as a share of p(1 - p): prompts whose outcomes did not differ so far may still differ."""

PREDICTED_STEPS = 2.0**20
"""Predicted rates are rounded to multiples of 1 over this number. So differences in the last digits, between machines
and thread counts, do not reach the order of training (except for one in thousands of millions).
"""

NEVER = -1
"""Generation of the last rollout for prompts without any."""


@dataclass(frozen=True)
class Posterior:
    """Beta distributions of success rates.

    Args:
        right (`np.ndarray`): `(P,)` float64, above 0: the first parameter.
        wrong (`np.ndarray`): `(P,)` float64, above 0: the second.
        share (`np.ndarray` or `float`, *optional*, defaults to 1): Expected variance of an outcome, as a share of
            p(1 - p); `(P,)` above 0, at most 1.
    """

    right: np.ndarray
    wrong: np.ndarray
    share: np.ndarray | float = 1.0

    @property
    def success_rate(self) -> np.ndarray:
        """Mean of p, `(P,)`."""
        return self.right / (self.right + self.wrong)

    @property
    def learnability(self) -> np.ndarray:
        """Expected variance of an outcome, the mean of p(1 - p) times `share`, `(P,)`."""
        total = self.right + self.wrong
        return self.right * self.wrong / (total * (total + 1)) * self.share

    def sample(self, uniforms: np.ndarray) -> np.ndarray:
        """Sample success rates by inverting the distribution function.

        Args:
            uniforms (`np.ndarray`): `(P,)` numbers between 0 and 1.

        Returns:
            `np.ndarray`: `(P,)` float64 from 0 to 1.
        """
        return betaincinv(self.right, self.wrong, uniforms)


class Belief:
    """Posteriors of all prompts of a dataset.

    Args:
        features (`np.ndarray`): `(n, D)` of mean squared length 1, see [`prompt_features`]. With `(n, 0)`, predictions
            use only a prompt's own outcomes and the mean over the others.
        config (`LearnAlignConfig`): Constants of the belief, `adaptive_*`.

    Raises:
        `ValueError`: If the features have another shape or type.
    """

    def __init__(self, features: np.ndarray, config: LearnAlignConfig):
        if features.ndim != 2 or not np.isfinite(features).all():
            raise ValueError(
                f"Features have the shape {features.shape}: give finite numbers of the shape (prompts, features), "
                "as prompt_features returns them."
            )
        self.features = features
        self.config = config
        self.generation = NEVER
        """Last recorded generation."""
        self.last_rolled_out = np.full(len(features), NEVER, dtype=np.int32)
        """`(n,)`: generation of each prompt's last rollout; `NEVER` for prompts without any."""
        self.probe = SuccessRateModel(
            features.shape[1],
            config.adaptive_prior_std,
            config.adaptive_decay,
            config.adaptive_drift_std,
        )
        """The model after the last recorded generation."""
        # `_counts`, `(n, 2)`: right and wrong rollouts of each prompt, as of the generation in `last_rolled_out`. The
        # array after it, `(n,)`: the logit of the prediction in that generation.
        self._counts = np.zeros((len(features), 2))
        self._predicted_then = np.zeros(len(features))
        self._scores = np.zeros(len(config.adaptive_concentration))
        # `Outcomes.spreads` of each prompt, decayed as `_counts`, and of all prompts, decayed as the model.
        self._spreads = np.zeros((len(features), 3))
        self._all_spreads = np.zeros(3)
        self.cost = CostModel(features, config) if config.adaptive_gain_per_cost else None
        """Costs of rollouts, if they matter."""

    def record(self, outcomes: Outcomes, generation: int) -> Posterior:
        """Count the outcomes of a generation.

        Args:
            outcomes ([`Outcomes`]): All outcomes of one generation, over all processes.
            generation (`int`): Its number, from 0, later than those recorded so far.

        Returns:
            `Posterior`: Posterior of the rolled-out prompts before the update, ascending by row, each once. It is the
            prediction to compare with the outcomes.

        Raises:
            `ValueError`: If the generation is not later, or a row is not in the dataset.
        """
        self._check_later(generation, "recorded")
        rows, counts = outcomes.by_prompt()
        if len(rows) and rows[-1] >= len(self):
            raise ValueError(
                f"Row {rows[-1]} is outside the dataset of {len(self)} prompts: give row numbers of this dataset."
            )
        probe = self._probe_at(generation)
        predicted = self._predicted(probe, rows)
        own = self._own(rows, predicted, generation)
        before = self._posterior(own, predicted, self.concentration, self._share(rows, generation))
        self._score(own, predicted, counts)
        self._count_spreads(outcomes.spreads(rows), rows, generation)
        if self.cost is not None:
            self.cost.record(outcomes, generation)
        # The new count starts from the count decayed to this generation; without earlier outcomes it starts from 0.
        self._counts[rows] = own + counts
        self._predicted_then[rows] = logit(predicted)
        self.last_rolled_out[rows] = generation
        judged = counts.any(axis=1)
        if judged.any():
            probe.update(self.features[rows[judged]], counts[judged, 0], counts[judged, 1])
        self.probe, self.generation = probe, generation
        return before

    def posterior(self, rows: np.ndarray, generation: int) -> Posterior:
        """Return the posterior of prompts before a generation is rolled out.

        Args:
            rows (`np.ndarray`): `(P,)` rows of the dataset.
            generation (`int`): Number of the generation, later than those recorded.

        Returns:
            `Posterior`: Of `P` prompts.

        Raises:
            `ValueError`: If the generation is not later.
        """
        self._check_later(generation, "queried")
        rows = np.asarray(rows, dtype=np.int64)
        predicted = self._predicted(self._probe_at(generation), rows)
        own, share = self._own(rows, predicted, generation), self._share(rows, generation)
        return self._posterior(own, predicted, self.concentration, share)

    @property
    def concentration(self) -> float:
        """The value of `concentration` that has predicted best so far; the first one in a tie."""
        return self.config.adaptive_concentration[int(np.argmax(self._scores))]

    def __len__(self) -> int:
        return len(self.features)

    def copy(self) -> Belief:
        """Return an independent copy of the belief; the features are shared."""
        twin = copy.copy(self)  # the model is replaced, never changed
        twin.last_rolled_out = self.last_rolled_out.copy()
        twin._counts = self._counts.copy()
        twin._predicted_then = self._predicted_then.copy()
        twin._scores = self._scores.copy()
        twin.cost = None if self.cost is None else self.cost.copy()
        twin._spreads = self._spreads.copy()  # the sum over all prompts is replaced, never changed
        return twin

    def _check_later(self, generation: int, verb: str) -> None:
        if generation <= self.generation:
            raise ValueError(
                f"Generation {generation} was {verb} after generation {self.generation} had been recorded: record "
                "all outcomes of a generation at once, and generations in ascending order."
            )

    def _probe_at(self, generation: int) -> SuccessRateModel:
        """Return the model before a generation."""
        return self.probe.faded(0 if self.generation == NEVER else generation - self.generation)

    def _predicted(self, probe: SuccessRateModel, rows: np.ndarray) -> np.ndarray:
        """Return predicted success rates, `(P,)`, neither 0 nor 1."""
        steps = np.round(probe.success_rates(self.features[rows]) * PREDICTED_STEPS)
        return np.clip(steps, 1, PREDICTED_STEPS - 1) / PREDICTED_STEPS

    def _own(self, rows: np.ndarray, predicted: np.ndarray, generation: int) -> np.ndarray:
        """Return own counts, decayed and shifted with the prediction, `(P, 2)`."""
        counts = self._counts[rows]
        total = counts.sum(axis=1)
        left = total * self._decay(rows, generation)
        # Half a rollout is added to either count: no right rollout of eight does not prove a rate of 0.
        then = logit((counts[:, 0] + 0.5) / (total + 1))
        rate = expit(then + logit(predicted) - self._predicted_then[rows])
        return np.stack([left * rate, left * (1 - rate)], axis=1)

    def _decay(self, rows: np.ndarray, generation: int) -> np.ndarray:
        """Return what is left of each prompt's counts, `(P,)`."""
        elapsed = (generation - self.last_rolled_out[rows]).astype(float)
        return self.config.adaptive_prompt_decay**elapsed

    def _count_spreads(self, spreads: np.ndarray, rows: np.ndarray, generation: int) -> None:
        """Count the spreads of a generation's prompts, before `last_rolled_out` changes."""
        left = self._decay(rows, generation)[:, np.newaxis]
        self._spreads[rows] = left * self._spreads[rows] + spreads
        elapsed = 0 if self.generation == NEVER else generation - self.generation
        kept = self.config.adaptive_decay**elapsed * self._all_spreads
        self._all_spreads = kept + spreads.sum(axis=0)

    def _share(self, rows: np.ndarray, generation: int) -> np.ndarray | float:
        """Return the variance of outcomes as a share of p(1 - p), `(P,)`."""
        if not self._all_spreads[1]:  # no outcome is a fraction
            return 1.0
        own = self._decay(rows, generation)[:, np.newaxis] * self._spreads[rows]
        expected = self._all_spreads / self._all_spreads[2]
        varied, partial, _ = (own + self.concentration * expected).T
        return np.clip(varied / (varied + partial), LEAST_SHARE, 1)

    def _posterior(
        self,
        own: np.ndarray,
        predicted: np.ndarray,
        concentration: float,
        share: np.ndarray | float = 1.0,
    ) -> Posterior:
        right = concentration * predicted + own[:, 0]
        wrong = concentration * (1 - predicted) + own[:, 1]
        return Posterior(right + LEAST, wrong + LEAST, share)

    def _score(self, own: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> None:
        """Add the likelihood of outcomes under each value of `concentration`."""
        self._scores *= self.config.adaptive_concentration_decay
        for place, concentration in enumerate(self.config.adaptive_concentration):
            before = self._posterior(own, predicted, concentration)
            likelihood = betaln(before.right + counts[:, 0], before.wrong + counts[:, 1])
            # Summed exactly, so that the choice does not depend on the numbering of the dataset's rows.
            self._scores[place] += math.fsum(likelihood - betaln(before.right, before.wrong))


# ---- Features of prompts, from embeddings ---------------------------------------------------------------------------
# Axes: `n` prompts, `H` entries of an embedding, `D` features.
#
# Embeddings of large models have a few entries that dwarf the rest, and more entries than a young run has outcomes. So
# every entry is centred and standardised, and the directions of largest variance are kept. The projection is fitted on
# a sample. Embeddings can then be projected a block at a time and never need to be in memory together.

BLOCK = 8192
"""Number of prompts projected at a time."""

FITTED = 20_000
"""Maximum number of prompts that a projection is fitted on."""


@dataclass(frozen=True)
class Projection:
    """An affine map from embeddings to features of mean squared length 1.

    Args:
        centre (`np.ndarray`): `(H,)` float64.
        directions (`np.ndarray`): `(H, D)` float64; without columns if all prompts have the same embedding.
    """

    centre: np.ndarray
    directions: np.ndarray

    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """Return features of prompts, `(P, D)` float32.

        Args:
            embeddings (`np.ndarray`): `(P, H)`.

        Raises:
            `ValueError`: If they are not finite, or have another width than those of the fit.
        """
        embeddings = checked(embeddings)
        if embeddings.shape[1] != len(self.centre):
            raise ValueError(
                f"Embeddings have {embeddings.shape[1]} entries, but the projection was fitted on "
                f"{len(self.centre)}: embed all prompts of the pool with the same model."
            )
        blocks = [
            (embeddings[start : start + BLOCK] - self.centre) @ self.directions
            for start in range(0, len(embeddings), BLOCK)
        ]
        return np.concatenate(blocks).astype(np.float32)


def fit_projection(embeddings: np.ndarray, dimensions: int = 64) -> Projection:
    """Return the principal components of standardised embeddings.

    Args:
        embeddings (`np.ndarray`): `(P, H)` of the pool, or of a random sample of it; some 20,000 suffice.
        dimensions (`int`, *optional*, defaults to `64`): D; fewer if the embeddings vary in fewer directions.

    Raises:
        `ValueError`: If the embeddings are not finite or of another shape, or `dimensions` is below 1.
    """
    if dimensions < 1:
        raise ValueError(f"dimensions={dimensions}: give a number of at least 1.")
    embeddings = checked(embeddings).astype(np.float64)
    centre = embeddings.mean(axis=0)
    deviations = embeddings - centre
    spread = deviations.std(axis=0)
    # Centring equal numbers leaves rounding errors.
    varies = spread > 1e-9 * np.abs(embeddings).max(axis=0)
    scale = np.where(varies, 1 / np.where(varies, spread, 1), 0)
    deviations *= scale
    variances, axes = np.linalg.eigh(deviations.T @ deviations / len(deviations))
    largest = np.argsort(-variances, kind="stable")[:dimensions]
    largest = largest[variances[largest] > 1e-9 * max(variances.max(), 1e-300)]
    directions = scale[:, None] * axes[:, largest]
    length = np.sqrt(variances[largest].sum())
    return Projection(centre, directions / length if length > 0 else directions)


def prompt_features(embeddings: np.ndarray, dimensions: int = 64, seed: int = 0) -> np.ndarray:
    """Return the features of a pool whose embeddings are in memory, `(n, D)` float32.

    Args:
        embeddings (`np.ndarray`): `(n, H)`.
        dimensions (`int`, *optional*, defaults to `64`): Maximum D.
        seed (`int`, *optional*, defaults to `0`): Seed of the sample of `FITTED` prompts that a larger pool is fitted
            on.

    Raises:
        `ValueError`: As in [`fit_projection`].
    """
    sample = embeddings
    if len(embeddings) > FITTED:
        order = np.random.default_rng(seed).permutation(len(embeddings))
        sample = embeddings[np.sort(order[:FITTED])]
    return fit_projection(sample, dimensions)(embeddings)


def checked(embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings as an array.

    Raises:
        `ValueError`: If they are not finite floating-point numbers, `(P, H)`.
    """
    embeddings = np.asarray(embeddings)
    is_matrix = embeddings.ndim == 2 and len(embeddings) > 0
    if not is_matrix or not np.issubdtype(embeddings.dtype, np.floating):
        raise ValueError(
            f"Embeddings have the shape {embeddings.shape} and the type {embeddings.dtype}: give floating-point "
            "numbers, one row for each prompt."
        )
    for start in range(0, len(embeddings), BLOCK):
        is_finite = np.isfinite(embeddings[start : start + BLOCK]).all(axis=1)
        if not is_finite.all():
            row = start + int(np.argmin(is_finite))
            raise ValueError(
                f"The embedding of prompt {row} is not finite: remove such prompts, or embed them with another "
                "model or in float32."
            )
    return embeddings


# ---- Calibration: predictions against later rollouts ----------------------------------------------------------------
# Axes: `P` predictions, each of one prompt's success rate before its rollouts. A prompt's rollouts count one by one:
# ten right ones of sixteen are ten positive events and six negative ones, all predicted with the same probability.


@dataclass(frozen=True)
class Bin:
    """Predictions between two bounds.

    Args:
        low (`float`): Lower bound, included.
        high (`float`): Upper bound; included in the last bin alone.
        prompts (`int`): Number of predictions in the bin.
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
    """Return the reliability diagram: predicted and observed rates in bins of equal width.

    Args:
        predicted (`np.ndarray`): `(P,)` from 0 to 1.
        right (`np.ndarray`): Right rollouts of each, `(P,)`.
        wrong (`np.ndarray`): Wrong rollouts of each, `(P,)`.
        count (`int`, *optional*, defaults to `10`): Number of bins.

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
    """Return the mean gap of predicted and observed rates, weighted by rollouts (ECE, Naeini et al., 2015).

    The result is NaN without rollouts.
    """
    filled = [bin_ for bin_ in bins if bin_.rollouts]
    if not filled:
        return float("nan")
    distances = [abs(bin_.predicted - bin_.seen) for bin_ in filled]
    return float(np.average(distances, weights=[bin_.rollouts for bin_ in filled]))


def brier_score(predicted: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> float:
    """Return the mean squared error of predictions for each rollout's outcome (Brier, 1950); NaN without rollouts.

    Args:
        predicted (`np.ndarray`): `(P,)` from 0 to 1.
        right (`np.ndarray`): Right rollouts of each, `(P,)`.
        wrong (`np.ndarray`): Wrong rollouts of each, `(P,)`.

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
    """Return the probability that a right rollout scored higher than a wrong one, ties counted half (ROC AUC).

    Args:
        scores (`np.ndarray`): `(P,)`, of any scale.
        right (`np.ndarray`): Right rollouts of each, `(P,)`.
        wrong (`np.ndarray`): Wrong rollouts of each, `(P,)`.

    Returns:
        `float`: From 0 to 1, 0.5 if scores have no information; NaN if all rollouts have the same outcome.

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
    lower = below + wrongs / 2  # wrong rollouts with a lower score, ties counted half
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
            f"Predictions {predicted.shape}, correct {right.shape} and wrong {wrong.shape} rollouts need the same "
            "shape, one entry per prompt."
        )
    is_probability = (predicted >= 0) & (predicted <= 1)
    if probabilities and not is_probability.all():
        outside = predicted[~is_probability][0]
        raise ValueError(
            f"A predicted success rate is {outside:g}: give probabilities from 0 to 1."
        )
    return predicted, right, wrong
