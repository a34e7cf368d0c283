"""Which prompts the virtual epoch under way trains on, generation by generation."""

from __future__ import annotations

import math

import numpy as np

from trl_learnalign import curriculum, hashing
from trl_learnalign.curriculum import STAGE, Phase
from trl_learnalign.ranking.clusters import feature_grouping
from trl_learnalign.records.categories import write_categories
from trl_learnalign.records.run import RunRecord
from trl_learnalign.training.beliefs import BeliefKeeper, RunBeliefs, scored_outcomes
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
        self._setup = setup
        self.groupings = setup.groupings
        """Categories by which what was rolled out is told: columns, and on the main rank of such a run clusters."""
        self.beliefs: BeliefKeeper | None = None
        """On the main rank of a run with adaptive order."""
        self._drawn: tuple[str, int] | None = None
        self._first_micro_step = 0
        self._prompts = self._more = np.empty((0, 0), dtype=np.int64)

    def begin(self, beliefs: RunBeliefs, step: int) -> None:
        """A run begins, or goes on at an optimizer step: an adaptive order keeps its belief from now on."""
        self._drawn = None
        if self.config.is_adaptive and self.ranks.is_main:
            self.beliefs = beliefs.keeper(step)
            self._add_clusters(beliefs.features)

    def _add_clusters(self, features: np.ndarray) -> None:
        """What an adaptive order tells prompts apart by makes categories too."""
        seed = self.config.selection_seed
        clusters = feature_grouping(features, self._setup.trainer.train_dataset, seed)
        if clusters is not None:
            self.groupings = (*self._setup.groupings, clusters)
            write_categories(self._setup.folder, self.groupings)

    def is_adaptive(self, phase: Phase) -> bool:
        """Whether a phase is trained on in the order of what is believed."""
        if phase.kind != STAGE:
            return False
        return self.config.order_of(self.run.plan.stages.index(phase)) == "adaptive"

    def begin_epoch(self, phase: Phase, step: int) -> tuple[np.ndarray, int]:
        """A virtual epoch begins.

        Args:
            phase (`Phase`): The phase that it belongs to.
            step (`int`): Its first optimizer step.

        Returns:
            `tuple[np.ndarray, int]`: Prompts of the units that it lies in, one generation after the other, `(P,)`, and
            how many micro-steps these have made before it.
        """
        plan, geometry = self.run.plan, self.geometry
        start = plan.unit_start(phase, step)
        self._first_micro_step = start * geometry.accumulation
        units = math.ceil((step + plan.epoch_steps - start) / geometry.unit_steps)
        generations = units * geometry.unit_generations
        if self.is_adaptive(phase):
            # A pass may end inside a unit, and with it a virtual epoch: the unit's prompts are drawn once.
            if self._drawn != (phase.name, start):
                self._set(generations, *self._believed(generations, phase, start))
            self._drawn = phase.name, start
        else:
            self._set(generations, *self._shuffled(generations, phase, start))
        return self._prompts.ravel(), (step - start) * geometry.accumulation

    def _set(self, generations: int, prompts: np.ndarray, more: np.ndarray) -> None:
        self._prompts = prompts.reshape(generations, -1)
        self._more = more.reshape(generations, -1)

    def _believed(self, generations: int, phase: Phase, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts of a unit by what is believed, and those that may be asked for besides."""
        drawn, pool = None, self.run.pool_of(phase)
        count = generations * self.geometry.prompts_per_generation
        if self.beliefs is not None:
            size = math.ceil(self.config.oversample * self.geometry.prompts_per_generation)
            best = self.beliefs.draw(pool, phase.name, step, generations * size)
            more = best[count:]
            if self.config.samples_dynamically:
                more = self._with_batches(generations, more, best, phase, step)
            drawn = best[:count], more
        # Floating-point numbers differ between machines: what the main rank has drawn is what all train on.
        return self.ranks.from_main(drawn)

    def _with_batches(
        self, generations: int, more: np.ndarray, best: np.ndarray, phase: Phase, step: int
    ) -> np.ndarray:
        """Further batches besides oversampling, `(generations, M)`: of prompts that were not drawn yet."""
        assert self.beliefs is not None
        pool, prompts = self.run.pool_of(phase), generations * self.geometry.prompts_per_generation
        count = self.config.max_generation_batches * prompts
        drawn = self.beliefs.draw(pool, f"{phase.name}, more", step, count)
        is_new = ~np.isin(drawn, best)
        others = np.resize(drawn[is_new] if is_new.any() else drawn, count)
        parts = [rows.reshape(generations, -1) for rows in (more, others)]
        return np.concatenate(parts, axis=1)

    def _shuffled(self, generations: int, phase: Phase, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts of so many generations, pass after pass, and those that may be asked for besides."""
        seed, pool = self.config.selection_seed, self.run.pool_of(phase)
        count = generations * self.geometry.prompts_per_generation
        start = self.run.plan.prompts_before(phase, step)
        prompts = curriculum.training_order(seed, phase.name, pool, start, count)
        # What dynamic sampling asks for besides comes in an order of its own: the passes over the pool stay.
        others = np.setdiff1d(pool, prompts)
        stream = hashing.key(seed, "more prompts", phase.name, step)
        more = hashing.permutation(stream, others if len(others) else pool)
        batches = self.config.max_generation_batches + math.ceil(self.config.oversample)
        return prompts, np.resize(more, batches * count)

    def learn_from_scores(self, record: RunRecord, phase: Phase) -> None:
        """A stage begins: what it has scored is learned from before its first prompts are drawn."""
        if not self.config.keeps_belief or not self.ranks.is_main:
            return
        for scored in scored_outcomes(record, [phase]):
            self.run.scored[phase.name] = scored
        if self.beliefs is not None and phase.name in self.run.scored:
            self.beliefs.add_scored(self.run.scored[phase.name])

    def rows_at(self, micro_step: int) -> np.ndarray:
        """Prompts of the generation that a micro-step of this epoch begins with, `(P,)`."""
        return self._prompts[self._generation(micro_step)]

    def more_rows(self, micro_step: int, start: int, count: int) -> np.ndarray:
        """Prompts besides, for dynamic sampling: number `start` to `start + count` of that generation."""
        return self._more[self._generation(micro_step), start : start + count]

    def _generation(self, micro_step: int) -> int:
        return (micro_step - self._first_micro_step) // self.geometry.micro_steps_per_generation
