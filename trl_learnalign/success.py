"""The success rule: a rollout is right if one reward function is above a threshold.

Success is binary and uses the accuracy reward alone (Li et al., 2026, Definition 4.2). With the weighted sum of
rewards, a format reward would leak into the success rate. If the range of a graded reward is known, the outcome of a
rollout is a fraction instead: the reward's place in the range, from 0 to 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trl_learnalign.config import LearnAlignConfig

logger = logging.getLogger(__name__)

LEVELS = 2**16
"""Fractions are multiples of 1 over this number. So their sums and those of their squares are exact in float64, for up
to a thousand rollouts, in any order."""

FEW = 0.1
"""Share of the rollouts on one side of the threshold below which they may be noise."""

EXPLAINED = 0.5
"""Share of the rewards' variance between right and wrong below which a threshold hides most of their information."""


@dataclass(frozen=True)
class CutOff:
    """Truncated completions.

    Args:
        share (`float`): Share of all completions, from 0 to 1.
        limit (`int`): `max_completion_length`, at which they were truncated.
    """

    share: float
    limit: int

    @property
    def cause(self) -> str | None:
        """The reason why none of them is right, as a sentence's end; `None` if most were not truncated."""
        if self.share < 0.5:
            return None
        return (
            f"{self.share:.0%} of them were cut off at max_completion_length={self.limit}, probably before the "
            "answer. Raise it, or ask for shorter answers."
        )


@dataclass(frozen=True)
class SuccessRule:
    """Decides which rollouts are right.

    Args:
        index (`int`): Number of the deciding reward function.
        name (`str`): Its name.
        threshold (`float`): A rollout succeeds above this value.
        bounds (`tuple[float, float]`, *optional*): Range of a graded reward; outcomes are then fractions of it.
    """

    index: int
    name: str
    threshold: float
    bounds: tuple[float, float] | None = None
    _outside: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    @staticmethod
    def of(config: LearnAlignConfig, names: Sequence[str]) -> SuccessRule:
        """Return the rule of a run.

        Args:
            config (`LearnAlignConfig`): Settings, with `success_reward`, `success_threshold` and `success_range`.
            names (sequence of `str`): The trainer's reward functions.

        Raises:
            `ValueError`: If the name is unknown, or none is given and the choice is ambiguous.
        """
        index = success_index(config, names)
        rule = SuccessRule(index, names[index], config.success_threshold)
        if config.success_range is None:
            return rule
        low, high = config.success_range
        return replace(rule, bounds=(low, high))

    @property
    def width(self) -> float:
        """Difference in reward between the outcomes 0 and 1: that of the range; 1 for right and wrong."""
        return 1.0 if self.bounds is None else self.bounds[1] - self.bounds[0]

    @property
    def identity(self) -> list[str | float]:
        """Everything that decides outcomes, for fingerprints."""
        return [self.name, *(self.bounds or [self.threshold])]

    @property
    def sentence(self) -> str:
        """The rule in words, as the first half of a sentence."""
        if self.bounds is None:
            return f"a rollout is right if {self.name} is above {self.threshold:g}"
        low, high = self.bounds
        return f"outcomes are {self.name} as a fraction of its range from {low:g} to {high:g}"

    def successes(self, rewards: Tensor) -> Tensor:
        """Return 1 above the threshold, 0 below or at it, and NaN if a rollout cannot be judged; or fractions.

        Args:
            rewards (`torch.Tensor`): Rewards of all functions, `(…, F)`; NaN where one returned `None`.

        Returns:
            `torch.Tensor`: `(…)` float64.
        """
        return self.of_its_rewards(rewards[..., self.index])

    def of_its_rewards(self, rewards: Tensor) -> Tensor:
        """Return [`successes`] from the rewards of the deciding function alone, `(…)`."""
        values = rewards.double()
        outcomes = (
            (values > self.threshold).double() if self.bounds is None else self._fraction(values)
        )
        # A reward that is not finite does not decide right or wrong, whatever the sum of rewards does with it.
        return torch.where(torch.isfinite(values), outcomes, torch.nan)

    def _fraction(self, values: Tensor) -> Tensor:
        """Return the place of rewards in their range, 0 to 1, a multiple of 1 / `LEVELS`."""
        assert self.bounds is not None
        low, high = self.bounds
        margin = (high - low) / LEVELS  # TRL keeps rewards in single precision
        is_outside = (values < low - margin) | (values > high + margin)
        outside = values[torch.isfinite(values) & is_outside]
        if len(outside) and not self._outside:
            self._outside.append(float(outside[0]))
            logger.warning(
                "%s returned %g, which is outside of success_range=[%g, %g]: such rewards count as its nearest end. "
                "Set success_range to the range that the reward has.",
                self.name,
                self._outside[0],
                low,
                high,
            )
        fractions = ((values - low) / (high - low)).clamp(0, 1)
        return (fractions * LEVELS).round() / LEVELS

    def problem(self, rewards: Tensor, cut_off: CutOff | None = None) -> str | None:
        """Return why (nearly) all, or none, of the rollouts count as right, with the remedy.

        Args:
            rewards (`torch.Tensor`): Rewards of all functions, `(…, F)`; NaN where one returned `None`.
            cut_off (`CutOff`, *optional*): The truncated ones among the rollouts.
        """
        return self.problem_of(rewards[..., self.index], cut_off)

    def problem_of(self, values: Tensor, cut_off: CutOff | None = None) -> str | None:
        """Return [`problem`] from the rewards of the deciding function alone.

        If the reward is graded, nearly none or nearly all count as none or all. The reward's differences among the
        many rollouts on one side of the threshold are lost, and the few on the other side are noise.
        """
        values = values[torch.isfinite(values)].double()  # the judged ones
        if not len(values):
            return None
        low, high = float(values.min()), float(values.max())
        if low == high:
            return self._one_for_all(len(values), low, cut_off)
        if self.bounds is not None:
            return None
        right = values > self.threshold
        share = float(right.double().mean())
        if FEW <= share <= 1 - FEW or _explained(values, right) >= EXPLAINED:
            return None
        is_low = share < FEW
        counted = int(right.sum()) if is_low else int((~right).sum())
        few, none = ("only {}", "no rollout") if is_low else ("all but {}", "every rollout")
        outcome = f"{few.format(counted)} of {len(values):,} rollouts succeeded"
        if not counted:
            outcome = f"{none} of {len(values):,} succeeded"
        hardly = "no prompt is learnable" if not counted else "hardly any prompt is learnable"
        extreme = f"largest was {high:g}" if is_low else f"smallest was {low:g}"
        change = "lower" if is_low else "raise"
        return (
            f"{outcome}, so {hardly}. Correct means {self._rule}; the {extreme}. The rewards range from {low:g} to "
            f"{high:g} (median {float(values.median()):g}), and selection and order only use whether they exceed "
            f"the threshold: {change} success_threshold, give the range of the reward with success_range, or name "
            "another reward with success_reward."
        )

    @property
    def _rule(self) -> str:
        if self.bounds is not None:
            return f"{self.name} in success_range=[{self.bounds[0]:g}, {self.bounds[1]:g}]"
        return f"{self.name} above success_threshold={self.threshold:g}"

    def _one_for_all(self, count: int, reward: float, cut_off: CutOff | None) -> str:
        least = self.threshold if self.bounds is None else self.bounds[0]
        known = None if cut_off is None or reward > least else cut_off.cause
        cause = known or (
            "Are the prompts too easy or too hard, or does the reward not recognise the answers as the model "
            "writes them?"
        )
        return (
            f"all {count:,} graded rollouts earned {self.name} {reward:g}, so no prompt is learnable. {cause} "
            f"(Correct means {self._rule}.)"
        )


def _explained(values: Tensor, right: Tensor) -> float:
    """Return the share, 0 to 1, of the variance of finite, unequal rewards that is between right and wrong ones."""
    share = right.double().mean()
    if not 0 < share < 1:
        return 0.0
    distance = values[right].mean() - values[~right].mean()
    return float(share * (1 - share) * distance.square() / values.var(correction=0))


def success_index(config: LearnAlignConfig, names: Sequence[str]) -> int:
    """Return the number of the deciding reward function; arguments and errors as in [`SuccessRule.of`]."""
    if config.success_reward is not None:
        if config.success_reward not in names:
            raise ValueError(
                f"success_reward={config.success_reward!r} is not a reward function of the trainer; name one of "
                f"them: {', '.join(map(repr, names))}."
            )
        return _only(list(names), config.success_reward)
    accuracy = [i for i, name in enumerate(names) if "accuracy" in name]
    candidates = accuracy if len(names) > 1 else [0]
    if len(candidates) != 1:
        raise ValueError(
            f"Which of the reward functions {', '.join(map(repr, names))} decides whether a rollout is correct? "
            "Name it with success_reward; the others do not enter the success rate."
        )
    return _only(list(names), names[candidates[0]])


def _only(names: list[str], name: str) -> int:
    """Return the index of the only function of a name, since the trainer keeps and logs rewards by name."""
    if names.count(name) > 1:
        raise ValueError(
            f"{names.count(name)} of the reward functions have the name {name!r}, so their rewards cannot be "
            "distinguished, not even in the trainer's log. Rename the one that decides whether a rollout is "
            "correct (def accuracy(**columns): return yours(**columns)) and name it with success_reward."
        )
    return names.index(name)
