"""What the group size does to the share of groups with right and wrong rollouts.

Axis: `P` groups, each of one prompt's rollouts.

A group of G rollouts of a prompt with success rate p is mixed with probability 1 - p^G - (1 - p)^G. Its estimate
from n >= G rollouts, k of them right, is the share of mixed ones among all subsets of G rollouts:
1 - [C(k, G) + C(n - k, G)] / C(n, G). It is unbiased for every p, so its mean over prompts is unbiased for the pool
that they were drawn from. For G > n no function of k is unbiased. In that case the distribution of p with the
maximum likelihood of the counts is fitted, without a parametric form (Kiefer & Wolfowitz, 1956), and its share is
used.

The cost of a group is its rollouts, so sizes are compared by mixed groups per rollout. Without skipping, training on
the other groups has a cost too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import comb

from trl_learnalign.adaptive.outcomes import Outcomes

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
