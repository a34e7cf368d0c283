"""Prompts: text, id and validity, in all the forms that users provide.

A prompt is a string or a conversation, a list of messages with a `role` and a `content`: a string or a list of parts.
An assistant turn may have tool calls instead of text.

Prompts that cannot be rolled out are reported before anything expensive runs. Rows are never dropped silently, because
the user would select from, report on and cite another pool than intended. Everything that can be trained on, however
unusual (any script, emoji, very long texts that fit, duplicates), is kept unchanged.
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
_IMAGES = 16  # images read at once


# ---- Text of a prompt -----------------------------------------------------------------------------------------------


IMAGE = "<image>"
"""Placeholder of an image in the text of a prompt."""


def message_text(message: Mapping[str, Any], with_images: bool = False) -> str | None:
    """The text of a message; `None` if it has none, or parts that are not text (images, audio).

    Args:
        message (mapping): The message.
        with_images (`bool`, *optional*, defaults to `False`): Represent an image by [`IMAGE`].
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        return None
    # Arrow gives each part the keys of all parts, with None for missing ones.
    kinds = [part.get("type") or "text" for part in content]
    if not {"text", "image"}.issuperset(kinds) or ("image" in kinds and not with_images):
        return None
    texts = zip(kinds, content, strict=True)
    return " ".join(IMAGE if kind == "image" else part.get("text") or "" for kind, part in texts)


def prompt_contents(prompt: Any) -> list[str]:
    """The text of each message of a prompt, empty if it has none; a plain string is one message."""
    if isinstance(prompt, str):
        return [prompt]
    return [message_text(message, with_images=True) or "" for message in prompt]


def prompt_text(prompt: Any) -> str:
    """The text of a prompt: the messages of a conversation on separate lines, each after its role."""
    if isinstance(prompt, str):
        return prompt
    lines = zip(prompt, prompt_contents(prompt), strict=True)
    return "\n".join(f"{message['role']}: {text}" for message, text in lines)


def prompt_question(prompt: Any) -> str:
    """The question of a prompt: its messages without system messages, on separate lines."""
    if isinstance(prompt, str):
        return prompt
    messages = [message for message in prompt if message["role"] != "system"]
    return "\n".join(prompt_contents(messages))


def prompt_id(prompt: Any) -> str:
    """Digest of a prompt's content, 16 hexadecimal digits; equal prompts have equal ids."""
    return rng.digest(prompt)


# ---- Prompts of a dataset -------------------------------------------------------------------------------------------


def has_images(feature: Any) -> bool:
    """Whether a column with this feature type of `datasets` has images at any depth."""
    if isinstance(feature, Mapping):
        return any(map(has_images, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(has_images, feature))
    inner = getattr(feature, "feature", None)
    return isinstance(feature, Image) or (inner is not None and has_images(inner))


def has_transform(dataset: Dataset) -> bool:
    """Whether rows are computed when read (`dataset.with_transform`)."""
    return dataset.format["type"] == "custom"


def columns_of(dataset: Dataset) -> list[str]:
    """Columns as training sees them: those created by the dataset's transform, if it has one."""
    if has_transform(dataset) and len(dataset):
        return list(dataset[[0]])
    return dataset.column_names


def prompts_of(dataset: Dataset, rows: Iterable[int] | None = None) -> Iterator[Any]:
    """Prompts as training sees them: with the dataset's transform if it has one, independent of its format.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        rows (iterable of `int`, *optional*): Row numbers; defaults to all rows.
    """
    # A transform may read any column. Formats only change the containers of texts and conversations.
    if not has_transform(dataset):
        dataset = dataset.with_format(None).select_columns(["prompt"])
    if rows is None:
        # Reading slices is several times as fast as reading lists of rows.
        for start in range(0, len(dataset), _BATCH):
            yield from dataset[start : start + _BATCH]["prompt"]
        return
    numbers = [int(row) for row in rows]
    for start in range(0, len(numbers), _BATCH):
        yield from dataset[numbers[start : start + _BATCH]]["prompt"]


def is_stream(dataset: Any) -> bool:
    """Whether prompts are streamed, so that rows can neither be counted nor indexed."""
    return isinstance(dataset, IterableDataset)


def rows_are_alike(dataset: Dataset) -> bool:
    """Whether a dataset has several rows and no column distinguishes them."""
    rows = dataset if has_transform(dataset) else dataset.with_format(None)
    if len(rows) < 2:
        return False
    first = rows[0]
    batches = rows.iter(batch_size=_BATCH)
    return all(value == first[name] for batch in batches for name in batch for value in batch[name])


def source_rows(dataset: Dataset, rows: Iterable[int]) -> list[int]:
    """Rows of the source file of a dataset: its column [`SOURCE_ROW`], or its own row numbers."""
    numbers = [int(row) for row in rows]
    if SOURCE_ROW not in dataset.column_names:
        return numbers
    column = dataset.with_format(None).select_columns([SOURCE_ROW])
    return list(column[numbers][SOURCE_ROW])


def moved_rows(dataset: Dataset) -> str | None:
    """Why a dataset's rows differ from those of its source file, as far as detectable; `None` without an indication.

    Args:
        dataset (`datasets.Dataset`): With a column `prompt`.
    """
    splits = (dataset.info.splits or {}).values()
    sizes = {dataset.data.num_rows, *(split.num_examples for split in splits)}
    if sizes != {len(dataset)}:
        return f"it has {len(dataset)} of the {max(sizes)} rows that were loaded"
    if "prompt" not in dataset.column_names:
        return None
    # Compare the order in memory with the order when read; `shuffle` and `sort` change only the latter.
    in_memory = dataset.data.column("prompt").to_pylist()
    as_read = dataset.with_format(None)["prompt"][:]
    return None if in_memory == as_read else "its rows were reordered"


# ---- Validity -------------------------------------------------------------------------------------------------------


def check_prompts(dataset: Dataset, with_images: bool = False) -> None:
    """Check each prompt: a string, or a conversation whose messages have a role and text.

    Duplicates are reported and kept: each is a separate candidate with its own rollouts. With images, equal texts do
    not count as duplicates.

    Args:
        dataset (`datasets.Dataset`): With a column `prompt`.
        with_images (`bool`, *optional*, defaults to `False`): Whether messages may have images.

    Raises:
        `ValueError`: Naming the rows, the error of the first, and the remedy.
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
            f"{len(faults)} of {len(dataset)} prompts cannot be used: {named_rows(faults)} (row {row} {fault}). Fix "
            "them, or remove them: dataset = dataset.select([i for i in range(len(dataset)) if i not in bad_rows])."
        )
    duplicates = len(dataset) - len(hashes)
    if duplicates and not with_images:
        logger.warning(
            "%d of %d prompts are duplicates of others. Each copy is scored and may be selected on its own; remove "
            "the copies if that is not intended.",
            duplicates,
            len(dataset),
        )


def _check_transform(dataset: Dataset) -> None:
    """Check that a transform is deterministic, because a prompt is read for scoring and again for training."""
    if not has_transform(dataset):
        return
    rows = range(min(len(dataset), _BATCH))
    first, second = list(prompts_of(dataset, rows)), list(prompts_of(dataset, rows))
    if first != second:
        raise ValueError(
            "The training dataset's transform produces different prompts each time it is read, so training would "
            "use other prompts than those that were scored. Fix the prompts with dataset.map instead of "
            "with_transform."
        )


def _fault(prompt: Any, with_images: bool) -> str | None:
    """What is wrong with a prompt, as a phrase that follows "row 7"."""
    if prompt is None:
        return "is None"
    if isinstance(prompt, str):
        return None if prompt.strip() else "is empty"
    if not isinstance(prompt, Sequence):
        return f"is a {type(prompt).__name__}, neither text nor a list of messages"
    if not prompt:
        return "is a conversation without messages"
    if isinstance(prompt[0], str):
        return "is a list of strings; messages must be dictionaries with the keys role and content"
    for message in prompt:
        has_role = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not has_role:
            return f"has the message {str(message)[:60]!r} without a role"
    texts = [(message["role"], message_text(message, with_images)) for message in prompt]
    # An assistant turn may consist of tool calls only.
    if any(text is None and role != "assistant" for role, text in texts):
        others = "audio" if with_images else "image and audio"
        return f"has a message without text ({others} parts are not supported)"
    asks = any(text and text.strip() for role, text in texts if role != "system")
    return None if asks else "has no question: all messages but the system's are empty"


def named_rows(rows: Iterable[int]) -> str:
    """Rows as named in messages: "row 7", or "rows 1, 2, 3"."""
    rows = list(rows)
    word = "rows" if len(rows) > 1 else "row"
    numbers = ", ".join(map(str, rows[:_NAMED_ROWS]))
    return f"{word} {numbers}, …" if len(rows) > _NAMED_ROWS else f"{word} {numbers}"


def dataset_digest(dataset: Any) -> str:
    """Digest of all rows and columns of a dataset, independent of its files and chunks.

    It does not depend on the format or on the position of the rows in a file. For a transform, the resulting prompts
    are used; for images, their encoded bytes, or their paths if they were not read. For a stream, which may be
    infinite, only the known column names are used.
    """
    if is_stream(dataset):
        return rng.digest(["stream", dataset.column_names])
    names = [name for name in dataset.column_names if name != SOURCE_ROW]
    shown = [name for name in names if has_images(dataset.features[name])]
    texts = [name for name in names if name not in shown]
    # The batch size is fixed, so that digests of runs started with an earlier version stay the same.
    batches = dataset.with_format(None).select_columns(texts).iter(batch_size=1000)
    digest = rng.digest_of(
        json.dumps(batch, sort_keys=True, ensure_ascii=False, default=str) for batch in batches
    )
    if shown:
        # Decoded images are different objects each time.
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
