"""A run begins, or goes on: what is there already, and whether it is the same run."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.records.run import RunRecord
from trl_learnalign.records.store import StoreError, differences
from trl_learnalign.training.run_identity import (
    RunIdentity,
    identify,
    settings_of_run,
    trainer_settings,
)
from trl_learnalign.training.setup import RunSetup

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


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


def identified(setup: RunSetup, config: LearnAlignConfig) -> RunIdentity:
    """The identity of a run; all ranks call it together.

    Args:
        setup (`RunSetup`): What the run is made of.
        config (`LearnAlignConfig`): Settings.
    """
    identity = identify(setup, config)
    setup.ranks.agree("plan, dataset and selection settings", identity.entries)
    return identity


def check_settings(setup: RunSetup, config: LearnAlignConfig, record: RunRecord) -> None:
    """Check that the folder holds no run with other settings, as far as they are known before training.

    Args:
        setup (`RunSetup`): What the run is made of.
        config (`LearnAlignConfig`): Settings.
        record (`RunRecord`): Of the folder.

    Raises:
        `StoreError`: If it does, on all ranks, naming the settings with both values.
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
"""What entries of a run's identity are that no setting has the name of."""


def _identity_found(record: RunRecord) -> Mapping[str, Any] | None:
    """What the run of a folder goes by, `None` if it holds none that can be read."""
    try:
        found = record.found()
    except StoreError:  # a checkpoint may make it anew
        return None
    return None if found is None else found.identity


def new_run(ranks: Ranks) -> str:
    """An id that no other run has; all ranks call it together."""
    return str(ranks.from_main(secrets.token_hex(8)))


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
            "it), and is refused otherwise. To be sure of a new run, give it another output_dir.",
            *(record.path, found.last_step),
        )


def scoring_batch_prompts_before(setup: RunSetup, record: RunRecord) -> int | None:
    """Prompts of one generation call of scoring in a run that the folder holds; all ranks call it together.

    `None` if it holds none, or one of a version that did not note them.

    Args:
        setup (`RunSetup`): What the run is made of.
        record (`RunRecord`): Of the folder.
    """
    found = setup.ranks.from_main(record.found() if setup.ranks.is_main else None)
    return None if found is None else found.trainer.scoring_batch_prompts
