"""Hooks into the trainer's loop: its order and state, epoch events for other callbacks, and its checkpoints.

The trainer's loop runs *virtual* epochs (`plan.Plan.epoch_steps`). It reads batches ahead, so an order that
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
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import transformers.trainer
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, has_length
from trl.trainer.utils import RepeatSampler

from trl_learnalign.bridge.policy import reshard, weights_changed
from trl_learnalign.bridge.requires import Called, Replaced, Required, overridden
from trl_learnalign.records.store import writing

# ---- The trainer's own order, after a resume ------------------------------------------------------------------------
# TRL's sampler draws a new order for each epoch from its own generator, which no checkpoint saves. A stock run that is
# resumed in its second epoch therefore trains on the order of the first epoch again. The sampler stays TRL's; a
# resumed run draws the orders of the earlier epochs and discards them.

ORDER_REQUIRES = Required(calls={"_get_train_sampler": Replaced(("dataset",))})


class StockOrder:
    """Keeps a reference to the sampler that a trainer creates for training.

    Args:
        trainer (`GRPOTrainer`): The trainer, before `train()`.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self._sampler: Sampler[int] | None = None
        self._make = trainer._get_train_sampler
        trainer._get_train_sampler = self._remembered  # type: ignore[method-assign]

    def _remembered(self, dataset: Any = None) -> Sampler[int] | None:
        self._sampler = self._make(dataset)
        return self._sampler

    def skip_earlier_epochs(self) -> None:
        """Advance the sampler past the earlier epochs of a resumed run; call it before the first batch is drawn."""
        passes, _ = passes_made(self.trainer)
        if isinstance(self._sampler, RepeatSampler):
            for _ in range(passes):
                next(iter(self._sampler), None)


def passes_made(trainer: GRPOTrainer) -> tuple[int, int]:
    """Finished epochs of the trainer's loop, and micro-steps made since training began."""
    steps, accumulation = trainer.state.global_step, trainer.args.gradient_accumulation_steps
    loader = trainer.callback_handler.train_dataloader
    if loader is None or not has_length(loader):
        return 0, steps * accumulation
    # The last step of an epoch takes the remaining micro-batches.
    passes, rest = divmod(steps, max(1, math.ceil(len(loader) / accumulation)))
    return passes, passes * len(loader) + rest * accumulation


# ---- State of the trainer -------------------------------------------------------------------------------------------

REQUIRES = Required(
    trainer=(
        "_metrics",
        "_logs",
        "_pending_metrics",
        "_pending_extra_logs",
        "_step",
        "_buffered_inputs",
        "_entropy_window_stats",
        "_last_world_entropy",
        "_current_train_step_time",
        "entropy_coef",
        "environments",
        "environment_factories",
    ),
    sometimes={"_environment_pool": lambda trainer: trainer.environment_factories is not None},
)

# What TRL collects for its next log.
COLLECTED = ("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs")

# Counters and controller state that generation or the loss advances.
COUNTERS = (
    "_step",
    "_buffered_inputs",
    "_current_train_step_time",
    "_entropy_window_stats",
    "_last_world_entropy",
    "entropy_coef",
    "environments",
)


def begin_counting(trainer: GRPOTrainer) -> None:
    """Make the trainer count micro-steps from the run's start, and clear what an interrupted `train()` left behind.

    A fresh trainer counts from 0 even after a resume. A generation that feeds several optimizer steps would then stay
    misaligned, and completions of one pool would be trained on in the next phase. A trainer that has trained before
    keeps its old count, and still holds the completions and metrics of the step at which it was interrupted.
    """
    _, trainer._step = passes_made(trainer)
    trainer._buffered_inputs = None
    trainer._current_train_step_time = 0.0
    trainer._entropy_window_stats = None
    for name in COLLECTED:
        setattr(trainer, name, _emptied(getattr(trainer, name)))
    weights_changed(trainer)


@contextmanager
def preserve_trainer_state(trainer: GRPOTrainer) -> Iterator[None]:
    """Restore the trainer's metrics, logs, counters, environments, modes and random states on exit.

    State that only user code can restore does change: that of reward functions, tools, a `rollout_func` and anything
    that environments keep outside their own instances. So do the random numbers of a vLLM server. No table of
    completions is written within the context, because `log` would overwrite the table of the current step.
    """
    swapped = {name: getattr(trainer, name) for name in COLLECTED}
    counters = {name: getattr(trainer, name) for name in COUNTERS}
    tokens_seen = trainer.state.num_input_tokens_seen
    modes = [(module, module.training) for module in trainer.model.modules()]
    states = random_states()
    counters["log_completions"] = trainer.log_completions
    for name, value in swapped.items():
        setattr(trainer, name, _emptied(value))
    trainer.log_completions = False
    if trainer.environment_factories is not None:
        # Environments outlive a rollout. TRL adds some if the pool is too small; this keeps training's own pool.
        swapped["_environment_pool"] = trainer._environment_pool
        trainer._environment_pool = {name: [] for name in trainer.environment_factories}
    try:
        with _keep_control_flags(trainer):
            yield
    finally:
        for name, value in {**swapped, **counters}.items():
            setattr(trainer, name, value)
        trainer.state.num_input_tokens_seen = tokens_seen
        reshard(trainer)
        for module, training in modes:
            module.training = training
        restore_random_states(states)


def _emptied(value: Any) -> Any:
    """An empty container of the same type and length limit."""
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory)
    if isinstance(value, deque):
        return deque(maxlen=value.maxlen)
    return {key: _emptied(entry) for key, entry in value.items()}


def random_states() -> tuple[Any, ...]:
    """Random states of Python, NumPy, and torch on all devices."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def restore_random_states(states: tuple[Any, ...]) -> None:
    """Restore the state that [`random_states`] returned."""
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


def log_apart(trainer: GRPOTrainer, metrics: dict[str, float], has_ended: bool = False) -> None:
    """Log the package's metrics without flushing the trainer's, which belong to its next step.

    Trackers and the trainer's history receive them. Callbacks that print every log on the terminal do not, because a
    log line of the package already shows the same there.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        metrics (`dict`): Metrics by name.
        has_ended (`bool`, *optional*): Whether training has ended; most trackers of transformers are closed then.
    """
    with preserve_trainer_state(trainer), _received_by_trackers(trainer, has_ended):
        trainer.log(dict(metrics))


@contextmanager
def _keep_control_flags(trainer: GRPOTrainer) -> Iterator[None]:
    """Restore the log, save and evaluate flags of the trainer's control, which the respective actions reset."""
    control = trainer.control
    flags = control.should_log, control.should_evaluate, control.should_save
    try:
        yield
    finally:
        trainer.control = control
        control.should_log, control.should_evaluate, control.should_save = flags


_PRINTERS = (PrinterCallback, ProgressCallback)
"""Callbacks of transformers that print logs, without and with a progress bar; user classes are left alone."""

_STAY_OPEN = (TensorBoardCallback, WandbCallback)
"""Trackers of transformers that can still be logged to after training."""


@contextmanager
def _received_by_trackers(trainer: GRPOTrainer, has_ended: bool) -> Iterator[None]:
    handler = trainer.callback_handler
    all_of_them = handler.callbacks
    handler.callbacks = [each for each in all_of_them if _is_open(each, has_ended)]
    try:
        yield
    finally:
        handler.callbacks = all_of_them


def _is_open(callback: TrainerCallback, has_ended: bool) -> bool:
    if type(callback) in _PRINTERS:
        return False
    is_integration = type(callback).__module__.startswith("transformers.integrations")
    return isinstance(callback, _STAY_OPEN) or not (has_ended and is_integration)


# ---- Epoch events ---------------------------------------------------------------------------------------------------

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
