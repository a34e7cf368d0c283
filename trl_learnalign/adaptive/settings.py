"""The constants of continual selection, each of them a setting, checked where it is declared."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trl_learnalign.config.adaptive import Adaptive


@dataclass(frozen=True)
class AdaptiveSettings:
    """Settings of the belief and of the order that follows from it.

    The defaults were chosen on development tasks (`docs/results/continual_tuning.json`).

    Of the belief:

    Args:
        dimensions (`int`, *optional*, defaults to `64`):
            Features of a prompt: directions in the space of embeddings that are kept.
        spread (`float`, *optional*, defaults to `4.0`):
            Standard deviation of the success rates' logits that features are expected to tell.
        drift (`float`, *optional*, defaults to `0.05`):
            Standard deviation of what all logits together are expected to move from one generation to the next.
        memory (`float`, *optional*, defaults to `0.97`):
            What an outcome of the last generation still teaches of all prompts one generation later, above 0 and at
            most 1: success rates move while the policy learns.
        own_memory (`float`, *optional*, defaults to `0.99`):
            The same of the prompt itself. What is remembered is whether it was harder or easier than expected, and
            that holds for longer.
        concentration (`tuple` of `float`, *optional*):
            How many rollouts of its own the prediction from a prompt's features weighs as much as, above 0. Of several
            values, the one is used by which past outcomes would have been predicted best; the first one to begin with.
        score_memory (`float`, *optional*, defaults to `0.99`):
            What a generation's outcomes still count in that comparison one generation later.

    Of the order:

    Args:
        exploration (`float`, *optional*, defaults to `0.5`):
            Share of each generation that comes from the shuffled pool, whatever is believed. `1`: all of it.
        candidates (`int`, *optional*, defaults to `8`):
            Prompts that compete for each of the other places; the pool passes by in a seeded order, this many at a
            time. `1`: no choice.
        headroom (`float`, *optional*, defaults to `1.0`):
            What a prompt of success rate p is worth: p(1 - p) (1 - p)^headroom, see [`worth_of`]. `0`: its
            learnability.
        cool_down (`int`, *optional*, defaults to `8`):
            Generations that a prompt does not compete in after it was rolled out. Of a small pool, at most half rests.

    Raises:
        `ValueError`: At construction, naming the value and the remedy.
    """

    dimensions: int = 64
    spread: float = 4.0
    drift: float = 0.05
    memory: float = 0.97
    own_memory: float = 0.99
    concentration: tuple[float, ...] = (4.0, 1.0, 2.0, 8.0, 16.0, 32.0)
    score_memory: float = 0.99
    exploration: float = 0.5
    candidates: int = 8
    headroom: float = 1.0
    cool_down: int = 8

    def __post_init__(self) -> None:
        smallest = {"dimensions": 1, "candidates": 1, "cool_down": 0}
        for name, least in smallest.items():
            self._check(name, isinstance(getattr(self, name), int), "a whole number")
            self._check(name, getattr(self, name) >= least, f"a number of at least {least}")
        self._check("spread", 0 < self.spread < math.inf, "a number above 0")
        for name in ("drift", "headroom"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        for name in ("memory", "own_memory", "score_memory"):
            self._check(name, 0 < getattr(self, name) <= 1, "a number above 0 and at most 1")
        self._check("exploration", 0 <= self.exploration <= 1, "a share from 0 to 1")
        values = self.concentration
        positive = all(0 < value < math.inf for value in values)
        self._check("concentration", bool(values) and positive, "one or several numbers above 0")
        self._check(
            "concentration", len(set(values)) == len(values), "numbers that differ from each other"
        )

    @staticmethod
    def of(config: Adaptive) -> AdaptiveSettings:
        """From the settings of a run, whose names begin with `adaptive_`."""
        return AdaptiveSettings(
            dimensions=config.adaptive_feature_dim,
            spread=config.adaptive_prior_std,
            drift=config.adaptive_drift_std,
            memory=config.adaptive_decay,
            own_memory=config.adaptive_prompt_decay,
            concentration=tuple(config.adaptive_concentration),
            score_memory=config.adaptive_concentration_decay,
            cool_down=config.adaptive_cool_down,
            candidates=config.adaptive_candidates_per_slot,
            headroom=config.adaptive_gain_exponent,
            exploration=config.adaptive_exploration,
        )

    def _check(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r}: give {remedy}.")
