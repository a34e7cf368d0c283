"""What is believed of every prompt's success rate, from all outcomes so far.

Axes: `n` prompts, `D` features, `M` values of `memory`, `C` values of `concentration`, `P` prompts that are asked
about.

Two things are known of a prompt. Its own right and wrong rollouts count; they fade by `memory` in every generation,
since the policy moves. And a probe, which has learned from all prompts' outcomes, predicts a success rate from its
features ([`SuccessProbe`]). A prompt's own rate lies around the predicted one, m, the closer the larger the
`concentration` c: Beta(c m, c (1 - m)). So the posterior is Beta(c m + right, c (1 - m) + wrong). Without features and
with c = 1 this is about what MoPPS has (arXiv 2507.04632); GPS (arXiv 2602.01970) generalises as well.

How well features tell success rates and how fast the past fades differs from pool to pool. So both settings can have
several values: before a generation's outcomes are counted, each pair of values predicts them (beta-binomial
likelihood), and the pair that has predicted best so far is used (prequential choice; Dawid, 1984). It takes no
rollouts of its own.

The belief is a function of the outcomes alone: a resumed run rebuilds it by recording them again, and all processes
have the same. Neither recording nor asking depends on n: nothing is updated but the prompts of the generation and the
probe, and fading happens when one asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, betaln

from trl_learnalign.adaptive.probe import SuccessProbe
from trl_learnalign.adaptive.settings import AdaptiveSettings

MAX_AGE = 100_000
"""Generations beyond which counts do not fade any more: by then next to nothing is left of them."""

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

    def expected_worth(self, headroom: float) -> np.ndarray:
        """Mean of p(1 - p) (1 - p)^headroom, `(P,)`."""
        weighted = betaln(self.right + 1, self.wrong + 1 + headroom)
        return np.exp(weighted - betaln(self.right, self.wrong))

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
        settings ([`AdaptiveSettings`]): `concentration`, `memory`, `score_memory`, `spread` and `drift` are read.

    Raises:
        `ValueError`: If the features are no such array.
    """

    def __init__(self, features: np.ndarray, settings: AdaptiveSettings):
        if features.ndim != 2 or not np.isfinite(features).all():
            raise ValueError(
                f"Features of the shape {features.shape} were given: they must be finite numbers, (prompts, features) "
                "like those that prompt_features makes of embeddings."
            )
        self.features = features
        self.settings = settings
        self.generation = NEVER
        """The last one that was recorded."""
        self.last_rolled_out = np.full(len(features), NEVER, dtype=np.int32)
        """`(n,)`: generations; `NEVER` for prompts without any."""
        self.probes = [
            SuccessProbe(features.shape[1], settings.spread, memory, settings.drift)
            for memory in settings.memory
        ]
        """As they were in the generation that was recorded last."""
        # `(n, M, 2)`: right and wrong of each prompt as they were in the generation of `last_rolled_out`.
        self._counts = np.zeros((len(features), len(settings.memory), 2))
        self._scores = np.zeros((len(settings.memory), len(settings.concentration)))
        self._fading = _fading_table(settings.memory)

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
        faded, predicted = self._faded_counts(rows, generation), self._predicted(rows, generation)
        before = self._posterior(faded, predicted, *self.best)
        self._score(faded, predicted, counts)
        # What was faded to this generation is the new count; a prompt without outcomes so far begins at 0.
        self._counts[rows] = faded + counts[:, None, :]
        self.last_rolled_out[rows] = generation
        self.probes, self.generation = self._probes_at(generation), generation
        is_judged = counts.any(axis=1)
        if is_judged.any():
            features = self.features[rows[is_judged]]
            right, wrong = counts[is_judged, 0], counts[is_judged, 1]
            for probe in self.probes:
                probe.update(features, right, wrong)
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
        faded, predicted = self._faded_counts(rows, generation), self._predicted(rows, generation)
        return self._posterior(faded, predicted, *self.best)

    @property
    def best(self) -> tuple[int, int]:
        """Which value of `memory` and which of `concentration` predicted best so far; of equal ones the first."""
        place = int(np.argmax(self._scores))
        return place // self._scores.shape[1], place % self._scores.shape[1]

    @property
    def memory(self) -> float:
        """The value of `memory` that is used."""
        return self.settings.memory[self.best[0]]

    @property
    def concentration(self) -> float:
        """The value of `concentration` that is used."""
        return self.settings.concentration[self.best[1]]

    def __len__(self) -> int:
        return len(self.features)

    @staticmethod
    def replay(
        features: np.ndarray,
        settings: AdaptiveSettings,
        history: Iterable[Outcomes],
    ) -> Belief:
        """The belief that these outcomes lead to, in the order of their generations."""
        belief = Belief(features, settings)
        for outcomes in history:
            belief.record(outcomes)
        return belief

    def _check_later(self, generation: int, verb: str) -> None:
        if generation <= self.generation:
            raise ValueError(
                f"Generation {generation} was to be {verb} after generation {self.generation} had been recorded: "
                "record all outcomes of a generation at once, and generations in their order."
            )

    def _probes_at(self, generation: int) -> list[SuccessProbe]:
        """The probes as they are before a generation."""
        elapsed = 0 if self.generation == NEVER else generation - self.generation
        return [probe.faded(elapsed) for probe in self.probes]

    def _faded_counts(self, rows: np.ndarray, generation: int) -> np.ndarray:
        """Own counts as they are in a generation, `(P, M, 2)`."""
        age = np.minimum(generation - self.last_rolled_out[rows], len(self._fading) - 1)
        return self._counts[rows] * self._fading[age][..., None]

    def _predicted(self, rows: np.ndarray, generation: int) -> np.ndarray:
        """Predicted success rates before a generation, `(P, M)`."""
        features = self.features[rows]
        predictions = [probe.success_rates(features) for probe in self._probes_at(generation)]
        rates = np.stack(predictions, axis=1)
        return np.round(rates * PREDICTED_STEPS) / PREDICTED_STEPS

    def _posterior(
        self,
        faded: np.ndarray,
        predicted: np.ndarray,
        memory: int,
        concentration: int,
    ) -> Posterior:
        counts, rates = faded[:, memory], predicted[:, memory]
        strength = self.settings.concentration[concentration]
        right = strength * rates + counts[:, 0]
        wrong = strength * (1 - rates) + counts[:, 1]
        return Posterior(right + LEAST, wrong + LEAST)

    def _score(self, faded: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> None:
        """Add the likelihood of outcomes under each pair of values."""
        self._scores *= self.settings.score_memory
        if self._scores.size == 1:
            return
        for memory, concentration in np.ndindex(self._scores.shape):
            before = self._posterior(faded, predicted, memory, concentration)
            after = betaln(before.right + counts[:, 0], before.wrong + counts[:, 1])
            log_likelihoods = after - betaln(before.right, before.wrong)
            # Summed exactly, so that the choice does not depend on how the dataset's rows are numbered.
            self._scores[memory, concentration] += math.fsum(log_likelihoods)


def _fading_table(memory: tuple[float, ...]) -> np.ndarray:
    """Powers of each value from the 0th on, `(A, M)`, as far as anything is left of a count."""
    lengths = [math.ceil(math.log(1e-9) / math.log(value)) for value in memory if value < 1]
    longest = max(lengths, default=1)
    ages = np.arange(min(longest, MAX_AGE) + 1)
    return np.asarray(memory) ** ages[:, None]
