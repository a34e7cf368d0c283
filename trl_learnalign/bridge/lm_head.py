"""Log-probabilities by the LM head, and the `GradientCapture` of the trainer's policy.

The installed release decides which of the two heads is used, never the presence of names. A release that has lost a
name is refused instead of being treated as an older one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from trl.trainer import utils as trl_utils

from trl_learnalign.bridge import requires
from trl_learnalign.bridge.requires import Called, Replaced, Required, is_before
from trl_learnalign.bridge.weights import causal_lm, is_sharded, reshard
from trl_learnalign.gradients.capture import GradientCapture, TokenBatch
from trl_learnalign.gradients.head import LogitTransform
from trl_learnalign.gradients.projection import Projection

if TYPE_CHECKING:
    from trl import GRPOTrainer


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
        """See `bridge.reading.label_log_probs`. Logits are computed only for the labels."""
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
        """See `bridge.reading.label_log_probs`."""
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

REQUIRES = lm_head.requires


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
