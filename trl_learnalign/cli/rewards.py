"""Reward functions that the arguments name: the recipes' own, or a user's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from trl.rewards import think_format_reward

from trl_learnalign.data.answers import accuracy_reward

Reward = Callable[..., Sequence[float | None]]

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
    return [NAMED[name] if name in NAMED else _at(name) for name in names]


def _at(path: str) -> Reward:
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"reward_funcs={path!r}: choose one of {', '.join(map(repr, NAMED))}, or name a function of your own in "
            "TRL's form, (completions, **columns) -> rewards, as 'package.module:function'."
        )
    if os.getcwd() not in sys.path:  # a script's path begins with its own folder
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward_funcs={path!r}: {module_name} cannot be imported ({error}). It must be installed, on PYTHONPATH "
            "or in the current folder."
        ) from error
    function = vars(module).get(name)
    if function is None:
        raise ValueError(f"reward_funcs={path!r}: {module_name} has no {name!r}.")
    if not callable(function):
        raise TypeError(f"reward_funcs={path!r} is a {type(function).__name__}: name a function.")
    return function


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
