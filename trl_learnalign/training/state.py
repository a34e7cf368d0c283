"""The state of a run that checkpoints contain: its plan, pools and current generation.

Small values go into the trainer's state as JSON. Pools may have a million prompts, so they are saved as binary arrays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

from trl_learnalign import plan
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.bridge.inference import (
    buffered_generation,
    is_mid_generation,
    restore_generation,
)
from trl_learnalign.bridge.policy import gathered
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.plan import STAGE, WARMUP, Phase, Plan, pass_end, passes_ended
from trl_learnalign.records.layout import REFERENCE, generation
from trl_learnalign.records.notes import Cost
from trl_learnalign.records.run_record import RunRecord
from trl_learnalign.records.store import Mark, check_keys, write_atomically
from trl_learnalign.training.setup import RunSetup

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


# ---- Run state ------------------------------------------------------------------------------------------------------

_POOL, _SCORED = "pool", "scored"
_COLUMNS = ("rows", "right", "wrong", "partial")


class RunState:
    """The plan, and the selections of stages.

    Args:
        plan (`Plan`): The run's plan.
        config (`LearnAlignConfig`): Settings, with `selection_seed` and `reselect`.
        scoring_batch_prompts (`int`): Maximum number of prompts of one generation call in scoring.
    """

    KEYS = ("ended", "scoring_batch_prompts")

    def __init__(self, plan: Plan, config: LearnAlignConfig, scoring_batch_prompts: int):
        self.config = config
        self.scoring_batch_prompts = scoring_batch_prompts
        self._whole_plan = self.plan = plan
        self.pools: dict[str, np.ndarray] = {}
        self.scored: dict[str, Outcomes] = {}
        """Scores of stages, if a belief learns from them; on the main rank."""
        self._ended: dict[str, int] = {}

    def keep_scoring_batch_prompts(self, scoring_batch_prompts: int | None) -> None:
        """Keep the batch size that the run began with, since seeds depend on the generation call.

        A setting overrides it.

        Args:
            scoring_batch_prompts (`int`, *optional*): Prompts of one generation call when the run began, if known.
        """
        if self.config.scoring_batch_prompts is None and scoring_batch_prompts is not None:
            self.scoring_batch_prompts = scoring_batch_prompts

    def keep_length(self, steps: int) -> None:
        """Adopt the trainer's number of optimizer steps; for a run of one phase, before its first step."""
        (phase,) = self.plan.phases
        self.plan = replace(self.plan, phases=(replace(phase, steps=steps),))

    def has_selected(self, phase: Phase) -> bool:
        """Whether a phase has its pool; a warm-up always has one."""
        return phase.kind != STAGE or phase.name in self.pools

    def select(self, phase: Phase, rows: np.ndarray) -> Phase:
        """Set the pool of a stage.

        Args:
            phase (`Phase`): A stage.
            rows (`np.ndarray`): Rows of the dataset, `(N,)`; N may be smaller than planned.

        Returns:
            `Phase`: The phase, with the steps that N prompts need, unless its steps were given.
        """
        self.pools[phase.name] = np.sort(np.asarray(rows, dtype=np.int64))
        if self.config.stage_steps is not None:
            return phase
        steps = plan.steps_for(len(rows), phase.passes, self.plan.geometry)
        return self.end(phase, phase.start + steps)

    def end(self, phase: Phase, step: int) -> Phase:
        """End a phase before an optimizer step, if it would end later; returns the updated phase."""
        if step < phase.end:
            self.plan = self.plan.ended_early(phase, step)
            self._ended[phase.name] = step
        return self.plan.phases[phase.index]

    def pool_of(self, phase: Phase) -> np.ndarray:
        """Return the prompts of a phase, rows of the dataset, ascending.

        Raises:
            `KeyError`: If the phase is a stage that has not selected yet.
        """
        if phase.kind == WARMUP:
            return plan.warmup_pool(self.config.selection_seed, self.plan.dataset_size, phase.size)
        return self.pools[phase.name]

    def candidates(self) -> np.ndarray:
        """Candidates of the next stage, ascending: all prompts, or those that no stage has selected (`reselect`)."""
        free = np.ones(self.plan.dataset_size, dtype=bool)
        if self.config.reselect == "remaining":
            for pool in self.pools.values():
                free[pool] = False
        return np.flatnonzero(free)

    def state_dict(self) -> dict[str, Any]:
        """Return early ends and the scoring batch size as plain JSON values; the rest is in [`arrays`]."""
        return {"ended": dict(self._ended), "scoring_batch_prompts": self.scoring_batch_prompts}

    def steps_of(self, state: Mapping[str, Any]) -> int:
        """Return the run's optimizer steps from a [`state_dict`]: fewer than planned if phases have ended early."""
        plan = self._whole_plan
        for phase in self._whole_plan.phases:
            step = state.get("ended", {}).get(phase.name)
            now = plan.phases[phase.index]
            if step is not None and step < now.end:
                plan = plan.ended_early(now, step)
        return plan.total_steps

    def arrays(self) -> dict[str, np.ndarray]:
        """Return pools, one bit for each row of the dataset, and the scores of stages, by name."""
        arrays = {}
        for stage, pool in self.pools.items():
            is_in = np.zeros(self.plan.dataset_size, dtype=bool)
            is_in[pool] = True
            arrays[f"{_POOL}/{stage}"] = np.packbits(is_in)
        for stage, scored in self.scored.items():
            for name in _COLUMNS if self.config.is_graded else _COLUMNS[:3]:
                arrays[f"{_SCORED}/{stage}/{name}"] = getattr(scored, name)
            arrays[f"{_SCORED}/{stage}/step"] = scored.steps[:1]
        return arrays

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore the arrays of [`arrays`]."""
        for key in arrays:
            kind, stage, *name = key.split("/")
            if kind == _POOL:
                bits = np.unpackbits(arrays[key], count=self.plan.dataset_size)
                self.pools[stage] = np.flatnonzero(bits)
            elif name == ["step"]:
                places = {column: f"{_SCORED}/{stage}/{column}" for column in _COLUMNS}
                columns: dict[str, Any] = {
                    column: arrays[place] for column, place in places.items() if place in arrays
                }
                step = int(arrays[key][0]) if len(arrays[key]) else 0
                self.scored[stage] = Outcomes.at(step, **columns)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of [`state_dict`], in a state in which no phase has ended.

        Raises:
            `ValueError`: If the state is of another version.
        """
        check_keys("the run", state, self.KEYS)
        self.keep_scoring_batch_prompts(state["scoring_batch_prompts"])
        for name, step in state["ended"].items():
            phase = next(phase for phase in self.plan.phases if phase.name == name)
            self.end(phase, step)


def planned_state(setup: RunSetup) -> RunState:
    """Return the state of a run before its first step."""
    return RunState(setup.plan, setup.config, setup.context.scoring_batch_prompts)


# ---- Compute budget -------------------------------------------------------------------------------------------------


class ComputeBudget:
    """Checks the cost of the whole run against its budget.

    Args:
        config (`LearnAlignConfig`): Settings, with `compute_budget`.
        record (`RunRecord`): The record; its ledger has the cost of earlier phases and of the stage's scoring.
    """

    def __init__(self, config: LearnAlignConfig, record: RunRecord):
        self._budget = math.inf if config.compute_budget is None else config.compute_budget
        self._record = record

    def is_limited(self, plan: Plan, phase: Phase) -> bool:
        """Whether the budget may end a phase: it ends the last phase only, earlier ones are just charged."""
        return self._budget < math.inf and phase.index == plan.phases[-1].index

    def is_spent(self, training: Cost) -> bool:
        """Whether the budget is spent.

        Args:
            training (`Cost`): Cost of the current phase so far.
        """
        ledger = self._record.contents.ledger
        return ledger.compute(ledger.total + training) >= self._budget


# ---- Passes ---------------------------------------------------------------------------------------------------------
# Passes are numbered over the whole run. A pass that is cut because its phase ends counts as a fraction. The next
# phase begins with the next whole number, as transformers does when training is stopped.


class RunPasses:
    """The passes of a run, computed from its plan, which may change during the run.

    Args:
        run (`RunState`): The state of the run.
    """

    def __init__(self, run: RunState):
        self.run = run

    @property
    def count(self) -> int:
        """Number of passes that the plan begins."""
        return sum(self._begun(phase) for phase in self.run.plan.phases)

    def epoch_at(self, step: int) -> float:
        """Return the passes done after optimizer step `step` (from 1), with the fraction of the current pass."""
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
        """Return the number of prompts of a phase; the planned number until the phase has selected."""
        pool = self.run.pools.get(phase.name)
        return phase.size if pool is None else len(pool)

    def _begun(self, phase: Phase) -> int:
        size, geometry = self._size(phase), self.run.plan.geometry
        ended = passes_ended(phase, size, phase.steps, geometry)
        return ended + (pass_end(phase, size, ended, geometry) < phase.steps)

    def _before(self, phase: Phase) -> Iterator[Phase]:
        return (other for other in self.run.plan.phases if other.index < phase.index)


# ---- The current generation -----------------------------------------------------------------------------------------
# A run that stops between the optimizer steps of a generation resumes with the same completions, so each process saves
# its own.


def save_generation(trainer: GRPOTrainer, folder: Path) -> None:
    """Save this process's current generation, if there is one.

    Args:
        trainer (`GRPOTrainer`): The trainer, between two steps.
        folder (`Path`): The checkpoint.
    """
    batches = buffered_generation(trainer)
    if batches is None:
        return
    tensors = {
        f"{i}/{name}": value.detach().cpu().clone()  # slices of a generation may share memory
        for i, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    write_atomically(folder / generation(trainer.accelerator.process_index), save(tensors))


def load_generation(trainer: GRPOTrainer, folder: Path, mark: Mark) -> None:
    """Restore the generation of a checkpoint that was saved in the middle of one.

    With another number of processes, the completions of the other processes cannot be read. The same prompts are then
    rolled out again.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        folder (`Path`): The checkpoint.
        mark (`Mark`): Its completion marker.
    """
    if not is_mid_generation(trainer):
        return
    if not mark.mid_generation or mark.processes != trainer.accelerator.num_processes:
        logger.warning(
            "Step %d is in the middle of a generation, and its completions were saved for %d process(es), not %d: the "
            "same prompts are rolled out again.",
            *(trainer.state.global_step, mark.processes, trainer.accelerator.num_processes),
        )
        return
    batches: dict[int, dict[str, Any]] = {}
    path = folder / generation(trainer.accelerator.process_index)
    for key, value in load_file(path).items():
        number, name = key.split("/", 1)
        batches.setdefault(int(number), {})[name] = value
    restore_generation(trainer, [batches[i] for i in sorted(batches)])


# ---- Moving reference model (`sync_ref_model`) ----------------------------------------------------------------------


def save_weights(
    trainer: GRPOTrainer,
    parameters: Iterable[tuple[str, nn.Parameter]],
    write: Callable[[bytes], object],
) -> None:
    """Write whole parameters; collective over all processes, and the main one writes."""
    weights = {}
    for name, parameter in parameters:
        with gathered(trainer, parameter) as whole:
            if trainer.accelerator.is_main_process:
                weights[name] = whole.cpu().clone()
    if trainer.accelerator.is_main_process:
        write(save(weights))
    trainer.accelerator.wait_for_everyone()


@torch.no_grad()
def load_reference(trainer: GRPOTrainer, path: Path) -> None:
    """Load the weights that [`save_weights`] wrote into the reference model; collective over all processes."""
    weights = load_file(path)
    for name, parameter in trainer.ref_model.named_parameters():
        with gathered(trainer, parameter, write=True) as whole:
            whole.copy_(weights[name])


def save_reference(trainer: GRPOTrainer, folder: Path) -> None:
    """Save a moved reference model with the checkpoint; collective over all processes."""
    if _has_moved(trainer):
        write = partial(write_atomically, folder / REFERENCE)
        save_weights(trainer, trainer.ref_model.named_parameters(), write)


def restore_reference(trainer: GRPOTrainer, folder: Path) -> None:
    """Restore the reference model of the checkpoint; collective over all processes.

    Raises:
        `ValueError`: If the reference had moved and was not saved.
    """
    if not _has_moved(trainer):
        return
    if not (folder / REFERENCE).exists():
        raise ValueError(
            f"The checkpoint at step {trainer.state.global_step} cannot be resumed with sync_ref_model=True: the "
            f"reference model had changed by then, TRL does not save it, and {REFERENCE} is missing from the "
            "checkpoint, so the objective would differ. Start again with another output_dir, or set "
            "sync_ref_model=False."
        )
    load_reference(trainer, folder / REFERENCE)


def _has_moved(trainer: GRPOTrainer) -> bool:
    """Whether the reference has already followed the policy, which it does every `ref_model_sync_steps` steps."""
    return (
        trainer.args.sync_ref_model
        and trainer.state.global_step >= trainer.args.ref_model_sync_steps
    )
