"""What tells a right rollout from a wrong one."""

from __future__ import annotations

from dataclasses import dataclass

from trl_learnalign.config.base import Settings, setting


@dataclass
class Success(Settings):
    """Success: which rollouts are right."""

    success_reward: str | None = setting(
        None,
        "Name of the reward function that says whether a rollout is right. Default: the only one, or the one "
        "whose name contains 'accuracy'. Other rewards never enter the success rate.",
    )
    success_threshold: float = setting(
        0.5, "A rollout succeeds if its success reward is above this value."
    )
