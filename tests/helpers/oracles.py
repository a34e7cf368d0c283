"""Slow, obvious versions of what the package computes fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from trl import GRPOTrainer

from trl_learnalign.measuring.generation import RolloutGroup
from trl_learnalign.success import SuccessRule

SUCCESS = SuccessRule(0, "accuracy_reward", 0.5)


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
    return -sum(
        float(chances[place - 1, token]) for place, token in zip(places, solution, strict=True)
    ) / len(solution)


@torch.no_grad()
def rds_plus(model: Any, tokens: list[int]) -> torch.Tensor:
    model.eval()
    states = (
        model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        .hidden_states[-1][0]
        .double()
    )
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


def trainer_gradients(trainer: GRPOTrainer, groups: Sequence[RolloutGroup]) -> torch.Tensor:
    """Gradient of TRL's own objective (minus its loss) of each prompt's rows as TRL gave them, `(P, parameters)`.

    From outside: nothing that the package computed enters, and none of its code. The prompt is the batch: TRL's count
    of the batch's tokens, by which some losses divide, is that of its rows.
    """
    return torch.stack([trainer_gradient(trainer, group.raw) for group in groups])


def full_gradient(trainer: GRPOTrainer, group: RolloutGroup) -> torch.Tensor:
    """[`trainer_gradients`] of one prompt; groups that no trainer made have no raw rows, and give their inputs."""
    return trainer_gradient(trainer, group.raw or group.inputs)


@torch.no_grad()
def rows_alone(trainer: GRPOTrainer, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows, without left padding if the model's log-probabilities depend on it.

    TRL passes no position ids, so models with learned absolute positions (GPT-2) see other positions beside longer
    prompts. What is meant is the prompt as it was when it was rolled out.
    """
    empty = int(rows["prompt_mask"].any(dim=0).long().argmax())
    cut = {
        name: value[:, empty:] if name.startswith("prompt_") else value
        for name, value in rows.items()
    }
    logps = []
    for own in (rows, cut):
        ids = torch.cat([own["prompt_ids"], own["completion_ids"]], dim=1)
        mask = torch.cat([own["prompt_mask"], own["completion_mask"]], dim=1)
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, own["completion_ids"].shape[1]
        )
        logps.append(found[own["completion_mask"].bool()])
    return dict(rows) if torch.allclose(logps[0], logps[1], rtol=1e-4, atol=1e-4) else cut


def trainer_gradient(trainer: GRPOTrainer, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One `autograd.grad` over all trainable parameters of minus the trainer's loss of some rows, in eval mode."""
    modes = [(module, module.training) for module in trainer.model.modules()]
    trainer.model.eval()  # no dropout, and the loss is not divided for gradient accumulation
    try:
        rows = rows_alone(trainer, rows)
        mask = rows["completion_mask"] * rows.get("tool_mask", 1)
        objective = -trainer._compute_loss(
            trainer.model, {**rows, "num_items_in_batch": mask.sum().clamp(min=1)}
        )
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(objective, parameters, allow_unused=True)
    finally:
        for module, training in modes:
            module.training = training
    parts = [
        torch.zeros_like(p) if g is None else g.to_dense()
        for p, g in zip(parameters, grads, strict=True)
    ]
    return torch.cat([part.flatten() for part in parts])
