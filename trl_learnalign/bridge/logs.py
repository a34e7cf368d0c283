"""Logs and metrics that TRL collects during a generation, and tables in the trackers of `report_to`.

TRL keeps lists of a number for each batch (`_metrics`), and for its table of completions the last generation's
columns (`_logs`), row by row and gathered over processes.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from transformers.integrations import TensorBoardCallback
from trl.trainer import utils as trl_utils

from trl_learnalign import markup
from trl_learnalign.bridge.requires import Called, Required

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


# ---- Tables in trackers ---------------------------------------------------------------------------------------------
# As TRL does for its completions (`GRPOTrainer.log`), the tracker's own module gets the table, beside what
# transformers' callbacks send; TensorBoard has no tables, and gets Markdown through the writer of transformers'
# callback.

logger = logging.getLogger(__name__)


class NotReadyError(RuntimeError):
    """A tracker cannot take a table now, and why."""


class TrackerTables:
    """Shows tables in the trackers that are switched on. A tracker that fails does not stop the run.

    Args:
        trainer (`GRPOTrainer`): With `args.report_to`.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self._told: set[str] = set()

    @property
    def is_on(self) -> bool:
        """Whether there is a tracker that takes tables."""
        return any(name in TRACKERS for name in self.trainer.args.report_to)

    def show(self, name: str, frame: pd.DataFrame) -> None:
        """Show a table; on the main process.

        Args:
            name (`str`): What it is, e.g. `"learnalign/prompts/stage_1"`.
            frame (`pandas.DataFrame`): Its columns, of texts, numbers and switches.
        """
        if not self.trainer.accelerator.is_main_process or frame.empty:
            return
        for tracker in self.trainer.args.report_to:
            if tracker not in TRACKERS:
                continue
            try:
                TRACKERS[tracker](self.trainer, name, frame)
            except Exception as error:  # whatever a tracker raises: it is not worth the run
                self._tell(tracker, error)

    def _tell(self, tracker: str, error: Exception) -> None:
        """Say once for each tracker that it got no table."""
        if tracker in self._told:
            return
        self._told.add(tracker)
        reason = str(error) or type(error).__name__
        logger.warning("%s got no tables of the selection: %s", tracker, reason)


def _to_wandb(trainer: GRPOTrainer, name: str, frame: pd.DataFrame) -> None:
    wandb: Any = importlib.import_module("wandb")
    if wandb.run is None:
        raise NotReadyError("no run has begun (wandb.init).")
    table = wandb.Table(dataframe=frame)
    # transformers plots over this metric; wandb's own steps count calls.
    wandb.log({name: table, "train/global_step": trainer.state.global_step})


def _to_trackio(trainer: GRPOTrainer, name: str, frame: pd.DataFrame) -> None:
    trackio: Any = importlib.import_module("trackio")
    rows = frame.astype(object).where(frame.notna(), None)  # JSON has no NaN
    table = trackio.Table(dataframe=rows)
    trackio.log({name: table, "train/global_step": trainer.state.global_step})


def _to_tensorboard(trainer: GRPOTrainer, name: str, frame: pd.DataFrame) -> None:
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, TensorBoardCallback):
            continue
        if callback.tb_writer is None:
            raise NotReadyError("its callback has opened no writer.")
        text = markup.table(list(frame.columns), frame.itertuples(index=False))
        callback.tb_writer.add_text(name, text, trainer.state.global_step)
        return
    raise NotReadyError("the trainer has no TensorBoardCallback.")


TRACKERS: dict[str, Callable[[GRPOTrainer, str, pd.DataFrame], None]] = {
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "tensorboard": _to_tensorboard,
}
"""By their names in `report_to`; others get the metrics alone."""
