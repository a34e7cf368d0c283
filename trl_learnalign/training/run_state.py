"""Where a run stands: its plan as it has come, the pools of its phases, what was scored. Knows no trainer.

What is small of it goes into the trainer's state as JSON. Pools may have a million prompts: they are binary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from trl_learnalign import curriculum
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.curriculum import STAGE, WARMUP, Phase, Plan
from trl_learnalign.records.history import RolledOutPrompts
from trl_learnalign.training.states import check_keys

_POOL, _SCORED = "pool", "scored"
_COLUMNS = ("rows", "right", "wrong")


class RunState:
    """The plan, and what stages have selected.

    Args:
        plan (`Plan`): The run's plan.
        config (`LearnAlignConfig`): With `selection_seed` and `reselect`.
        scoring_batch_prompts (`int`): Prompts of one generation call in scoring, at most.
    """

    KEYS = ("ended", "scoring_batch_prompts")

    def __init__(self, plan: Plan, config: LearnAlignConfig, scoring_batch_prompts: int):
        self.config = config
        self.scoring_batch_prompts = scoring_batch_prompts
        self._whole_plan = plan
        self.begin()

    def keep_scoring_batch_prompts(self, scoring_batch_prompts: int | None) -> None:
        """Roll out as the run began, whatever memory there is now: seeds go by the call. A setting stands above it.

        Args:
            scoring_batch_prompts (`int`, *optional*): Prompts of one generation call when it began, if they are known.
        """
        if self.config.scoring_batch_prompts is None and scoring_batch_prompts is not None:
            self.scoring_batch_prompts = scoring_batch_prompts

    def begin(self) -> None:
        """Nothing is selected, and no phase has ended."""
        self.plan = self._whole_plan
        self.pools: dict[str, np.ndarray] = {}
        self.scored: dict[str, RolledOutPrompts] = {}
        """What stages have scored, where a belief learns from it; on the main rank."""
        self._ended: dict[str, int] = {}

    def keep_length(self, steps: int) -> None:
        """The trainer's own number of optimizer steps; of a run of one phase, before its first step."""
        (phase,) = self.plan.phases
        self.plan = replace(self.plan, phases=(replace(phase, steps=steps),))

    def has_selected(self, phase: Phase) -> bool:
        """Whether a phase has its pool; the warm-up has it from the beginning."""
        return phase.kind != STAGE or phase.name in self.pools

    def select(self, phase: Phase, rows: np.ndarray) -> Phase:
        """Give a stage its pool.

        Args:
            phase (`Phase`): A stage.
            rows (`np.ndarray`): Rows of the dataset, `(N,)`; N may be fewer than planned.

        Returns:
            `Phase`: With the steps that so many prompts need, unless its steps were given.
        """
        self.pools[phase.name] = np.sort(np.asarray(rows, dtype=np.int64))
        if self.config.stage_steps is not None:
            return phase
        steps = curriculum.steps_for(len(rows), phase.passes, self.plan.geometry)
        return self.end(phase, phase.start + steps)

    def end(self, phase: Phase, step: int) -> Phase:
        """Let a phase end before an optimizer step, if it would end later; returns it as it is then."""
        if step < phase.end:
            self.plan = self.plan.ended_early(phase, step)
            self._ended[phase.name] = step
        return self.plan.phases[phase.index]

    def pool_of(self, phase: Phase) -> np.ndarray:
        """Prompts of a phase, rows of the dataset, ascending.

        Raises:
            `KeyError`: If it is a stage that has not selected yet.
        """
        if phase.kind == WARMUP:
            return curriculum.warmup_pool(
                self.config.selection_seed, self.plan.dataset_size, phase.size
            )
        return self.pools[phase.name]

    def candidates(self) -> np.ndarray:
        """Whom the next stage may select, ascending: all prompts, or those that no stage has taken (`reselect`)."""
        free = np.ones(self.plan.dataset_size, dtype=bool)
        if self.config.reselect == "remaining":
            for pool in self.pools.values():
                free[pool] = False
        return np.flatnonzero(free)

    def state_dict(self) -> dict[str, Any]:
        """Early ends, and how scoring rolls out, as plain JSON values; the rest is in [`arrays`]."""
        return {"ended": dict(self._ended), "scoring_batch_prompts": self.scoring_batch_prompts}

    def steps_of(self, state: Mapping[str, Any]) -> int:
        """Optimizer steps of the run by a [`state_dict`]: fewer than planned if phases have ended early."""
        plan = self._whole_plan
        for phase in self._whole_plan.phases:
            step = state.get("ended", {}).get(phase.name)
            now = plan.phases[phase.index]
            if step is not None and step < now.end:
                plan = plan.ended_early(now, step)
        return plan.total_steps

    def arrays(self) -> dict[str, np.ndarray]:
        """Pools, a bit for each row of the dataset, and what stages have scored, by name."""
        arrays = {}
        for stage, pool in self.pools.items():
            is_in = np.zeros(self.plan.dataset_size, dtype=bool)
            is_in[pool] = True
            arrays[f"{_POOL}/{stage}"] = np.packbits(is_in)
        for stage, scored in self.scored.items():
            for name in _COLUMNS:
                arrays[f"{_SCORED}/{stage}/{name}"] = getattr(scored, name)
            arrays[f"{_SCORED}/{stage}/step"] = np.array([scored.step])
        return arrays

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from [`arrays`]."""
        for key in arrays:
            kind, stage, *name = key.split("/")
            if kind == _POOL:
                bits = np.unpackbits(arrays[key], count=self.plan.dataset_size)
                self.pools[stage] = np.flatnonzero(bits)
            elif name == ["step"]:
                place = f"{_SCORED}/{stage}"
                columns = {column: arrays[f"{place}/{column}"] for column in _COLUMNS}
                self.scored[stage] = RolledOutPrompts(int(arrays[key][0]), **columns)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version.
        """
        check_keys("the run", state, self.KEYS)
        self.begin()
        self.keep_scoring_batch_prompts(state["scoring_batch_prompts"])
        for name, step in state["ended"].items():
            phase = next(phase for phase in self.plan.phases if phase.name == name)
            self.end(phase, step)
