"""Datasets of questions with final answers → the columns that `GRPOTrainer` and TRL's rewards expect.

Columns made here: `prompt` (conversational), `solution` (the final answer alone, what `accuracy_reward` compares with)
and `reference` (the written-out solution where the dataset has one, for likelihood-based selectors).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, ReadInstruction, load_dataset

from trl_learnalign import hashing
from trl_learnalign.prompts import SOURCE_ROW, message_text

logger = logging.getLogger(__name__)

SYSTEM_PROMPT = (
    "You solve problems. First reason step by step between <think> and </think>, then give the final answer as "
    "\\boxed{answer}."
)
"""Asks for what TRL's `think_format_reward` and `accuracy_reward` check."""

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_QUESTION_COLUMNS = ("question", "problem", "prompt")
_ANSWER_COLUMNS = ("answer", "solution", "ground_truth")


def load_questions(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """A dataset of questions from the hub, a local file (JSONL, JSON, Parquet, CSV) or a folder saved by `datasets`.

    Args:
        name (`str`): Hub id, e.g. `"openai/gsm8k"`, or a path.
        config (`str`, *optional*): Configuration of a hub dataset, e.g. `"main"`.
        split (`str`, *optional*, defaults to `"train"`): Split of a hub dataset; slices such as `"train[:100]"` work
            for files too.

    Raises:
        `FileNotFoundError`: If a path is meant and nothing is there.
        `ValueError`: If a file has an unknown ending or cannot be read.
    """
    path = Path(name)
    if path.is_dir() and (path / "dataset_info.json").exists():
        return Dataset.load_from_disk(str(path))
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise ValueError(f"{name}: files end in {', '.join(_FORMATS)}; convert it to one of these.")
        part = split[split.index("[") :] if "[" in split else ""
        try:
            return load_dataset(_FORMATS[path.suffix], data_files=name, split=f"train{part}")
        except Exception as error:
            # Each format fails with errors of its own, some without a word.
            raise ValueError(
                f"{name} cannot be read as {_FORMATS[path.suffix]} ({error or type(error).__name__}): give a file "
                "with one problem per row."
            ) from error
    if is_path(name):
        raise FileNotFoundError(
            f"{name} does not exist: give an existing file or folder, or a hub id such as openai/gsm8k."
        )
    return load_dataset(name, config, split=split)


def is_path(name: str) -> bool:
    """Whether a name means a place on this machine rather than a hub repository (`owner/name`)."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or Path(name).suffix in _FORMATS


def as_prompts(dataset: Dataset, system_prompt: str = SYSTEM_PROMPT) -> Dataset:
    r"""Questions and answers as `prompt`, `solution` and `reference`.

    Reads the columns of GSM8K (`question`, `answer` with `#### 72`), MATH (`problem`, `solution` with `\boxed{}`),
    MATH-500, AIME and AMC (`problem`, `answer`), and DAPO-MATH-17K (`prompt`, `reward_model.ground_truth`).

    Args:
        dataset (`Dataset`): Rows with a question and an answer.
        system_prompt (`str`, *optional*): First message of each prompt; none if empty.

    Raises:
        `ValueError`: If question or answer columns are missing, naming those that are there.
    """
    question = next((name for name in _QUESTION_COLUMNS if name in dataset.column_names), None)
    graded = "reward_model" in dataset.column_names
    if question is None or not (graded or any(name in dataset.column_names for name in _ANSWER_COLUMNS)):
        raise ValueError(
            f"The dataset has columns {dataset.column_names}; it needs a question ({', '.join(_QUESTION_COLUMNS)}) "
            f"and an answer ({', '.join(_ANSWER_COLUMNS)}). Rename them with dataset.rename_column."
        )

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        written = row["reward_model"]["ground_truth"] if graded else _first(row, _ANSWER_COLUMNS)
        messages = [{"role": "user", "content": _question_text(row[question])}]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
        reference = row.get("solution") if isinstance(row.get("solution"), str) else None
        written = "" if written is None else str(written)
        return {"prompt": messages, "solution": final_answer(written), "reference": reference or written}

    made = dataset.map(convert, remove_columns=dataset.column_names, desc="Preparing prompts")
    unanswered = [row for row, solution in enumerate(made["solution"]) if not solution]
    if unanswered and len(unanswered) == len(made):
        raise ValueError("No row of the dataset has an answer: without one no rollout is right or wrong.")
    if unanswered:
        logger.warning(
            "%d of %d rows have no answer (the first is row %d): their rollouts are neither right nor wrong, and they "
            "are ranked last. Leave them out to save their rollouts.",
            *(len(unanswered), len(made), unanswered[0]),
        )
    return made


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _question_text(question: Any) -> str:
    """DAPO-MATH-17K keeps its questions as conversations."""
    return question if isinstance(question, str) else message_text(question[-1]) or ""


def final_answer(written: Any) -> str:
    r"""The final answer in a written solution: after `####` (GSM8K), in the last `\boxed{}` (MATH), or all of it.

    Thousands separators are dropped from plain numbers, since a parser may take a comma for a list.
    """
    text = "" if written is None else str(written).strip()
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    elif (boxed := _last_boxed(text)) is not None:
        text = boxed
    return text.replace(",", "") if re.fullmatch(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end].strip()
    return None


def with_source_rows(dataset: Dataset, name: str, config: str | None = None, split: str = "train") -> Dataset:
    """The dataset with a column `source_row`: where its rows are in the file or split that it was loaded from.

    Args:
        dataset (`Dataset`): All rows that [`load_questions`] gave for the other arguments, in their order.
        name (`str`): As there.
        config (`str`, *optional*): As there.
        split (`str`, *optional*, defaults to `"train"`): As there; of a slice, rows are counted in the whole.
    """
    rows = np.arange(len(dataset))
    base, _, part = split.partition("[")
    if part and "+" not in split and not Path(name).is_dir():
        base = "train" if Path(name).is_file() else base
        whole = len(load_questions(name, config, base))
        (piece,) = ReadInstruction.from_spec(f"{base}[{part}").to_absolute({base: whole})
        rows = np.arange(whole)[piece.from_ : piece.to]
    if SOURCE_ROW in dataset.column_names:
        dataset = dataset.remove_columns(SOURCE_ROW)
    return dataset.add_column(SOURCE_ROW, rows)


def hold_out(dataset: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a held-out part, chosen by seed.

    Args:
        dataset (`Dataset`): All rows.
        size (`int`): Rows to hold out, fewer than there are.
        seed (`int`): Decides which.

    Returns:
        `tuple[Dataset, Dataset]`: The rest and the held-out rows.
    """
    order = hashing.permutation(hashing.key(seed, "held out"), np.arange(len(dataset)))
    return dataset.select(sorted(order[size:])), dataset.select(sorted(order[:size]))
