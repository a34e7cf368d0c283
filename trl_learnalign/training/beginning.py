"""A run begins, or goes on: what is there already, and whether it is the same run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.records.run import RunRecord
from trl_learnalign.training.run_identity import RunIdentity, identify
from trl_learnalign.training.setup import RunSetup

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

STATE_KEY = "learnalign"
"""Key of the state in the trainer's checkpoint."""


def check_beginning(state: TrainerState, has_trained: bool) -> None:
    """Check that a trainer that has trained goes on where it stood.

    Raises:
        `ValueError`: If it would begin anew.
    """
    if state.global_step == 0 and has_trained:
        raise ValueError(
            "This trainer has trained already, and train() would begin at step 0 with the weights as they are now: "
            "the warm-up and what is selected would not be those of the plan, and the record of the first run would "
            "be overwritten. To go on after an interruption: train(resume_from_checkpoint=True). To train once more: "
            "make a new trainer with another output_dir."
        )


def check_alone(trainer: GRPOTrainer, callback: TrainerCallback) -> None:
    """Check that no other callback of the kind decides on the same trainer's prompts.

    Raises:
        `ValueError`: If one does.
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


def identified(
    setup: RunSetup, config: LearnAlignConfig, record: RunRecord
) -> tuple[RunIdentity, LearnAlignConfig]:
    """The identity of a run, and its settings as they hold; all ranks call it together.

    A run that version 0.1 began goes on by the letter of Eq. 9, the only rule that it knew.

    Args:
        setup (`RunSetup`): What the run is made of.
        config (`LearnAlignConfig`): Settings as they were given.
        record (`RunRecord`): Of the folder that may hold a run already.
    """
    found = setup.ranks.from_main(record.found() if setup.ranks.is_main else None)
    begun = {} if found is None else found.identity
    of_version_0_1 = "selector" in begun and "zero_learnability" not in begun
    if of_version_0_1 and config.zero_learnability != "by_score":
        config = replace(config, zero_learnability="by_score")
        logger.warning(
            "%s was begun by version 0.1, which ranked by the letter of Eq. 9; this run goes on so, as with "
            "zero_learnability='by_score'.",
            record.folder,
        )
    identity = identify(setup, config, of_version_0_1)
    setup.ranks.agree("plan, dataset and selection settings", identity.entries)
    return identity, config


def warn_of_a_second_beginning(setup: RunSetup, identity: RunIdentity, record: RunRecord) -> None:
    """Before hours of warm-up: measurements of the first run fit only if training repeats itself bit by bit."""
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
            "it), and is refused otherwise. To go on where that run stood: train(resume_from_checkpoint=True); to be "
            "sure of a new run, give it another output_dir.",
            *(record.path, found.last_step),
        )


def rollout_prompts_before(setup: RunSetup, record: RunRecord) -> int | None:
    """Prompts of one generation call of scoring in a run that the folder holds; all ranks call it together.

    `None` if it holds none, or one of a version that did not note them.

    Args:
        setup (`RunSetup`): What the run is made of.
        record (`RunRecord`): Of the folder.
    """
    found = setup.ranks.from_main(record.found() if setup.ranks.is_main else None)
    return None if found is None else found.trainer.rollout_prompts


def kept_state(state: TrainerState, is_needed: bool = True) -> Mapping[str, Any] | None:
    """What the checkpoint that is resumed keeps of the run.

    Args:
        state (`TrainerState`): As the checkpoint has it.
        is_needed (`bool`, *optional*, defaults to `True`): Whether the run cannot go on without.

    Returns:
        `mapping`: `None` where it was written without the callback, and nothing is needed.

    Raises:
        `ValueError`: If it was written without the callback, and something is needed.
    """
    found = state.stateful_callbacks.get(STATE_KEY)
    if found is not None:
        return found
    written = f"The checkpoint at step {state.global_step} was written without LearnAlignCallback"
    if is_needed:
        raise ValueError(
            f"{written}: its steps cannot be placed in the plan. Resume a checkpoint of this run, or start anew."
        )
    logger.warning("%s: what was spent before it is not in the record.", written)
    return None
