"""The sampler: the prompts of a virtual epoch → indices for TRL's dataloader."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from trl_learnalign.curriculum import Plan


class CurriculumSampler(Sampler[int]):
    """Yields one virtual epoch of prompt indices, in the layout TRL's generation batches expect.

    Each micro-step lists the prompts of its generation, every prompt `G` times in a row (TRL's `RepeatSampler`
    layout). The length never changes, since transformers reads it only once.

    Args:
        plan (`Plan`): The run's plan.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.prompts: np.ndarray | None = None
        self._skipped = 0

    def begin_epoch(self, prompts: np.ndarray, skipped: int = 0) -> None:
        """Set what the next iteration yields.

        Args:
            prompts (`np.ndarray`): Rows of the dataset, one generation after the other, `(P,)`.
            skipped (`int`, *optional*, defaults to 0): Micro-steps of the first generations that an epoch before this
                one has made already.
        """
        self.prompts = np.asarray(prompts, dtype=np.int64)
        self._skipped = skipped

    @property
    def _micro_steps(self) -> int:
        return self.plan.epoch_steps * self.plan.geometry.accumulation

    def __iter__(self) -> Iterator[int]:
        if self.prompts is None:
            raise RuntimeError(
                "CurriculumSampler has no prompts yet: it is driven by LearnAlignCallback, add that to the trainer."
            )
        geometry = self.plan.geometry
        generations = self.prompts.reshape(-1, geometry.prompts_per_generation)
        for micro_step in range(self._skipped, self._skipped + self._micro_steps):
            generation = generations[micro_step // geometry.micro_steps_per_generation]
            yield from np.repeat(generation, geometry.rollouts).tolist()

    def __len__(self) -> int:
        geometry = self.plan.geometry
        return self._micro_steps * geometry.prompts_per_generation * geometry.rollouts
