"""A `GradientCapture` of the trainer's policy, with its LM head routed through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from trl_learnalign.bridge.lm_head import lm_head
from trl_learnalign.bridge.required import Called, Required
from trl_learnalign.bridge.weights import causal_lm, is_sharded, reshard
from trl_learnalign.gradients.capture import GradientCapture, TokenBatch
from trl_learnalign.gradients.sketch import Projection

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(
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
