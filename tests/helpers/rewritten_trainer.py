"""A `GRPOTrainer` that is rewritten as Unsloth rewrites it: a copy of TRL's source, changed in the same places.

Unsloth writes a module `UnslothGRPOTrainer` with TRL's source as the base of a class of its own, replaces there what
computes log-probabilities and the loss, wraps generation and steps in functions that accept anything, and puts the
class wherever TRL has its own. Here what is replaced comes to the same numbers as TRL's. Nothing of ours is imported:
Unsloth is imported first.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import trl
import trl.trainer
from trl.trainer import grpo_trainer

NAME = "UnslothGRPOTrainer"


def rewritten() -> type:
    """The class."""
    source = inspect.getsource(grpo_trainer.GRPOTrainer)
    module = types.ModuleType(NAME)
    vars(module).update({**vars(grpo_trainer), "__name__": NAME})
    exec(source.replace("class GRPOTrainer(", f"class _{NAME}(", 1), vars(module))
    base = vars(module)[f"_{NAME}"]
    logps_of_trl = base._get_per_token_logps_and_entropies

    def logps(
        self: Any,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_efficient: bool = False,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Those of the sampling and the reference policy; the loss has a way of its own."""
        if compute_efficient:
            return None, None
        given = model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy
        with torch.no_grad():
            return logps_of_trl(self, *given, *arguments, **options)

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        self._get_per_token_logps_and_entropies = types.MethodType(logps_of_trl, self)
        try:
            return self._compute_loss(model, inputs)
        finally:
            del self._get_per_token_logps_and_entropies

    base._get_per_token_logps_and_entropies, base.compute_loss = logps, compute_loss
    made = type(NAME, (base,), {"__module__": NAME})
    for name in ("_generate_and_score_completions", "training_step", "train"):
        setattr(made, name, passing_on(getattr(made, name)))
    return made


def passing_on(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes a method's place and names no parameter."""

    def passed_on(self: Any, *arguments: Any, **options: Any) -> Any:
        return method(self, *arguments, **options)

    return passed_on


def put_in_place(replace: Callable[[Any, str, Any], None] = setattr) -> type:
    """Put the class wherever TRL has its own.

    Args:
        replace (callable, *optional*): `monkeypatch.setattr`, for a while; for good by default.
    """
    made = rewritten()
    for module in (trl, trl.trainer, grpo_trainer):
        replace(module, "GRPOTrainer", made)
    return made
