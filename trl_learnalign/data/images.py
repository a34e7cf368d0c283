"""Pictures in a dataset of questions: nothing here looks at them, so that they must not be dropped in silence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl_learnalign.data.prompts import holds_images, prompt_contents

if TYPE_CHECKING:
    from datasets import Dataset

# As datasets on the hub call them, also where they hold paths, addresses or bytes.
_NAMES = re.compile(
    r"((decoded|query|question)_)?(image|img|picture)s?(_?\d+|_(path|url|file|bytes|base64)s?)?"
)
_PLACES = ("<image>", "<image_1>", "<image 1>", "<|image|>", "<|image_pad|>")
_BATCH = 1000


def check_pictures(dataset: Dataset) -> None:
    """Refuse a dataset with pictures.

    Args:
        dataset (`datasets.Dataset`): Questions, or prompts; pictures are not decoded.

    Raises:
        `ValueError`: Naming the columns and the remedy.
    """
    found = columns_with_pictures(dataset)
    if found:
        raise ValueError(
            f"The dataset has pictures in {', '.join(map(repr, found))}: questions are read as text, and without "
            "their pictures they would be others. Leave such rows out, or, where the questions do not need them, "
            f"the columns: dataset.remove_columns({found})."
        )


def columns_with_pictures(dataset: Dataset) -> list[str]:
    """Those of [`picture_columns`] that hold something in some row."""
    return [name for name in picture_columns(dataset) if _holds_any(dataset, name)]


def picture_columns(dataset: Dataset) -> list[str]:
    """Columns for pictures, by their names or types; they may be empty."""
    return [
        name
        for name, feature in dataset.features.items()
        if _NAMES.fullmatch(name.lower()) or holds_images(feature)
    ]


def _holds_any(dataset: Dataset, name: str) -> bool:
    """Whether a column holds something in some row: one that is empty throughout is no column of pictures."""
    return any(map(_holds_something, _cells(dataset, name)))


def holds_empty_lists(dataset: Dataset, name: str) -> bool:
    """Whether each row of a column is an empty list; `None` is none."""
    return all(cell == [] for cell in _cells(dataset, name))


def _cells(dataset: Dataset, name: str) -> Iterator[Any]:
    """Cells of a column as they lie in Arrow: decoding is slow, and needs Pillow."""
    table = dataset.select_columns([name]).with_format("arrow")
    for start in range(0, len(table), _BATCH):
        yield from table[start : start + _BATCH][name].to_pylist()


def _holds_something(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_something, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return any(map(_holds_something, value))
    return value is not None and value not in ("", b"")


def shows_a_picture(prompt: Any) -> bool:
    """Whether a prompt has the place of a picture in its text."""
    texts = prompt_contents(prompt)
    return any(mark in text for text in texts for mark in _PLACES)
