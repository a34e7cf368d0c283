"""Categories and embeddings of prompts, from columns of the dataset.

Axis: `n` rows of the dataset.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from datasets import ClassLabel, Value

from trl_learnalign.config.fields import did_you_mean, is_function_path, shown
from trl_learnalign.data.formats import ANSWER_COLUMNS, QUESTION_COLUMNS
from trl_learnalign.data.prompts import SOURCE_ROW, is_stream

if TYPE_CHECKING:
    from datasets import Dataset

MOST = 50
"""Maximum number of distinct values of an automatically detected column."""

LOOKED_AT = 500
"""Number of rows that are read first; a column with more than [`MOST`] values in them is rejected."""

PROMPTS_A_VALUE = 3
"""Minimum average number of prompts per value of such a column."""

NO_VALUE = "(none)"

NOT_CATEGORIES = {*QUESTION_COLUMNS, *ANSWER_COLUMNS, "reference", "target", SOURCE_ROW}
"""Columns that are not categories even if they have few values: question, answer and row."""

CLUSTER = "prompt_cluster"
"""Name of categories formed by clusters of similar prompts instead of a column."""


@dataclass(frozen=True)
class Grouping:
    """An assignment of prompts to categories.

    Args:
        by (`str`): The column, or [`CLUSTER`].
        labels (`tuple[str]`): Names of the categories.
        codes (`np.ndarray`): Category of each row, `(n,)` int64; -1 for rows without one.
    """

    by: str
    labels: tuple[str, ...]
    codes: np.ndarray

    @classmethod
    def of(cls, by: str, texts: Sequence[str]) -> Grouping:
        """Create from texts; rows with the same text form a category.

        Args:
            by (`str`): The column.
            texts (sequence of `str`): The text of each row, n of them.
        """
        values = np.array(texts, dtype=object)
        codes, labels = pd.factorize(values, sort=True)
        names = tuple(labels.tolist())
        return cls(by, names, codes.astype(np.int64))

    def names(self) -> list[str]:
        """Name of each row's category, n of them; empty for rows without one."""
        return [self.labels[code] if code >= 0 else "" for code in self.codes.tolist()]


def column_groupings(dataset: Dataset, columns: Sequence[str] | None) -> tuple[Grouping, ...]:
    """Categories by columns.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        columns (sequence of `str`, *optional*): The columns; defaults to those that look like categories
            (`LearnAlignConfig.category_columns`). A stream has none.

    Raises:
        `ValueError`: As [`check_category_columns`].
    """
    if is_stream(dataset):
        return ()
    if columns is not None:
        check_category_columns(dataset, columns)
        return tuple(_grouping(dataset, name) for name in dict.fromkeys(columns))
    found = []
    for name in dataset.column_names:
        if not _may_be_categories(name, dataset.features[name]):
            continue
        # Read only the first rows at first, to avoid reading long texts of a large dataset.
        first = set(_values(dataset, name, LOOKED_AT))
        if len(first) > MOST:
            continue
        grouping = _grouping(dataset, name)
        count = len(grouping.labels)
        if 2 <= count <= MOST and len(dataset) >= PROMPTS_A_VALUE * count:
            found.append(grouping)
    return tuple(found)


def check_category_columns(dataset: Dataset, columns: Sequence[str] | None) -> None:
    """Check that the given columns exist and have one value per row.

    Raises:
        `ValueError`: Naming the column, the problem and the existing columns.
    """
    for name in columns or ():
        if name not in dataset.column_names:
            raise ValueError(
                f"category_columns: the dataset has no column {name!r}, only {dataset.column_names}"
                f"{did_you_mean(name, dataset.column_names)} Give the names of columns, or [] for none."
            )
        kind = dataset.features[name]
        if not isinstance(kind, (Value, ClassLabel)):
            flat = [other for other, its in dataset.features.items() if isinstance(its, Value)]
            raise ValueError(
                f"category_columns: the column {name!r} holds {kind}, not one value for each prompt. Columns that do: "
                f"{flat}."
            )


def _may_be_categories(name: str, kind: Any) -> bool:
    """Whether a column's values may be categories, judging by its name and type."""
    if name.lower() in NOT_CATEGORIES or name.startswith("selection_"):
        return False
    if isinstance(kind, ClassLabel):
        return True
    if not isinstance(kind, Value):
        return False
    return kind.dtype in ("string", "large_string", "bool") or "int" in kind.dtype


def _grouping(dataset: Dataset, name: str) -> Grouping:
    values = _values(dataset, name, len(dataset))
    kind = dataset.features[name]
    texts = [_label(value, kind) for value in values]
    return Grouping.of(name, texts)


def _values(dataset: Dataset, name: str, count: int) -> list[Any]:
    """The first values of a column."""
    column = dataset.with_format(None).select_columns([name])
    return column[:count][name]


def _label(value: Any, kind: Any) -> str:
    if value is None:
        return NO_VALUE
    # Unlabelled rows of a ClassLabel have -1.
    if isinstance(kind, ClassLabel):
        return kind.int2str(value) if value >= 0 else NO_VALUE
    return str(value)


# ---- Embeddings -----------------------------------------------------------------------------------------------------

HIDDEN, NONE = "hidden", "none"
"""Values of `adaptive_embeddings` other than a column or a function."""


_CHECKED = 10_000  # rows of a column that are checked at a time


def check_embeddings(name: str, dataset: Dataset) -> None:
    """Check that the value of `adaptive_embeddings` exists, before any expensive work.

    Args:
        name (`str`): The value.
        dataset (`datasets.Dataset`): The training dataset.

    Raises:
        `ValueError`: If it is neither a column nor a function, or the column does not hold the same number of finite
            numbers in each row, naming the row.
    """
    if name in (HIDDEN, NONE):
        return
    if name in dataset.column_names:
        _check_column(name, dataset)
    elif ":" in name and is_function_path(name):
        embedding_function(name)
    else:
        raise ValueError(
            f"adaptive_embeddings={name!r} is not {HIDDEN!r}, {NONE!r}, a column of the dataset "
            f"({', '.join(map(repr, dataset.column_names))}) or a 'package.module:function'."
        )


def _check_column(name: str, dataset: Any) -> None:
    """Check, a block of rows at a time, that a column holds the same number of finite numbers in each row."""
    plain = dataset.with_format(None)
    first = plain[0][name]
    width = np.size(first)
    for start in range(0, len(dataset), _CHECKED):
        rows = plain[start : start + _CHECKED][name]
        if _are_embeddings(rows, width):
            continue
        row, value = next(
            (start + place, value)
            for place, value in enumerate(rows)
            if not _are_embeddings([value], width)
        )
        numbers = f" (of length {width}, as in row 0)" if row else ""
        raise ValueError(
            f"adaptive_embeddings={name!r}: row {row} of the column has {shown(value)}, which is not a list of "
            f"finite numbers{numbers} that describes a prompt. Name a column with one list per prompt, all of the "
            "same length."
        )


def _are_embeddings(rows: list[Any], width: int) -> bool:
    """Whether each row is a list of `width` finite numbers."""
    try:
        block = np.asarray(rows, dtype=np.float32)
    except (TypeError, ValueError):
        return False
    return block.shape == (len(rows), width) and width > 0 and bool(np.isfinite(block).all())


def embedding_function(name: str) -> Any:
    """Return the user's function of `adaptive_embeddings`.

    Raises:
        `ValueError`: If it cannot be imported or is not a function.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"adaptive_embeddings={name!r} cannot be imported ({error}): name a function of an importable module as "
            "'package.module:function'."
        ) from error
    if not callable(function):
        raise ValueError(
            f"adaptive_embeddings={name!r} is a {type(function).__name__}: name a function that takes the prompts "
            "and returns one row of numbers for each."
        )
    return function
