"""Weights that an optimizer updates in 16 bits with no float32 copy: at the learning rates of RL they hardly move."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from trl_learnalign import bridge

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

_TYPICAL_WEIGHT = 0.02  # standard deviation of the usual initialisation

_REMEDY = (
    "Load the model in float32 and let the forward pass be bfloat16: GRPOConfig(bf16=True, "
    "model_init_kwargs={'dtype': 'float32'}), in the recipes --dtype float32 --bf16 true. DeepSpeed ZeRO, "
    "accelerate's FSDP2 with mixed precision, and PEFT's adapters keep float32 copies of their own."
)


def warn_of_rounding(trainer: GRPOTrainer) -> None:
    """Warn, on the main process, if most of what training learns would be rounded away.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training: model wrapped, optimizer made.
    """
    problem = rounding_problem(trainer)
    if problem is not None and trainer.accelerator.is_main_process:
        logger.warning("%s", problem)


def rounding_problem(trainer: GRPOTrainer) -> str | None:
    """Why updates would be rounded away, with the remedy, or `None`.

    Args:
        trainer (`GRPOTrainer`): As in [`warn_of_rounding`].
    """
    if (dtype := bridge.casts_weights(trainer)) is not None:
        return (
            f"use_transformers_continuous_batching casts the trained weights to {_name(dtype)} at the first "
            f"generation, for good: {_lost(dtype, trainer.args.learning_rate)} Generate without it, or with vLLM."
        )
    weights = bridge.sixteen_bit_weights(trainer)
    if not weights:
        return None
    first, dtype = next(iter(weights.items()))
    return (
        f"{len(weights)} trainable parameters ({first}, ...) are {_name(dtype)}, and the optimizer keeps no float32 "
        f"copy of them: {_lost(dtype, trainer.args.learning_rate)} {_REMEDY}"
    )


def _lost(dtype: torch.dtype, learning_rate: float) -> str:
    spacing = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(_TYPICAL_WEIGHT))
    return (
        f"an update below half the distance of two neighbouring numbers is lost. Around {_TYPICAL_WEIGHT} they are "
        f"{spacing:.1e} apart, and an Adam step is about learning_rate={learning_rate:g}."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
