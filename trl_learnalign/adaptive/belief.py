"""What is believed of every prompt's success rate, from all outcomes so far.

Axes: `n` prompts, `D` features, `C` values of `concentration`, `P` prompts that are asked about.

Two things are known of a prompt. A probe, which has learned from all prompts' outcomes, predicts a success rate m from
its features ([`SuccessProbe`]). And its own right and wrong rollouts count. They grow old: training has moved the
policy since. So they fade, and what is left is moved along with the prediction: if the logit of m has risen by 1 since
they came out, so has that of their rate. A prompt that was harder than prompts like it is still believed to be.

A prompt's own rate lies around the predicted one, the closer the larger the `concentration` c: Beta(c m, c (1 - m)).
So the posterior is Beta(c m + right, c (1 - m) + wrong). How well features tell success rates differs from pool to
pool. So c can have several values: before a generation's outcomes are counted, each value predicts them (beta-binomial
likelihood), and the one that has predicted best so far is used (prequential choice; Dawid, 1984). It takes no rollouts
of its own.

Without features this is a posterior for each prompt, as MoPPS has it (arXiv 2507.04632); GPS (arXiv 2602.01970)
generalises over prompts as well, with another model.

The belief is a function of the outcomes alone: a resumed run rebuilds it by recording them again, and all processes
have the same. Neither recording nor asking depends on n: nothing is updated but the prompts of the generation and the
probe, and fading happens when one asks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, betaln, expit, logit

from trl_learnalign.adaptive.probe import SuccessProbe
from trl_learnalign.config import LearnAlignConfig

LEAST = 0.01
"""Right and wrong rollouts that are assumed of every prompt: however sure a prediction is, both can happen."""

PREDICTED_STEPS = 2.0**20
"""Predicted rates are rounded to multiples of one part in this many: differences in the last digits, as other machines
and thread counts make them, do not reach the order of training (but for one in thousands of millions)."""

NEVER = -1
"""The generation in which a prompt was last rolled out, if it never was."""


@dataclass(frozen=True)
class Outcomes:
    """What came out of one generation, over all processes.

    Args:
        generation (`int`): Its number, from 0.
        rows (`np.ndarray`): Prompts, `(P,)`, rows of the dataset in any order; a prompt may be there several times.
        right (`np.ndarray`): Right rollouts of each, `(P,)` whole numbers.
        wrong (`np.ndarray`): Wrong rollouts of each; those that could not be judged are neither.

    Raises:
        `ValueError`: If these are no counts.
    """

    generation: int
    rows: np.ndarray
    right: np.ndarray
    wrong: np.ndarray

    def __post_init__(self) -> None:
        if self.generation < 0:
            raise ValueError(f"generation={self.generation}: generations are counted from 0.")
        shapes = {name: np.shape(getattr(self, name)) for name in ("rows", "right", "wrong")}
        if len(set(shapes.values())) > 1 or len(shapes["rows"]) != 1:
            raise ValueError(
                f"Outcomes have the shapes {shapes}: give one row and two counts for each prompt."
            )
        for name in shapes:
            values = np.asarray(getattr(self, name))
            if len(values) and (not np.issubdtype(values.dtype, np.integer) or values.min() < 0):
                raise ValueError(
                    f"{name} of generation {self.generation} has the type {values.dtype} and values like "
                    f"{values.min()}: give whole numbers of at least 0."
                )

    def by_prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """Each prompt once, ascending, `(P',)`, and its right and wrong rollouts, `(P', 2)` float64."""
        rows, places = np.unique(np.asarray(self.rows, dtype=np.int64), return_inverse=True)
        counts = np.zeros((len(rows), 2))  # sums of whole numbers: exact in any order
        np.add.at(counts, places, np.stack([self.right, self.wrong], axis=1))
        return rows, counts


@dataclass(frozen=True)
class Posterior:
    """Beta distributions of success rates.

    Args:
        right (`np.ndarray`): `(P,)` float64, above 0: the first parameter.
        wrong (`np.ndarray`): `(P,)` float64, above 0: the second.
    """

    right: np.ndarray
    wrong: np.ndarray

    @property
    def success_rate(self) -> np.ndarray:
        """Mean of p, `(P,)`."""
        return self.right / (self.right + self.wrong)

    @property
    def learnability(self) -> np.ndarray:
        """Mean of p(1 - p), `(P,)`."""
        total = self.right + self.wrong
        return self.right * self.wrong / (total * (total + 1))

    def sample(self, uniforms: np.ndarray) -> np.ndarray:
        """Success rates drawn by inverting the distribution function.

        Args:
            uniforms (`np.ndarray`): `(P,)` numbers between 0 and 1.

        Returns:
            `np.ndarray`: `(P,)` float64 from 0 to 1.
        """
        return betaincinv(self.right, self.wrong, uniforms)


class Belief:
    """Posteriors of all prompts of a dataset.

    Args:
        features (`np.ndarray`): `(n, D)` of mean squared length 1, see [`prompt_features`]; `(n, 0)`: nothing is known
            of a prompt but its own outcomes and how the others fare.
        config (`LearnAlignConfig`): Constants of the belief, `adaptive_*`.

    Raises:
        `ValueError`: If the features are no such array.
    """

    def __init__(self, features: np.ndarray, config: LearnAlignConfig):
        if features.ndim != 2 or not np.isfinite(features).all():
            raise ValueError(
                f"Features of the shape {features.shape} were given: they must be finite numbers, (prompts, features) "
                "like those that prompt_features makes of embeddings."
            )
        self.features = features
        self.config = config
        self.generation = NEVER
        """The last one that was recorded."""
        self.last_rolled_out = np.full(len(features), NEVER, dtype=np.int32)
        """`(n,)`: generations; `NEVER` for prompts without any."""
        self.probe = SuccessProbe(
            features.shape[1],
            config.adaptive_prior_std,
            config.adaptive_decay,
            config.adaptive_drift_std,
        )
        """As it was after the generation that was recorded last."""
        # `(n, 2)`: right and wrong of each prompt as they were in the generation of `last_rolled_out`, and `(n,)` the
        # logit of what was predicted then.
        self._counts = np.zeros((len(features), 2))
        self._predicted_then = np.zeros(len(features))
        self._scores = np.zeros(len(config.adaptive_concentration))

    def record(self, outcomes: Outcomes) -> Posterior:
        """Count the outcomes of a generation.

        Args:
            outcomes ([`Outcomes`]): All outcomes of one generation, later than those recorded so far.

        Returns:
            `Posterior`: What was believed of the rolled-out prompts before, ascending by row, each once: to be held
            against what came out.

        Raises:
            `ValueError`: If the generation is not later, or a row is not in the dataset.
        """
        self._check_later(outcomes.generation, "recorded")
        rows, counts = outcomes.by_prompt()
        if len(rows) and rows[-1] >= len(self):
            raise ValueError(
                f"Row {rows[-1]} is not in the dataset of {len(self)} prompts: give its row numbers."
            )
        generation = outcomes.generation
        probe = self._probe_at(generation)
        predicted = self._predicted(probe, rows)
        own = self._own(rows, predicted, generation)
        before = self._posterior(own, predicted, self.concentration)
        self._score(own, predicted, counts)
        # What was faded to this generation is the new count; a prompt without outcomes so far begins at 0.
        self._counts[rows] = own + counts
        self._predicted_then[rows] = logit(predicted)
        self.last_rolled_out[rows] = generation
        judged = counts.any(axis=1)
        if judged.any():
            probe.update(self.features[rows[judged]], counts[judged, 0], counts[judged, 1])
        self.probe, self.generation = probe, generation
        return before

    def posterior(self, rows: np.ndarray, generation: int) -> Posterior:
        """What is believed of prompts before a generation is rolled out.

        Args:
            rows (`np.ndarray`): `(P,)` rows of the dataset.
            generation (`int`): Number of the generation, later than those recorded.

        Returns:
            `Posterior`: Of `P` prompts.

        Raises:
            `ValueError`: If the generation is not later.
        """
        self._check_later(generation, "asked about")
        rows = np.asarray(rows, dtype=np.int64)
        predicted = self._predicted(self._probe_at(generation), rows)
        return self._posterior(
            self._own(rows, predicted, generation), predicted, self.concentration
        )

    @property
    def concentration(self) -> float:
        """The value of `concentration` that predicted best so far; of equal ones the first."""
        return self.config.adaptive_concentration[int(np.argmax(self._scores))]

    def __len__(self) -> int:
        return len(self.features)

    def copy(self) -> Belief:
        """The same belief, to go on with apart from this one; features are shared."""
        twin = copy.copy(self)  # the probe is replaced, never changed
        twin.last_rolled_out = self.last_rolled_out.copy()
        twin._counts = self._counts.copy()
        twin._predicted_then = self._predicted_then.copy()
        twin._scores = self._scores.copy()
        return twin

    def _check_later(self, generation: int, verb: str) -> None:
        if generation <= self.generation:
            raise ValueError(
                f"Generation {generation} was to be {verb} after generation {self.generation} had been recorded: "
                "record all outcomes of a generation at once, and generations in their order."
            )

    def _probe_at(self, generation: int) -> SuccessProbe:
        """The probe as it is before a generation."""
        return self.probe.faded(0 if self.generation == NEVER else generation - self.generation)

    def _predicted(self, probe: SuccessProbe, rows: np.ndarray) -> np.ndarray:
        """Predicted success rates, `(P,)`, neither 0 nor 1."""
        steps = np.round(probe.success_rates(self.features[rows]) * PREDICTED_STEPS)
        return np.clip(steps, 1, PREDICTED_STEPS - 1) / PREDICTED_STEPS

    def _own(self, rows: np.ndarray, predicted: np.ndarray, generation: int) -> np.ndarray:
        """Own counts, faded and moved along with the prediction, `(P, 2)`."""
        counts = self._counts[rows]
        total = counts.sum(axis=1)
        left = total * self.config.adaptive_prompt_decay ** (
            generation - self.last_rolled_out[rows]
        ).astype(float)
        # Half a rollout of either kind: none right of eight is no reason to believe in none, ever.
        then = logit((counts[:, 0] + 0.5) / (total + 1))
        rate = expit(then + logit(predicted) - self._predicted_then[rows])
        return np.stack([left * rate, left * (1 - rate)], axis=1)

    def _posterior(self, own: np.ndarray, predicted: np.ndarray, concentration: float) -> Posterior:
        right = concentration * predicted + own[:, 0]
        wrong = concentration * (1 - predicted) + own[:, 1]
        return Posterior(right + LEAST, wrong + LEAST)

    def _score(self, own: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> None:
        """Add the likelihood of outcomes under each value of `concentration`."""
        self._scores *= self.config.adaptive_concentration_decay
        for place, concentration in enumerate(self.config.adaptive_concentration):
            before = self._posterior(own, predicted, concentration)
            likelihood = betaln(before.right + counts[:, 0], before.wrong + counts[:, 1])
            # Summed exactly, so that the choice does not depend on how the dataset's rows are numbered.
            self._scores[place] += math.fsum(likelihood - betaln(before.right, before.wrong))
