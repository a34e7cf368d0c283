"""Log-probabilities through the LM head, with the head's own gradient passed on instead of accumulated.

TRL's fused head multiplies hidden states by the head's weight directly, so no hook on the head module fires. During
capture this module replaces it. It computes the same numbers in token chunks, and its backward pass gives each
prompt's output gradients to the projection without forming a weight gradient of its own.

Axes: `N` scored tokens, `H` hidden dimensions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

# Maximum number of logits that are kept for the backward pass, or computed at once: 128 MiB in float32.
_MAX_LOGITS = 1 << 25


@dataclass(frozen=True)
class LogitTransform:
    """The transform of logits before the softmax in model and TRL: `softcap(scale · z) / temperature`.

    Args:
        scale (`float`): Factor of the architecture, 1 for most.
        softcap (`float`, *optional*): Gemma's `cap · tanh(z / cap)`.
        temperature (`float`): Sampling temperature.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature if self.temperature != 1.0 else logits

    def derivative(self, transformed: Tensor) -> Tensor | float:
        """Derivative of the transform at a point, computed from its value there."""
        slope = self.scale / self.temperature
        if self.softcap is None:
            return slope
        return slope * (1 - (transformed * self.temperature / self.softcap) ** 2)


@dataclass(frozen=True)
class HeadContext:
    """Non-tensor arguments of the head's backward pass.

    Args:
        transform (`LogitTransform`): Applied to the logits.
        segments (sequence of `slice`): The tokens of each prompt, in order, without gaps.
        on_gradient (callable): Called as `on_gradient(p, logit_grads, hidden)` with prompt number, `(r, V)` and
            `(r, H)`, at least once per prompt.
        materialised (callable): Context manager in which the weight is gathered (ZeRO-3 partitions it).
    """

    transform: LogitTransform
    segments: Sequence[slice]
    on_gradient: Callable[[int, Tensor, Tensor], None]
    materialised: Callable[[], AbstractContextManager[Any]]


class CapturedLogProbs(torch.autograd.Function):
    """Log-probabilities and entropies of target tokens; see the module."""

    @override
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        context: HeadContext,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        )
        logps = torch.empty(len(hidden), device=hidden.device)
        entropies = torch.empty(len(hidden), device=hidden.device)
        # For few tokens, the softmax inputs are kept and not computed twice.
        keeps_logits = len(hidden) * len(weight) <= _MAX_LOGITS
        buffers: list[Tensor] = []
        for part in _chunks(slice(0, len(hidden)), len(weight)):
            logits = _logits(hidden[part], weight, bias, dtype, context.transform)
            log_p = logits.log_softmax(dim=-1)
            indices = targets[part].unsqueeze(-1)
            logps[part] = log_p.gather(-1, indices).squeeze(-1)
            entropies[part] = -(log_p.exp() * log_p).sum(dim=-1)
            if keeps_logits:
                # Without a softcap the gradient does not need the logits themselves.
                buffers.append(log_p if context.transform.softcap is None else logits)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, *buffers)
        ctx.context, ctx.dtype, ctx.keeps_logits = context, dtype, keeps_logits
        return logps, entropies

    @override
    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None) -> Any:
        hidden, weight, bias, targets, entropies, *buffers = ctx.saved_tensors
        context: HeadContext = ctx.context
        dtype, transform = ctx.dtype, context.transform
        grad_hidden = torch.zeros_like(hidden)
        with context.materialised():
            for p, segment in enumerate(context.segments):
                for part in _chunks(segment, len(weight)):
                    if ctx.keeps_logits:
                        logits = buffers[0][part]
                    else:
                        logits = _logits(hidden[part], weight, bias, dtype, transform)
                    if ctx.keeps_logits and transform.softcap is None:
                        log_p = logits  # kept from the forward pass
                    else:
                        log_p = logits.log_softmax(dim=-1)
                    grads = _logit_grads(
                        log_p, targets[part], grad_logps, grad_entropies, entropies, part
                    )
                    grads *= transform.derivative(logits)
                    context.on_gradient(p, grads, hidden[part])
                    grad_part = grads.to(dtype) @ weight.to(dtype)
                    grad_hidden[part] = grad_part.to(hidden.dtype)
        return grad_hidden, None, None, None, None


def _chunks(tokens: slice, vocabulary: int) -> list[slice]:
    step = max(1, _MAX_LOGITS // vocabulary)
    return [
        slice(start, min(start + step, tokens.stop))
        for start in range(tokens.start, tokens.stop, step)
    ]


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    transform: LogitTransform,
) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    logits = nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)
    return transform(logits.float())


def _logit_grads(
    log_p: Tensor,
    targets: Tensor,
    grad_logps: Tensor | None,
    grad_entropies: Tensor | None,
    entropies: Tensor,
    part: slice,
) -> Tensor:
    """Gradient with respect to the transformed logits, `(r, V)`.

    `∂ log p_t / ∂z_j = [j = t] - p_j`; `∂H / ∂z_j = -p_j (log p_j + H)`.
    """
    p = log_p.exp()
    if grad_logps is None:
        grads = torch.zeros_like(p)
    else:
        of_target = grad_logps[part].unsqueeze(-1)
        grads = p * -of_target
        grads.scatter_add_(-1, targets.unsqueeze(-1), of_target.to(grads))
    if grad_entropies is not None:
        of_entropy = grad_entropies[part].unsqueeze(-1)
        grads -= of_entropy * p * (log_p + entropies[part].unsqueeze(-1))
    return grads
