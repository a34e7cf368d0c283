"""In how many bits weights are kept, and passes computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trl_learnalign.bridge.weights import zero_stage

if TYPE_CHECKING:
    from trl import GRPOTrainer

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def computes_in_float32(trainer: GRPOTrainer) -> bool:
    """Whether weights and arithmetic have the precision of float32 (TF32 has not)."""
    tf32 = (
        torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    )
    if trainer.accelerator.mixed_precision not in (None, "no") or (
        tf32 and torch.cuda.is_available()
    ):
        return False
    return all(p.dtype in (torch.float32, torch.float64) for p in trainer.model.parameters())


def computes_in_float16(trainer: GRPOTrainer) -> bool:
    """Whether gradients may overflow and underflow."""
    weights = any(p.dtype == torch.float16 for p in trainer.model.parameters())
    return trainer.accelerator.mixed_precision == "fp16" or weights


def has_dropout(trainer: GRPOTrainer) -> bool:
    """Whether a pass in training mode is random."""
    settings = trainer.model.config.to_dict().items()
    functional = any(
        "drop" in name and isinstance(value, float) and value > 0 for name, value in settings
    )
    return functional or any(isinstance(m, nn.Dropout) and m.p > 0 for m in trainer.model.modules())


def computes_in_16_bits(trainer: GRPOTrainer) -> bool:
    """Whether weights are 16 bits wide, or layers compute so under autocast."""
    weights = any(p.dtype in (torch.bfloat16, torch.float16) for p in trainer.model.parameters())
    return trainer.args.bf16 or trainer.args.fp16 or weights


def sixteen_bit_weights(trainer: GRPOTrainer) -> dict[str, torch.dtype]:
    """Trainable parameters that the optimizer updates in 16 bits, with no float32 copy anywhere.

    What decides is what the optimizer holds: under DeepSpeed its own float32 partitions; under accelerate's FSDP2
    parameters that were cast to float32; on one GPU and under DDP the model's parameters as they are.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training.
    """
    optimizer: Any = trainer.optimizer
    groups = optimizer.param_groups
    while hasattr(optimizer, "optimizer"):  # accelerate and DeepSpeed wrap torch's
        optimizer = optimizer.optimizer
    if getattr(
        optimizer, "master_weights", False
    ):  # the fused optimizers of Apex and Transformer Engine
        return {}
    # Kahan summation keeps what rounding loses.
    compensated = ("kahan_sum", "use_kahan_summation")
    rounded = [group for group in groups if not any(group.get(name) for name in compensated)]
    updated = {id(parameter) for group in rounded for parameter in group["params"]}
    return {
        name: parameter.dtype
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and parameter.dtype in SIXTEEN_BITS and id(parameter) in updated
    }


def casts_weights(trainer: GRPOTrainer) -> torch.dtype | None:
    """What TRL casts the trained weights themselves to when it generates, or `None` if it leaves them alone."""
    args = trainer.args
    if not args.use_transformers_continuous_batching or zero_stage(trainer):
        return None
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
