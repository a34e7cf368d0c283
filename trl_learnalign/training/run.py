"""A run from the beginning of its training: how it starts and resumes, its identity and its state."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState

from trl_learnalign.bridge.objective import reset_entropy_controller
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.stage import Prior, StageMeasurer
from trl_learnalign.plan import Phase
from trl_learnalign.records import layout
from trl_learnalign.records.history import HistoryRecorder
from trl_learnalign.records.run_record import (
    RunContents,
    RunRecord,
    check_recorded,
    check_same,
    recorded,
)
from trl_learnalign.records.store import StoreError, differences
from trl_learnalign.training.checkpoints import STATE_KEY, CheckpointWriter, Kept, check_new
from trl_learnalign.training.counters import PhaseCounters, RolloutFilters, start_line
from trl_learnalign.training.epoch_order import EpochOrder, read_prompts
from trl_learnalign.training.phases import PhaseHook, Phases, StageSelection
from trl_learnalign.training.setup import (
    RunIdentity,
    RunSetup,
    header,
    identify,
    settings_of_run,
    trainer_settings,
)
from trl_learnalign.training.state import (
    ComputeBudget,
    RunState,
    load_generation,
    planned_state,
    restore_reference,
)
from trl_learnalign.training.steps import TrainingMonitor

logger = logging.getLogger(__name__)


# ---- Checks ---------------------------------------------------------------------------------------------------------


def check_not_retrained(state: TrainerState, has_trained: bool) -> None:
    """Check that a trainer that has already trained resumes from its checkpoint.

    Raises:
        `ValueError`: If training would start from step 0 again.
    """
    if state.global_step == 0 and has_trained:
        raise ValueError(
            "This trainer has already trained, and train() would start at step 0 with the current weights: the "
            "warm-up and the selections would not follow the plan, and the record of the first run would be "
            "overwritten. To resume after an interruption: train(resume_from_checkpoint=True). To train again: "
            "make a new trainer with another output_dir."
        )


def identified(setup: RunSetup) -> RunIdentity:
    """Return the identity of a run; collective over all ranks."""
    identity = identify(setup, setup.config)
    setup.ranks.agree("plan, dataset and selection settings", identity.entries)
    return identity


def check_settings(setup: RunSetup) -> None:
    """Check that the folder holds no run with other settings, as far as they are known before training.

    Args:
        setup (`RunSetup`): The assembled run.

    Raises:
        `StoreError`: If it does. All ranks raise it, and the message names the settings with both values.
    """
    found = setup.ranks.from_main(_identity_found(setup) if setup.ranks.is_main else None)
    if found is None:
        return
    ours = {**settings_of_run(setup, setup.config), **trainer_settings(setup)}
    theirs = {name: value for name, value in found.items() if name not in LATER}
    lines = differences(theirs, ours, "{} was {!r} and is {!r}")
    for name, words in WORDS.items():
        lines = [re.sub(rf"^{re.escape(name)}", words, line) for line in lines]
    lines = list(dict.fromkeys(lines))  # a setting may be in two groups of the identity
    if lines:
        raise StoreError(
            f"{setup.folder / layout.RUN} was written by another run: {'; '.join(lines)}. Give this run "
            "another output_dir (or record_dir), restore these settings, or move or delete that folder."
        )


LATER = ("model", "tokenizer", "generation_config", "code", "validation_dataset")
"""Entries of a run's identity that are compared when training begins."""

WORDS = {
    "prompts_per_unit": "the number of prompts that are trained on together (per_device_train_batch_size x processes "
    "x gradient_accumulation_steps / num_generations, or steps_per_generation)",
    "steps_per_unit": "the number of steps that share rollouts (steps_per_generation x num_iterations / "
    "gradient_accumulation_steps)",
    "dataset was": "the digest of train_dataset was",
    "dataset_size": "the number of rows of train_dataset",
    "settings.": "",
    "training.": "",
}
"""Descriptions of identity entries that have no setting of the same name."""


def _identity_found(setup: RunSetup) -> Mapping[str, Any] | None:
    """Return the identity of the recorded run, or `None` if the folder has no readable one."""
    try:
        found = recorded(setup.folder)
    except StoreError:  # a checkpoint may be able to rebuild it
        return None
    return None if found is None else found.identity


def new_run(ranks: Ranks) -> str:
    """Return an id that no other run has; collective over all ranks."""
    return str(ranks.from_main(secrets.token_hex(8)))


def warn_of_rerun(setup: RunSetup, identity: RunIdentity) -> None:
    """Warn before hours of warm-up: the first run's measurements fit only if training repeats bit by bit."""
    found = check_recorded(setup.folder, identity.entries)
    if (
        found is not None
        and found.last_step
        and setup.trains_before_scoring
        and setup.ranks.is_main
    ):
        logger.warning(
            "%s: a run with these settings reached step %d here, and this one starts again at step 0. Measurements "
            "made after training are reused if the weights are identical to the last bit (a GPU does not guarantee "
            "that), and refused otherwise. To be sure of a new run, give it another output_dir.",
            *(setup.folder / layout.RUN, found.last_step),
        )


def scoring_batch_prompts_before(setup: RunSetup) -> int | None:
    """Return the recorded number of prompts per generation call of scoring; collective over all ranks.

    The result is `None` if the folder holds no run, or a run of a version that did not record this number.
    """
    found = setup.ranks.from_main(recorded(setup.folder) if setup.ranks.is_main else None)
    return None if found is None else found.trainer.scoring_batch_prompts


# ---- Run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run from the beginning of its training, with all that changes in it; each `train()` makes one.

    Args:
        setup (`RunSetup`): The assembled run.
        state (`RunState`): The plan as it stands, and the selections so far.
        counters (`PhaseCounters`): What is counted in the current phase.
        record (`RunRecord`): Its record.
        phases (`Phases`): What is done between two phases.
        order (`EpochOrder`): The prompts of virtual epochs.
        steps (`TrainingMonitor`): Records outcomes and costs, and ends phases.
        checkpoints (`CheckpointWriter`): Completes its checkpoints.
        measurer (`StageMeasurer`): Measures and ranks candidates.
        selection (`StageSelection`): Selects the prompts of stages.
    """

    setup: RunSetup
    state: RunState
    counters: PhaseCounters
    record: RunRecord
    phases: Phases
    order: EpochOrder
    steps: TrainingMonitor
    checkpoints: CheckpointWriter
    measurer: StageMeasurer
    selection: StageSelection

    def begin_phase(self, phase: Phase, step: int) -> Phase:
        """Begin a phase, and select its prompts if it is a stage; returns it with the steps that they need."""
        phase = self.phases.begin(phase, step, self.selection)
        self.order.learn_from_scores(self.record, phase)
        self.counters.begin_phase()
        return phase

    def end_phase(self, phase: Phase) -> None:
        """Record a phase that was trained to its end."""
        for note in self.steps.notes(phase):
            self.record.note(phase.name, note)
        self.steps.history.save()

    def end(self) -> None:
        """End the training, by the plan or by an earlier stop from outside (by early stopping, say)."""
        step = self.setup.trainer.state.global_step
        phase = self.state.plan.phase_at(step - 1)
        if phase.start < step < phase.end:  # it was trained and has its cost
            planned = self.state.plan.total_steps
            logger.info("%s: training was stopped at step %d of %d.", phase.name, step, planned)
            self.end_phase(self.state.end(phase, step))
        self.phases.end_run()

    def seal(self, folder: Path) -> None:
        """Complete a checkpoint that transformers has written."""
        self.checkpoints.seal(folder)
        self.steps.show_prompts()
        self.phases.drop_measurements()


def begin_run(
    setup: RunSetup,
    identity: RunIdentity,
    additions: RolloutFilters,
    kept: Kept | None,
    on_phase_end: PhaseHook | None,
) -> Run:
    """Begin a run, or resume one; collective over all ranks.

    Args:
        setup (`RunSetup`): The assembled run.
        identity (`RunIdentity`): Its identity.
        additions (`RolloutFilters`): Skipping and dynamic sampling of its trainer.
        kept (`Kept`, *optional*): What the checkpoint contains that is resumed from.
        on_phase_end (callable, *optional*): See `LearnAlignCallback`.

    Raises:
        `StoreError`: If the record folder holds another run.
        `CheckpointError`: If checkpoints of an earlier run are in the way.
        `ValueError`: If the checkpoint is of another version.
    """
    state, counters = planned_state(setup), PhaseCounters(setup, additions)
    if setup.config.uses_trainer_order:
        state.keep_length(setup.trainer.state.max_steps)
    if kept is None:
        record = _new_record(setup, identity, state, counters)
    else:
        record = _resumed(setup, identity, state, counters, kept)
    history = _history(setup)
    history.begin(None if kept is None else kept.history)
    phases = Phases(setup, state, record, on_phase_end)
    phases.begin_run()
    if state.plan.stages:  # for a warm-up alone, the code that selects after it logs the end
        logger.info("%s", start_line(setup, state.plan, additions))
    features = np.empty((0, 0))
    if setup.config.needs_belief:
        features = read_prompts(setup, identity, record, None if kept is None else kept.features)
    order = EpochOrder(setup, state, history, features)
    return _assembled(identity, counters, phases, order, kept)


def finished_run(
    setup: RunSetup,
    identity: RunIdentity,
    additions: RolloutFilters,
    before: RunContents,
    step: int,
    scoring_batch_prompts: int | None,
) -> Run:
    """Return a run whose training has ended in an earlier process, from its record.

    Args:
        setup (`RunSetup`): The assembled run.
        identity (`RunIdentity`): Its identity.
        additions (`RolloutFilters`): Skipping and dynamic sampling of its trainer.
        before (`RunContents`): Its record.
        step (`int`): Its last optimizer step.
        scoring_batch_prompts (`int`, *optional*): Its number of prompts of one generation call in scoring.
    """
    state = planned_state(setup)
    state.keep_scoring_batch_prompts(scoring_batch_prompts)
    described = header(setup, setup.config, state.plan, state.scoring_batch_prompts)
    place = setup.folder, setup.ranks.is_main
    record = RunRecord.resume(*place, described, identity.entries, before, step, under_way=())
    order = EpochOrder(setup, state, _history(setup), np.empty((0, 0)))
    phases = Phases(setup, state, record, None)
    return _assembled(identity, PhaseCounters(setup, additions), phases, order, None)


def _assembled(
    identity: RunIdentity,
    counters: PhaseCounters,
    phases: Phases,
    order: EpochOrder,
    kept: Kept | None,
) -> Run:
    setup, state, record, history = phases.setup, phases.run, phases.record, order.history
    budget = ComputeBudget(setup.config, record)
    prior = order.belief_before if setup.config.needs_belief else None
    measurer = measurer_of(setup, identity, state.scoring_batch_prompts, prior)

    return Run(
        setup=setup,
        state=state,
        counters=counters,
        record=record,
        phases=phases,
        order=order,
        steps=TrainingMonitor(setup, state, order, history, counters, budget),
        checkpoints=CheckpointWriter(setup, state, counters, record, history, kept),
        measurer=measurer,
        selection=StageSelection(measurer, record, state.plan, setup.groupings),
    )


def measurer_of(
    setup: RunSetup, identity: RunIdentity, scoring_batch_prompts: int, prior: Prior | None = None
) -> StageMeasurer:
    """Return the object that measures and ranks candidates in a run.

    Args:
        setup (`RunSetup`): The assembled run.
        identity (`RunIdentity`): Its identity.
        scoring_batch_prompts (`int`): Maximum number of prompts of one generation call in scoring.
        prior (callable, *optional*): Returns the belief before a step, for a rollout budget.
    """
    context = replace(setup.context, scoring_batch_prompts=scoring_batch_prompts)
    return StageMeasurer(
        context=context,
        folder=setup.folder,
        dataset_digest=identity.dataset,
        validation=identity.validation,
        measured_with=identity.measured_with,
        prior=prior,
    )


def _new_record(
    setup: RunSetup, identity: RunIdentity, state: RunState, counters: PhaseCounters
) -> RunRecord:
    """Return the record of a new run; in the trainer's own order it may begin with a checkpoint of the trainer."""
    if setup.trainer.state.global_step:
        counters.begin_phase()
    else:
        reset_entropy_controller(setup.trainer)
    state.keep_scoring_batch_prompts(scoring_batch_prompts_before(setup))
    warn_of_rerun(setup, identity)
    if not setup.config.uses_trainer_order:  # otherwise the trainer's own behaviour is valid
        check_new(setup)
    described = header(setup, setup.config, state.plan, state.scoring_batch_prompts)
    place = setup.folder, setup.ranks.is_main
    return RunRecord.begin(*place, described, identity.entries, new_run(setup.ranks))


def _resumed(
    setup: RunSetup, identity: RunIdentity, state: RunState, counters: PhaseCounters, kept: Kept
) -> RunRecord:
    """Restore the state of a run from a checkpoint; returns its record.

    Raises:
        `ValueError`: If the state is of another version, naming missing and unknown keys.
    """
    trainer = setup.trainer
    check_same(setup.folder, kept.record, identity.entries)
    planned = state.plan
    found = trainer.state.stateful_callbacks[STATE_KEY]
    state.load_state_dict({name: found[name] for name in RunState.KEYS if name in found})
    counters.load_state_dict({name: part for name, part in found.items() if name not in state.KEYS})
    state.load_arrays(kept.arrays)
    restore_reference(trainer, kept.folder)
    load_generation(trainer, kept.folder, kept.mark)
    # The plan of the beginning: where phases have ended is in their notes.
    described = header(setup, setup.config, planned, state.scoring_batch_prompts)
    place, step = (setup.folder, setup.ranks.is_main), trainer.state.global_step
    under_way = {phase.name for phase in state.plan.phases if phase.end > step}
    return RunRecord.resume(*place, described, identity.entries, kept.record, step, under_way)


def _history(setup: RunSetup) -> HistoryRecorder:
    path, dataset = setup.folder / layout.HISTORY, setup.trainer.train_dataset
    return HistoryRecorder(path, dataset, setup.ranks.is_main, setup.config.is_graded)
