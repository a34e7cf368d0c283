"""Groups of rollouts that are counted where nobody knows their prompts: in the trainer's own order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from trl_learnalign.training.states import check_keys


@dataclass
class Tally:
    """Counts over a phase; plain JSON values, for a checkpoint.

    Args:
        groups (`int`): Groups that were rolled out.
        useful (`int`): Those of them that have a gradient.
        mixed (`int`): Those with both right and wrong rollouts.
        trained (`int`): Groups that generations were made up of.
    """

    groups: int = 0
    useful: int = 0
    mixed: int = 0
    trained: int = 0

    def begin(self) -> None:
        """A phase begins."""
        self.load_state_dict(dict.fromkeys(asdict(self), 0))

    def add(self, useful: np.ndarray, successes: torch.Tensor, trained: int) -> None:
        """Count a generation.

        Args:
            useful (`np.ndarray`): Which groups have a gradient, `bool` `(P,)`.
            successes (`torch.Tensor`): `(P, G)` of 1, 0 and NaN where a rollout could not be judged.
            trained (`int`): How many of the groups are trained on.
        """
        is_mixed = (successes == 1).any(dim=1) & (successes == 0).any(dim=1)
        self.groups += len(successes)
        self.useful += int(useful.sum())
        self.mixed += int(is_mixed.sum())
        self.trained += trained

    def state_dict(self) -> dict[str, int]:
        """As plain JSON values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version.
        """
        check_keys("the tally", state, asdict(self))
        for name in asdict(self):
            setattr(self, name, state[name])
