"""Context managers that restore the trainer's state, also after an exception."""

from __future__ import annotations

import math
import random
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length
from trl.trainer.utils import RepeatSampler

from trl_learnalign.bridge.policy import reshard, weights_changed
from trl_learnalign.bridge.requires import Replaced, Required

if TYPE_CHECKING:
    from trl import GRPOTrainer


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
