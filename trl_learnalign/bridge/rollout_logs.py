"""What TRL collects for its log while it rolls out: kept apart batch by batch, and put together again.

TRL keeps lists of a number for each batch (`_metrics`), and for its table of completions the last generation's
columns (`_logs`), row by row and gathered over processes.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from trl.trainer import utils as trl_utils

from trl_learnalign.bridge.required import Called, Required

if TYPE_CHECKING:
    from trl import GRPOTrainer

REQUIRES = Required(
    trainer=("reward_func_names",), functions={"trl.trainer.utils:nanstd": Called(1)}
)


def unbounded(value: Any) -> Any:
    """An empty container of the same make that forgets nothing: TRL's columns are as long as a generation."""
    if isinstance(value, defaultdict):
        make = value.default_factory
        return defaultdict(deque if make is not None and isinstance(make(), deque) else make)
    if isinstance(value, deque):
        return deque()
    return {key: unbounded(entry) for key, entry in value.items()}


@contextmanager
def nothing_added(metrics: dict[str, list[float]]) -> Iterator[None]:
    """What is added to TRL's lists of metrics meanwhile is taken out again."""
    before = {name: len(values) for name, values in metrics.items()}
    try:
        yield
    finally:
        for name in list(metrics):
            # An empty list would be logged as None.
            if name in before:
                del metrics[name][before[name] :]
            else:
                del metrics[name]


def add_metrics(
    metrics: dict[str, list[float]],
    collected: Sequence[Mapping[str, list[float]]],
    weights: Sequence[float],
) -> None:
    """Add what several batches of a generation say as what the generation says: one number for each name.

    Args:
        metrics (`dict`): TRL's lists of training metrics.
        collected (sequence of `dict`): Those of each batch.
        weights (sequence of `float`): How much each batch counts: its rollouts.
    """
    for name in _names(collected):
        values: list[float] = []
        weight_of: list[float] = []
        for batch, weight in zip(collected, weights, strict=True):
            # A list that has no such name yet would be made by asking for it.
            found = batch.get(name, [])
            values += found
            weight_of += [weight] * len(found)
        if name == "num_tokens":  # a counter, of which the last value holds
            metrics[name] = values[-1:]
        else:
            metrics[name].append(_overall(name, values, weight_of))


def reward_metrics(trainer: GRPOTrainer, rewards: torch.Tensor) -> dict[str, float]:
    """What TRL would say of the rewards of several batches if they were one: means and standard deviations.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        rewards (`torch.Tensor`): `(R, F)`, NaN where a function returned `None`.
    """
    # Of two functions of one name TRL's list has the one and the other in turn, and the last value is the second's.
    metrics = {}
    for name, values in zip(trainer.reward_func_names, rewards.unbind(dim=1), strict=True):
        metrics[f"rewards/{name}/mean"] = float(values.nanmean())
        metrics[f"rewards/{name}/std"] = float(trl_utils.nanstd(values))
    total = (rewards * trainer.reward_weights.to(rewards)).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = torch.nan
    return {
        **metrics,
        "reward": float(total.nanmean()),
        "reward_std": float(trl_utils.nanstd(total)),
    }


def _names(collected: Sequence[Mapping[str, Any]]) -> list[str]:
    """All names, in the order in which they come up."""
    names: dict[str, None] = {}
    for batch in collected:
        names |= dict.fromkeys(batch)
    return list(names)


def _overall(name: str, values: Sequence[float], weights: Sequence[float]) -> float:
    """A mean, unless the last part of the name says that it is an extreme; of the values that are numbers."""
    known = [not math.isnan(value) for value in values]
    values = [value for value, is_known in zip(values, known, strict=True) if is_known]
    weights = [weight for weight, is_known in zip(weights, known, strict=True) if is_known]
    if not values:
        return math.nan
    kind = name.rsplit("/", 1)[-1]
    if kind.startswith("min"):
        return min(values)
    if kind.startswith("max"):
        return max(values)
    if len(values) == 1:  # to the last bit
        return values[0]
    return float(np.average(values, weights=weights))


def add_rows(
    logs: dict[str, Any], collected: Sequence[Mapping[str, Any]], rows: Sequence[np.ndarray]
) -> None:
    """Add the rows of several batches to the columns of TRL's table.

    Args:
        logs (`dict`): TRL's columns, and tables of columns by name.
        collected (sequence of `dict`): Those of each batch.
        rows (sequence of `np.ndarray`): For each batch, which of its rows: `bool` `(R,)`.
    """
    for name, column in logs.items():
        parts = [batch[name] for batch in collected]
        if isinstance(column, deque):
            _add_column(column, parts, rows)
            continue
        for key in _names(parts):
            _add_column(column[key], [part.get(key, ()) for part in parts], rows)


def _add_column(
    column: deque[Any], parts: Sequence[Sequence[Any]], rows: Sequence[np.ndarray]
) -> None:
    if not any(len(part) for part in parts):  # images of a model that sees none
        return
    for part, chosen in zip(parts, rows, strict=True):
        # A column that one batch lacks: its reward function logged nothing.
        values = list(part) or [None] * len(chosen)
        # Two reward functions of one name fill the same column one after the other.
        repeated = np.resize(chosen, len(values))
        column.extend(value for value, is_chosen in zip(values, repeated, strict=True) if is_chosen)
