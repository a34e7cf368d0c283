"""A stage's candidates rolled out in rounds: few of them, and those that are believed to teach most.

The first round is a random sample. It says what the candidates are like on the whole, and it is what the belief begins
to learn the stage's policy from. Each later round prefers the prompts whose learnability p(1 - p) is believed to be
large by then, so that hardly anything is spent on those that are surely solved or hopeless.

All of it is a function of the belief, the candidates and (seed, stage, round).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trl_learnalign import hashing
from trl_learnalign.adaptive.belief import Belief, Outcomes


def budgeted(count: int, share: float) -> int:
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
    total = budgeted(count, share)
    rounds = min(rounds, total)
    least, rest = divmod(total, rounds)
    return [least + 1] * rest + [least] * (rounds - rest)


def promising(
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
    bits = hashing.random_bits(stream, candidates)
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
