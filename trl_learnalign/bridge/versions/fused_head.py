"""From trl 1.15 on: log-probabilities come from a head that is fused with the loss and never gives logits out.

`model(..., labels=labels, fused_lm_head=True)` takes the head's weight and calls `_ChunkedLogProbFunction`: no hook on
the head fires. While gradients are captured, the capture takes that function's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from trl.trainer import utils as trl_utils

from trl_learnalign.bridge.required import Called, Replaced, Required
from trl_learnalign.gradients.capture import GradientCapture
from trl_learnalign.gradients.head import LogitTransform

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
REQUIRES = Required(
    functions={
        "trl.trainer.utils:_ChunkedLogProbFunction.forward": Replaced(_PARAMETERS),
        "trl.trainer.utils:maybe_gather_lm_head_ctx": Called(2),
        "trl.trainer.utils:add_fused_lm_head": Called(1),
    }
)


def materialised(weight: torch.Tensor, bias: torch.Tensor | None) -> AbstractContextManager[Any]:
    """Where the head's weights are whole, also under ZeRO-3."""
    return trl_utils.maybe_gather_lm_head_ctx(weight, bias)


@contextmanager
def head_captured(capture: GradientCapture, head: Any) -> Iterator[None]:
    """The fused head is routed through the capture."""
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


@contextmanager
def untempered() -> Iterator[None]:
    """The fused head at temperature 1: it divides by the trainer's sampling temperature."""
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


@contextmanager
def _in_place_of_the_function(log_probs: Callable[..., Any]) -> Iterator[None]:
    original = trl_utils._ChunkedLogProbFunction

    class Head:
        """Takes the place of `_ChunkedLogProbFunction`."""

        apply = staticmethod(log_probs)

    trl_utils._ChunkedLogProbFunction = Head
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = original


def prepare_reader(model: Any) -> None:
    """Give a model that was just loaded what [`label_log_probs`] needs."""
    trl_utils.add_fused_lm_head(model)


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
