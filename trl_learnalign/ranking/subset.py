"""The chosen prompts as a dataset: all columns that they came with, and what the selection says of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value

from trl_learnalign.data.prompts import SOURCE_ROW, prompts_of, source_rows
from trl_learnalign.records.selection_export import FIGURES, PREFIX


def subset_of(dataset: Dataset, table: pa.Table, rows: np.ndarray) -> Dataset:
    """The chosen rows, best first, with all columns of the dataset and what the selection says of them.

    Added columns: `selection_index` (row of the file, or of the dataset if no file is known), `selection_rank` (from
    1), `selection_score`, `selection_success_rate`, `selection_learnability` and `selection_alignment`; missing values
    where nothing is known.

    Args:
        dataset (`datasets.Dataset`): Where the prompts are.
        table (`pyarrow.Table`): The candidates (`trl_learnalign.records.run`).
        rows (`np.ndarray`): Rows of the dataset that were chosen, `(N,)`, best first.
    """
    columns: dict[str, list[Any]] = {
        "index": source_rows(dataset, rows),
        "rank": list(range(1, len(rows) + 1)),
    }
    figures = table.select(["index", *FIGURES]).to_pylist()
    by_row = {figure["index"]: figure for figure in figures}
    for name in FIGURES:
        # What fills up a larger choice was not scored.
        columns[name] = [by_row.get(row, {}).get(name) for row in rows.tolist()]
    made = _rows_alone(dataset, rows)
    for name, values in columns.items():
        kind = "int64" if name in ("index", "rank") else "float64"
        made = made.add_column(PREFIX + name, values, feature=Value(kind))
    return made


def _rows_alone(dataset: Dataset, rows: Iterable[int]) -> Dataset:
    """Those rows in memory, without what an earlier selection said of them."""
    names = dataset.column_names
    stale = [name for name in names if name.startswith(PREFIX) or name == SOURCE_ROW]
    subset = dataset.with_format(None).remove_columns(stale).select(rows)
    kept = {name: subset[name] for name in subset.column_names}
    made = Dataset.from_dict(kept, features=subset.features.copy())
    if "prompt" in made.column_names:
        return made
    # A transform makes the prompts as they are read.
    return made.add_column("prompt", list(prompts_of(dataset, rows)))
