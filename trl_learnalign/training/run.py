"""A run and its parts: start or resume, identity, state."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainerCallback, TrainerState

from trl_learnalign.bridge.borrow import StockOrder
from trl_learnalign.bridge.compat import install_sampler
from trl_learnalign.bridge.events import EpochEvents, Saving, SavingHooks
from trl_learnalign.bridge.objective import reset_entropy_controller
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.stage import StageMeasurer
from trl_learnalign.plan import Phase, Plan
from trl_learnalign.records import layout
from trl_learnalign.records.history import HistoryRecorder
from trl_learnalign.records.run import Header, RunRecord
from trl_learnalign.records.store import StoreError, differences
from trl_learnalign.training.checkpoints import STATE_KEY, Checkpoints, Kept
from trl_learnalign.training.display import RunDisplay
from trl_learnalign.training.model_card import describe
from trl_learnalign.training.order import EpochOrder
from trl_learnalign.training.phases import PhaseHook, Phases, StageSelection
from trl_learnalign.training.sampler import CurriculumSampler
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
    RunPasses,
    RunState,
    load_generation,
    restore_reference,
)
from trl_learnalign.training.steps import TrainingMonitor

if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)


def check_not_retrained(state: TrainerState, has_trained: bool) -> None:
    """Check that a trainer that has already trained resumes from its checkpoint.

    Raises:
        `ValueError`: If training would start from step 0 again.
    """
    if state.global_step == 0 and has_trained:
        raise ValueError(
            "This trainer has trained already, and train() would begin at step 0 with the weights as they are now: "
            "the warm-up and what is selected would not be those of the plan, and the record of the first run would "
            "be overwritten. To go on after an interruption: train(resume_from_checkpoint=True). To train once more: "
            "make a new trainer with another output_dir."
        )


def check_alone(trainer: GRPOTrainer, callback: TrainerCallback) -> None:
    """Check that no other callback of this kind selects prompts for the same trainer.

    Raises:
        `ValueError`: If there is one.
    """
    others = [
        other
        for other in trainer.callback_handler.callbacks
        if isinstance(other, type(callback)) and other is not callback
    ]
    if others:
        raise ValueError(
            f"This trainer has {len(others) + 1} callbacks of type {type(callback).__name__}, and each would decide "
            "which prompts come next: add one."
        )


def identified(setup: RunSetup, config: LearnAlignConfig) -> RunIdentity:
    """Return the identity of a run; collective over all ranks."""
    identity = identify(setup, config)
    setup.ranks.agree("plan, dataset and selection settings", identity.entries)
    return identity


def check_settings(setup: RunSetup, config: LearnAlignConfig, record: RunRecord) -> None:
    """Check that the folder holds no run with other settings, as far as they are known before training.

    Args:
        setup (`RunSetup`): The assembled run.
        config (`LearnAlignConfig`): Settings.
        record (`RunRecord`): Record of the folder.

    Raises:
        `StoreError`: If it does. All ranks raise it, and the message names the settings with both values.
    """
    found = setup.ranks.from_main(_identity_found(record) if setup.ranks.is_main else None)
    if found is None:
        return
    ours = {**settings_of_run(setup, config), **trainer_settings(setup)}
    theirs = {name: value for name, value in found.items() if name not in LATER}
    lines = differences(theirs, ours, "{} was {!r} and is {!r}")
    for name, words in WORDS.items():
        lines = [re.sub(rf"^{re.escape(name)}", words, line) for line in lines]
    if lines:
        raise StoreError(
            f"{record.path} was written by another run: {'; '.join(lines)}. Give this run another output_dir (or "
            "record_dir), set these back, or move or delete that folder."
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


def _identity_found(record: RunRecord) -> Mapping[str, Any] | None:
    """Return the identity of the recorded run, or `None` if the folder has no readable one."""
    try:
        found = record.found()
    except StoreError:  # a checkpoint may be able to rebuild it
        return None
    return None if found is None else found.identity


def new_run(ranks: Ranks) -> str:
    """Return an id that no other run has; collective over all ranks."""
    return str(ranks.from_main(secrets.token_hex(8)))


def warn_of_rerun(setup: RunSetup, identity: RunIdentity, record: RunRecord) -> None:
    """Warn before hours of warm-up: the first run's measurements fit only if training repeats bit by bit."""
    found = record.check(identity.entries)
    if (
        found is not None
        and found.last_step
        and setup.trains_before_scoring
        and setup.ranks.is_main
    ):
        logger.warning(
            "%s: a run with these settings has got to step %d here, and this one begins anew at step 0. What was "
            "measured after training is used if the weights come out the same, bit by bit (a GPU does not promise "
            "it), and is refused otherwise. To be sure of a new run, give it another output_dir.",
            *(record.path, found.last_step),
        )


def scoring_batch_prompts_before(setup: RunSetup, record: RunRecord) -> int | None:
    """Return the recorded number of prompts per generation call of scoring; collective over all ranks.

    The result is `None` if the folder holds no run, or a run of a version that did not record this number.
    """
    found = setup.ranks.from_main(record.found() if setup.ranks.is_main else None)
    return None if found is None else found.trainer.scoring_batch_prompts


class TrainingRun(RunDisplay, TrainerCallback):
    """The parts of a run, how it starts and resumes; [`LearnAlignCallback`] adds what happens at each event."""

    @classmethod
    def of(
        cls, setup: RunSetup, identity_of: Callable[[RunIdentity], RunIdentity] | None = None
    ) -> Self:
        """Return the callback of an assembled run, and give its trainer the sampler.

        Args:
            setup (`RunSetup`): The assembled run.
            identity_of (callable, *optional*): Maps the run's identity to the one that is recorded.
        """
        callback = cls.__new__(cls)
        callback._put_together(setup, None)
        callback._identity_of = identity_of
        return callback

    def _put_together(self, setup: RunSetup, on_phase_end: PhaseHook | None) -> None:
        self.setup = setup
        self.trainer, self.config, self.folder = setup.trainer, setup.config, setup.folder
        self.record = RunRecord(self.folder, self.ranks.is_main)
        self.run = RunState(setup.plan, self.config, setup.context.scoring_batch_prompts)
        self.phases = Phases(setup, self.run, self.record, on_phase_end)
        history = self.folder / layout.HISTORY
        recorder = HistoryRecorder(history, self.trainer.train_dataset, self.ranks.is_main)
        self.order = EpochOrder(setup, self.run, recorder)
        budget = ComputeBudget(self.config, self.record)
        self.steps = TrainingMonitor(setup, self.run, self.order, recorder, budget)
        parts = self.run, self.record, self.steps
        self.checkpoints = Checkpoints(setup, *parts, self.state_dict)
        self._saving = self._watch_saving()
        self.sampler = CurriculumSampler(setup.plan)
        self._stock_order: StockOrder | None = None
        if self.config.uses_trainer_order:
            self._stock_order = StockOrder(self.trainer)
        else:
            install_sampler(self.trainer, self.sampler)
            EpochEvents(self.trainer, self, RunPasses(self.run))
        self.identity: RunIdentity | None = None
        self._identity_of: Callable[[RunIdentity], RunIdentity] | None = None
        self._selection: StageSelection | None = None
        self._has_trained = False
        self._saved_at: int | None = None

    def _watch_saving(self) -> Saving:
        checkpoints, handler = self.checkpoints, self.trainer.callback_handler
        hooks = SavingHooks(
            is_active=lambda: self in handler.callbacks,
            training=checkpoints.training,
            begin=checkpoints.begin,
            seal=self._seal,
            describe=self._describe,
        )
        return Saving(self.trainer, hooks)

    def _seal(self, folder: Path) -> None:
        self._saved_at = self.trainer.state.global_step
        self.checkpoints.seal(folder)
        if self.record.has_begun:
            self.steps.show_prompts()
            self.phases.drop_measurements()

    def _describe(self) -> None:
        """Add the section on this run to the model card."""
        if self.record.has_begun and self.plan.stages:
            describe(Path(self.trainer.args.output_dir), self.record.contents)

    @property
    def plan(self) -> Plan:
        """The current plan; stages may have ended early."""
        return self.run.plan

    @property
    def ranks(self) -> Ranks:
        """The distributed processes."""
        return self.setup.ranks

    @property
    def is_scoring(self) -> bool:
        """Whether current rollouts are made to score prompts and not to train on them."""
        return self._selection is not None and self._selection.is_scoring

    def _begin_anew(self, identity: RunIdentity, step: int) -> None:
        """Start a run; in the trainer's own order, a checkpoint of the trainer alone is enough to start from."""
        if step:
            self.steps.begin_phase()
        else:
            reset_entropy_controller(self.trainer)
        self.run.keep_scoring_batch_prompts(scoring_batch_prompts_before(self.setup, self.record))
        warn_of_rerun(self.setup, identity, self.record)
        if not self.config.uses_trainer_order:  # otherwise the trainer's own behaviour is valid
            self.checkpoints.check_new()
        self.record.begin(self._header(), identity.entries, new_run(self.ranks))
        self.steps.history.begin()

    def _go_on(self, identity: RunIdentity, kept: Kept, state: TrainerState) -> None:
        self.record.check_same(kept.record, identity.entries)
        self.load_state_dict(state.stateful_callbacks[STATE_KEY])
        self.run.load_arrays(kept.arrays)
        restore_reference(self.trainer, kept.folder)
        load_generation(self.trainer, kept.folder, kept.mark)
        self.record.go_on(self._header(), identity.entries, kept.record, state.global_step)
        self.steps.history.begin(kept.history)

    def _header(self) -> Header:
        return header(self.setup, self.config, self.plan, self.run.scoring_batch_prompts)

    def identify(self) -> RunIdentity:
        """Return the identity of this run; collective over all ranks."""
        identity = identified(self.setup, self.config)
        self.identity = identity if self._identity_of is None else self._identity_of(identity)
        return self.identity

    def measurer(self) -> StageMeasurer:
        """The object that measures and ranks candidates in this run; available after [`identify`]."""
        assert self.identity is not None
        scoring_batch_prompts = self.run.scoring_batch_prompts
        context = replace(
            self.setup.context, config=self.config, scoring_batch_prompts=scoring_batch_prompts
        )
        prior = self.order.belief_before if self.config.needs_belief else None
        return self.identity.measurer(context, self.folder, prior)

    def state_dict(self) -> dict[str, Any]:
        """The small part of the state that a checkpoint contains, as plain JSON values."""
        return {**self.run.state_dict(), **self.steps.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of [`state_dict`].

        Raises:
            `ValueError`: If the state is of another version, naming missing and unknown keys.
        """
        self.run.load_state_dict({name: state[name] for name in RunState.KEYS if name in state})
        self.steps.load_state_dict(
            {name: part for name, part in state.items() if name not in RunState.KEYS}
        )

    def _note_training(self, phase: Phase) -> None:
        for note in self.steps.notes(phase):
            self.record.note(phase.name, note)
        self.steps.history.save()

    def _note_what_was_cut(self, step: int) -> None:
        """Record a phase that was ended from outside (by early stopping, say): it was trained and has its cost."""
        phase = self.plan.phase_at(step - 1)
        if phase.start < step < phase.end:
            planned = self.plan.total_steps
            logger.info("%s: training was stopped at step %d of %d.", phase.name, step, planned)
            self._note_training(self.run.end(phase, step))
