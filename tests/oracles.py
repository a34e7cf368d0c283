"""Slow, obvious versions of what the package computes fast."""

from __future__ import annotations

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
