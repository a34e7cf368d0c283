"""Checkpoints of transformers: what happens when one is written, and before one is gone on with.

However a checkpoint comes about (by steps, at a boundary, by transformers' own preemption support, by a script),
`_save_checkpoint` writes it. It deletes older checkpoints and uploads before it returns: both wait here until the
checkpoint has everything that it needs.

A checkpoint is of a moment between two optimizer steps. One that is asked for within a step is written at its end: the
rollouts of half a step could not be gone on with. And what draws random numbers between the end of a step and the
beginning of the next one (the iterator over the data) draws them once more after a resume: what is saved then has the
random state of before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers.trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from trl_learnalign.bridge.lending import random_states, restore_random_states
from trl_learnalign.bridge.overrides import overridden
from trl_learnalign.bridge.required import Called, Replaced, Required
from trl_learnalign.records.store import writing

if TYPE_CHECKING:
    from trl import GRPOTrainer

_ROTATION = "rotate_checkpoints"
_IS_FUNCTION = _ROTATION in vars(transformers.trainer)
"""Older checkpoints are deleted by a function in transformers 5, and by a method before."""

REQUIRES = Required(
    trainer=("_step", "train", *(() if _IS_FUNCTION else (f"_{_ROTATION}",))),
    calls={
        "_save_checkpoint": Replaced(("model", "trial")),
        "_load_rng_state": Replaced(("checkpoint",)),
        "_push_from_checkpoint": Replaced(("checkpoint_folder",)),
        "_get_output_dir": Called(0, ("trial",)),
    },
)


@dataclass(frozen=True)
class SavingHooks:
    """What a run does when checkpoints are written and read; all ranks call each of them together.

    Args:
        is_active (callable): Whether the run takes part at all.
        training (callable): The checkpoint that `train()` was asked to go on with, or `None` → what is entered for as
            long as it trains.
        begin (callable): The folder → whether a checkpoint may be written now.
        seal (callable): The folder, with everything of transformers' → adds what is missing.
    """

    is_active: Callable[[], bool]
    training: Callable[[Path | None], AbstractContextManager[None]]
    begin: Callable[[Path], bool]
    seal: Callable[[Path], None]


class Saving:
    """Takes the place of the trainer's `train` and `_save_checkpoint`.

    Args:
        trainer (`GRPOTrainer`): The trainer; the overrides sit on the instance, not on its class.
        hooks (`SavingHooks`): What the run does.
    """

    def __init__(self, trainer: GRPOTrainer, hooks: SavingHooks):
        self.trainer, self.hooks = trainer, hooks
        self._random: Any = None
        self._train = _original(trainer, "train")
        self._save_checkpoint = _original(trainer, "_save_checkpoint")
        self._load_rng_state = _original(trainer, "_load_rng_state")
        for name, method in (
            ("train", self.train),
            ("_save_checkpoint", self.save_checkpoint),
            ("_load_rng_state", self.load_rng_state),
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

    def keep_random(self) -> None:
        """Until the next step begins, checkpoints have the random state of now."""
        self._random = random_states()

    def step_begins(self) -> None:
        """From now on, checkpoints have the random state that they are written in."""
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
    """Micro-steps that the trainer has made, those of an optimizer step under way among them."""
    return int(trainer._step)


def _original(trainer: GRPOTrainer, name: str) -> Callable[..., Any]:
    """A method of the trainer as it was before another [`Saving`] took its place."""
    method = getattr(trainer, name)
    owner = getattr(method, "__self__", None) if inspect.ismethod(method) else None
    return getattr(owner, f"_{name.lstrip('_')}") if isinstance(owner, Saving) else method


@contextmanager
def _postponed(owner: Any, name: str) -> Iterator[list[Callable[[], Any]]]:
    """Calls of a function within the context, to be made after it."""
    original = getattr(owner, name)
    calls: list[Callable[[], Any]] = []

    def later(*arguments: Any, **named: Any) -> None:
        calls.append(partial(original, *arguments, **named))

    with overridden(owner, name, later):
        yield calls
