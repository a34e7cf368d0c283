"""The constants of continual selection, each of them a setting, checked where it is declared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AdaptiveSettings:
    """Settings of the belief and of the order that follows from it.

    The defaults were chosen on development tasks (`docs/results/continual_tuning.json`).

    Args:
        neighbour_count (`int`, *optional*, defaults to `64`):
            Prompts whose outcomes count for a prompt as well: those with the most similar embeddings. `0`: none.
        kernel_power (`float`, *optional*, defaults to `4.0`):
            A neighbour's weight is its cosine to this power (negative cosines have no weight).
        sharing (`tuple` of `float`, *optional*):
            What an outcome of a neighbour of weight 1 counts, in outcomes of the prompt itself, from 0 to 1. Of
            several values, the one is used by which past outcomes would have been predicted best.
        memory (`tuple` of `float`, *optional*):
            What an outcome of the last generation still counts one generation later, above 0 and at most 1: success
            rates move while the policy learns. Of several values the best predictor is used, as for `sharing`.
        score_memory (`float`, *optional*, defaults to `0.99`):
            The same for the score by which values of `sharing` and `memory` are compared.
        prior (`float`, *optional*, defaults to `0.5`):
            Right and wrong outcomes, as many of each, that are assumed of a prompt before anything is known of it.
        cool_down (`int`, *optional*, defaults to `8`):
            Generations that a prompt rests after it was rolled out. Pools too small for it use the longest rested.
        candidates (`int`, *optional*, defaults to `16`):
            Prompts that compete for each place of a generation; the pool passes by in a seeded order, this many at a
            time. `1`: the plain shuffled order, whatever is believed.
        sharpness (`float`, *optional*, defaults to `math.inf`):
            Candidates win in proportion to their sampled learnability to this power; infinite: the largest ones.
        exploration (`float`, *optional*, defaults to `0.0`):
            Share of each generation that is taken as it comes in the seeded order, without competition.
        first_exploration (`float`, *optional*, defaults to `0.0`):
            That share in the first generation, from where it falls evenly to `exploration`.
        exploration_generations (`int`, *optional*, defaults to `0`):
            Generations in which it falls.

    Raises:
        `ValueError`: At construction, naming the value and the remedy.
    """

    neighbour_count: int = 64
    kernel_power: float = 4.0
    sharing: tuple[float, ...] = (0.125,)
    memory: tuple[float, ...] = (0.97,)
    score_memory: float = 0.99
    prior: float = 0.5
    cool_down: int = 8
    candidates: int = 16
    sharpness: float = math.inf
    exploration: float = 0.0
    first_exploration: float = 0.0
    exploration_generations: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("neighbour_count", 0),
            ("cool_down", 0),
            ("exploration_generations", 0),
            ("candidates", 1),
        ):
            self._check(name, isinstance(getattr(self, name), int), "a whole number")
            self._check(name, getattr(self, name) >= least, f"a number of at least {least}")
        for name in ("kernel_power", "prior"):
            value = getattr(self, name)
            self._check(name, 0 < value < math.inf, "a number above 0")
        self._check("sharpness", self.sharpness > 0, "a number above 0, or math.inf")
        for name in ("exploration", "first_exploration"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        self._check("score_memory", 0 < self.score_memory <= 1, "a number above 0 and at most 1")
        self._check_grid("sharing", all(0 <= value <= 1 for value in self.sharing), "from 0 to 1")
        self._check_grid("memory", all(0 < value <= 1 for value in self.memory), "above 0 and at most 1")

    def _check_grid(self, name: str, within: bool, bounds: str) -> None:
        values = getattr(self, name)
        self._check(name, bool(values) and within, f"one or several numbers {bounds}")
        self._check(name, len(set(values)) == len(values), "numbers that differ from each other")

    def _check(self, name: str, holds: Any, remedy: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r}: give {remedy}.")
