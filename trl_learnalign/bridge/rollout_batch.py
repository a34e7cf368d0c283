"""Rollouts of one batch of prompts with the trainer's own generation, and what TRL says of them kept apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trl_learnalign.bridge import rollout_rows
from trl_learnalign.bridge.overrides import overridden
from trl_learnalign.bridge.required import Required
from trl_learnalign.bridge.rollout_logs import unbounded
from trl_learnalign.bridge.rollout_rows import Batch

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(trainer=("_calculate_rewards", "_metrics", "_logs"))

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts of one batch of prompts; `R` of them over all processes.

    Args:
        rows (`dict`): TRL's inputs of the loss, of this process.
        rewards (`torch.Tensor`): Of all processes, `(R, F)`, NaN where a function returned `None`.
        sizes (`np.ndarray`): Sizes of the advantages of all processes, 0 where no token counts, `(R,)`.
        metrics (`dict`): What TRL collected for its log.
        logs (`dict`): What TRL collected for its table of completions, of all processes.
    """

    rows: Batch
    rewards: torch.Tensor
    sizes: np.ndarray
    metrics: dict[str, list[float]]
    logs: dict[str, Any]


def collect_rollouts(
    trainer: GRPOTrainer, generate: Callable[[Rows], Batch], rows: Rows
) -> RolloutBatch:
    """Roll a batch of prompts out; all processes call it together, with equally many rows.

    Args:
        trainer (`GRPOTrainer`): The trainer, in training mode.
        generate (callable): Its `_generate_and_score_completions`.
        rows (`list[dict]`): Rows of the dataset of this process, each once for each rollout.
    """
    metrics, logs = trainer._metrics, trainer._logs
    calculate = trainer._calculate_rewards
    rewards: list[torch.Tensor] = []

    def keep_rewards(*args: Any, **kwargs: Any) -> torch.Tensor:
        rewards.append(calculate(*args, **kwargs))
        return rewards[-1]

    trainer._metrics, trainer._logs = unbounded(metrics), unbounded(logs)
    try:
        with overridden(trainer, "_calculate_rewards", keep_rewards):
            batch = generate(rows)
        collected = trainer._metrics["train"], trainer._logs
    finally:
        trainer._metrics, trainer._logs = metrics, logs
    counted = rollout_rows.loss_mask(batch).sum(dim=1) > 0
    sizes = trainer.accelerator.gather(rollout_rows.advantage_sizes(batch) * counted)
    return RolloutBatch(batch, rewards[-1].cpu(), sizes.cpu().numpy(), *collected)
