"""The chosen prompts as a dataset: all columns that they came with, and what the selection says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Value
from datasets.table import InMemoryTable

from trl_learnalign.data.prompts import SOURCE_ROW, prompts_of, source_rows
from trl_learnalign.records.selection_export import FIGURES, PREFIX


@dataclass(frozen=True)
class FileRows:
    """Rows as their file has them, of which the prompts were made.

    Args:
        rows (`datasets.Dataset`): All that were read.
        numbers (`np.ndarray`): Where each stands in the file, ascending.
    """

    rows: Dataset
    numbers: np.ndarray

    def at(self, numbers: list[int]) -> Dataset:
        """The rows of these numbers, in their order."""
        places = np.searchsorted(self.numbers, numbers)
        return self.rows.with_format(None).select(places)


def subset_of(
    dataset: Dataset, table: pa.Table, rows: np.ndarray, originals: FileRows | None = None
) -> Dataset:
    """The chosen rows, best first, with all their columns and what the selection says of them.

    Added columns: `selection_index` (row of the file, or of the dataset if no file is known), `selection_rank` (from
    1), `selection_score`, `selection_success_rate`, `selection_learnability` and `selection_alignment`; missing values
    where nothing is known.

    Args:
        dataset (`datasets.Dataset`): Where the prompts are.
        table (`pyarrow.Table`): The candidates (`trl_learnalign.records.run`).
        rows (`np.ndarray`): Rows of the dataset that were chosen, `(N,)`, best first.
        originals (`FileRows`, *optional*): Rows to write in place of the dataset's, which were made of them.
    """
    indices = source_rows(dataset, rows)
    ranks = list(range(1, len(rows) + 1))
    made = _rows_alone(dataset, rows) if originals is None else _of_file(originals, indices)
    made = _with_column(made, "index", indices, "int64")
    made = _with_column(made, "rank", ranks, "int64")
    scored = table["index"].to_pylist()
    for name in FIGURES:
        values = table[name].to_pylist()
        by_row = dict(zip(scored, values, strict=True))
        # What fills up a larger choice was not scored.
        column = [by_row.get(row) for row in rows.tolist()]
        made = _with_column(made, name, column, "float64")
    return made


def _with_column(dataset: Dataset, name: str, values: list[Any], kind: str) -> Dataset:
    feature = Value(kind)
    return dataset.add_column(PREFIX + name, values, feature=feature)


def _of_file(originals: FileRows, indices: list[int]) -> Dataset:
    """Those rows in memory, without what an earlier selection said of them."""
    found = originals.at(indices)
    stale = [name for name in found.column_names if name.startswith(PREFIX)]
    kept = found.remove_columns(stale).with_format("arrow")[:]
    return Dataset(InMemoryTable(kept), info=DatasetInfo(features=_without(found.features, stale)))


def _without(features: Features, names: list[str]) -> Features:
    return Features({name: kind for name, kind in features.items() if name not in names})


def _rows_alone(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """Those rows in memory, without what an earlier selection said of them."""
    stale = []
    for name in dataset.column_names:
        if name.startswith(PREFIX) or name == SOURCE_ROW:
            stale.append(name)
    plain = dataset.with_format(None)
    subset = plain.remove_columns(stale).select(rows)
    kept = {name: subset[name] for name in subset.column_names}
    features = subset.features.copy()
    made = Dataset.from_dict(kept, features=features)
    if "prompt" in made.column_names:
        return made
    # A transform makes the prompts as they are read.
    prompts = list(prompts_of(dataset, rows))
    return made.add_column("prompt", prompts)
