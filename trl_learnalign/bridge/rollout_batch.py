"""Rollouts with the trainer's own generation, and what TRL says of them: rewards, advantages, logs."""

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
class RolledOut:
    """All groups of rollouts of one generation, the same on every process.

    Args:
        micro_step (`int`): The trainer's micro-step that the generation begins with.
        asked_rows (`np.ndarray`): Rows of the dataset that dynamic sampling has asked for besides, `int64` `(E,)`.
        rewards (`torch.Tensor`): `(P + E, G, F)`, NaN where a function returned `None`: first the `P` prompts of the
            trainer's sampler in its order, then those of `asked_rows`.
        useful (`np.ndarray`): Which groups have a gradient, `bool` `(P + E,)`: some rollout has an advantage, beyond
            rounding, and a token that the loss is over.
        trained (`np.ndarray`): Which groups are trained on, `bool` `(P + E,)`: `P` of them.
    """

    micro_step: int
    asked_rows: np.ndarray
    rewards: torch.Tensor
    useful: np.ndarray
    trained: np.ndarray


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
    """Roll a batch of prompts out, with logs of its own; all processes call it together, with equally many rows.

    Args:
        trainer (`GRPOTrainer`): The trainer, in training mode.
        generate (callable): Its `_generate_and_score_completions`.
        rows (`list[dict]`): Rows of the dataset of this process, each once for each rollout.
    """
    metrics, logs = trainer._metrics, trainer._logs
    trainer._metrics, trainer._logs = unbounded(metrics), unbounded(logs)
    try:
        batch, rewards = generate_rollouts(trainer, generate, rows)
        collected = trainer._metrics["train"], trainer._logs
    finally:
        trainer._metrics, trainer._logs = metrics, logs
    return RolloutBatch(batch, rewards.cpu(), gathered_sizes(trainer, batch), *collected)


def gathered_sizes(trainer: GRPOTrainer, batch: Batch) -> np.ndarray:
    """Sizes of the advantages of all processes, 0 where no token counts, `(R,)`."""
    counted = rollout_rows.loss_mask(batch).sum(dim=1) > 0
    sizes = trainer.accelerator.gather(rollout_rows.advantage_sizes(batch) * counted)
    return sizes.cpu().numpy()


def generate_rollouts(
    trainer: GRPOTrainer, generate: Callable[[Rows], Batch], rows: Rows
) -> tuple[Batch, torch.Tensor]:
    """TRL's inputs of the loss, and the rewards of all processes `(R, F)`; advantages are 0 where rewards are equal.

    The mean of equal rewards is not always that reward: of eight times 0.1 it is off by one in the last place, and
    divided by a deviation of 0 + 1e-4 that is an advantage of 7e-5, for a prompt of which nothing can be learned.

    Args:
        trainer (`GRPOTrainer`): The trainer, in training mode.
        generate (callable): Its `_generate_and_score_completions`, or what stands for it.
        rows (`list[dict]`): As in [`collect_rollouts`].
    """
    batch, rewards = rewarded(trainer, generate, rows)
    # What stands for it may put a batch together from several; each of them has been here then.
    if len(rewards) == rollout_rows.row_count(batch) * trainer.accelerator.num_processes:
        _silence(trainer, batch, silent_groups(trainer, rewards))
    return batch, rewards


def rewarded(
    trainer: GRPOTrainer, generate: Callable[[Rows], Batch], rows: Rows
) -> tuple[Batch, torch.Tensor]:
    """As [`generate_rollouts`], with the advantages as TRL has them; rewards of all batches that it was made up of."""
    calculate = trainer._calculate_rewards
    rewards: list[torch.Tensor] = []

    def keep_rewards(*args: Any, **kwargs: Any) -> torch.Tensor:
        rewards.append(calculate(*args, **kwargs))
        return rewards[-1]

    with overridden(trainer, "_calculate_rewards", keep_rewards):
        batch = generate(rows)
    return batch, torch.cat(rewards)


def silent_groups(trainer: GRPOTrainer, rewards: torch.Tensor) -> torch.Tensor:
    """Groups whose rollouts all earned the same, `bool` `(P,)`: their advantages are 0 but for rounding.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        rewards (`torch.Tensor`): `(R, F)`, NaN where a function returned `None`.
    """
    weights = trainer.reward_weights.to(rewards)
    if trainer.multi_objective_aggregation == "sum_then_normalize":
        # Added up as TRL does, so that what is equal there is equal here.
        unscorable = torch.isnan(rewards).all(dim=1)
        total = (rewards * weights).nansum(dim=1)
        rewards = torch.where(unscorable, torch.nan, total).unsqueeze(1)
    groups = rewards.view(-1, trainer.num_generations, rewards.shape[1])
    judged = ~torch.isnan(groups)
    largest = torch.where(judged, groups, -torch.inf).amax(dim=1)
    smallest = torch.where(judged, groups, torch.inf).amin(dim=1)
    return (largest <= smallest).all(dim=1)


def _silence(trainer: GRPOTrainer, batch: Batch, silent: torch.Tensor) -> None:
    """Set the advantages of some groups to 0, in the batch and in the table of completions."""
    rows = silent.repeat_interleave(trainer.num_generations)
    count = rollout_rows.row_count(batch)
    first = trainer.accelerator.process_index * count
    own = rows[first : first + count]
    batch["advantages"] = torch.where(own, 0.0, batch["advantages"])
    column = trainer._logs["advantages"]
    for place, is_silent in enumerate(reversed(rows.tolist()), start=1):
        if is_silent and place <= len(column):
            column[-place] = 0.0
