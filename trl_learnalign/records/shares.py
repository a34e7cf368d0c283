"""What is noted of a choice by categories: how many of its prompts each has, beside the pool and random choices."""

from __future__ import annotations

from dataclasses import dataclass

from trl_learnalign.records.entries import Entry

NARROW = 0.5
"""Of a random choice's spread beyond a single category: a choice with less is far narrower."""


@dataclass(frozen=True, kw_only=True)
class CategoryCount(Entry):
    """A category of prompts.

    Args:
        name (`str`): Value of the column, or the most typical prompt of the cluster.
        pool (`int`): Prompts of the pool in it.
        chosen (`int`): Prompts of the choice in it; of what was trained on, groups of rollouts.
    """

    name: str
    pool: int
    chosen: int


@dataclass(frozen=True, kw_only=True)
class Shares(Entry):
    """A choice by categories of prompts, beside its pool (`trl_learnalign.ranking.shares`).

    The *effective number* of categories is `exp(-Σ s ln s)` of their shares `s`: 12 of 12 equal ones, 1 if all is in
    one.

    Args:
        by (`str`): The column, or `"prompt_cluster"`.
        pool (`int`): Prompts of the pool that belong to a category.
        chosen (`int`): Those of the choice; of what was trained on, groups of rollouts.
        distinct (`int`): Categories of the pool.
        categories (`tuple[CategoryCount]`): The largest of them, by their prompts in pool and choice.
        effective (`float`): Effective number of categories of the choice.
        effective_pool (`float`): Of the pool.
        effective_random (`float`): Mean over seeded random choices of as many.
        effective_random_low (`float`): The lowest of these.
    """

    by: str
    pool: int
    chosen: int
    distinct: int
    categories: tuple[CategoryCount, ...]
    effective: float
    effective_pool: float
    effective_random: float
    effective_random_low: float

    @property
    def is_narrow(self) -> bool:
        """Whether the choice is spread over far fewer categories than random ones."""
        if self.effective >= self.effective_random_low:
            return False
        # One category is the least there is: of two equal ones, all from one is as narrow as can be.
        return self.effective - 1 < NARROW * (self.effective_random - 1)

    @property
    def narrowness(self) -> str | None:
        """What is wrong with a choice far narrower than a random one, as a sentence's end; `None` if it is not."""
        if not self.is_narrow:
            return None
        largest = max(self.categories, key=lambda category: category.chosen)
        share = largest.chosen / self.chosen
        share_of_pool = largest.pool / self.pool
        return (
            f"by {self.by}, the choice comes from about {self.effective:.1f} of {self.distinct} categories, a "
            f"random one of as many from {self.effective_random:.1f}; the largest, {largest.name!r}, "
            f"has {share:.0%} of the choice and {share_of_pool:.0%} of the pool"
        )


def spread_line(shares: Shares) -> str:
    """How far a choice is spread, in a few words of the log."""
    return (
        f"about {shares.effective:.1f} of {shares.distinct} categories by {shares.by} "
        f"(random {shares.effective_random:.1f})"
    )
