"""Draws the prompts of a generation: some uniformly, the others by Thompson sampling among candidates.

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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import comb

from trl_learnalign import rng
from trl_learnalign.adaptive.belief import NEVER, Belief, Outcomes
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
                rng.permutation(rng.key(self.seed, *self.names, number), self.pool),
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
        winners = np.lexsort((ties, -expected_gain(rates, self.config.adaptive_gain_exponent)))
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
        stream = rng.key(self.seed, "adaptive", self.name, purpose, generation)
        return ((rng.random_bits(stream, rows) >> np.uint64(11)) + 0.5) * 2.0**-53


def _each_once(rows: np.ndarray) -> np.ndarray:
    """Rows without repetitions, in the order of their first places."""
    _, places = np.unique(rows, return_index=True)
    return rows[np.sort(places)]


def expected_gain(success_rates: np.ndarray, headroom: float) -> np.ndarray:
    """What training on prompts of these success rates is worth, `(P,)`: learnability times what is left to gain.

    `headroom` 0: p(1 - p), the variance of a rollout; 1: p(1 - p)², the first-order gain in success rate of a step
    along the prompt's own gradient (Knapsack RL, arXiv 2509.25849), largest at p = 1/3.
    """
    left = 1 - success_rates
    return success_rates * left * left**headroom


# ---- Rounds within a rollout budget ---------------------------------------------------------------------------------
# The first round is a random sample. It says what the candidates are like on the whole, and it is what the belief
# begins to learn the stage's policy from. Each later round prefers the prompts whose learnability p(1 - p) is believed
# to be large by then, so that hardly anything is spent on those that are surely solved or hopeless.
#
# All of it is a function of the belief, the candidates and (seed, stage, round).


def budget_size(count: int, share: float) -> int:
    """How many of some candidates are rolled out: at most this share of them, and one at least.

    Args:
        count (`int`): The candidates.
        share (`float`): Above 0, at most 1.
    """
    # Three tenths of ten are three, whatever floating point makes of it.
    return max(1, math.floor(share * count + 1e-9))


def round_sizes(count: int, share: float, rounds: int) -> list[int]:
    """Prompts of each round, at least one; they add up to [`budgeted`], and differ by one at most.

    Args:
        count (`int`): The candidates.
        share (`float`): Above 0, at most 1.
        rounds (`int`): Rounds, at least 1; of fewer prompts there are fewer.
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
    """The prompts of a later round, `(size,)` rows, ascending.

    They are drawn one after the other, without replacement, with probabilities in proportion to their expected
    learnability to the power of `focus`; by the order of keys (Efraimidis & Spirakis, 2006). The best alone would be
    of few kinds.

    Args:
        belief ([`Belief`]): After all rounds so far.
        candidates (`np.ndarray`): Rows that were not rolled out in this stage yet, `(P,)`.
        size (`int`): How many are wanted, at most P.
        focus (`float`): At least 0; 0: anybody.
        stream (`int`): Key of the draws, from `hashing.key`.
    """
    posterior = belief.posterior(candidates, belief.generation + 1)
    bits = rng.random_bits(stream, candidates)
    uniforms = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
    luck = -np.log(-np.log(uniforms))
    keys = focus * np.log(posterior.learnability) + luck
    first = np.lexsort((bits, -keys))
    drawn = candidates[first[:size]]
    return np.sort(drawn)


def after_rounds(belief: Belief, rounds: Sequence[Outcomes]) -> Belief:
    """What is believed after the rounds of a stage; the belief itself stays as it is.

    The policy is the same in all of them: they are one generation, and nothing fades in between.

    Args:
        belief ([`Belief`]): Before the stage.
        rounds (sequence of [`Outcomes`]): Of the rounds so far, one or more, all of the same generation.
    """
    whole = Outcomes(
        generation=rounds[0].generation,
        rows=np.concatenate([part.rows for part in rounds]),
        right=np.concatenate([part.right for part in rounds]),
        wrong=np.concatenate([part.wrong for part in rounds]),
    )
    later = belief.copy()
    later.record(whole)
    return later


# ---- Group size -----------------------------------------------------------------------------------------------------
# Axis: `P` groups, each of one prompt's rollouts.
#
# A group of G rollouts of a prompt with success rate p is mixed with probability 1 - p^G - (1 - p)^G. Its estimate
# from n >= G rollouts, k of them right, is the share of all choices of G of them that are mixed: 1 - [C(k, G) + C(n -
# k, G)] / C(n, G). It is unbiased for every p, so its mean over prompts is unbiased for the pool that they were drawn
# from. For G > n no function of k is unbiased. There the distribution of p that makes the counts most likely is found,
# without a form given beforehand (Kiefer & Wolfowitz, 1956), and the share is that distribution's.
#
# A group costs its rollouts, so sizes are compared by mixed groups for each rollout. Without skipping, training on the
# other groups costs something too.

SIZES = (2, 4, 8, 16)
"""Values of G that are compared."""

PAYS = 1.25
"""So many times as many mixed groups for the same rollouts, at least, are called worth a smaller G."""

SURE = 2.0
"""Standard errors that they have to lie above it."""

RATES = np.sin(np.linspace(0, np.pi / 2, 101)) ** 2
"""Success rates that a fitted distribution may have, denser at 0 and 1."""

EM_STEPS = 200
"""Of expectation maximisation; more change the share in the third digit."""


@dataclass(frozen=True)
class GroupSizes:
    """Shares of mixed groups by size.

    Args:
        groups (`int`): Groups that they are estimated from.
        own (`int`): Rollouts of each of these.
        shares (`dict[int, float]`): G → share of mixed groups, from 0 to 1, ascending.
        fitted (`tuple[int, ...]`): Those sizes whose share comes from the fitted distribution.
        smaller (`int`, *optional*): The size below `own` that has most mixed groups for each rollout, if it has
            [`PAYS`] times as many as `own` beyond chance; else `None`.
    """

    groups: int
    own: int
    shares: dict[int, float]
    fitted: tuple[int, ...]
    smaller: int | None

    @property
    def line(self) -> str:
        """In words, one line."""
        parts = []
        for size, share in self.shares.items():
            mark = " by a fit" if size in self.fitted else ""
            parts.append(f"{size}: {share:.0%}, {100 * share / size:.1f}{mark}")
        return (
            "Groups with both right and wrong rollouts, and how many of them 100 rollouts give, by num_generations: "
            f"{'; '.join(parts)} (from {self.groups:,} groups of {self.own} rollouts)."
        )

    @property
    def advice(self) -> str | None:
        """What a smaller size would give, one line; `None` if it would not pay."""
        if self.smaller is None:
            return None
        gain = self.own * self.shares[self.smaller] / (self.smaller * self.shares[self.own])
        return (
            f"num_generations={self.smaller} instead of {self.own} would give {gain:.1f} times as many of them with "
            "as many completions a step (docs/continual.md, Group size)."
        )

    @property
    def lines(self) -> list[str]:
        """[`line`] and, where a smaller size would pay, [`advice`]."""
        return [self.line] if self.advice is None else [self.line, self.advice]


def mixed_share(right: np.ndarray, wrong: np.ndarray, size: int) -> np.ndarray:
    """Estimates of the chance that `size` rollouts of each prompt are mixed, unbiased, `(P,)` from 0 to 1.

    Args:
        right (`np.ndarray`): Right rollouts of each group, `(P,)` whole numbers.
        wrong (`np.ndarray`): Wrong ones; together at least `size`.
        size (`int`): G.

    Raises:
        `ValueError`: If a group has fewer rollouts.
    """
    total = right + wrong
    if len(total) and total.min() < size:
        raise ValueError(
            f"size={size}: a group has {total.min()} judged rollouts; give at least as many."
        )
    return 1 - (comb(right, size) + comb(wrong, size)) / comb(total, size)


def fitted_share(right: np.ndarray, wrong: np.ndarray, size: int) -> float:
    """Share of mixed groups of `size` rollouts under the distribution of success rates that fits the counts best.

    Args and shapes as in [`mixed_share`], with any number of rollouts in a group.
    """
    counts, times = np.unique(np.stack([right, wrong], axis=1), axis=0, return_counts=True)
    likelihoods = RATES ** counts[:, :1] * (1 - RATES) ** counts[:, 1:]
    weights = np.full(len(RATES), 1 / len(RATES))
    for _ in range(EM_STEPS):
        weights = weights * ((times / (likelihoods @ weights)) @ likelihoods) / times.sum()
    return float(weights @ (1 - RATES**size - (1 - RATES) ** size))


def group_sizes(right: np.ndarray, wrong: np.ndarray, own: int) -> GroupSizes | None:
    """Shares of mixed groups at [`SIZES`] and at a run's own size.

    Args:
        right (`np.ndarray`): Right rollouts of each group, `(P,)` whole numbers.
        wrong (`np.ndarray`): Wrong ones; groups whose rollouts could not all be judged are left out.
        own (`int`): Rollouts of each group.

    Returns:
        `GroupSizes`: `None` if no group is mixed: then nothing is known of any size.
    """
    whole = right + wrong == own
    right, wrong = right[whole], wrong[whole]
    if not ((right > 0) & (wrong > 0)).any():
        return None
    shares, fitted = {}, []
    for size in sorted({own, *SIZES}):
        if size <= own:
            shares[size] = float(mixed_share(right, wrong, size).mean())
        else:
            shares[size] = fitted_share(right, wrong, size)
            fitted.append(size)
    return GroupSizes(len(right), own, shares, tuple(fitted), _smaller(right, wrong, own, shares))


def _smaller(
    right: np.ndarray, wrong: np.ndarray, own: int, shares: dict[int, float]
) -> int | None:
    """The size below `own` that pays, if one does beyond the chance of which prompts were seen."""
    smaller = [size for size in shares if size < own]
    if not smaller or len(right) < 2:
        return None
    best = max(smaller, key=lambda size: shares[size] / size)
    per_rollout = mixed_share(right, wrong, own) / own
    gains = mixed_share(right, wrong, best) / best - PAYS * per_rollout
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return best if gains.mean() > SURE * error else None
