"""The trainer's policy: its parameters, which may be sharded, their precision, its LM head and `GradientCapture`.

The installed release decides which of the two heads is used, never the presence of names. A release that has lost a
name is refused instead of being treated as an older one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from trl.trainer import utils as trl_utils

from trl_learnalign import rng
from trl_learnalign.bridge import requires
from trl_learnalign.bridge.requires import Called, Replaced, Required, is_before
from trl_learnalign.gradients.capture import GradientCapture, TokenBatch, full_numel
from trl_learnalign.gradients.layers import LogitTransform
from trl_learnalign.gradients.projection import Projection

if TYPE_CHECKING:
    from trl import GRPOTrainer


# ---- Parameters, and their precision --------------------------------------------------------------------------------

WEIGHTS_REQUIRES = Required(sometimes={"_last_loaded_step": lambda trainer: trainer.use_vllm})


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


# ---- LM heads: logits before trl 1.15, fused with the loss since ----------------------------------------------------

_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
FUSED = Required(
    functions={
        "trl.trainer.utils:_ChunkedLogProbFunction.forward": Replaced(_PARAMETERS),
        "trl.trainer.utils:maybe_gather_lm_head_ctx": Called(2),
        "trl.trainer.utils:add_fused_lm_head": Called(1),
    }
)


class PlainHead:
    """Before trl 1.15: log-probabilities are computed from the model's logits.

    The head is called and captured like any other linear layer. Nothing here is private to TRL.
    """

    requires = Required()

    @staticmethod
    def materialised(
        weight: torch.Tensor, bias: torch.Tensor | None
    ) -> AbstractContextManager[Any]:
        """Does nothing: the head's own forward pass gathers its weights."""
        return nullcontext()

    @staticmethod
    @contextmanager
    def head_captured(capture: GradientCapture, head: nn.Module) -> Iterator[None]:
        """Capture the head like every linear layer; see [`_apart`] for what trl 1.8 needs in addition."""
        if not is_before("1.9"):
            yield
            return
        handle = head.register_forward_hook(_apart, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @staticmethod
    @contextmanager
    def untempered() -> Iterator[None]:
        """Does nothing: logits are the model's own."""
        yield

    @staticmethod
    def prepare_reader(model: Any) -> None:
        """Does nothing: every model returns logits."""

    @staticmethod
    def label_log_probs(
        model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """See `bridge.inference.label_log_probs`. Logits are computed only for the labels."""
        asked = labels[:, 1:] != -100

        def choose(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            length = input_ids.shape[1]
            # Prompt tuning prepends virtual tokens to each row.
            hidden = inputs[0][:, -length:-1]
            return (hidden[asked].unsqueeze(0),)

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        handle = base.get_output_embeddings().register_forward_pre_hook(choose)
        try:
            outputs = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            handle.remove()
        logits = outputs.logits[0].float()
        targets = labels[:, 1:][asked]
        of_labels = -nn.functional.cross_entropy(logits, targets, reduction="none")
        return of_labels.new_zeros(asked.shape).masked_scatter(asked, of_labels)


def _apart(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A copy of the head's output.

    trl 1.8 divides logits by the temperature in place. If the logits are a view, as with a bias, this removes the call
    from the graph, and autograd would have to compute the head, one prompt at a time.
    """
    return output.clone() if output.requires_grad else output


class FusedHead:
    """From trl 1.15 on: log-probabilities come from a head that is fused with the loss, without logits.

    `model(..., labels=labels, fused_lm_head=True)` uses the head's weight and calls `_ChunkedLogProbFunction`, so no
    hook on the head fires. The capture replaces that function while gradients are captured.
    """

    requires = FUSED

    @staticmethod
    def materialised(
        weight: torch.Tensor, bias: torch.Tensor | None
    ) -> AbstractContextManager[Any]:
        """Gather the head's weights, also under ZeRO-3."""
        return trl_utils.maybe_gather_lm_head_ctx(weight, bias)

    @staticmethod
    @contextmanager
    def head_captured(capture: GradientCapture, head: Any) -> Iterator[None]:
        """Route the fused head through the capture."""
        original = trl_utils._ChunkedLogProbFunction

        def log_probs(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            chunk_size: int,
            softcap: float | None = None,
            scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy",),
        ) -> tuple[torch.Tensor | None, ...]:
            if not capture.is_recording:
                return original.apply(
                    hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
                )
            transform = LogitTransform(scale, softcap, temperature)
            logps, entropies = capture.head_log_probs(hidden, weight, bias, targets, transform)
            return logps, entropies, None, None, None

        with _in_place_of_the_function(log_probs):
            yield

    @staticmethod
    @contextmanager
    def untempered() -> Iterator[None]:
        """Run the fused head at temperature 1; it otherwise divides by the trainer's sampling temperature."""
        original = trl_utils._ChunkedLogProbFunction

        def log_probs(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            *rest: Any,
        ) -> tuple[torch.Tensor | None, ...]:
            return original.apply(hidden, weight, bias, targets, 1.0, *rest)

        with _in_place_of_the_function(log_probs):
            yield

    @staticmethod
    def prepare_reader(model: Any) -> None:
        """Prepare a newly loaded model for [`label_log_probs`]."""
        trl_utils.add_fused_lm_head(model)

    @staticmethod
    def label_log_probs(
        model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """See `bridge.inference.label_log_probs`."""
        outputs = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            fused_lm_head=True,
        )
        return outputs.log_probs


@contextmanager
def _in_place_of_the_function(log_probs: Callable[..., Any]) -> Iterator[None]:
    original = trl_utils._ChunkedLogProbFunction

    class Head:
        """Replaces `_ChunkedLogProbFunction`."""

        apply = staticmethod(log_probs)

    trl_utils._ChunkedLogProbFunction = Head
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = original


lm_head: type[PlainHead | FusedHead] = PlainHead if requires.is_before("1.15") else FusedHead
"""The LM head of the installed release."""

LM_HEAD_REQUIRES = lm_head.requires


# ---- Gradient capture of the policy ---------------------------------------------------------------------------------

CAPTURE_REQUIRES = Required(
    calls={"_get_per_token_logps_and_entropies": Called(4, ("compute_entropy",))},
)


def token_log_probs(trainer: GRPOTrainer, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The trainer's log-probabilities and entropies of the completion tokens, `(B, C)` each."""
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        batch.input_ids,
        batch.attention_mask,
        batch.completion_length,
        compute_entropy=True,
    )
    return logps, entropies


@contextmanager
def gradient_capture(trainer: GRPOTrainer, projection: Projection) -> Iterator[GradientCapture]:
    """A [`GradientCapture`] of the trainer's policy, with its LM head routed through it."""
    reshard(trainer)
    head = causal_lm(trainer).get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    capture = GradientCapture(
        trainer.model,
        projection,
        lambda batch: token_log_probs(trainer, batch),
        head_weight=weight,
        head_bias=bias,
        materialised=lambda: lm_head.materialised(weight, bias),
        sharded=is_sharded(trainer),
    )
    with capture, lm_head.head_captured(capture, head), _nothing_reduced(trainer):
        yield capture


@contextmanager
def _nothing_reduced(trainer: GRPOTrainer) -> Iterator[None]:
    """Remove the hooks of ZeRO-3's leaf modules, which in any backward pass add to the next reduction."""
    engine_optimizer = getattr(trainer.model_wrapped, "optimizer", None)
    taken = []
    for handle in getattr(engine_optimizer, "_leaf_module_hooks", ()):
        hooks = handle.hooks_dict_ref()
        taken.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook
