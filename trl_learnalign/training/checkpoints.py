"""Checkpoints with everything that resuming needs, and the message after Ctrl-C.

The order of prompts depends on the outcomes of rollouts and on pools, features and costs. Each checkpoint contains all
of them up to its step. The record folder is for people to read and is rebuilt from the checkpoint. A checkpoint also
contains:

- the current generation, which may feed several optimizer steps; each process saves its own;
- a reference model that follows the policy (`sync_ref_model`): it is part of the objective, and TRL does not save it.

Prompt features may be large (256 MB for a million prompts). The checkpoints of a run share one file of them, as far as
the file system allows, and the record folder has a copy. Either can replace the other.

The completion marker ([`trl_learnalign.records.store`]) is written last. It holds the run's id and the digest of each
file. A checkpoint with a file that does not match is never resumed from.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import numpy as safetensors_numpy
from transformers import TrainerControl, TrainerState

from trl_learnalign.bridge.hooks import micro_steps_made
from trl_learnalign.bridge.inference import is_mid_generation
from trl_learnalign.records import layout, store
from trl_learnalign.records.history import HistoryRecorder
from trl_learnalign.records.lock import run_lock, sweep
from trl_learnalign.records.run_record import RunContents, RunRecord, read_contents, sealed
from trl_learnalign.records.store import (
    CheckpointError,
    Mark,
    StoreError,
    check_no_folders,
    same_file,
    write_atomically,
    write_json,
)
from trl_learnalign.training.counters import PhaseCounters
from trl_learnalign.training.setup import RunSetup
from trl_learnalign.training.state import (
    RunState,
    planned_state,
    restore_reference,
    save_generation,
    save_reference,
)

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


STATE_KEY = "learnalign"
"""Key of the small part of the state in the trainer's own state."""


@dataclass(frozen=True)
class Kept:
    """What a checkpoint contains of a run.

    Args:
        folder (`Path`): The checkpoint.
        mark (`Mark`): Its completion marker.
        record (`RunContents`): The notes.
        history (`bytes`, *optional*): The reward history; on the main rank.
        arrays (mapping): See `RunState.arrays`; the scores of stages are on the main rank alone.
    """

    folder: Path
    mark: Mark
    record: RunContents
    history: bytes | None
    arrays: Mapping[str, np.ndarray]

    @property
    def features(self) -> Path:
        """File of the prompt features in the checkpoint."""
        return self.folder / layout.CHECKPOINT_FEATURES


# ---- Resume ---------------------------------------------------------------------------------------------------------


class CheckpointReader:
    """Reads the checkpoint that `train()` resumes from; every method is collective over all ranks.

    Args:
        setup (`RunSetup`): The assembled run.
    """

    def __init__(self, setup: RunSetup):
        self.setup, self.trainer, self.ranks = setup, setup.trainer, setup.ranks
        self._resumed: Path | None = None
        self._stock = False

    @contextmanager
    def training(self, resumed: Path | None) -> Iterator[None]:
        """Hold the lock of the record folder while `train()` runs.

        Args:
            resumed (`Path`, *optional*): The checkpoint that `train()` was asked to resume from.

        Raises:
            `CheckpointError`: If that checkpoint is incomplete.
            `StoreError`: If another run uses the folder.
        """
        with self._alone():
            self._stock = resumed is not None and self._is_stock(resumed)
            if resumed is not None and not self._stock:
                self.check(resumed)
            self._resumed = resumed
            with self._without_further_steps(resumed), report_stop(self.trainer):
                yield

    @contextmanager
    def _without_further_steps(self, resumed: Path | None) -> Iterator[None]:
        """Prevent a step of a run that ended before its plan: the trainer checks for the end only after a step."""
        args, steps = self.trainer.args, self.trainer.args.max_steps
        if resumed is not None and not self.setup.config.uses_trainer_order:
            state = TrainerState.load_from_json(str(resumed / "trainer_state.json"))
            kept = state.stateful_callbacks.get(STATE_KEY)
            if kept is not None and state.global_step >= planned_state(self.setup).steps_of(kept):
                args.max_steps = state.global_step
        try:
            yield
        finally:
            args.max_steps = steps

    def _is_stock(self, folder: Path) -> bool:
        """Whether a run in the trainer's own order resumes from a checkpoint of the trainer alone (allowed)."""
        if not self.setup.config.uses_trainer_order or (folder / layout.COMPLETE).exists():
            return False
        try:
            state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        except (OSError, ValueError, TypeError):
            return False
        return STATE_KEY not in state.stateful_callbacks

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with ExitStack() as stack:
            problem = None
            if self.ranks.is_main:
                try:
                    stack.enter_context(run_lock(self.setup.folder))
                    output_dir = Path(self.trainer.args.output_dir)
                    folders = output_dir, *store.checkpoints_in(output_dir)
                    sweep(*folders, records=self.setup.folder)
                    check_no_folders(self.setup.folder)
                except StoreError as error:
                    problem = str(error)
            if problem := self.ranks.from_main(problem):
                raise StoreError(problem)
            yield

    def check(self, folder: Path) -> None:
        """Check that a checkpoint is complete.

        Raises:
            `CheckpointError`: If it is not, naming the file, the reason, and the newest complete checkpoint.
        """
        problem = None
        if self.trainer.args.should_save:  # one process of those that share a disk
            self._restore_features(folder)
            problem = store.problem_of(folder) if folder.is_dir() else "the folder does not exist"
        problems = [problem for problem in self.ranks.gather([problem]) if problem is not None]
        if problems:
            remedy = store.resume_remedy(folder.parent) if self.ranks.is_main else None
            raise CheckpointError(
                f"{folder} cannot be resumed: {problems[0]}. {self.ranks.from_main(remedy)}"
            )

    def _restore_features(self, folder: Path) -> None:
        """Restore prompt features that the checkpoint has lost from their copy in the record folder."""
        try:
            noted = store.read_mark(folder).files.get(layout.CHECKPOINT_FEATURES)
        except ValueError:
            return
        path, beside = (
            folder / layout.CHECKPOINT_FEATURES,
            self.setup.folder / layout.PROMPT_FEATURES,
        )
        if noted is None or store.fits(path, noted) or not store.fits(beside, noted):
            return
        _remove(path)
        write_atomically(path, beside.read_bytes())
        logger.warning("%s was missing or damaged and is now %s again.", path, beside)

    def kept(self, state: TrainerState) -> Kept | None:
        """Return the contents of the checkpoint that training resumes from; `None` for a new run.

        Raises:
            `CheckpointError`: If the run cannot be resumed from it.
        """
        folder = self._resumed
        if folder is None and state.global_step:  # resumed without `trainer.train`
            folder = self._resumed_folder()
            self.check(folder)
        if folder is None:
            return None
        if self._stock:
            logger.warning(
                "%s was written without LearnAlignCallback, so the record does not include what was spent before "
                "it.",
                folder,
            )
            restore_reference(self.trainer, folder)
            return None
        kept = self._read(folder) if self.ranks.is_main else None
        if self.ranks.count == 1:
            return kept
        received = self.ranks.from_main(None if kept is None else replace(kept, history=None))
        return kept or received

    def _resumed_folder(self) -> Path:
        for place in (self.trainer.args.resume_from_checkpoint, checkpoint_folder(self.trainer)):
            if place is not None and Path(str(place)).is_dir():
                return Path(str(place))
        raise CheckpointError(
            f"Training continues at step {self.trainer.state.global_step}, but the checkpoint is unknown: call "
            "trainer.train(resume_from_checkpoint=...)."
        )

    def _read(self, folder: Path) -> Kept:
        try:
            record = read_contents(folder / layout.CHECKPOINT_RECORD)
            history = (folder / layout.CHECKPOINT_HISTORY).read_bytes()
            arrays = safetensors_numpy.load_file(folder / layout.CHECKPOINT_STATE)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} cannot be resumed: {error}. {store.resume_remedy(folder.parent)}"
            ) from error
        return Kept(folder, store.read_mark(folder), record, history, arrays)


def check_new(setup: RunSetup) -> None:
    """Check that no earlier run has left checkpoints, since they would be taken for this run's; collective.

    Raises:
        `CheckpointError`: If there are any.
    """
    output_dir = Path(setup.trainer.args.output_dir)
    found = None
    if setup.ranks.is_main:
        folders = store.checkpoints_in(output_dir)
        whole = [each for each in folders if store.problem_of(each, with_digests=False) is None]
        found = str(whole[0]) if whole else None
    if found := setup.ranks.from_main(found):
        raise CheckpointError(
            f"{found} belongs to an earlier run, and this run would start at step 0 in its folder. To resume that "
            "run: train(resume_from_checkpoint=True), or --resume_from_checkpoint true for a recipe. To start a "
            f"new run: give another output_dir, or move the checkpoints and records of {output_dir} away."
        )


# ---- Saving ---------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Adds a run's files to the checkpoints of transformers; every method is collective over all ranks.

    Args:
        setup (`RunSetup`): The assembled run.
        run (`RunState`): Its state.
        counters (`PhaseCounters`): What is counted in its current phase.
        record (`RunRecord`): Its notes.
        history (`HistoryRecorder`): Its reward history.
        kept (`Kept`, *optional*): The checkpoint that the run was resumed from.
    """

    def __init__(
        self,
        setup: RunSetup,
        run: RunState,
        counters: PhaseCounters,
        record: RunRecord,
        history: HistoryRecorder,
        kept: Kept | None,
    ):
        self.setup, self.trainer, self.ranks = setup, setup.trainer, setup.ranks
        self.run, self.counters, self.record, self.history = run, counters, record, history
        self.last_step = -1
        """The step of the newest checkpoint that this run has written."""
        self._features = None if kept is None else kept.features
        self._wanted: Path | None = None
        self._ended = self._place()

    def state_dict(self) -> dict[str, Any]:
        """Return the small part of the state, as plain JSON values."""
        return {**self.run.state_dict(), **self.counters.state_dict()}

    def _place(self) -> tuple[int, int]:
        """Optimizer steps and micro-steps done so far."""
        return self.trainer.state.global_step, micro_steps_made(self.trainer)

    def begin(self, folder: Path) -> bool:
        """Prepare a checkpoint that transformers is about to write; returns whether it may be written now.

        It may not be written inside a step. [`end_step`] then requests it again.
        """
        if self._ended != self._place():
            self._wanted = folder
            return False
        self.trainer.state.stateful_callbacks[STATE_KEY] = self.state_dict()
        if self.ranks.is_main:
            # An overwritten checkpoint is incomplete until its marker is written again.
            for path in [folder / layout.COMPLETE, *folder.glob("learnalign_*")]:
                _remove(path)
        self.ranks.wait()
        return True

    def seal(self, folder: Path) -> None:
        """Add our files and the completion marker, after transformers has written its files.

        Args:
            folder (`Path`): The checkpoint.

        Raises:
            `StoreError`: If a file cannot be written.
        """
        self.last_step = self.trainer.state.global_step
        save_generation(self.trainer, folder)
        save_reference(self.trainer, folder)
        if self.ranks.is_main:
            self._write(folder)
        self.ranks.wait()
        args = self.trainer.args
        if args.should_save:
            mark = Mark(
                run=self.record.contents.run,
                step=self.trainer.state.global_step,
                processes=self.ranks.count,
                mid_generation=is_mid_generation(self.trainer),
                resumable=not args.save_only_model,
                files=store.sealed_files(folder),
            )
            store.write_mark(folder, mark)
        self.ranks.wait()

    def _write(self, folder: Path) -> None:
        write_json(folder / layout.CHECKPOINT_RECORD, sealed(self.record.contents))
        write_atomically(folder / layout.CHECKPOINT_HISTORY, self.history.content())
        self.history.save()
        write_atomically(
            folder / layout.CHECKPOINT_STATE, safetensors_numpy.save(self.run.arrays())
        )
        self._write_features(folder / layout.CHECKPOINT_FEATURES)

    def _write_features(self, path: Path) -> None:
        before, beside = self._features, self.setup.folder / layout.PROMPT_FEATURES
        if before is not None and before.is_file():
            same_file(before, path)
        elif self.setup.config.needs_belief and beside.is_file():
            write_atomically(path, beside.read_bytes())
        self._features = path

    def end_step(self, control: TrainerControl) -> None:
        """Request the checkpoint that was due inside the step; called once the step is done and recorded."""
        self._ended = self._place()
        if self._wanted is None:
            return
        logger.info(
            "A checkpoint was requested within a step; it will be saved at the end of the step."
        )
        control.should_save = True
        if self.ranks.is_main and self._wanted.is_dir() and not any(self._wanted.iterdir()):
            with suppress(OSError):
                self._wanted.rmdir()
        self._wanted = None


def checkpoint_folder(trainer: GRPOTrainer) -> Path:
    """Folder to which transformers saves the checkpoint of the current step."""
    return Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step, or `None`; incomplete ones are reported in the log.

    `train()` reads the files and finds out whether they are undamaged.
    """
    for folder in store.checkpoints_in(output_dir):
        problem = store.problem_of(folder, with_digests=False)
        if problem is None:
            return folder
        logger.warning("%s is not used: %s.", folder, problem)
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------

RESUME = "resume_from_checkpoint=True, or --resume_from_checkpoint true for a recipe"


@contextmanager
def report_interruption(trainer: GRPOTrainer) -> Iterator[None]:
    """Report what was saved and how to resume if scoring is interrupted, and raise the interruption again.

    It is raised from here: a traceback into scoring is of no interest and would hide the message.
    """
    try:
        yield
    except KeyboardInterrupt as interruption:
        if not is_reported(interruption):
            raise
        message = f"{interruption}; {resume_hint(trainer)}."
        if trainer.accelerator.is_main_process:
            logger.warning("%s", message)
        raise KeyboardInterrupt(message) from None


@contextmanager
def report_stop(trainer: GRPOTrainer) -> Iterator[None]:
    """Report what was saved and how to resume if training is interrupted, and raise the interruption again.

    An interruption that has been reported already is raised as it is.
    """
    try:
        yield
    except KeyboardInterrupt as interruption:
        if is_reported(interruption):
            raise
        told = interrupted_run(trainer)
        if trainer.accelerator.is_main_process:
            logger.warning("%s", told)
        raise KeyboardInterrupt(told) from None


def is_reported(interruption: KeyboardInterrupt) -> bool:
    """Whether the exception already says what was saved; a plain one has no text."""
    return bool(interruption.args)


def resume_hint(trainer: GRPOTrainer) -> str:
    """Return how to resume an interrupted scoring, as the end of a sentence."""
    if trainer.state.global_step == 0:
        return "the same command continues there"
    whole = last_complete_checkpoint(str(trainer.args.output_dir))
    if whole is not None and whole.name == checkpoint_folder(trainer).name:
        return f"the same command with resume ({RESUME}) continues there"
    return (
        "no checkpoint has the current policy (save_at_phase_end, save_strategy): the same command trains again, and "
        "reuses the measurements if the weights are identical to the last bit"
    )


def interrupted_run(trainer: GRPOTrainer) -> str:
    """Return what was saved of a run that was interrupted during training, as a sentence."""
    step = trainer.state.global_step
    whole = last_complete_checkpoint(str(trainer.args.output_dir))
    if whole is None:
        return f"Interrupted at step {step}; no checkpoint was saved, so the same command starts again at step 0."
    return f"Interrupted at step {step}; {whole} was saved: the same command with resume ({RESUME}) continues there."
