"""`categories.parquet`: the category of each row of the dataset, by each column that a choice is told by.

One row for each of the dataset, in its order; one column of texts for each grouping, named as the dataset's column.
With it, a report says which categories a run has trained on without the dataset, also of a run that is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from trl_learnalign.data.categories import Grouping
from trl_learnalign.records import layout
from trl_learnalign.records.tables import read_table, write_table


def write_categories(folder: Path, groupings: Sequence[Grouping]) -> None:
    """Write the file, where there is a grouping; on the main rank.

    Args:
        folder (`Path`): The record folder.
        groupings (sequence of `Grouping`): By columns of the dataset.
    """
    if not groupings:
        return
    columns = {grouping.by: grouping.names() for grouping in groupings}
    write_table(folder / layout.CATEGORIES, pa.table(columns))


def read_categories(folder: Path) -> list[Grouping]:
    """Read the file; empty if there is none.

    Raises:
        `ValueError`: If it is damaged.
    """
    path = folder / layout.CATEGORIES
    if not path.exists():
        return []
    table = read_table(path)
    groupings = []
    for name in table.column_names:
        texts = table[name].to_pylist()
        grouping = Grouping.of(name, texts)
        groupings.append(grouping)
    return groupings
