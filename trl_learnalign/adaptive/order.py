"""Which prompts come next: a part from the shuffled pool, the others by Thompson sampling among candidates.

A part of each generation (`exploration`) comes from the pool in a seeded order, pass after pass, whatever is believed:
skills that are not practised decline, and what is not rolled out is not known. The other places are competed for. The
pool passes by in another seeded order, `candidates` prompts for each of them. For every candidate a success rate p is
drawn from what is believed of it, and those win whose p is worth most. So uncertain prompts get tried, and solved and
hopeless ones rest. Candidates that pass by, instead of a search through the whole pool, keep two things: the time for
a generation does not depend on the pool's size; and of a million prompts of which little is known, the luckiest draws
do not crowd out what is known.

All of it is a function of the belief, the pool and (seed, generation): nothing is drawn in an order of its own.
"""

from __future__ import annotations

import math

import numpy as np

from trl_learnalign import hashing
from trl_learnalign.adaptive.belief import NEVER, Belief
from trl_learnalign.config import LearnAlignConfig


class ShuffledPasses:
    """The pool in a seeded order, pass after pass, each in an order of its own.

    Args:
        pool (`np.ndarray`): `(N,)` distinct rows.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        names (`str`): What the order is for; part of every seed.
    """

    def __init__(self, pool: np.ndarray, seed: int, *names: str):
        self.pool = pool
        self.seed = seed
        self.names = names
        self._kept: tuple[int, np.ndarray] = (-1, pool)

    def between(self, start: int, stop: int) -> np.ndarray:
        """Rows number `start` to `stop`, counted over all passes; at a seam of two passes a row may be there twice."""
        size, parts = len(self.pool), []
        for number in range(start // size, -(-stop // size)):
            first = number * size
            parts.append(self._pass(number)[max(start - first, 0) : stop - first])
        return np.concatenate([*parts, np.empty(0, dtype=np.int64)])

    def _pass(self, number: int) -> np.ndarray:
        if self._kept[0] != number:  # one is kept: to shuffle a million rows takes a while
            self._kept = (
                number,
                hashing.permutation(hashing.key(self.seed, *self.names, number), self.pool),
            )
        return self._kept[1]


class AdaptiveOrder:
    """The order of training on one pool.

    Args:
        pool (`np.ndarray`): `(N,)` distinct rows of the dataset, in any order.
        count (`int`): Prompts of a generation (with oversampling, those that are rolled out).
        config (`LearnAlignConfig`): Constants of the order, `adaptive_*`.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        name (`str`): Name of the phase; part of every seed.

    Raises:
        `ValueError`: If the pool has fewer prompts than a generation, or one of them twice.
    """

    def __init__(
        self, pool: np.ndarray, count: int, config: LearnAlignConfig, seed: int, name: str
    ):
        self.pool = np.unique(np.asarray(pool, dtype=np.int64))
        if len(self.pool) < len(pool):
            raise ValueError(
                f"The pool lists {len(pool) - len(self.pool)} prompts twice: give each row once."
            )
        if not 0 < count <= len(self.pool):
            raise ValueError(
                f"A generation of {count} prompts was asked of a pool of {len(self.pool)}: enlarge the pool or lower "
                "the prompts per generation or the oversampling."
            )
        self.count = count
        self.config = config
        self.seed = seed
        self.name = name
        # At most half of the pool rests, or nothing would be left to choose among.
        self.cool_down = min(config.adaptive_cool_down, len(self.pool) // (2 * count))
        competed = count - math.floor(config.adaptive_exploration * count)
        self.candidate_count = min(config.adaptive_candidates_per_slot * competed, len(self.pool))
        self._explored = ShuffledPasses(self.pool, seed, "adaptive exploration", name)
        self._candidates = ShuffledPasses(self.pool, seed, "adaptive candidates", name)

    def draw(self, belief: Belief, generation: int) -> np.ndarray:
        """Prompts of a generation, `(count,)` int64 rows of the dataset, all different.

        Args:
            belief ([`Belief`]): Of the dataset that the pool is a part of.
            generation (`int`): Number of the generation, later than those recorded.
        """
        explored = self.explored(generation)
        places = self.count - len(explored)
        candidates = np.setdiff1d(self.candidates(generation), explored)
        last = belief.last_rolled_out[candidates]
        candidates = candidates[(last == NEVER) | (generation - last > self.cool_down)]
        if len(candidates) <= places:
            others = np.setdiff1d(self.pool, np.concatenate([explored, candidates]))
            order = np.argsort(belief.last_rolled_out[others], kind="stable")
            longest_rested = others[order[: places - len(candidates)]]
            return np.concatenate([explored, candidates, longest_rested])
        rates = belief.posterior(candidates, generation).sample(
            self._uniforms("rate", generation, candidates)
        )
        ties = self._uniforms("tie", generation, candidates)
        winners = np.lexsort((ties, -worth_of(rates, self.config.adaptive_gain_exponent)))
        return np.concatenate([explored, candidates[winners[:places]]])

    def explored(self, generation: int) -> np.ndarray:
        """Prompts that a generation has from the shuffled pool, each once."""
        per_generation = self.config.adaptive_exploration * self.count
        start, stop = (
            math.floor(per_generation * number) for number in (generation, generation + 1)
        )
        return _each_once(self._explored.between(start, stop))

    def candidates(self, generation: int) -> np.ndarray:
        """Prompts that pass by in a generation to compete for its other places, each once."""
        start = generation * self.candidate_count
        return _each_once(self._candidates.between(start, start + self.candidate_count))

    def _uniforms(self, purpose: str, generation: int, rows: np.ndarray) -> np.ndarray:
        """A number between 0 and 1 for each row, `(P,)`."""
        stream = hashing.key(self.seed, "adaptive", self.name, purpose, generation)
        return ((hashing.random_bits(stream, rows) >> np.uint64(11)) + 0.5) * 2.0**-53


def _each_once(rows: np.ndarray) -> np.ndarray:
    """Rows without repetitions, in the order of their first places."""
    _, places = np.unique(rows, return_index=True)
    return rows[np.sort(places)]


def worth_of(success_rates: np.ndarray, headroom: float) -> np.ndarray:
    """What training on prompts of these success rates is worth, `(P,)`: learnability times what is left to gain.

    `headroom` 0: p(1 - p), the variance of a rollout; 1: p(1 - p)², the first-order gain in success rate of a step
    along the prompt's own gradient (Knapsack RL, arXiv 2509.25849), largest at p = 1/3.
    """
    left = 1 - success_rates
    return success_rates * left * left**headroom
