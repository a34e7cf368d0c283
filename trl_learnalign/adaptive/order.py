"""Draws the prompts of a generation: some uniformly, the others by Thompson sampling among candidates.

A share of each generation (`exploration`) comes from the pool in a seeded order, pass after pass, whatever the belief:
skills without practice decline, and prompts without rollouts stay unknown. Candidates compete for the other places.
They are the next prompts of the pool in another seeded order, `candidates` prompts for each place. A success rate p is
sampled from the posterior of every candidate, and the candidates with the largest expected gain at their p win. So
uncertain prompts are tried, and solved and hopeless ones rest. Passing candidates are used instead of a search of the
whole pool for two reasons. The time for a generation does not depend on the pool's size. And in a pool of a million
mostly unknown prompts, the luckiest samples would crowd out the known prompts.

The draw is a function of the belief, the pool and (seed, generation); there is no other random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trl_learnalign import rng
from trl_learnalign.adaptive.belief import NEVER, Belief
from trl_learnalign.adaptive.outcomes import Outcomes
from trl_learnalign.config import LearnAlignConfig


class ShuffledPasses:
    """The pool in a seeded order, pass after pass, each pass in its own order.

    Args:
        pool (`np.ndarray`): `(N,)` distinct rows.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        names (`str`): Purpose of the order; part of every seed.
    """

    def __init__(self, pool: np.ndarray, seed: int, *names: str):
        self.pool = pool
        self.seed = seed
        self.names = names
        self._kept: tuple[int, np.ndarray] = (-1, pool)

    def between(self, start: int, stop: int) -> np.ndarray:
        """Return rows number `start` to `stop` of all passes; a row may occur twice where two passes meet."""
        size, parts = len(self.pool), []
        for number in range(start // size, -(-stop // size)):
            first = number * size
            parts.append(self._pass(number)[max(start - first, 0) : stop - first])
        return np.concatenate([*parts, np.empty(0, dtype=np.int64)])

    def _pass(self, number: int) -> np.ndarray:
        if self._kept[0] != number:  # cached: shuffling a million rows takes a while
            self._kept = (
                number,
                rng.permutation(rng.key(self.seed, *self.names, number), self.pool),
            )
        return self._kept[1]


class AdaptiveOrder:
    """The order of training on one pool.

    Args:
        pool (`np.ndarray`): `(N,)` distinct rows of the dataset, in any order.
        count (`int`): Number of prompts of a generation (with oversampling, of those that are rolled out).
        config (`LearnAlignConfig`): Constants of the order, `adaptive_*`.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        name (`str`): Name of the phase; part of every seed.

    Raises:
        `ValueError`: If the pool has fewer prompts than a generation, or contains a prompt twice.
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
                f"A generation of {count} prompts was requested from a pool of {len(self.pool)}: enlarge the pool, "
                "or lower the prompts per generation or the oversampling."
            )
        self.count = count
        self.config = config
        self.seed = seed
        self.name = name
        # At most half of the pool rests, so that there is something left to choose from.
        self.cool_down = min(config.adaptive_cool_down, len(self.pool) // (2 * count))
        competed = count - math.floor(config.adaptive_exploration * count)
        self.candidate_count = min(config.adaptive_candidates_per_slot * competed, len(self.pool))
        self._explored = ShuffledPasses(self.pool, seed, "adaptive exploration", name)
        self._candidates = ShuffledPasses(self.pool, seed, "adaptive candidates", name)

    def draw(self, belief: Belief, generation: int) -> np.ndarray:
        """Draw the prompts of a generation, `(count,)` int64 rows of the dataset, all different.

        Args:
            belief ([`Belief`]): Belief about the dataset that contains the pool.
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
        posterior = belief.posterior(candidates, generation)
        rates = posterior.sample(self._uniforms("rate", generation, candidates))
        ties = self._uniforms("tie", generation, candidates)
        variances = rates * (1 - rates) * posterior.share
        gains = expected_gain(rates, self.config.adaptive_gain_exponent, variances)
        winners = np.lexsort((ties, -gains))
        return np.concatenate([explored, candidates[winners[:places]]])

    def explored(self, generation: int) -> np.ndarray:
        """Return the prompts that a generation takes from the shuffled pool, each once."""
        per_generation = self.config.adaptive_exploration * self.count
        start, stop = (
            math.floor(per_generation * number) for number in (generation, generation + 1)
        )
        return _each_once(self._explored.between(start, stop))

    def candidates(self, generation: int) -> np.ndarray:
        """Return the prompts that compete for the other places of a generation, each once."""
        start = generation * self.candidate_count
        return _each_once(self._candidates.between(start, start + self.candidate_count))

    def _uniforms(self, purpose: str, generation: int, rows: np.ndarray) -> np.ndarray:
        """Return a number between 0 and 1 for each row, `(P,)`."""
        stream = rng.key(self.seed, "adaptive", self.name, purpose, generation)
        return ((rng.random_bits(stream, rows) >> np.uint64(11)) + 0.5) * 2.0**-53


def _each_once(rows: np.ndarray) -> np.ndarray:
    """Return rows without repetitions, in the order of their first occurrence."""
    _, places = np.unique(rows, return_index=True)
    return rows[np.sort(places)]


def expected_gain(
    success_rates: np.ndarray, headroom: float, variances: np.ndarray | None = None
) -> np.ndarray:
    """Return the gain of training on prompts with these success rates, `(P,)`: learnability times remaining headroom.

    With `headroom` 0 it is p(1 - p), the variance of a rollout. With 1 it is p(1 - p)², the first-order gain in
    success rate of a step along the prompt's own gradient (Knapsack RL, arXiv 2509.25849), which is largest at p =
    1/3. The outcomes of a graded reward have smaller `variances`, `(P,)`, which replace p(1 - p).
    """
    left = 1 - success_rates
    learnability = success_rates * left if variances is None else variances
    return learnability * left**headroom


# ---- Rounds within a rollout budget ---------------------------------------------------------------------------------
# The first round is a uniform random sample. It shows what the candidates are like overall, and the belief starts to
# learn the stage's policy from it. Each later round prefers the prompts with large expected learnability p(1 - p), so
# that little is spent on prompts that are surely solved or hopeless.
#
# Everything is a function of the belief, the candidates and (seed, stage, round).


def budget_size(count: int, share: float) -> int:
    """Return how many candidates are rolled out: at most this share of them, and at least one.

    Args:
        count (`int`): Number of candidates.
        share (`float`): Above 0, at most 1.
    """
    # Guards against floating-point error: three tenths of ten are three.
    return max(1, math.floor(share * count + 1e-9))


def round_sizes(count: int, share: float, rounds: int) -> list[int]:
    """Return the prompts of each round, at least one; they sum to [`budget_size`] and differ by at most one.

    Args:
        count (`int`): Number of candidates.
        share (`float`): Above 0, at most 1.
        rounds (`int`): Number of rounds, at least 1; there are fewer rounds if there are fewer prompts.
    """
    total = budget_size(count, share)
    rounds = min(rounds, total)
    least, rest = divmod(total, rounds)
    return [least + 1] * rest + [least] * (rounds - rest)


def sample_by_learnability(
    belief: Belief,
    candidates: np.ndarray,
    size: int,
    focus: float,
    stream: int,
) -> np.ndarray:
    """Draw the prompts of a later round, `(size,)` rows, ascending.

    They are drawn one after the other, without replacement, with probabilities proportional to their expected
    learnability to the power of `focus`. The draw sorts random keys (Efraimidis & Spirakis, 2006). Taking only the
    best prompts would cover few kinds of prompts.

    Args:
        belief ([`Belief`]): Belief after all rounds so far.
        candidates (`np.ndarray`): Rows that were not rolled out in this stage yet, `(P,)`.
        size (`int`): Number of prompts, at most P.
        focus (`float`): At least 0; 0 samples uniformly.
        stream (`int`): Key of the draws, from `rng.key`.
    """
    posterior = belief.posterior(candidates, belief.generation + 1)
    bits = rng.random_bits(stream, candidates)
    uniforms = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
    luck = -np.log(-np.log(uniforms))
    keys = focus * np.log(posterior.learnability) + luck
    first = np.lexsort((bits, -keys))
    drawn = candidates[first[:size]]
    return np.sort(drawn)


def after_rounds(belief: Belief, rounds: Sequence[Outcomes], generation: int) -> Belief:
    """Return the belief after the rounds of a stage; the given belief is not changed.

    The policy is the same in all rounds. They count as one generation, without decay in between.

    Args:
        belief ([`Belief`]): Belief before the stage.
        rounds (sequence of [`Outcomes`]): Outcomes of the rounds so far, one or more.
        generation (`int`): Number of the generation that they are.
    """
    later = belief.copy()
    later.record(Outcomes.joined(rounds), generation)
    return later
