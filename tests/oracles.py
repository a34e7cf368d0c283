"""Slow, obvious versions of what the package computes fast."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from trl import GRPOTrainer

from trl_learnalign import trainer_bridge as bridge
from trl_learnalign.rollouts import RolloutGroup


def score_matrix(successes: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """`S` of Eq. 9, entry by entry, float64."""
    p = [sum(row) / len(row) for row in successes.tolist()]
    v = [x * (1 - x) for x in p]
    features = features.double()
    matrix = torch.zeros(len(v), len(v), dtype=torch.float64)
    for i in range(len(v)):
        for j in range(len(v)):
            norms = features[i].norm() * features[j].norm()
            cosine = features[i] @ features[j] / norms if norms > 0 else 0.0
            matrix[i, j] = v[i] * v[j] * cosine
    return matrix


def row_averages(successes: torch.Tensor, features: torch.Tensor) -> np.ndarray:
    return score_matrix(successes, features).mean(dim=1).numpy()


def row_averages_without_self(successes: torch.Tensor, features: torch.Tensor) -> np.ndarray:
    matrix = score_matrix(successes, features)
    return ((matrix.sum(dim=1) - matrix.diagonal()) / (len(matrix) - 1)).numpy()


@torch.no_grad()
def mean_nll(model: Any, before: list[int], solution: list[int]) -> float:
    """One text alone, token after token, with the model's own logits."""
    model.eval()
    logits = model(input_ids=torch.tensor([before + solution])).logits[0].double()
    chances = torch.log_softmax(logits, dim=1)
    places = range(len(before), len(before) + len(solution))
    return -sum(float(chances[place - 1, token]) for place, token in zip(places, solution, strict=True)) / len(
        solution
    )


@torch.no_grad()
def rds_plus(model: Any, tokens: list[int]) -> torch.Tensor:
    model.eval()
    states = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0].double()
    total = sum(range(1, len(tokens) + 1))
    mean = sum(states[i] * (i + 1) / total for i in range(len(tokens)))
    return mean / mean.norm()


@torch.no_grad()
def next_token_probabilities(model: Any, tokens: list[int], ids: list[int]) -> list[float]:
    model.eval()
    logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].double()
    return [float(torch.softmax(logits, dim=0)[i]) for i in ids]


def selectit_score(ratings: list[list[float]], softmax: bool = False) -> float:
    """As the formulas of the paper go, rating prompt by rating prompt."""
    scores = []
    for probabilities in ratings:
        weights = [math.exp(p) for p in probabilities] if softmax else probabilities
        shares = [w / sum(weights) for w in weights]
        base = max(range(5), key=lambda k: shares[k])
        scores.append((base + 1) * sum(abs(shares[base] - share) for share in shares) / 4)
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
    return mean / (1 + 0.2 * std)


def limr_score(rates: list[float], means: list[float]) -> float:
    numerator = sum((r - m) ** 2 for r, m in zip(rates, means, strict=True))
    return 1 - numerator / sum((1 - m) ** 2 for m in means)


def full_gradient(trainer: GRPOTrainer, group: RolloutGroup) -> torch.Tensor:
    """Gradient of the trainer's objective of one prompt: one `autograd.grad` over all trainable parameters."""
    accelerator = trainer.accelerator
    modes = [(module, module.training) for module in trainer.model.modules()]
    trainer.model.eval()
    trainer.accelerator = bridge._LocalAccelerator(accelerator)
    try:
        objective = -trainer._compute_loss(trainer.model, dict(group.inputs))
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(objective, parameters, allow_unused=True)
    finally:
        trainer.accelerator = accelerator
        for module, training in modes:
            module.training = training
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return torch.cat([part.flatten() for part in parts])
