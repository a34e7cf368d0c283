"""Runs of which some rows have no gradient, and what is compared of them: gradients, and rows that went through."""

from __future__ import annotations

import gc
from typing import Any

import cases
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_learnalign.bridge.skipping import ZeroAdvantageFilter, install_skipping

# Accelerate collects garbage after every run: most of its time goes to the objects of imported modules, which stay.
gc.freeze()

# TRL's fused head computes in float32 whatever the weights are.
ROUNDING = 1e-5


def number_of(prompt: Any) -> int:
    """Row of the dataset that a prompt of `cases.dataset` is."""
    return int("".join(character for character in cases.text(prompt) if character.isdigit()))


def half_idle_reward(completions: list[Any], prompts: list[Any], **_: Any) -> list[float]:
    """A coin for every other prompt, and nothing to be had for the rest."""
    coins = cases.accuracy_reward(completions)
    return [coin * (number_of(prompt) % 2) for coin, prompt in zip(coins, prompts, strict=True)]


def graded_reward(completions: list[Any], prompts: list[Any], **_: Any) -> list[float]:
    lengths = cases.length_reward(completions)
    return [
        length * (number_of(prompt) % 2) for length, prompt in zip(lengths, prompts, strict=True)
    ]


class Steps(TrainerCallback):
    """The gradient of every optimizer step, and the rows that went through the model for it."""

    def __init__(self, trainer: GRPOTrainer):
        self.model = trainer.model
        self.gradients: list[torch.Tensor] = []
        self.rows: list[int] = []
        self.shapes: list[tuple[int, int]] = []
        trainer.add_callback(self)
        trainer.model.get_input_embeddings().register_forward_hook(self._see)

    def _see(
        self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
    ) -> None:
        if torch.is_grad_enabled():
            self.rows[-1] += inputs[0].shape[0]
            self.shapes.append(tuple(inputs[0].shape))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.rows.append(0)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        self.gradients.append(torch.cat([gradient.flatten().clone() for gradient in gradients]))


def trained(
    folder: Any, skip: bool, **options: Any
) -> tuple[GRPOTrainer, Steps, ZeroAdvantageFilter | None]:
    """A short run in float64, with rows without a gradient left out or not."""
    dropout = dict.fromkeys(options.pop("dropout", ()), 0.0)
    policy = cases.model(options.pop("family", "qwen2"), **dropout).double()
    defaults = dict(
        rewards=half_idle_reward,
        max_steps=4,
        logging_steps=100,
        max_grad_norm=0.0,
        learning_rate=1e-2,
    )
    trainer = cases.trainer(folder, policy, **{**defaults, **options})
    steps = Steps(trainer)
    skipper = install_skipping(trainer) if skip else None
    assert not isinstance(skipper, str), skipper
    trainer.train()
    return trainer, steps, skipper


def distances(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[float]:
    """How far apart vectors are, pair by pair, relative to the first; 0 if both are 0."""
    assert len(one) == len(other)
    pairs = zip(one, other, strict=True)
    return [float((a - b).norm() / a.norm().clamp(min=torch.finfo(a.dtype).tiny)) for a, b in pairs]
