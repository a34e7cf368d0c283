"""Epochs as everybody else sees them: one for each pass over the prompts.

The trainer's loop makes *virtual* epochs (`curriculum.Plan.epoch_steps`), since it reads batches ahead: an order that
goes by what has just been rolled out has to begin another iterator. `state.epoch`, the strategies "epoch" of logging,
saving and evaluation, and other people's callbacks all hang on what the loop takes for an epoch. So the one place that
all of it goes through, the callback handler's `call_event`, is replaced on the instance: it puts the true epoch into
the state before anybody is told of a step, and passes on the beginning and the end of an epoch where a pass begins or
ends. One long epoch with a lazy sampler would need neither, but the batches of an accumulation, and one more, are
drawn before the first of them is rolled out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_learnalign.bridge.required import Replaced, Required

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

_CALL = ("event", "args", "state", "control", "kwargs")
REQUIRES = Required(
    functions={"transformers.trainer_callback:CallbackHandler.call_event": Replaced(_CALL)}
)


class Passes(Protocol):
    """Where the passes of a run begin and end, by optimizer steps that are done."""

    @property
    def count(self) -> int:
        """How many the run begins."""

    def epoch_at(self, step: int) -> float:
        """Passes that are done, with the part of one."""

    def ends_at(self, step: int) -> bool:
        """Whether one ends, and another begins if the run goes on."""


class EpochEvents:
    """Tells a trainer's callbacks of passes as epochs.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        owner (`TrainerCallback`): Who is told of the beginning of virtual epochs; nothing changes until it is among
            the trainer's callbacks.
        passes (`Passes`): The passes.
    """

    _tell: Callable[..., TrainerControl]

    def __init__(self, trainer: GRPOTrainer, owner: TrainerCallback, passes: Passes):
        self.handler, self.owner, self.passes = trainer.callback_handler, owner, passes
        before = self.handler.call_event
        replaced = getattr(before, "__self__", None)
        # One that was made for the same trainer before has given up its sampler, too.
        self._tell = replaced._tell if isinstance(replaced, EpochEvents) else before
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
        told = (event, args, state, control)
        if self.owner not in self.handler.callbacks:
            return self._tell(*told, **kwargs)
        if event == "on_train_begin":
            self._has_begun = False
            state.num_train_epochs = self.passes.count
            control = self._tell(*told, **kwargs)
            state.num_train_epochs = (
                self.passes.count
            )  # the owner knows by now where a resumed run stands
            return control
        if event == "on_epoch_begin":
            return self._begin(told, **kwargs)
        if event == "on_epoch_end" and not self._ends(state, control):
            control.should_log = control.should_evaluate = control.should_save = False
            return control
        if event == "on_step_end":
            state.epoch = self.passes.epoch_at(state.global_step)
        return self._checked(state, self._tell(*told, **kwargs))

    def _begin(
        self,
        told: tuple[str, TrainingArguments, TrainerState, TrainerControl],
        **kwargs: Any,
    ) -> TrainerControl:
        """A virtual epoch begins; everybody is told if a pass does, or if a run goes on inside one."""
        callbacks = self.handler.callbacks
        if self._has_begun and not self.passes.ends_at(told[2].global_step):
            self.handler.callbacks = [self.owner]
        self._has_begun = True
        try:
            return self._tell(*told, **kwargs)
        finally:
            self.handler.callbacks = callbacks

    def _ends(self, state: TrainerState, control: TrainerControl) -> bool:
        return control.should_training_stop or self.passes.ends_at(state.global_step)

    def _checked(self, state: TrainerState, control: TrainerControl) -> TrainerControl:
        """Without a callback's wish to go on with the next epoch: the plan has no place for it."""
        if control.should_epoch_stop:
            control.should_epoch_stop = False
            if not self._has_warned:
                logger.warning(
                    "A callback has set should_epoch_stop at step %d, and the pass goes on all the same: its prompts "
                    "are planned. To end the training set should_training_stop, to shorten it max_steps.",
                    state.global_step,
                )
            self._has_warned = True
        return control
