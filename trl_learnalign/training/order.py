"""Which prompts the virtual epoch under way trains on, generation by generation."""

from __future__ import annotations

import math

import numpy as np

from trl_learnalign import curriculum, hashing
from trl_learnalign.curriculum import STAGE, Phase
from trl_learnalign.records.run import RunRecord
from trl_learnalign.training.beliefs import BeliefKeeper, scored_outcomes
from trl_learnalign.training.run_state import RunState
from trl_learnalign.training.setup import RunSetup


class EpochOrder:
    """Prompts of virtual epochs; all ranks ask together and are told the same.

    Args:
        setup (`RunSetup`): What the run is made of.
        run (`RunState`): Where it stands.
    """

    def __init__(self, setup: RunSetup, run: RunState):
        self.config, self.ranks = setup.config, setup.ranks
        self.run = run
        self.geometry = setup.plan.geometry
        self.beliefs: BeliefKeeper | None = None
        """On the main rank of a run with adaptive order."""
        self._first_micro_step = 0
        self._prompts = self._more = np.empty((0, 0), dtype=np.int64)

    def is_adaptive(self, phase: Phase) -> bool:
        """Whether a phase is trained on in the order of what is believed."""
        if phase.kind != STAGE:
            return False
        return self.config.order_of(self.run.plan.stages.index(phase)) == "adaptive"

    def begin_epoch(self, phase: Phase, step: int) -> np.ndarray:
        """A virtual epoch begins.

        Args:
            phase (`Phase`): The phase that it belongs to.
            step (`int`): Its first optimizer step.

        Returns:
            `np.ndarray`: Its prompts, one generation after the other, `(P,)`.
        """
        generations, size = self.run.plan.epoch_generations, self.geometry.prompts_per_generation
        self._first_micro_step = step * self.geometry.accumulation
        if self.is_adaptive(phase):
            prompts, more = self._believed(phase, step, generations)
        else:
            prompts, more = self._shuffled(phase, step, generations)
        self._prompts = prompts.reshape(generations, size)
        self._more = more.reshape(generations, -1)
        return prompts

    def _believed(self, phase: Phase, step: int, generations: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = None
        if self.beliefs is not None:
            pool, size = self.run.pool_of(phase), self.geometry.prompts_per_generation
            wanted = generations * math.ceil(self.config.oversample * size)
            best = self.beliefs.draw(pool, phase.name, step, wanted)
            more = best[generations * size :].reshape(generations, -1)
            if self.config.samples_dynamically:
                # Further batches, and what makes a batch even among processes.
                batches = generations * self.config.max_generation_batches * size
                others = self.beliefs.draw(pool, f"{phase.name}, more", step, batches)
                others = others[~np.isin(others, best)] if len(pool) > len(best) else others
                others = np.resize(others if len(others) else best, batches)
                more = np.concatenate([more, others.reshape(generations, -1)], axis=1)
            drawn = best[: generations * size], more
        return self.ranks.from_main(drawn)

    def _shuffled(self, phase: Phase, step: int, generations: int) -> tuple[np.ndarray, np.ndarray]:
        seed, pool = self.config.selection_seed, self.run.pool_of(phase)
        start = self.run.plan.prompts_before(phase, step)
        count = generations * self.geometry.prompts_per_generation
        prompts = curriculum.training_order(seed, phase.name, pool, start, count)
        # What dynamic sampling asks for besides comes in an order of its own: that of the pool does not depend on it.
        stream = hashing.key(seed, "more prompts", phase.name, step)
        more = hashing.permutation(
            stream, np.setdiff1d(pool, prompts) if len(pool) > count else pool
        )
        spare = (self.config.max_generation_batches + math.ceil(self.config.oversample)) * len(
            prompts
        )
        return prompts, np.resize(more, spare)

    def learn_from_scores(self, record: RunRecord, phase: Phase) -> None:
        """A stage begins: what it has scored is learned from before its first prompts are drawn."""
        if self.beliefs is not None:
            for scored in scored_outcomes(record, [phase], self.geometry.rollouts):
                self.beliefs.add_scored(scored)

    def rows_at(self, micro_step: int) -> np.ndarray:
        """Prompts of the generation that a micro-step of this epoch begins with, `(P,)`."""
        return self._prompts[self._generation(micro_step)]

    def more_rows(self, micro_step: int, start: int, count: int) -> np.ndarray:
        """Prompts besides, for dynamic sampling: number `start` to `start + count` of that generation."""
        return self._more[self._generation(micro_step), start : start + count]

    def _generation(self, micro_step: int) -> int:
        return (micro_step - self._first_micro_step) // self.geometry.micro_steps_per_generation
