"""Reward functions that the arguments name: the recipes' own, or a user's."""

from __future__ import annotations

from collections.abc import Sequence

from trl.rewards import think_format_reward

from trl_learnalign.data.answers import accuracy_reward
from trl_learnalign.evaluation.grading import Reward, load_reward

NAMED: dict[str, Reward] = {
    "accuracy_reward": accuracy_reward,
    "think_format_reward": think_format_reward,
}
"""Those of the recipes."""


def find_rewards(names: Sequence[str]) -> list[Reward]:
    """Reward functions by name or by place.

    Args:
        names (sequence of `str`): Each in [`NAMED`], or `"package.module:function"`, also in the current folder.

    Raises:
        `ValueError`: Naming what is not known, cannot be imported, or is not there.
        `TypeError`: If it is no function.
    """
    found = []
    for name in names:
        if name not in NAMED and ":" not in name:
            raise ValueError(
                f"reward_funcs={name!r}: choose one of {', '.join(map(repr, NAMED))}, or name a function of your own "
                "in TRL's form, (completions, **columns) -> rewards, as 'package.module:function'."
            )
        found.append(NAMED[name] if name in NAMED else load_reward(name, "reward_funcs"))
    return found


def check_weights(weights: Sequence[float] | None, rewards: Sequence[Reward]) -> None:
    """Check `reward_weights` of the trainer against the rewards, before a model is loaded.

    Raises:
        `ValueError`: If there are not as many weights as rewards.
    """
    if weights is not None and len(weights) != len(rewards):
        names = [getattr(reward, "__name__", type(reward).__name__) for reward in rewards]
        raise ValueError(
            f"reward_weights={list(weights)} for {len(rewards)} reward function(s) ({', '.join(names)}): give one "
            "weight for each, e.g. --reward_weights " + " ".join(["1"] * len(rewards)) + "."
        )
