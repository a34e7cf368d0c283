"""The sampler: the prompts of a virtual epoch → indices for TRL's dataloader."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from trl_learnalign.curriculum import Plan


class CurriculumSampler(Sampler[int]):
    """Yields one virtual epoch of prompt indices, in the layout TRL's generation batches expect.

    Each generation lists its prompts, every prompt `G` times in a row, and the whole list once for each micro-step
    it feeds (TRL's `RepeatSampler` layout). The length never changes, since transformers reads it only once.

    Args:
        plan (`Plan`): The run's plan.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.prompts: np.ndarray | None = None

    def begin_epoch(self, prompts: np.ndarray) -> None:
        """Set what the next iteration yields.

        Args:
            prompts (`np.ndarray`): Rows of the dataset, one generation after the other, `(P,)`.
        """
        self.prompts = np.asarray(prompts, dtype=np.int64)

    def __iter__(self) -> Iterator[int]:
        if self.prompts is None:
            raise RuntimeError(
                "CurriculumSampler has no prompts yet: it is driven by LearnAlignCallback, add that to the trainer."
            )
        geometry = self.plan.geometry
        for generation in self.prompts.reshape(-1, geometry.prompts_per_generation):
            repeated = np.repeat(generation, geometry.rollouts).tolist()
            for _ in range(geometry.micro_steps_per_generation):
                yield from repeated

    def __len__(self) -> int:
        geometry = self.plan.geometry
        per_generation = (
            geometry.prompts_per_generation
            * geometry.rollouts
            * geometry.micro_steps_per_generation
        )
        return self.plan.epoch_generations * per_generation
