"""When a stage has taught what it can: the reward, smoothed, has stopped rising."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.training.states import check_keys


class Plateau:
    """Watches the training reward of one stage.

    Args:
        config (`LearnAlignConfig`): With `plateau_patience`, `plateau_min_delta` and `plateau_smoothing`.
    """

    def __init__(self, config: LearnAlignConfig):
        self.patience = config.plateau_patience
        self.min_delta = config.plateau_min_delta
        self.smoothing = config.plateau_smoothing
        self.begin()

    def begin(self) -> None:
        """Forget the last stage."""
        self._sum = self._weight = 0.0
        self._best: float | None = None
        self._waited = 0

    def add(self, reward: float | None) -> bool:
        """Count a step.

        Args:
            reward (`float`, *optional*): Mean reward of the step, if there is a new one.

        Returns:
            `bool`: Whether `patience` steps have passed without a rise of `min_delta`.
        """
        if reward is not None:
            # An exponential mean without the pull towards 0 that starting at 0 would give.
            self._sum = self.smoothing * self._sum + (1 - self.smoothing) * reward
            self._weight = self.smoothing * self._weight + (1 - self.smoothing)
            smoothed = self._sum / self._weight
            if self._best is None or smoothed > self._best + self.min_delta:
                self._best, self._waited = smoothed, 0
                return False
        self._waited += 1
        return self._waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "sum": self._sum,
            "weight": self._weight,
            "best": self._best,
            "waited": self._waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version.
        """
        check_keys("the plateau", state, ("sum", "weight", "best", "waited"))
        self._sum, self._weight = state["sum"], state["weight"]
        self._best, self._waited = state["best"], state["waited"]
