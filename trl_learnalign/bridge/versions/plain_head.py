"""Before trl 1.15: log-probabilities come from the logits that the model gives.

The head is a linear layer that is called as any other, and is captured as that. Nothing here is private to TRL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from trl_learnalign.bridge.required import Required
from trl_learnalign.bridge.versions import releases
from trl_learnalign.gradients.capture import GradientCapture

REQUIRES = Required()


def materialised(weight: torch.Tensor, bias: torch.Tensor | None) -> AbstractContextManager[Any]:
    """Nothing to do: the head's own forward pass gathers its weights."""
    return nullcontext()


@contextmanager
def head_captured(capture: GradientCapture, head: nn.Module) -> Iterator[None]:
    """The head is captured as every linear layer is; see [`_apart`] for what trl 1.8 needs besides."""
    if not releases.is_before("1.9"):
        yield
        return
    handle = head.register_forward_hook(_apart, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _apart(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """The head's output, in memory of its own.

    trl 1.8 divides logits by the temperature in place. Where they are a view, as behind a bias, that cuts the call out
    of the graph, and autograd would have to do the head, one prompt at a time.
    """
    return output.clone() if output.requires_grad else output


@contextmanager
def untempered() -> Iterator[None]:
    """Nothing to do: logits are the model's own."""
    yield


def prepare_reader(model: Any) -> None:
    """Nothing to do: every model gives logits."""


def label_log_probs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """See `bridge.reading.label_log_probs`. Logits are computed for the labels alone."""
    asked = labels[:, 1:] != -100

    def choose(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        length = input_ids.shape[1]
        # Prompt tuning puts virtual tokens before each row.
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
