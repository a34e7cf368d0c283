"""Draws the prompts of a generation: some uniformly, the others by Thompson sampling among candidates.

A share of each generation (`exploration`) comes from the pool in a seeded order, pass after pass, whatever the belief:
skills without practice decline, and prompts without rollouts stay unknown. Candidates compete for the other places.
They are the next prompts of the pool in another seeded order, `candidates` prompts for each place. A success rate p is
sampled from the posterior of every candidate, and the candidates with the largest expected gain at their p win. So
uncertain prompts are tried, and solved and hopeless ones rest. The gain may be divided by the expected cost of a
rollout (`adaptive_gain_per_cost`). Passing candidates are used instead of a search of the
whole pool for two reasons. The time for a generation does not depend on the pool's size. And in a pool of a million
mostly unknown prompts, the luckiest samples would crowd out the known prompts.

The draw is a function of the belief, the pool and (seed, generation); there is no other random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import comb

from trl_learnalign import rng
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import NEVER, Belief
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
        if belief.cost is not None:
            gains = gains / belief.cost.expected(candidates, generation)
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


# ---- Group size -----------------------------------------------------------------------------------------------------
# What the group size does to the share of groups with right and wrong rollouts.
#
# Axis: `P` groups, each of one prompt's rollouts.
#
# A group of G rollouts of a prompt with success rate p is mixed with probability 1 - p^G - (1 - p)^G. Its estimate
# from n >= G rollouts, k of them right, is the share of mixed ones among all subsets of G rollouts:
# 1 - [C(k, G) + C(n - k, G)] / C(n, G). It is unbiased for every p, so its mean over prompts is unbiased for the pool
# that they were drawn from. For G > n no function of k is unbiased. In that case the distribution of p with the
# maximum likelihood of the counts is fitted, without a parametric form (Kiefer & Wolfowitz, 1956), and its share is
# used.
#
# The cost of a group is its rollouts, so sizes are compared by mixed groups per rollout. Without skipping, training on
# the other groups has a cost too.

SIZES = (2, 4, 8, 16)
"""Values of G that are compared."""

PAYS = 1.25
"""Minimum ratio of mixed groups per rollout at which a smaller G is recommended."""

SURE = 2.0
"""Number of standard errors by which the gain must exceed [`PAYS`]."""

RATES = np.sin(np.linspace(0, np.pi / 2, 101)) ** 2
"""Success rates in the support of the fitted distribution, denser at 0 and 1."""

EM_STEPS = 200
"""Iterations of expectation maximisation; more change the share in the third digit."""


@dataclass(frozen=True)
class GroupSizes:
    """Shares of mixed groups by size.

    Args:
        groups (`int`): Number of groups that the estimates are from.
        own (`int`): Rollouts of each of these groups.
        shares (`dict[int, float]`): G → share of mixed groups, from 0 to 1, ascending. For a graded reward only that
            of `own`: the sums of its outcomes do not show how other sizes would differ.
        fitted (`tuple[int, ...]`): The sizes whose share comes from the fitted distribution.
        smaller (`int`, *optional*): The size below `own` with the most mixed groups per rollout, if it has
            significantly more than [`PAYS`] times as many as `own`; else `None`.
    """

    groups: int
    own: int
    shares: dict[int, float]
    fitted: tuple[int, ...]
    smaller: int | None

    @property
    def line(self) -> str:
        """Return the shares as one line of text."""
        if len(self.shares) == 1:
            return (
                f"Groups whose outcomes differ: {self.shares[self.own]:.0%} (from {self.groups:,} groups of "
                f"{self.own} rollouts with a graded reward, which do not show the effect of num_generations)."
            )
        parts = []
        for size, share in self.shares.items():
            mark = " by a fit" if size in self.fitted else ""
            parts.append(f"{share:.0%} at {size}{mark}")
        return (
            f"Share of groups with both correct and wrong rollouts, by num_generations: {', '.join(parts)} "
            f"(estimated from {self.groups:,} groups of {self.own})."
        )

    @property
    def advice(self) -> str | None:
        """Return one line about the gain of a smaller size; `None` if no smaller size is recommended."""
        if self.smaller is None:
            return None
        gain = self.own * self.shares[self.smaller] / (self.smaller * self.shares[self.own])
        return (
            f"num_generations={self.smaller} instead of {self.own} would give {gain:.1f} times as many such groups "
            "from the same number of rollouts (docs/continual.md, Group size)."
        )

    @property
    def lines(self) -> list[str]:
        """Return [`line`] and, if a smaller size is recommended, [`advice`]."""
        return [self.line] if self.advice is None else [self.line, self.advice]


def mixed_share(right: np.ndarray, wrong: np.ndarray, size: int) -> np.ndarray:
    """Return unbiased estimates of the probability that `size` rollouts of each prompt are mixed, `(P,)` from 0 to 1.

    Args:
        right (`np.ndarray`): Right rollouts of each group, `(P,)` whole numbers.
        wrong (`np.ndarray`): Wrong rollouts of each, `(P,)`; right and wrong together are at least `size`.
        size (`int`): G.

    Raises:
        `ValueError`: If a group has fewer rollouts.
    """
    total = right + wrong
    if len(total) and total.min() < size:
        raise ValueError(
            f"size={size}: a group has only {total.min()} graded rollouts; give at least that many."
        )
    return 1 - (comb(right, size) + comb(wrong, size)) / comb(total, size)


def fitted_share(right: np.ndarray, wrong: np.ndarray, size: int) -> float:
    """Return the share of mixed groups of `size` rollouts under the fitted distribution of success rates.

    Args and shapes as in [`mixed_share`], with any number of rollouts in a group.
    """
    counts, times = np.unique(np.stack([right, wrong], axis=1), axis=0, return_counts=True)
    likelihoods = RATES ** counts[:, :1] * (1 - RATES) ** counts[:, 1:]
    weights = np.full(len(RATES), 1 / len(RATES))
    for _ in range(EM_STEPS):
        weights = weights * ((times / (likelihoods @ weights)) @ likelihoods) / times.sum()
    return float(weights @ (1 - RATES**size - (1 - RATES) ** size))


def group_sizes(outcomes: Outcomes, own: int) -> GroupSizes | None:
    """Return the shares of mixed groups at [`SIZES`] and at a run's own size.

    Args:
        outcomes ([`Outcomes`]): The groups; those with rollouts that could not be judged are left out.
        own (`int`): Rollouts of each group.

    Returns:
        `GroupSizes`: `None` if no group is mixed, since then nothing can be estimated for any size.
    """
    outcomes = outcomes.where(outcomes.judged == own)
    if not outcomes.mixed.any():
        return None
    if outcomes.partial.any():
        return GroupSizes(len(outcomes), own, {own: float(outcomes.mixed.mean())}, (), None)
    right, wrong = outcomes.right, outcomes.wrong
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
    """Return the recommended size below `own`, if its gain is larger than sampling error."""
    smaller = [size for size in shares if size < own]
    if not smaller or len(right) < 2:
        return None
    best = max(smaller, key=lambda size: shares[size] / size)
    per_rollout = mixed_share(right, wrong, own) / own
    gains = mixed_share(right, wrong, best) / best - PAYS * per_rollout
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return best if gains.mean() > SURE * error else None
