"""What is believed of every prompt's success rate, from all outcomes so far.

Axes: `n` prompts, `k` neighbours, `M` values of `memory`, `S` values of `sharing`, `P` prompts that are asked about.

Each prompt counts its right and wrong rollouts. Counts fade by `memory` in every generation, since the policy moves. A
prompt borrows its neighbours' counts, times their weight and `sharing`. The posterior is Beta(prior + right, prior +
wrong) of both together; without neighbours this is the posterior of MoPPS (arXiv 2507.04632).

How far neighbours are to be trusted and how fast the past fades differs from pool to pool. So both can have several
values: before a generation's outcomes are counted, each pair of values predicts them (beta-binomial likelihood), and
the pair that has predicted best so far is used (prequential choice, Dawid, 1984). It takes no rollouts of its own.

The belief is a function of the outcomes alone, so a resumed run rebuilds it bit for bit by recording them again, and
all processes have the same. Recording costs O(P k) and asking O(P k), whatever n is: nothing is updated but the
prompts of the generation, fading and borrowing happen when one asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, betaln

from trl_learnalign.adaptive.neighbours import Neighbours
from trl_learnalign.adaptive.settings import AdaptiveSettings

MAX_AGE = 100_000
"""Generations beyond which counts do not fade any more: by then next to nothing is left of them."""

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
            raise ValueError(f"Outcomes have the shapes {shapes}: give one row and two counts for each prompt.")
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
        neighbours ([`Neighbours`]): Of the dataset's prompts.
        settings ([`AdaptiveSettings`]): `sharing`, `memory`, `score_memory` and `prior` are read.
    """

    def __init__(self, neighbours: Neighbours, settings: AdaptiveSettings):
        self.neighbours = neighbours
        self.settings = settings
        self.generation = NEVER
        """The last one that was recorded."""
        self.last_rolled_out = np.full(len(neighbours), NEVER, dtype=np.int32)
        """`(n,)`: generations; `NEVER` for prompts without any."""
        # `(n, M, 2)`: right and wrong of each prompt as they were in the generation of `last_rolled_out`.
        self._counts = np.zeros((len(neighbours), len(settings.memory), 2))
        self._scores = np.zeros((len(settings.memory), len(settings.sharing)))
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
        if outcomes.generation <= self.generation:
            raise ValueError(
                f"Generation {outcomes.generation} was to be recorded after generation {self.generation}: record all "
                "outcomes of a generation at once, and generations in their order."
            )
        rows, counts = outcomes.by_prompt()
        if len(rows) and rows[-1] >= len(self):
            raise ValueError(f"Row {rows[-1]} is not in the dataset of {len(self)} prompts: give its row numbers.")
        generation = outcomes.generation
        own, borrowed = self._faded_counts(rows, generation)
        before = self._posterior(own, borrowed, *self.best)
        self._score(own, borrowed, counts)
        # What was faded to this generation is the new count; a prompt without outcomes so far begins at 0.
        self._counts[rows] = own + counts[:, None, :]
        self.last_rolled_out[rows] = generation
        self.generation = generation
        return before

    def posterior(self, rows: np.ndarray, generation: int) -> Posterior:
        """What is believed of prompts before a generation is rolled out.

        Args:
            rows (`np.ndarray`): `(P,)` rows of the dataset.
            generation (`int`): Number of the generation; later than those recorded, so that all of them have faded.

        Returns:
            `Posterior`: Of `P` prompts.

        Raises:
            `ValueError`: If the generation is not later.
        """
        if generation <= self.generation:
            raise ValueError(
                f"What was believed before generation {generation} was asked after generation {self.generation} had "
                "been recorded: ask about a later one, or replay the outcomes up to it."
            )
        own, borrowed = self._faded_counts(np.asarray(rows), generation)
        return self._posterior(own, borrowed, *self.best)

    @property
    def best(self) -> tuple[int, int]:
        """Which value of `memory` and which of `sharing` predicted best so far; of equal ones the first."""
        place = int(np.argmax(self._scores))
        return place // self._scores.shape[1], place % self._scores.shape[1]

    @property
    def memory(self) -> float:
        """The value of `memory` that is used."""
        return self.settings.memory[self.best[0]]

    @property
    def sharing(self) -> float:
        """The value of `sharing` that is used."""
        return self.settings.sharing[self.best[1]]

    def __len__(self) -> int:
        return len(self.neighbours)

    @staticmethod
    def replay(neighbours: Neighbours, settings: AdaptiveSettings, history: Iterable[Outcomes]) -> Belief:
        """The belief that these outcomes lead to, in the order of their generations."""
        belief = Belief(neighbours, settings)
        for outcomes in history:
            belief.record(outcomes)
        return belief

    def _faded_counts(self, rows: np.ndarray, generation: int) -> tuple[np.ndarray, np.ndarray]:
        """Own and borrowed counts, `(P, M, 2)` each, before sharing."""
        own = self._counts[rows] * self._faded(self.last_rolled_out[rows], generation)[..., None]
        neighbours = self.neighbours.rows[rows]
        last = self.last_rolled_out[neighbours]
        # Of a large pool, few prompts have been rolled out: only those are looked up.
        places, columns = np.nonzero(last != NEVER)
        weights = self.neighbours.weights[rows[places], columns][:, None]
        weights = weights * self._faded(last[places, columns], generation)
        counts = self._counts[neighbours[places, columns]] * weights[..., None]
        borrowed = np.zeros_like(own)
        for memory in range(own.shape[1]):
            for kind in range(2):
                values = counts[:, memory, kind]
                borrowed[:, memory, kind] = np.bincount(places, values, minlength=len(rows))
        return own, borrowed

    def _faded(self, last: np.ndarray, generation: int) -> np.ndarray:
        """What outcomes of given generations still count, `(…, M)`."""
        age = np.minimum(generation - last, len(self._fading) - 1)
        return self._fading[age]

    def _posterior(self, own: np.ndarray, borrowed: np.ndarray, memory: int, sharing: int) -> Posterior:
        counts = own[:, memory] + self.settings.sharing[sharing] * borrowed[:, memory]
        return Posterior(self.settings.prior + counts[:, 0], self.settings.prior + counts[:, 1])

    def _score(self, own: np.ndarray, borrowed: np.ndarray, counts: np.ndarray) -> None:
        """Add the likelihood of outcomes under each pair of values."""
        self._scores *= self.settings.score_memory
        if self._scores.size == 1:
            return
        for memory, sharing in np.ndindex(self._scores.shape):
            before = self._posterior(own, borrowed, memory, sharing)
            likelihood = betaln(before.right + counts[:, 0], before.wrong + counts[:, 1])
            # Summed exactly, so that the choice does not depend on how the dataset's rows are numbered.
            self._scores[memory, sharing] += math.fsum(likelihood - betaln(before.right, before.wrong))


def _fading_table(memory: tuple[float, ...]) -> np.ndarray:
    """Powers of each value from the 0th on, `(A, M)`, as far as anything is left of a count."""
    longest = max((math.ceil(math.log(1e-9) / math.log(value)) for value in memory if value < 1), default=1)
    ages = np.arange(min(longest, MAX_AGE) + 1)
    return np.asarray(memory) ** ages[:, None]
