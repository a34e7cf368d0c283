"""The sampler: the current pool → indices for TRL's dataloader."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from trl_learnalign.curriculum import Phase, Plan, training_order


class CurriculumSampler(Sampler[int]):
    """Yields one virtual epoch of prompt indices, in the layout TRL's generation batches expect.

    Each generation lists its prompts, every prompt `G` times in a row, and the whole list once for each micro-step
    it feeds (TRL's `RepeatSampler` layout). What is yielded is a pure function of the plan, the seed, the pool and
    the step at which the epoch begins; the length never changes, since transformers reads it only once.

    Args:
        plan (`Plan`): The run's plan.
        seed (`int`): `LearnAlignConfig.selection_seed`.
    """

    def __init__(self, plan: Plan, seed: int):
        self.plan = plan
        self.seed = seed
        self.phase: Phase | None = None
        self.pool = np.empty(0, dtype=np.int64)
        self.epoch_start = 0

    def begin_epoch(self, plan: Plan, phase: Phase, pool: np.ndarray, step: int) -> None:
        """Set what the next iteration yields.

        Args:
            plan (`Plan`): The plan as it stands (a stage may have ended early).
            phase (`Phase`): The phase that the epoch belongs to.
            pool (`np.ndarray`): Its prompts, `int64` of shape `(N,)`.
            step (`int`): The optimizer step at which the epoch begins.
        """
        self.plan, self.phase, self.pool, self.epoch_start = (
            plan,
            phase,
            np.asarray(pool, dtype=np.int64),
            step,
        )

    def prompts(self) -> np.ndarray:
        """Prompts of the epoch, without repetitions for rollouts and micro-steps."""
        if self.phase is None:
            raise RuntimeError(
                "CurriculumSampler has no pool yet: it is driven by LearnAlignCallback, add that to the trainer."
            )
        start = self.plan.prompts_before(self.phase, self.epoch_start)
        count = self.plan.epoch_generations * self.plan.geometry.prompts_per_generation
        return training_order(self.seed, self.phase.name, self.pool, start, count)

    def __iter__(self) -> Iterator[int]:
        geometry = self.plan.geometry
        for generation in self.prompts().reshape(-1, geometry.prompts_per_generation):
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
