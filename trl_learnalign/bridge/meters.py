"""What the trainer has counted so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trl_learnalign.bridge.required import Required

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(trainer=("_metrics",))


def last_reward(trainer: GRPOTrainer) -> float | None:
    """Mean reward of the latest generation since the last log, if there is one."""
    values = trainer._metrics["train"].get("reward")
    return values[-1] if values else None


def mean_completion_lengths(trainer: GRPOTrainer) -> list[float]:
    """Mean tokens per rollout, over all processes, of each generation since the last log; the trainer's own list."""
    return trainer._metrics["train"].get("completions/mean_length", [])


def cut_share(trainer: GRPOTrainer) -> float:
    """How many completions of the latest generation did not end by themselves, from 0 to 1; 0 if nobody knows."""
    values = trainer._metrics["train"].get("completions/clipped_ratio")
    return values[-1] if values else 0.0


def add_metrics(trainer: GRPOTrainer, metrics: Mapping[str, float]) -> None:
    """Add to what the trainer logs next; it takes means over the steps since its last log."""
    for name, value in metrics.items():
        trainer._metrics["train"][name].append(value)


def tokens_seen(trainer: GRPOTrainer) -> int:
    """Tokens of prompts and completions of all training rollouts so far, over all processes (TRL's `num_tokens`)."""
    return int(trainer.state.num_input_tokens_seen)
