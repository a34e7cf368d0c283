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
        self,
        pool: np.ndarray,
        count: int,
        settings: AdaptiveSettings,
        seed: int,
        name: str,
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
        is_rested = (last == NEVER) | (generation - last > self.cool_down)
        rested = candidates[is_rested]
        if len(rested) < self.count:
            return self._least_recent(belief, candidates)
        free = self._free_places(generation)
        first, others = rested[:free], rested[free:]
        worth = self._worth(belief, generation, others)
        noise = self._uniforms("noise", generation, others)
        winners = winning(worth, noise, self.count - free, self.settings.sharpness)
        return np.concatenate([first, others[winners]])

    def _worth(self, belief: Belief, generation: int, rows: np.ndarray) -> np.ndarray:
        """What training on prompts is worth as far as is known, `(P,)`."""
        posterior = belief.posterior(rows, generation)
        headroom = self.settings.headroom
        if not self.settings.thompson:
            return posterior.expected_worth(headroom)
        uniforms = self._uniforms("rate", generation, rows)
        return worth_of(posterior.sample(uniforms), headroom)

    def candidates(self, generation: int) -> np.ndarray:
        """Prompts that pass by in a generation, in the seeded order, each once."""
        size = len(self.pool)
        number = min(self.settings.candidates * self.count, size)
        first = generation * number
        last = first + number - 1
        parts = []
        for k in range(first // size, last // size + 1):
            start = first - k * size
            parts.append(self._order(k)[max(start, 0) : start + number])
        if len(parts) == 1:
            return parts[0]
        # The end of one pass and the start of the next may share prompts.
        both = np.concatenate(parts)
        _, places = np.unique(both, return_index=True)
        return both[np.sort(places)]

    def _order(self, k: int) -> np.ndarray:
        """The pool in the order of pass `k`."""
        number, order = self._pass
        if number != k:
            stream = hashing.key(self.seed, "adaptive order", self.name, k)
            order = hashing.permutation(stream, self.pool)
            self._pass = k, order
        return order

    def _least_recent(self, belief: Belief, candidates: np.ndarray) -> np.ndarray:
        """Those of the candidates, then of the pool, that were rolled out the longest time ago."""
        others = np.setdiff1d(self.pool, candidates)
        everything = np.concatenate([candidates, others])
        order = np.argsort(belief.last_rolled_out[everything], kind="stable")
        return everything[order[: self.count]]

    def _free_places(self, generation: int) -> int:
        """Places of a generation that are taken as they come."""
        settings = self.settings
        remaining = max(0.0, 1 - generation / max(1, settings.exploration_generations))
        extra = remaining * (settings.first_exploration - settings.exploration)
        share = settings.exploration + extra
        # Rounded up as often as the fraction says, so that the mean over generations is the share.
        draw = self._uniforms("explored", generation, np.zeros(1, dtype=np.int64))[0]
        return math.floor(share * self.count + draw)

    def _uniforms(self, purpose: str, generation: int, rows: np.ndarray) -> np.ndarray:
        """A number between 0 and 1 for each row, `(P,)`."""
        stream = hashing.key(self.seed, "adaptive", self.name, purpose, generation)
        # The 53 bits of a float64's fraction; the half keeps 0 and 1 out.
        bits = hashing.random_bits(stream, rows) >> np.uint64(11)
        return (bits + 0.5) * 2.0**-53


def worth_of(success_rates: np.ndarray, headroom: float) -> np.ndarray:
    """What training on prompts of these success rates is worth, `(P,)`: learnability times what is left to gain.

    `headroom` 0: p(1 - p), the variance of a rollout; 1: p(1 - p)², the first-order gain (arXiv 2509.25849).
    """
    failure_rates = 1 - success_rates
    return success_rates * failure_rates * failure_rates**headroom


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
            noise = -np.log(-np.log(uniforms))
            keys = sharpness * np.log(values) + noise
    order = np.lexsort((uniforms, -keys))
    return order[:count]


def most_worthwhile(
    right: np.ndarray,
    wrong: np.ndarray,
    count: int,
    headroom: float,
) -> np.ndarray:
    """Places of the groups to train on after oversampling: those of the largest worth that was seen.

    Args:
        right (`np.ndarray`): Right rollouts of each group, `(P,)`, in the order in which they were drawn.
        wrong (`np.ndarray`): Wrong ones.
        count (`int`): How many groups are wanted.
        headroom (`float`): As in [`worth_of`].

    Returns:
        `np.ndarray`: `(count,)` ascending, so that the order of drawing stays; of equal ones the first.
    """
    right, wrong = np.asarray(right), np.asarray(wrong)
    rates = right / np.maximum(right + wrong, 1)
    # A group without wrong rollouts, or without any that could be judged, is worth nothing.
    worth = np.where(wrong > 0, worth_of(rates, headroom), 0.0)
    best = np.argsort(-worth, kind="stable")[:count]
    return np.sort(best)
