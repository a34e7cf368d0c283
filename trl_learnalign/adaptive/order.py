"""Which prompts come next: Thompson sampling of learnability among candidates that pass by.

The pool passes by in a seeded order, pass after pass, `candidates` prompts for each place of a generation. For every
candidate a success rate p is drawn from what is believed of it; those of the largest p(1 - p) win. So uncertain
prompts get tried, and solved and hopeless ones rest. Candidates that pass by, instead of a search through the whole
pool, keep three things: every prompt has its turn; the time for a generation does not depend on the pool's size; and
of a million prompts of which nothing is known, the luckiest draws do not crowd out what is known.

All of it is a function of the belief, the pool and (seed, generation): nothing is drawn in an order of its own.
"""

from __future__ import annotations

import math

import numpy as np

from trl_learnalign import hashing
from trl_learnalign.adaptive.belief import NEVER, Belief
from trl_learnalign.adaptive.settings import AdaptiveSettings


class AdaptiveOrder:
    """The order of training on one pool.

    Args:
        pool (`np.ndarray`): `(N,)` distinct rows of the dataset, in any order.
        count (`int`): Prompts of a generation (with oversampling, those that are rolled out).
        settings ([`AdaptiveSettings`]): All but the belief's own are read.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        name (`str`): Name of the phase; part of every seed.

    Raises:
        `ValueError`: If the pool has fewer prompts than a generation, or one of them twice.
    """

    def __init__(
        self, pool: np.ndarray, count: int, settings: AdaptiveSettings, seed: int, name: str
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
        self.settings = settings
        self.seed = seed
        self.name = name
        # At most half of the pool rests, or nothing would be left to choose among.
        self.cool_down = min(settings.cool_down, len(self.pool) // (2 * count))
        self._pass: tuple[int, np.ndarray] = (-1, self.pool)

    def draw(self, belief: Belief, generation: int) -> np.ndarray:
        """Prompts of a generation, `(count,)` int64 rows of the dataset, all different.

        Args:
            belief ([`Belief`]): Of the dataset that the pool is a part of.
            generation (`int`): Number of the generation, later than those recorded.
        """
        candidates = self.candidates(generation)
        last = belief.last_rolled_out[candidates]
        fresh = candidates[(last == NEVER) | (generation - last > self.cool_down)]
        if len(fresh) < self.count:
            return self._least_recent(belief, candidates)
        free = self._explored(generation)
        taken, others = fresh[:free], fresh[free:]
        posterior = belief.posterior(others, generation)
        if self.settings.thompson:
            rates = posterior.sample(self._uniforms("rate", generation, others))
            worth = worth_of(rates, self.settings.headroom)
        else:
            worth = posterior.expected_worth(self.settings.headroom)
        noise = self._uniforms("noise", generation, others)
        winners = winning(worth, noise, self.count - free, self.settings.sharpness)
        return np.concatenate([taken, others[winners]])

    def candidates(self, generation: int) -> np.ndarray:
        """Prompts that pass by in a generation, in the seeded order, each once."""
        number = min(self.settings.candidates * self.count, len(self.pool))
        first = generation * number
        found = []
        for k in range(first // len(self.pool), (first + number - 1) // len(self.pool) + 1):
            start = first - k * len(self.pool)
            found.append(self._order(k)[max(start, 0) : start + number])
        if len(found) == 1:
            return found[0]
        both = np.concatenate(
            found
        )  # the end of one pass and the start of the next may share prompts
        _, places = np.unique(both, return_index=True)
        return both[np.sort(places)]

    def _order(self, k: int) -> np.ndarray:
        """The pool in the order of pass `k`."""
        if self._pass[0] != k:
            self._pass = (
                k,
                hashing.permutation(
                    hashing.key(self.seed, "adaptive order", self.name, k), self.pool
                ),
            )
        return self._pass[1]

    def _least_recent(self, belief: Belief, candidates: np.ndarray) -> np.ndarray:
        """Those of the candidates, then of the pool, that were rolled out the longest time ago."""
        everything = np.concatenate([candidates, np.setdiff1d(self.pool, candidates)])
        order = np.argsort(belief.last_rolled_out[everything], kind="stable")
        return everything[order[: self.count]]

    def _explored(self, generation: int) -> int:
        """Places of a generation that are taken as they come."""
        settings = self.settings
        left = max(0.0, 1 - generation / max(1, settings.exploration_generations))
        share = settings.exploration + left * (settings.first_exploration - settings.exploration)
        draw = self._uniforms("explored", generation, np.zeros(1, dtype=np.int64))[0]
        return math.floor(share * self.count + draw)

    def _uniforms(self, purpose: str, generation: int, rows: np.ndarray) -> np.ndarray:
        """A number between 0 and 1 for each row, `(P,)`."""
        stream = hashing.key(self.seed, "adaptive", self.name, purpose, generation)
        return ((hashing.random_bits(stream, rows) >> np.uint64(11)) + 0.5) * 2.0**-53


def worth_of(success_rates: np.ndarray, headroom: float) -> np.ndarray:
    """What training on prompts of these success rates is worth, `(P,)`: learnability times what is left to gain.

    `headroom` 0: p(1 - p), the variance of a rollout; 1: p(1 - p)², the first-order gain (arXiv 2509.25849).
    """
    left = 1 - success_rates
    return success_rates * left * left**headroom


def winning(values: np.ndarray, uniforms: np.ndarray, count: int, sharpness: float) -> np.ndarray:
    """Places of those that win, the first one first.

    Args:
        values (`np.ndarray`): `(P,)`, not negative.
        uniforms (`np.ndarray`): `(P,)` between 0 and 1: the noise.
        count (`int`): How many win.
        sharpness (`float`): They win in proportion to their value to this power, one after the other; infinite: the
            largest values win.

    Returns:
        `np.ndarray`: `(count,)` int64.
    """
    if math.isinf(sharpness):
        keys = values
    else:
        # Gumbel's trick: the largest of log weight + noise is drawn in proportion to the weights (Yellott, 1977).
        with np.errstate(divide="ignore"):
            keys = sharpness * np.log(values) - np.log(-np.log(uniforms))
    return np.lexsort((uniforms, -keys))[:count]


def most_learnable(right: np.ndarray, wrong: np.ndarray, count: int) -> np.ndarray:
    """Places of the groups to train on after oversampling: those of the largest p(1 - p) that was seen.

    Args:
        right (`np.ndarray`): Right rollouts of each group, `(P,)`, in the order in which they were drawn.
        wrong (`np.ndarray`): Wrong ones.
        count (`int`): How many groups are wanted.

    Returns:
        `np.ndarray`: `(count,)` ascending, so that the order of drawing stays; of equal ones the first.
    """
    total = np.maximum(np.asarray(right) + wrong, 1)
    learnability = np.asarray(right) * np.asarray(wrong) / total**2
    return np.sort(np.argsort(-learnability, kind="stable")[:count])
