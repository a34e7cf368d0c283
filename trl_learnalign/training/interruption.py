"""Ctrl-C: what is kept, and how to go on, in one sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trl_learnalign.training.checkpoints import checkpoint_folder, last_complete_checkpoint

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

RESUME = "resume_from_checkpoint=True, for a recipe --resume_from_checkpoint true"


@contextmanager
def interruption_told(trainer: GRPOTrainer) -> Iterator[None]:
    """Say what is kept if scoring is interrupted, and how to go on there; the interruption goes on.

    It goes on from here: where in the scoring it came is of no interest, and would bury the sentence.

    Args:
        trainer (`GRPOTrainer`): The trainer that scores.
    """
    try:
        yield
    except KeyboardInterrupt as interruption:
        if not is_told(interruption):
            raise
        told = f"{interruption}; {way_on(trainer)}."
        if trainer.accelerator.is_main_process:
            logger.warning("%s", told)
        raise KeyboardInterrupt(told) from None


def is_told(interruption: KeyboardInterrupt) -> bool:
    """Whether it says what is kept already; a plain one has no text."""
    return bool(interruption.args)


def way_on(trainer: GRPOTrainer) -> str:
    """How an interrupted scoring goes on, as the end of a sentence.

    Args:
        trainer (`GRPOTrainer`): With the step that its policy has reached.
    """
    if trainer.state.global_step == 0:
        return "the same command goes on there"
    whole = last_complete_checkpoint(str(trainer.args.output_dir))
    if whole is not None and whole.name == checkpoint_folder(trainer).name:
        return f"the same command with resume ({RESUME}) goes on there"
    return (
        "no checkpoint holds the policy as it is now (save_at_phase_end, save_strategy): the same command trains "
        "anew, and goes on there if the weights come out the same, bit by bit"
    )


def interrupted_run(trainer: GRPOTrainer) -> str:
    """What is left of a run that was interrupted while it trained, in a sentence.

    Args:
        trainer (`GRPOTrainer`): The trainer.
    """
    step = trainer.state.global_step
    whole = last_complete_checkpoint(str(trainer.args.output_dir))
    if whole is None:
        return (
            f"Interrupted at step {step}; no checkpoint was saved, so the same command begins anew."
        )
    return f"Interrupted at step {step}; {whole} is kept: the same command with resume ({RESUME}) goes on there."
