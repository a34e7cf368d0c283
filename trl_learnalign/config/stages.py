"""How many prompts are trained on, in which phases, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from trl_learnalign.config.base import Settings, setting
from trl_learnalign.config.checks import as_list, each, number, shown, whole


def shares(name: str, value: Any) -> list[Any]:
    """Sizes of stages: all fractions (up to 1, as floats) or all counts (from 2, as whole numbers)."""
    sizes = as_list(value)
    if not sizes:
        raise ValueError(
            f"{name}={shown(value)} is empty: give at least one fraction or count, e.g. {name}=[1000]."
        )
    for size in sizes:
        try:
            is_positive = number(name, size) > 0
        except ValueError:
            is_positive = False
        if not is_positive:
            raise ValueError(
                f"{name}={shown(sizes)}: {shown(size)} is not a positive number. Give fractions of the pool, e.g. "
                "0.5, or counts, e.g. 1000."
            )
    fractions = [size <= 1 for size in sizes]
    if all(fractions):
        return [float(size) for size in sizes]
    if any(fractions):
        raise ValueError(
            f"{name}={shown(sizes)} mixes fractions (up to 1) and counts (from 2): give all as one or the other."
        )
    return each(whole(2))(name, sizes)


@dataclass
class Stages(Settings):
    """Warm-up and stages."""

    warmup_samples: Annotated[int, whole(0)] = setting(
        0,
        "Prompts of the warm-up: a seeded random subset that is trained on before the first scoring. 0: none. "
        "Paper: 300 for GSM8K and MATH, 1000 for DAPO-MATH-17K; none before its staged RL.",
    )
    warmup_epochs: Annotated[int, whole(1)] = setting(1, "Passes over the warm-up prompts.")
    stages: Annotated[list[float], shares] = setting(
        [1.0],
        "Prompts of each stage: fractions of the pool (values up to 1), or counts (whole numbers from 2). 1: the "
        "whole pool in one stage, so that nothing is scored or left out. One count, e.g. 1000, is the paper's main "
        "setting; 0.5 0.3 0.2 its staged RL.",
    )
    stage_epochs: Annotated[list[int] | None, each(whole(1))] = setting(
        None,
        "Passes over each stage's prompts: one number for all stages, or one for each. Default: 1; where the whole "
        "pool is one stage without a warm-up, as long as the trainer's own max_steps or num_train_epochs say.",
    )
    stage_steps: Annotated[list[int] | None, each(whole(0))] = setting(
        None,
        "Optimizer steps of each stage instead of passes, so that any number of prompts is trained on equally "
        "long: one number for all stages, or one for each; 0 counts stage_epochs. With plateau_patience it is the "
        "most that a stage takes.",
    )
    after_warmup: Literal["continue", "restart"] = setting(
        "continue",
        "'continue': the stages start from the warmed-up policy. 'restart': after scoring, weights, optimizer and "
        "learning-rate schedule go back to their initial state, so that N samples means N.",
    )
    reselect: Literal["remaining", "all"] = setting(
        "remaining",
        "'remaining': a stage chooses among the prompts that no earlier stage chose (as the paper), and averages "
        "scores over these. 'all': each stage chooses from, and averages over, the whole pool.",
    )
    on_shortfall: Literal["fill", "shrink"] = setting(
        "fill",
        "When fewer prompts than wanted have learnability above 0: 'fill' the stage with prompts of learnability 0, "
        "in seeded order, or 'shrink' it to the others. Either is said in the log and the record.",
    )
    zero_learnability: Literal["last", "by_score"] = setting(
        "last",
        "Where prompts of learnability 0 (p = 0 or 1) rank, whose rewards teach nothing and whose score is 0. "
        "'last': behind every learnable prompt. 'by_score': the letter of Eq. 9, ahead of learnable prompts of "
        "negative score (a negative mean cosine with the pool).",
    )
    skip_forced_scoring: bool = setting(
        True,
        "Do not score a stage that takes every prompt that earlier ones have left (the last of 50/30/20): its scores "
        "would choose nothing. False, as the paper: it is scored all the same, for its table. A stage of the whole "
        "pool is never scored, and one that on_shortfall='shrink' may leave prompts out of always is.",
    )

    @property
    def stages_are_fractions(self) -> bool:
        """Whether `stages` are fractions of the pool rather than counts."""
        return self.stages[0] <= 1

    @property
    def is_whole_pool(self) -> bool:
        """Whether all prompts are one stage and nothing comes before it: only their order is left to choose."""
        return self.stages == [1.0] and self.warmup_samples == 0

    @property
    def has_trainers_length(self) -> bool:
        """Whether the trainer's `max_steps` or `num_train_epochs` say how long the run is."""
        return self.is_whole_pool and self.stage_epochs is None and self.stage_steps is None

    def _check_together(self) -> None:
        super()._check_together()
        self._check_sum()
        self._check_passes()
        self._check_steps()
        if self.after_warmup == "restart" and self.warmup_samples == 0:
            raise ValueError(
                "after_warmup='restart' with warmup_samples=0: there is no warm-up to restart from; "
                "set after_warmup='continue' or warmup_samples above 0."
            )

    def _check_sum(self) -> None:
        total = sum(self.stages)
        # Three tenths and seven tenths are not exactly one in floating point.
        if self.stages_are_fractions and self.reselect == "remaining" and total > 1 + 1e-9:
            raise ValueError(
                f"stages={self.stages} add up to {total:g} of the pool: with reselect='remaining' the "
                "fractions must add up to at most 1; lower them, or use reselect='all'."
            )

    def _check_passes(self) -> None:
        if self.stage_epochs is None:
            return
        if len(self.stage_epochs) not in (1, len(self.stages)):
            raise ValueError(
                f"stage_epochs={self.stage_epochs} for {len(self.stages)} stages: give one number, or one for each."
            )

    def _check_steps(self) -> None:
        steps = self.stage_steps
        if steps is None or not any(steps):
            self.stage_steps = None
            return
        if len(steps) not in (1, len(self.stages)) or not all(steps):
            raise ValueError(
                f"stage_steps={steps} for {len(self.stages)} stage(s): give one number above 0, or one for each; 0 "
                "alone counts stage_epochs instead."
            )
        if any(passes != 1 for passes in self.stage_epochs or [1]):
            raise ValueError(
                f"stage_epochs={self.stage_epochs} and stage_steps={steps} both say how long a stage is: set "
                "stage_steps=0 to count passes, or leave stage_epochs at 1."
            )
        if self.on_shortfall == "shrink":
            raise ValueError(
                f"stage_steps={steps} gives a stage its steps whatever the number of its prompts, and "
                "on_shortfall='shrink' takes steps away with the prompts: set on_shortfall='fill', or count "
                "stage_epochs."
            )
