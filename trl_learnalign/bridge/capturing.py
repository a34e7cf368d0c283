"""A `GradientCapture` of the trainer's policy, with TRL's fused LM head routed through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from trl.trainer import utils as trl_utils

from trl_learnalign.bridge.required import Required
from trl_learnalign.bridge.weights import causal_lm, is_sharded, reshard
from trl_learnalign.gradients.capture import GradientCapture, TokenBatch
from trl_learnalign.gradients.head import LogitTransform
from trl_learnalign.gradients.sketch import Projection

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(
    trainer=("_get_per_token_logps_and_entropies",),
    utils=("_ChunkedLogProbFunction", "maybe_gather_lm_head_ctx"),
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
    """A [`GradientCapture`] of the trainer's policy, with TRL's fused LM head routed through it."""
    reshard(trainer)
    head = causal_lm(trainer).get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    capture = GradientCapture(
        trainer.model,
        projection,
        lambda batch: token_log_probs(trainer, batch),
        head_weight=weight,
        head_bias=bias,
        materialised=lambda: trl_utils.maybe_gather_lm_head_ctx(weight, bias),
        sharded=is_sharded(trainer),
    )
    with capture, _fused_head(capture), _nothing_reduced(trainer):
        yield capture


@contextmanager
def _nothing_reduced(trainer: GRPOTrainer) -> Iterator[None]:
    """Without the hooks of ZeRO-3's leaf modules: in any backward pass they add to what is reduced next."""
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


@contextmanager
def _fused_head(capture: GradientCapture) -> Iterator[None]:
    original = trl_utils._ChunkedLogProbFunction

    class CapturingHead:
        """Takes the place of `ChunkedLogProbFunction`; passes on what is not being captured."""

        @staticmethod
        def apply(
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
            return (
                *capture.head_log_probs(hidden, weight, bias, targets, transform),
                None,
                None,
                None,
            )

    trl_utils._ChunkedLogProbFunction = CapturingHead
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = original
