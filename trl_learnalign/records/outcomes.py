"""What the rollouts that were made for training came to, group by group, as a run's `reward_history.parquet` has it.

Axis: `P` groups, each of one prompt's rollouts in one generation, in the order in which they were made.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa

from trl_learnalign.records.history import INDEX, PHASE, PREDICTED, RIGHT, STEP, USEFUL, WRONG
from trl_learnalign.records.tables import read_table


@dataclass(frozen=True)
class Outcomes:
    """Groups of rollouts, and what came out.

    Args:
        phases (`np.ndarray`): Name of the phase of each, `(P,)`.
        steps (`np.ndarray`): Optimizer step that each belongs to, counted from 0.
        rows (`np.ndarray`): Row of the dataset.
        right (`np.ndarray`): Right rollouts.
        wrong (`np.ndarray`): Wrong ones; those that could not be judged are neither.
        useful (`np.ndarray`): Whether the group has a gradient, bool.
        predicted (`np.ndarray`): Success rate that was believed of it before, NaN where nothing was.
    """

    phases: np.ndarray
    steps: np.ndarray
    rows: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    useful: np.ndarray
    predicted: np.ndarray

    @staticmethod
    def of(table: pa.Table) -> Outcomes:
        """From the table of a run."""
        return Outcomes(
            phases=np.array(table[PHASE].to_pylist(), dtype=object),
            steps=table[STEP].to_numpy(),
            rows=table[INDEX].to_numpy(),
            right=table[RIGHT].to_numpy(),
            wrong=table[WRONG].to_numpy(),
            useful=table[USEFUL].to_numpy(),
            predicted=table[PREDICTED].to_numpy().astype(np.float64),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, mask: np.ndarray) -> Outcomes:
        """Those groups alone; `mask`: `(P,)` bool."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Outcomes(**{name: values[mask] for name, values in columns.items()})

    def of_phase(self, name: str) -> Outcomes:
        """Those of one phase."""
        return self.where(self.phases == name)

    @property
    def predictions(self) -> Outcomes:
        """Those of which something was believed."""
        return self.where(~np.isnan(self.predicted))

    @property
    def mixed(self) -> np.ndarray:
        """Whether there were both right and wrong rollouts, `(P,)` bool."""
        return (self.right > 0) & (self.wrong > 0)

    @property
    def judged(self) -> np.ndarray:
        """Rollouts that could be judged, `(P,)`."""
        return self.right + self.wrong

    @property
    def success_rates(self) -> np.ndarray:
        """Share of right rollouts, `(P,)`, NaN where none could be judged."""
        nothing = np.full(len(self), np.nan)
        return np.divide(self.right, self.judged, out=nothing, where=self.judged > 0)


def first_groups(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong rollouts of each prompt's first group, `(P,)` each: a reward history, or a stage's table.

    Raises:
        `ValueError`: If there is no such file, it is damaged, or nothing was rolled out.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: give reward_history.parquet or the table of a scored stage, from the record "
            "folder of a run."
        )
    table = read_table(path)
    if not {INDEX, RIGHT, WRONG} <= set(table.column_names):
        raise ValueError(f"{path} lacks one of the columns {INDEX}, {RIGHT} and {WRONG}.")
    frame = table.select([INDEX, RIGHT, WRONG]).to_pandas().dropna()
    if frame.empty:
        raise ValueError(f"{path} has no prompt that was rolled out.")
    first = frame.drop_duplicates(INDEX).astype(np.int64)
    return first[RIGHT].to_numpy(), first[WRONG].to_numpy()


def read_outcomes(path: Path) -> Outcomes | None:
    """Read them from a run's file; `None` if there is none, or it counted nothing.

    Raises:
        `ValueError`: If it is damaged.
    """
    if not path.exists():
        return None
    table = read_table(path)
    if not {PHASE, STEP, INDEX, RIGHT, WRONG, USEFUL, PREDICTED} <= set(table.column_names):
        return None
    return Outcomes.of(table)
