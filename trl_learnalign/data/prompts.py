"""Prompts: text, id and validity of the forms that users bring.

A prompt is a text or a conversation, a list of messages with a `role` and a `content`: a text or a list of parts. A
turn of the assistant may have no text at all, but calls of tools.

What cannot be rolled out is named before anything expensive happens. Rows are never dropped silently: a pool that is
not what the user thinks it is would be selected from, reported on and cited. What can be trained on, however odd (any
script, emoji, very long texts that fit, duplicates), is kept as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Image, IterableDataset

from trl_learnalign import rng

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SOURCE_ROW = "source_row"
"""Column with the row of the source file that a prompt comes from, if rows have been split off since."""

_NAMED_ROWS = 5
_BATCH = 1000
_IMAGES = 16  # read at once


# ---- What a prompt says ---------------------------------------------------------------------------------------------


IMAGE = "<image>"
"""Placeholder of an image in the text of a prompt."""


def message_text(message: Mapping[str, Any], with_images: bool = False) -> str | None:
    """The text of a message; `None` if it has none, or parts that are no text (images, audio).

    Args:
        message (mapping): The message.
        with_images (`bool`, *optional*, defaults to `False`): Let [`IMAGE`] stand for an image.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        return None
    # Parts come from Arrow with all keys that any part has, missing ones as None.
    kinds = [part.get("type") or "text" for part in content]
    if not {"text", "image"}.issuperset(kinds) or ("image" in kinds and not with_images):
        return None
    texts = zip(kinds, content, strict=True)
    return " ".join(IMAGE if kind == "image" else part.get("text") or "" for kind, part in texts)


def prompt_contents(prompt: Any) -> list[str]:
    """The text of each message of a prompt, empty where it has none; a plain prompt is one."""
    if isinstance(prompt, str):
        return [prompt]
    return [message_text(message, with_images=True) or "" for message in prompt]


def prompt_text(prompt: Any) -> str:
    """The text of a prompt: the messages of a conversation one below the other, each after its role."""
    if isinstance(prompt, str):
        return prompt
    lines = zip(prompt, prompt_contents(prompt), strict=True)
    return "\n".join(f"{message['role']}: {text}" for message, text in lines)


def prompt_question(prompt: Any) -> str:
    """What a prompt asks: its messages but for system messages, one below the other."""
    if isinstance(prompt, str):
        return prompt
    messages = [message for message in prompt if message["role"] != "system"]
    return "\n".join(prompt_contents(messages))


def prompt_id(prompt: Any) -> str:
    """Digest of a prompt's content, 16 hexadecimal digits: equal prompts have equal ids."""
    return rng.digest(prompt)


# ---- Prompts of a dataset -------------------------------------------------------------------------------------------


def holds_images(feature: Any) -> bool:
    """Whether a column of this type of `datasets` holds images, however deep."""
    if isinstance(feature, Mapping):
        return any(map(holds_images, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(holds_images, feature))
    inner = getattr(feature, "feature", None)
    return isinstance(feature, Image) or (inner is not None and holds_images(inner))


def has_transform(dataset: Dataset) -> bool:
    """Whether rows are made as they are read (`dataset.with_transform`)."""
    return dataset.format["type"] == "custom"


def columns_of(dataset: Dataset) -> list[str]:
    """Columns as training sees them: those that the dataset's transform makes, if it has one."""
    if has_transform(dataset) and len(dataset):
        return list(dataset[[0]])
    return dataset.column_names


def prompts_of(dataset: Dataset, rows: Iterable[int] | None = None) -> Iterator[Any]:
    """Prompts as training sees them: with the dataset's transform if it has one, whatever its format.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        rows (iterable of `int`, *optional*): Which ones; all by default.
    """
    # A transform may read any column. Formats give the same texts and conversations in other containers.
    if not has_transform(dataset):
        dataset = dataset.with_format(None).select_columns(["prompt"])
    if rows is None:
        # Slices are read several times as fast as lists of rows.
        for start in range(0, len(dataset), _BATCH):
            yield from dataset[start : start + _BATCH]["prompt"]
        return
    numbers = [int(row) for row in rows]
    for start in range(0, len(numbers), _BATCH):
        yield from dataset[numbers[start : start + _BATCH]]["prompt"]


def is_stream(dataset: Any) -> bool:
    """Whether prompts come one after the other, and no row can be counted or asked for."""
    return isinstance(dataset, IterableDataset)


def rows_are_alike(dataset: Dataset) -> bool:
    """Whether a dataset has several rows and no column tells one from another."""
    rows = dataset if has_transform(dataset) else dataset.with_format(None)
    if len(rows) < 2:
        return False
    first = rows[0]
    batches = rows.iter(batch_size=_BATCH)
    return all(value == first[name] for batch in batches for name in batch for value in batch[name])


def source_rows(dataset: Dataset, rows: Iterable[int]) -> list[int]:
    """Rows of the file that a dataset was made from: its column [`SOURCE_ROW`], else its own rows."""
    numbers = [int(row) for row in rows]
    if SOURCE_ROW not in dataset.column_names:
        return numbers
    column = dataset.with_format(None).select_columns([SOURCE_ROW])
    return list(column[numbers][SOURCE_ROW])


def moved_rows(dataset: Dataset) -> str | None:
    """Why a dataset's rows are not those of the file it was made from, as far as it tells; `None` if nothing says so.

    Args:
        dataset (`datasets.Dataset`): With a column `prompt`.
    """
    splits = (dataset.info.splits or {}).values()
    sizes = {dataset.data.num_rows, *(split.num_examples for split in splits)}
    if sizes != {len(dataset)}:
        return f"it has {len(dataset)} rows of {max(sizes)} that were loaded"
    if "prompt" not in dataset.column_names:
        return None
    # As it lies in memory, and as it is read: `shuffle` and `sort` change the second alone.
    in_memory = dataset.data.column("prompt").to_pylist()
    as_read = dataset.with_format(None)["prompt"][:]
    return None if in_memory == as_read else "its rows were put into another order"


# ---- Faults ---------------------------------------------------------------------------------------------------------


def check_prompts(dataset: Dataset, with_images: bool = False) -> None:
    """Check each prompt: text, or a conversation whose messages have a role and text.

    Duplicates are reported and kept: each is a candidate of its own, with its own rollouts. Where there are images,
    equal texts are no duplicates.

    Args:
        dataset (`datasets.Dataset`): With a column `prompt`.
        with_images (`bool`, *optional*, defaults to `False`): Whether messages may have images.

    Raises:
        `ValueError`: Naming the rows, what is wrong with the first of them, and the remedy.
    """
    _check_transform(dataset)
    faults: dict[int, str] = {}
    hashes: set[int] = set()
    for row, prompt in enumerate(prompts_of(dataset)):
        if fault := _fault(prompt, with_images):
            faults[row] = fault
        is_text = isinstance(prompt, str)
        content = prompt if is_text else json.dumps(prompt, sort_keys=True, default=str)
        hashes.add(hash(content))
    if faults:
        row, fault = next(iter(faults.items()))
        raise ValueError(
            f"{len(faults)} of {len(dataset)} prompts cannot be used: {named_rows(faults)} (row {row} {fault}). Mend "
            "them, or leave them out: dataset = dataset.select([i for i in range(len(dataset)) if i not in bad_rows])."
        )
    duplicates = len(dataset) - len(hashes)
    if duplicates and not with_images:
        logger.warning(
            "%d of %d prompts are duplicates of others; each is scored and may be selected on its own. Leave them out "
            "if that is not what you want.",
            duplicates,
            len(dataset),
        )


def _check_transform(dataset: Dataset) -> None:
    """A prompt is scored and then trained on: both must read the same."""
    if not has_transform(dataset):
        return
    rows = range(min(len(dataset), _BATCH))
    first, second = list(prompts_of(dataset, rows)), list(prompts_of(dataset, rows))
    if first != second:
        raise ValueError(
            "The training dataset's transform makes other prompts each time it is read, so that those that are "
            "trained on would not be those that were scored. Make them once: dataset.map instead of with_transform."
        )


def _fault(prompt: Any, with_images: bool) -> str | None:
    """What is wrong with a prompt, continuing "row 7 …"."""
    if prompt is None:
        return "is None"
    if isinstance(prompt, str):
        return None if prompt.strip() else "is empty"
    if not isinstance(prompt, Sequence):
        return f"is a {type(prompt).__name__}, neither text nor a list of messages"
    if not prompt:
        return "is a conversation without messages"
    if isinstance(prompt[0], str):
        return "is a list of strings; messages are dictionaries with role and content"
    for message in prompt:
        has_role = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not has_role:
            return f"has the message {str(message)[:60]!r} without a role"
    texts = [(message["role"], message_text(message, with_images)) for message in prompt]
    # An assistant's turn may hold tool calls alone.
    if any(text is None and role != "assistant" for role, text in texts):
        others = "audio" if with_images else "image and audio"
        return f"has a message without text ({others} parts are not supported)"
    asks = any(text and text.strip() for role, text in texts if role != "system")
    return None if asks else "asks nothing: all its messages but the system's are empty"


def named_rows(rows: Iterable[int]) -> str:
    """Rows as messages name them: "row 7", or "rows 1, 2, 3"."""
    rows = list(rows)
    word = "rows" if len(rows) > 1 else "row"
    numbers = ", ".join(map(str, rows[:_NAMED_ROWS]))
    return f"{word} {numbers}, …" if len(rows) > _NAMED_ROWS else f"{word} {numbers}"


def dataset_digest(dataset: Any) -> str:
    """Digest of all rows and columns of a dataset, whatever files and chunks it comes from.

    A format does not count, nor where in a file the rows were. A transform counts by the prompts that it makes. Images
    count as they lie in files, by their paths where they were not read in. A stream, which may have no end, counts by
    the names of its columns as far as they are known.
    """
    if is_stream(dataset):
        return rng.digest(["stream", dataset.column_names])
    names = [name for name in dataset.column_names if name != SOURCE_ROW]
    shown = [name for name in names if holds_images(dataset.features[name])]
    texts = [name for name in names if name not in shown]
    # Batches of a fixed size: digests of runs that were begun with an earlier version stay what they were.
    batches = dataset.with_format(None).select_columns(texts).iter(batch_size=1000)
    digest = rng.digest_of(
        json.dumps(batch, sort_keys=True, ensure_ascii=False, default=str) for batch in batches
    )
    if shown:
        # Decoded images are other objects each time.
        tables = dataset.with_format("arrow").select_columns(shown).iter(batch_size=_IMAGES)
        of_images = rng.digest_of(
            json.dumps(table.to_pydict(), sort_keys=True, default=_bytes_digest) for table in tables
        )
        digest = rng.digest([digest, of_images])
    if has_transform(dataset):
        return rng.digest([digest, list(prompts_of(dataset))])
    return digest


def _bytes_digest(value: Any) -> str:
    return hashlib.blake2b(value).hexdigest() if isinstance(value, bytes) else str(value)
