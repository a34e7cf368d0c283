"""When a stage ends before its steps are done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from trl_learnalign.config.base import Settings, setting
from trl_learnalign.config.checks import number, shown, whole


def smoothing(name: str, value: Any) -> float:
    """Weight of the past in a running mean."""
    weight = number(name, value)
    if not 0 <= weight < 1:
        raise ValueError(f"{name}={shown(value)}: choose a value from 0 up to, not including, 1.")
    return weight


@dataclass
class Plateau(Settings):
    """Plateau: stages that end early."""

    plateau_patience: Annotated[int, whole(0)] = setting(
        0,
        "End a stage early after this many steps without improvement of the smoothed reward. 0: never.",
    )
    plateau_min_delta: float = setting(
        0.005, "Rise of the smoothed reward that counts as improvement."
    )
    plateau_smoothing: Annotated[float, smoothing] = setting(
        0.9, "Weight of the past in the smoothed reward, from 0 up to but not including 1."
    )
