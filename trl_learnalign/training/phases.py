"""One phase ends and the next begins: accuracy is measured, prompts are selected, weights go back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from trl_learnalign import bridge
from trl_learnalign.curriculum import WARMUP, Phase
from trl_learnalign.records import layout
from trl_learnalign.records.categories import write_categories
from trl_learnalign.records.notes import BASE, MetricsNote, SelectionNote
from trl_learnalign.records.run import RunRecord
from trl_learnalign.training.phase_metrics import notable
from trl_learnalign.training.restart import InitialState, split_schedule
from trl_learnalign.training.run_state import RunState
from trl_learnalign.training.setup import RunSetup
from trl_learnalign.training.stage import StageSelection

logger = logging.getLogger(__name__)

PhaseHook = Callable[[str, int], "Mapping[str, Any] | None"]


class Phases:
    """What happens between the phases of a run.

    Args:
        setup (`RunSetup`): What the run is made of.
        run (`RunState`): Where it stands.
        record (`RunRecord`): Where it is noted.
        on_phase_end (callable, *optional*): See `LearnAlignCallback`.
    """

    def __init__(
        self, setup: RunSetup, run: RunState, record: RunRecord, on_phase_end: PhaseHook | None
    ):
        self.setup, self.trainer = setup, setup.trainer
        self.run = run
        self.record = record
        self.on_phase_end = on_phase_end
        self._initial = InitialState(setup.trainer, record)
        self._goes_back = (
            setup.config.after_warmup == "restart" and setup.plan.phases[0].kind == WARMUP
        )

    def begin_run(self) -> None:
        """A run begins or goes on.

        With `after_warmup="restart"`: keep what will be gone back to, and split the schedule.
        """
        step, steps = self.trainer.state.global_step, self.run.plan.total_steps
        if self.setup.ranks.is_main:
            write_categories(self.setup.folder, self.setup.groupings)
        if step:
            logger.info("Resumed at step %d of %d.", step, steps)
        if not self._goes_back:
            return
        split_schedule(self.trainer, self.run.plan.phases[0].end, steps)
        if step == 0:
            self._initial.save()
        elif step <= self.run.plan.phases[0].end and self.record.writes:
            self._initial.check()

    def end_run(self) -> None:
        """Training has ended: with the plan, or before by somebody else's will."""
        step, plan = self.trainer.state.global_step, self.run.plan
        if step >= plan.total_steps:
            self.end(plan.phases[-1].name, step)
            self.drop_measurements()
        self.record.write_log(self.trainer.state.log_history)
        if not plan.stages:  # of a selection that comes after it
            return
        folder = self.setup.folder
        logger.info("Step %d of %d reached. Records: %s", step, plan.total_steps, folder)
        logger.info(
            "To see what was selected, and why: trl-learnalign report %s",
            layout.output_folder(folder),
        )

    def begin(self, phase: Phase, step: int, selection: StageSelection) -> Phase:
        """A phase begins; all ranks call it together.

        Args:
            phase (`Phase`): The phase.
            step (`int`): Its first optimizer step.
            selection (`StageSelection`): What selects, if it is a stage.

        Returns:
            `Phase`: With the steps that the prompts found for it need.
        """
        self.end(self.run.plan.phases[phase.index - 1].name if phase.index else BASE, step)
        self.record.write_log(self.trainer.state.log_history)
        if self.setup.config.leaves_the_order:
            if size := self.run.plan.dataset_size:
                self.record.note(phase.name, SelectionNote(step=step, scored=False, selected=size))
        elif not self.run.has_selected(phase):
            selector = self.setup.selectors[self.run.plan.stages.index(phase)]
            rows = selection.select(phase, step, self.run.candidates(), selector)
            phase = self.run.select(phase, rows)
        if self._goes_back and phase.index == 1:
            self._initial.restore()
            split_schedule(self.trainer, phase.start, self.run.plan.total_steps)
            logger.info("Weights, optimizer and schedule are back in their initial state.")
        logger.info(
            "%s: %s, %s, steps %d to %d of %d",
            *(phase.name, self._prompts_of(phase), self._order_of(phase)),
            *(phase.start + 1, phase.end, self.run.plan.total_steps),
        )
        return phase

    def _prompts_of(self, phase: Phase) -> str:
        is_whole = self.setup.config.leaves_the_order
        return self.run.plan.prompts if is_whole else f"{len(self.run.pool_of(phase)):,} prompts"

    def _order_of(self, phase: Phase) -> str:
        if self.setup.config.leaves_the_order:
            return "in the trainer's own order"
        stages = self.run.plan.stages
        order = self.setup.config.order_of(stages.index(phase)) if phase in stages else "shuffled"
        if order != "shuffled":
            return f"in {order} order"
        return "1 pass" if phase.passes == 1 else f"{phase.passes} passes"

    def end(self, name: str, step: int) -> None:
        """Note what `on_phase_end` finds, unless that is noted already.

        Args:
            name (`str`): `Phase.name`, or `"base"` before the first.
            step (`int`): Optimizer step that the policy has reached.
        """
        if self.on_phase_end is None or self.record.get(name, MetricsNote) is not None:
            return
        with bridge.left_as_found(self.trainer):
            metrics = self.on_phase_end(name, step)
        self.record.note(name, MetricsNote(step=step, others=notable(name, step, metrics)))

    def drop_measurements(self) -> None:
        """Without `keep_features`: what the pools that a checkpoint holds were selected by."""
        if not self.setup.config.keep_features and self.setup.ranks.is_main:
            for stage in self.run.pools:
                shutil.rmtree(self.setup.folder / stage, ignore_errors=True)
