"""Epoch events for other callbacks, and hooks around the checkpoints of transformers.

The trainer's loop runs *virtual* epochs (`curriculum.Plan.epoch_steps`). It reads batches ahead, so an order that
depends on the latest rollouts has to start a new iterator. But `state.epoch`, the "epoch" strategies of logging,
saving and evaluation, and other callbacks all depend on what the loop considers an epoch. The callback handler's
`call_event`, which all of these go through, is therefore replaced on the instance. The replacement writes the true
epoch into the state before any callback sees a step, and forwards epoch begin and end events only where a pass over
the data begins or ends. One long epoch with a lazy sampler would need neither, but the loop draws the batches of one
accumulation, plus one, before the first of them is rolled out.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import transformers.trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from trl_learnalign.bridge.borrow import random_states, restore_random_states
from trl_learnalign.bridge.requires import Called, Replaced, Required, overridden
from trl_learnalign.records.store import writing

if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)

_CALL = ("event", "args", "state", "control", "kwargs")
EPOCHS_REQUIRES = Required(
    functions={"transformers.trainer_callback:CallbackHandler.call_event": Replaced(_CALL)}
)


class Passes(Protocol):
    """Where the passes of a run begin and end, by completed optimizer steps."""

    @property
    def count(self) -> int:
        """Number of passes that the run begins."""

    def epoch_at(self, step: int) -> float:
        """Completed passes, including the fraction of the current one."""

    def ends_at(self, step: int) -> bool:
        """Whether a pass ends at this step."""


class EpochEvents:
    """Reports passes over the data as epochs to a trainer's callbacks.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        owner (`TrainerCallback`): The callback that receives the begin events of virtual epochs; nothing changes until
            it is among the trainer's callbacks.
        passes (callable): Returns the passes of the current run.
    """

    _call_original: Callable[..., TrainerControl]

    def __init__(self, trainer: GRPOTrainer, owner: TrainerCallback, passes: Callable[[], Passes]):
        self.handler, self.owner, self.passes = trainer.callback_handler, owner, passes
        before = self.handler.call_event
        replaced = getattr(before, "__self__", None)
        # An instance that was installed on the same trainer before has given up its sampler as well.
        self._call_original = (
            replaced._call_original if isinstance(replaced, EpochEvents) else before
        )
        self._has_begun = self._has_warned = False
        self.handler.call_event = self._call_event

    def _call_event(
        self,
        event: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        event_args = (event, args, state, control)
        if self.owner not in self.handler.callbacks:
            return self._call_original(*event_args, **kwargs)
        if event == "on_train_begin":
            self._has_begun = False
            state.num_train_epochs = self.passes().count
            control = self._call_original(*event_args, **kwargs)
            # The owner has restored the position of a resumed run by now.
            state.num_train_epochs = self.passes().count
            return control
        if event == "on_epoch_begin":
            return self._begin(event_args, **kwargs)
        if event == "on_epoch_end" and not self._ends(state, control):
            control.should_log = control.should_evaluate = control.should_save = False
            return control
        if event == "on_step_end":
            state.epoch = self.passes().epoch_at(state.global_step)
        return self._checked(state, self._call_original(*event_args, **kwargs))

    def _begin(
        self,
        event_args: tuple[str, TrainingArguments, TrainerState, TrainerControl],
        **kwargs: Any,
    ) -> TrainerControl:
        """A virtual epoch begins; other callbacks see it only if a pass begins or a run resumes inside one."""
        callbacks = self.handler.callbacks
        if self._has_begun and not self.passes().ends_at(event_args[2].global_step):
            self.handler.callbacks = [self.owner]
        self._has_begun = True
        try:
            return self._call_original(*event_args, **kwargs)
        finally:
            self.handler.callbacks = callbacks

    def _ends(self, state: TrainerState, control: TrainerControl) -> bool:
        return control.should_training_stop or self.passes().ends_at(state.global_step)

    def _checked(self, state: TrainerState, control: TrainerControl) -> TrainerControl:
        """Reject a callback's request to skip to the next epoch, which the plan does not support."""
        if control.should_epoch_stop:
            control.should_epoch_stop = False
            if not self._has_warned:
                logger.warning(
                    "A callback set should_epoch_stop at step %d. It has no effect, because the prompts of the "
                    "pass are planned. To end the training set should_training_stop; to shorten it set max_steps.",
                    state.global_step,
                )
            self._has_warned = True
        return control


# ---- Checkpoint hooks -----------------------------------------------------------------------------------------------
# `_save_checkpoint` writes every checkpoint, whatever triggered it: a step count, a boundary, the preemption support
# of transformers or a script. It deletes older checkpoints and uploads before it returns. Both are postponed here
# until the checkpoint is complete.
#
# A checkpoint captures the moment between two optimizer steps. One that is requested within a step is written at the
# step's end, because the rollouts of half a step could not be resumed. Code that draws random numbers between the end
# of a step and the beginning of the next one (the data iterator) draws them again after a resume. The checkpoint
# therefore saves the random state from before those draws.

_ROTATION = "rotate_checkpoints"
_IS_FUNCTION = _ROTATION in vars(transformers.trainer)
"""Whether older checkpoints are deleted by a function (transformers 5) instead of a method (before)."""

SAVING_REQUIRES = Required(
    trainer=("_step", "train", "create_model_card", *(() if _IS_FUNCTION else (f"_{_ROTATION}",))),
    calls={
        "_save_checkpoint": Replaced(("model", "trial")),
        "_load_rng_state": Replaced(("checkpoint",)),
        "_push_from_checkpoint": Replaced(("checkpoint_folder",)),
        "_get_output_dir": Called(0, ("trial",)),
    },
)


@dataclass(frozen=True)
class SavingHooks:
    """What a run does when checkpoints are written and read; all ranks call each hook together.

    Args:
        is_active (callable): Whether the run takes part.
        training (callable): Maps the checkpoint that `train()` resumes from, or `None`, to a context manager that
            stays open during training.
        begin (callable): Maps the folder to whether a checkpoint may be written now.
        seal (callable): Receives the folder with everything that transformers wrote, and adds what is missing.
        describe (callable): Adds to the model card that TRL has written; called on the main process.
    """

    is_active: Callable[[], bool]
    training: Callable[[Path | None], AbstractContextManager[None]]
    begin: Callable[[Path], bool]
    seal: Callable[[Path], None]
    describe: Callable[[], None]


class Saving:
    """Replaces the trainer's `train`, `_save_checkpoint` and `create_model_card`.

    Args:
        trainer (`GRPOTrainer`): The trainer; the overrides are on the instance, not on its class.
        hooks (`SavingHooks`): What the run does.
    """

    def __init__(self, trainer: GRPOTrainer, hooks: SavingHooks):
        self.trainer, self.hooks = trainer, hooks
        self._random: Any = None
        self._train = _original(trainer, "train")
        self._save_checkpoint = _original(trainer, "_save_checkpoint")
        self._load_rng_state = _original(trainer, "_load_rng_state")
        self._create_model_card = _original(trainer, "create_model_card")
        for name, method in (
            ("train", self.train),
            ("_save_checkpoint", self.save_checkpoint),
            ("_load_rng_state", self.load_rng_state),
            ("create_model_card", self.create_model_card),
        ):
            setattr(trainer, name, method)

    def train(self, resume_from_checkpoint: Any = None, *others: Any, **named: Any) -> Any:
        """`Trainer.train`."""
        if not self.hooks.is_active():
            return self._train(resume_from_checkpoint, *others, **named)
        if resume_from_checkpoint is True:
            found = get_last_checkpoint(self.trainer.args.output_dir)
            resume_from_checkpoint = True if found is None else found
        given = isinstance(resume_from_checkpoint, (str, Path))
        with self.hooks.training(Path(resume_from_checkpoint) if given else None):
            return self._train(resume_from_checkpoint, *others, **named)

    def save_checkpoint(self, model: Any, trial: Any) -> None:
        """`Trainer._save_checkpoint`.

        Raises:
            `StoreError`: If the disk is full or cannot be written.
        """
        trainer = self.trainer
        if not self.hooks.is_active():
            self._save_checkpoint(model, trial)
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        folder = Path(trainer._get_output_dir(trial=trial)) / name
        with writing(folder):
            self._save(folder, model, trial)

    def _save(self, folder: Path, model: Any, trial: Any) -> None:
        trainer = self.trainer
        if not self.hooks.begin(folder):
            return
        rotation = transformers.trainer if _IS_FUNCTION else trainer
        with ExitStack() as stack:
            stack.enter_context(self._of_before())
            pushes = stack.enter_context(_postponed(trainer, "_push_from_checkpoint"))
            name = _ROTATION if _IS_FUNCTION else f"_{_ROTATION}"
            rotations = stack.enter_context(_postponed(rotation, name))
            self._save_checkpoint(model, trial)
        self.hooks.seal(folder)
        for call in (*pushes, *rotations):
            call()

    def load_rng_state(self, checkpoint: Any) -> None:
        """`Trainer._load_rng_state`."""
        self._load_rng_state(checkpoint)
        self.keep_random()

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """`Trainer.create_model_card`."""
        self._create_model_card(*arguments, **named)
        if self.hooks.is_active() and self.trainer.accelerator.is_main_process:
            self.hooks.describe()

    def keep_random(self) -> None:
        """Until the next step begins, save the present random state in checkpoints."""
        self._random = random_states()

    def step_begins(self) -> None:
        """From now on, save the random state at the time of writing in checkpoints."""
        self._random = None

    @contextmanager
    def _of_before(self) -> Iterator[None]:
        if self._random is None:
            yield
            return
        now = random_states()
        restore_random_states(self._random)
        try:
            yield
        finally:
            restore_random_states(now)


def micro_steps_made(trainer: GRPOTrainer) -> int:
    """Micro-steps that the trainer has made, including those of an unfinished optimizer step."""
    return int(trainer._step)


def _original(trainer: GRPOTrainer, name: str) -> Callable[..., Any]:
    """A method of the trainer before another [`Saving`] replaced it."""
    method = getattr(trainer, name)
    owner = getattr(method, "__self__", None) if inspect.ismethod(method) else None
    return getattr(owner, f"_{name.lstrip('_')}") if isinstance(owner, Saving) else method


@contextmanager
def _postponed(owner: Any, name: str) -> Iterator[list[Callable[[], Any]]]:
    """Postpone calls of a function within the context; yields the list of postponed calls."""
    original = getattr(owner, name)
    calls: list[Callable[[], Any]] = []

    def later(*arguments: Any, **named: Any) -> None:
        calls.append(partial(original, *arguments, **named))

    with overridden(owner, name, later):
        yield calls
