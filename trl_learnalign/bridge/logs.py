"""Logs and metrics that TRL collects during a generation, and tables in the trackers of `report_to`.

TRL keeps a list with one number per batch for each metric (`_metrics`). For its table of completions it keeps the
columns of the last generation (`_logs`), row by row and gathered over processes.
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

logger = logging.getLogger(__name__)


REQUIRES = Required(
    trainer=("reward_func_names",), functions={"trl.trainer.utils:nanstd": Called(1)}
)


def unbounded(value: Any) -> Any:
    """An empty container of the same type without a length limit; TRL limits its columns to one generation."""
    if isinstance(value, defaultdict):
        make = value.default_factory
        return defaultdict(deque if make is not None and isinstance(make(), deque) else make)
    if isinstance(value, deque):
        return deque()
    return {key: unbounded(entry) for key, entry in value.items()}


@contextmanager
def remove_added_metrics(metrics: dict[str, list[float]]) -> Iterator[None]:
    """Remove on exit what was added to TRL's lists of metrics within the context."""
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
    """Merge the metrics of several batches into one number per name for the generation, and add them to TRL's lists.

    Args:
        metrics (`dict`): TRL's lists of training metrics.
        collected (sequence of `dict`): The metrics of each batch.
        weights (sequence of `float`): Weight of each batch: its number of rollouts.
    """
    for name in _names(collected):
        values: list[float] = []
        weight_of: list[float] = []
        for batch, weight in zip(collected, weights, strict=True):
            # Indexing would create a missing name.
            found = batch.get(name, [])
            values += found
            weight_of += [weight] * len(found)
        if name == "num_tokens":  # a counter, whose last value is the current one
            metrics[name] = values[-1:]
        else:
            metrics[name].append(_overall(name, values, weight_of))


def reward_metrics(trainer: GRPOTrainer, rewards: torch.Tensor) -> dict[str, float]:
    """The reward metrics that TRL would log if several batches were one: means and standard deviations.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        rewards (`torch.Tensor`): `(R, F)`, NaN where a function returned `None`.
    """
    # If two functions share a name, TRL's list has their values in turn, and the last value is the second function's.
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
    """All names, in order of first occurrence."""
    names: dict[str, None] = {}
    for batch in collected:
        names |= dict.fromkeys(batch)
    return list(names)


def _overall(name: str, values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean of the finite values, or an extreme if the last part of the name says so."""
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
    if len(values) == 1:  # exact to the last bit
        return values[0]
    return float(np.average(values, weights=weights))


def add_rows(
    logs: dict[str, Any], collected: Sequence[Mapping[str, Any]], rows: Sequence[np.ndarray]
) -> None:
    """Add the rows of several batches to the columns of TRL's table.

    Args:
        logs (`dict`): TRL's columns, and tables of columns by name.
        collected (sequence of `dict`): The columns of each batch.
        rows (sequence of `np.ndarray`): For each batch, the mask of the rows to add, `bool` `(R,)`.
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
    if not any(len(part) for part in parts):  # the images column of a text-only model
        return
    for part, chosen in zip(parts, rows, strict=True):
        # One batch lacks the column if its reward function logged nothing.
        values = list(part) or [None] * len(chosen)
        # Two reward functions of one name fill the same column one after the other.
        repeated = np.resize(chosen, len(values))
        column.extend(value for value, is_chosen in zip(values, repeated, strict=True) if is_chosen)


# ---- Tables in trackers ---------------------------------------------------------------------------------------------
# As TRL does for its completions (`GRPOTrainer.log`), tables go to the tracker's own module, in addition to what the
# callbacks of transformers send. TensorBoard has no tables, and gets Markdown through transformers' writer.


class NotReadyError(RuntimeError):
    """A tracker cannot accept a table now; the message gives the reason."""


class TrackerTables:
    """Logs tables to the enabled trackers. A tracker that fails does not stop the run.

    Args:
        trainer (`GRPOTrainer`): The trainer, with `args.report_to`.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self._warned: set[str] = set()

    @property
    def is_on(self) -> bool:
        """Whether an enabled tracker accepts tables."""
        return any(name in TRACKERS for name in self.trainer.args.report_to)

    def show(self, name: str, frame: pd.DataFrame) -> None:
        """Log a table; called on the main process.

        Args:
            name (`str`): Name of the table, e.g. `"learnalign/prompts/stage_1"`.
            frame (`pandas.DataFrame`): The table, with columns of strings, numbers and booleans.
        """
        if not self.trainer.accelerator.is_main_process or frame.empty:
            return
        for tracker in self.trainer.args.report_to:
            if tracker not in TRACKERS:
                continue
            try:
                TRACKERS[tracker](self.trainer, name, frame)
            except Exception as error:  # whatever a tracker raises must not stop the run
                self._warn_once(tracker, error)

    def _warn_once(self, tracker: str, error: Exception) -> None:
        """Warn once per tracker that it received no table."""
        if tracker in self._warned:
            return
        self._warned.add(tracker)
        reason = str(error) or type(error).__name__
        logger.warning("%s did not get the tables of the selection: %s", tracker, reason)


def _to_wandb(trainer: GRPOTrainer, name: str, frame: pd.DataFrame) -> None:
    wandb: Any = importlib.import_module("wandb")
    if wandb.run is None:
        raise NotReadyError("no run has started (wandb.init).")
    table = wandb.Table(dataframe=frame)
    # transformers uses this metric as the x axis; wandb's own steps count calls.
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
            raise NotReadyError("its callback has not opened a writer.")
        text = markup.table(list(frame.columns), frame.itertuples(index=False))
        callback.tb_writer.add_text(name, text, trainer.state.global_step)
        return
    raise NotReadyError("the trainer has no TensorBoardCallback.")


TRACKERS: dict[str, Callable[[GRPOTrainer, str, pd.DataFrame], None]] = {
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "tensorboard": _to_tensorboard,
}
"""Functions by the trackers' names in `report_to`; other trackers get only the metrics."""
