"""Tables in the trackers of `report_to`: Weights & Biases, trackio and TensorBoard.

As TRL does for its completions (`GRPOTrainer.log`), the tracker's own module gets the table, beside what transformers'
callbacks send; TensorBoard has no tables, and gets Markdown through the writer of transformers' callback.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd
from transformers.integrations import TensorBoardCallback

from trl_learnalign.records import markdown

if TYPE_CHECKING:
    from trl import GRPOTrainer

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
        text = markdown.table(list(frame.columns), frame.itertuples(index=False))
        callback.tb_writer.add_text(name, text, trainer.state.global_step)
        return
    raise NotReadyError("the trainer has no TensorBoardCallback.")


TRACKERS: dict[str, Callable[[GRPOTrainer, str, pd.DataFrame], None]] = {
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "tensorboard": _to_tensorboard,
}
"""By their names in `report_to`; others get the metrics alone."""
