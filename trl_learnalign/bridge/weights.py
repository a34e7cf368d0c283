"""Access to parameters that DDP, ZeRO or FSDP2 may have sharded, and their precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from trl_learnalign import rng
from trl_learnalign.bridge.requires import Required
from trl_learnalign.gradients.capture import full_numel

if TYPE_CHECKING:
    from trl import GRPOTrainer


REQUIRES = Required(sometimes={"_last_loaded_step": lambda trainer: trainer.use_vllm})


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_fsdp2(trainer: GRPOTrainer) -> bool:
    """Whether parameters are sharded by FSDP's second version."""
    return any(isinstance(p, DTensor) for p in trainer.model.parameters())


def causal_lm(trainer: GRPOTrainer) -> Any:
    """The model with an LM head, without PEFT's wrapper."""
    return without_peft(trainer.model)


def without_peft(model: Any) -> Any:
    """The model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_virtual_tokens(trainer: GRPOTrainer) -> bool:
    """Whether PEFT prepends trained tokens or keys and values to each row (prompt, p- and prefix tuning)."""
    return bool(
        getattr(getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False)
    )


def trainable_sizes(trainer: GRPOTrainer) -> dict[str, int]:
    """Number of elements of each trainable parameter, in canonical order and by canonical name."""
    reshard(trainer)
    return {name: full_numel(p) for name, p in trainer.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def weights_digest(trainer: GRPOTrainer) -> str:
    """Bit-exact digest of the trainable weights, independent of how they are sharded."""
    reshard(trainer)
    total = 0
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        with gathered(trainer, parameter) as weights:
            bits = (
                weights.detach()
                .contiguous()
                .view(-1)
                .view(_INTEGERS[weights.element_size()])
                .long()
            )
        # Each element is multiplied by its position, so that a swap changes the sum; integer addition is
        # order-independent.
        places = torch.arange(1, bits.numel() + 1, device=bits.device)
        total ^= rng.key(name, int((bits * (2 * places + 1)).sum()))
    return f"{total:016x}"


@torch.no_grad()
def sampled_digest(
    trainer: GRPOTrainer, parameters: Iterable[tuple[str, nn.Parameter]], most: int = 4096
) -> str:
    """Digest of names, shapes and evenly spaced elements of parameters, independent of how they are sharded.

    It is meant for frozen weights: two different models differ in nearly all elements, so a sample is sufficient.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        parameters (iterable): Names and parameters; all ranks call it together with the same ones.
        most (`int`, *optional*, defaults to 4096): Maximum number of elements sampled per parameter.
    """
    total = 0
    for name, parameter in parameters:
        with gathered(trainer, parameter) as weights:
            entries = weights.detach().reshape(-1)
            sample = entries[:: max(1, -(-entries.numel() // most))].contiguous()
            bits = sample.view(_INTEGERS[sample.element_size()]).tolist()
            total ^= rng.key(name, str(tuple(weights.shape)), str(weights.dtype), str(bits))
    return f"{total:016x}"


@contextmanager
def gathered(
    trainer: GRPOTrainer, parameter: nn.Parameter, write: bool = False
) -> Iterator[torch.Tensor]:
    """The full data of a parameter, gathered if it is sharded; all ranks call it together.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        parameter (`torch.nn.Parameter`): A parameter of its model.
        write (`bool`, *optional*, defaults to `False`): Keep what is written into it; all ranks write the same.
    """
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        full = parameter.full_tensor().detach()
        yield full
        if write:
            parameter.detach().copy_(distribute_tensor(full, mesh, placements))
    elif hasattr(parameter, "ds_id"):  # ZeRO-3, even before the engine exists
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
            yield parameter.detach()
    else:
        yield parameter.detach()


def partition_again(trainer: GRPOTrainer) -> None:
    """Let ZeRO-3 re-partition weights that a truncated backward pass has left gathered (those of the embedding)."""
    if zero_stage(trainer) == 3:
        trainer.model_wrapped.empty_partition_cache()


def weights_changed(trainer: GRPOTrainer) -> None:
    """Make a vLLM engine load the weights again, which it otherwise does only when the step has changed."""
    if trainer.use_vllm:
        trainer._last_loaded_step = -1


def reshard(trainer: GRPOTrainer) -> None:
    """Reshard the root's parameters, which stay gathered under FSDP2 after a forward pass without a backward pass.

    Until then, tied weights are two parameters with two names, and the state is not that at the start of training.
    """
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(trainer: GRPOTrainer) -> bool:
    """Whether parameters are sharded (ZeRO-3, FSDP), so that all ranks must make the same forward passes."""
    return zero_stage(trainer) == 3 or is_fsdp2(trainer)


def zero_stage(trainer: GRPOTrainer) -> int:
    """DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None else 0


# ---- Precision of weights and passes --------------------------------------------------------------------------------

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def computes_in_float32(trainer: GRPOTrainer) -> bool:
    """Whether weights and arithmetic have float32 precision (TF32 does not)."""
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
    """Whether forward passes in training mode are random."""
    settings = trainer.model.config.to_dict().items()
    functional = any(
        "drop" in name and isinstance(value, float) and value > 0 for name, value in settings
    )
    return functional or any(isinstance(m, nn.Dropout) and m.p > 0 for m in trainer.model.modules())


def computes_in_16_bits(trainer: GRPOTrainer) -> bool:
    """Whether weights are 16 bits wide, or layers compute in 16 bits under autocast."""
    weights = any(p.dtype in (torch.bfloat16, torch.float16) for p in trainer.model.parameters())
    return trainer.args.bf16 or trainer.args.fp16 or weights


def sixteen_bit_weights(trainer: GRPOTrainer) -> dict[str, torch.dtype]:
    """Trainable parameters that the optimizer updates in 16 bits, without any float32 copy.

    The optimizer's own parameters decide: under DeepSpeed its float32 partitions; under accelerate's FSDP2 the
    parameters cast to float32; on one GPU and under DDP the model's parameters.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training.
    """
    optimizer: Any = trainer.optimizer
    groups = optimizer.param_groups
    while hasattr(optimizer, "optimizer"):  # accelerate and DeepSpeed wrap the torch optimizer
        optimizer = optimizer.optimizer
    if getattr(
        optimizer, "master_weights", False
    ):  # the fused optimizers of Apex and Transformer Engine
        return {}
    # Kahan summation retains what rounding would lose.
    compensated = ("kahan_sum", "use_kahan_summation")
    rounded = [group for group in groups if not any(group.get(name) for name in compensated)]
    updated = {id(parameter) for group in rounded for parameter in group["params"]}
    return {
        name: parameter.dtype
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and parameter.dtype in SIXTEEN_BITS and id(parameter) in updated
    }


def casts_weights(trainer: GRPOTrainer) -> torch.dtype | None:
    """The dtype to which TRL casts the trained weights themselves when it generates, or `None` if it does not."""
    args = trainer.args
    if not args.use_transformers_continuous_batching or zero_stage(trainer):
        return None
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
