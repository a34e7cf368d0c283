"""Which modules some tokens reach and others do not: routed experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from trl_learnalign.bridge.capturing import token_log_probs
from trl_learnalign.bridge.lending import left_as_found
from trl_learnalign.bridge.texts import tokenizer
from trl_learnalign.bridge.weights import causal_lm, partition_again
from trl_learnalign.gradients.capture import TokenBatch

if TYPE_CHECKING:
    from trl import GRPOTrainer

_ROUTE_PROBES = 8  # passes that look for routed experts, where a first one leaves modules out


@torch.no_grad()
def unevenly_called(trainer: GRPOTrainer) -> list[str]:
    """Names of modules with parameters of their own that some tokens reach and others do not; in the model's order.

    Found by short forward passes over one repeated token each, the same on all ranks: equal tokens go to the same few
    experts. Modules within a leaf module of ZeRO-3 do not count.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training; all ranks call it together.
    """
    found = dict(_modules_with_parameters(trainer.model))
    head = causal_lm(
        trainer
    ).get_output_embeddings()  # fused: not called, its weight is used all the same
    ids = tokenizer(trainer)("0 1 2 3 4 5 6 7 8 9 ? a", add_special_tokens=False)["input_ids"]
    first: set[str] | None = None
    with left_as_found(trainer):
        trainer.model.eval()
        for token in list(dict.fromkeys(ids))[:_ROUTE_PROBES]:
            called = _called(trainer, found, token)
            if first is not None and called != first:
                return [name for name in found if name in called ^ first]
            first = called
            if all(name in called or module is head for name, module in found.items()):
                return []
    return []


def routing_problem(trainer: GRPOTrainer) -> str | None:
    """Why rows without a gradient matter where no other row reaches some modules, or `None` if they do not.

    Such a module's gradient is 0 with them and none without; where it is 0, momentum and decay move the weights.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training; all ranks call it together.
    """
    modules = dict(trainer.model.named_modules())
    trained = [
        name
        for name in unevenly_called(trainer)
        if any(parameter.requires_grad for parameter in modules[name].parameters(recurse=False))
    ]
    if not trained:
        return None
    return (
        f"which modules run depends on the tokens ({', '.join(trained[:2])}, …), and a gradient of 0 is another thing "
        "for the optimizer than none: momentum and decay move the weights"
    )


def _modules_with_parameters(
    module: nn.Module, prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    if getattr(module, "_z3_leaf", False):
        return
    if any(True for _ in module.parameters(recurse=False)):
        yield prefix.removesuffix("."), module
    for name, child in module.named_children():
        yield from _modules_with_parameters(child, f"{prefix}{name}.")


def _called(trainer: GRPOTrainer, modules: Mapping[str, nn.Module], token: int) -> set[str]:
    """Names of those modules that a pass over four times the same token calls."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in modules.items()
    ]
    ids = torch.full((1, 4), token, device=trainer.accelerator.device)
    try:
        token_log_probs(trainer, TokenBatch(ids, torch.ones_like(ids), 2, 1))
    finally:
        for handle in handles:
            handle.remove()
        partition_again(trainer)
    return called
