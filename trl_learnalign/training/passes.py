"""Passes over the prompts of a run, counted as everybody else counts epochs.

Passes are numbered over the whole run. One that is cut, because its phase ends, leaves a fraction, and the next phase
begins with the next whole number, as transformers does with a training that is stopped.
"""

from __future__ import annotations

from collections.abc import Iterator

from trl_learnalign.curriculum import Phase, pass_end, passes_ended
from trl_learnalign.training.run_state import RunState


class RunPasses:
    """Where the passes of a run begin and end; follows its plan, which may change as it goes on.

    Args:
        run (`RunState`): Where the run stands.
    """

    def __init__(self, run: RunState):
        self.run = run

    @property
    def count(self) -> int:
        """Passes that the plan begins."""
        return sum(self._begun(phase) for phase in self.run.plan.phases)

    def epoch_at(self, step: int) -> float:
        """Passes that have been made when optimizer step number `step` (from 1) is done, with the part of one."""
        phase = self.run.plan.phase_at(step - 1)
        geometry = self.run.plan.geometry
        before = sum(self._begun(earlier) for earlier in self._before(phase))
        size, made = self._size(phase), step - phase.start
        ended = passes_ended(phase, size, made, geometry)
        start = pass_end(phase, size, ended, geometry)
        length = pass_end(phase, size, ended + 1, geometry) - start
        micro_steps = (made - start) * geometry.accumulation
        # The trainer's own pass may end inside an accumulation.
        whole = phase.pass_micro_steps or length * geometry.accumulation
        return before + ended + micro_steps / whole if micro_steps else float(before + ended)

    def ends_at(self, step: int) -> bool:
        """Whether a pass ends with optimizer step number `step`, and another one begins unless the run ends."""
        phase = self.run.plan.phase_at(step - 1)
        made = step - phase.start
        if step <= 0 or step == phase.end:
            return step > 0
        geometry, size = self.run.plan.geometry, self._size(phase)
        ended = passes_ended(phase, size, made, geometry)
        return ended > 0 and pass_end(phase, size, ended, geometry) == made

    def _size(self, phase: Phase) -> int:
        """Prompts of a phase; as planned until it has chosen."""
        pool = self.run.pools.get(phase.name)
        return phase.size if pool is None else len(pool)

    def _begun(self, phase: Phase) -> int:
        size, geometry = self._size(phase), self.run.plan.geometry
        ended = passes_ended(phase, size, phase.steps, geometry)
        return ended + (pass_end(phase, size, ended, geometry) < phase.steps)

    def _before(self, phase: Phase) -> Iterator[Phase]:
        return (other for other in self.run.plan.phases if other.index < phase.index)
