"""The first rollouts of a run: can the threshold of success be met at all, and would smaller groups teach more?"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from trl_learnalign.adaptive.group_size import group_sizes
from trl_learnalign.success import CutOff, SuccessRule

logger = logging.getLogger(__name__)

ROLLOUTS = 128
"""So many are looked at: enough that a reward of some right and some wrong rollouts has shown both."""

GROUPS = 64
"""Groups that are looked at: the standard error of a share is at most 6 %."""


class FirstLook:
    """Warns once if all of the first rollouts count as right, or none does.

    An order by belief would go on for the whole run with nothing to tell prompts apart by. Runs that score their
    candidates are warned there.

    Args:
        success (`SuccessRule`): Which rollouts are right.
        wanted (`bool`): Whether anybody is to be warned.
        limit (`int`): `max_completion_length`.
    """

    def __init__(self, success: SuccessRule, wanted: bool, limit: int):
        self.success, self.limit = success, limit
        self._cut_off = 0.0
        self._rewards: list[Tensor] = []
        self._left = ROLLOUTS if wanted else 0

    def add(self, rewards: Tensor, cut_share: float) -> None:
        """Rollouts of a generation have been judged.

        Args:
            rewards (`torch.Tensor`): Of the function that decides, of any shape; NaN where it could not judge.
            cut_share (`float`): How many of them were cut off, from 0 to 1.
        """
        if self._left <= 0:
            return
        self._rewards.append(rewards.detach().flatten().cpu())
        self._left -= rewards.numel()
        self._cut_off += cut_share * rewards.numel()
        if self._left > 0:
            return
        seen = torch.cat(self._rewards)
        self._rewards.clear()
        cut_off = CutOff(self._cut_off / len(seen), self.limit)
        problem = self.success.problem_of(seen, cut_off)
        if problem is not None:
            logger.warning("The first %d rollouts of training: %s", len(seen), problem)


class GroupLook:
    """Says once what the number of rollouts does to the share of mixed groups, and whether fewer would pay.

    Args:
        wanted (`bool`): Whether anybody is to be told.
    """

    def __init__(self, wanted: bool):
        self._wanted = wanted
        self._successes: list[Tensor] = []

    def leave(self) -> None:
        """Say nothing: a run that goes on may have learned to draw more mixed groups than the pool has."""
        self._wanted = False

    def add(self, successes: Tensor) -> None:
        """Rollouts of a generation have been judged.

        Args:
            successes (`torch.Tensor`): 1, 0 or NaN, `(P, G)` for P prompts.
        """
        if not self._wanted:
            return
        self._successes.append(successes.detach().cpu())
        if sum(map(len, self._successes)) < GROUPS:
            return
        self._wanted = False
        seen = torch.cat(self._successes)
        self._successes.clear()
        right, wrong = ((seen == outcome).sum(dim=1).numpy() for outcome in (1, 0))
        sizes = group_sizes(right, wrong, own=seen.shape[1])
        for line in () if sizes is None else sizes.lines:
            logger.info("%s", line)
