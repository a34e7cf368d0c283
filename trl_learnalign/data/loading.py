"""Loads datasets of questions with final answers into the columns that `GRPOTrainer` expects.

The created columns are `prompt` (conversational), `solution` and `reference`. `solution` is the final answer, as a
plain number or in a box, against which `accuracy_reward` grades; a list of them if a row of the dataset has several
correct answers. `reference` is the written-out solution if the dataset has one, for likelihood-based selectors.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    ReadInstruction,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.table import InMemoryTable

from trl_learnalign import rng
from trl_learnalign.data.answers import (
    MAX_UNJUDGED,
    Solution,
    misjudged,
    reference_answer,
    warn_of_literal_references,
    why_not_gradable,
)
from trl_learnalign.data.cells import UnusableRowError
from trl_learnalign.data.formats import Form, find_form
from trl_learnalign.data.prompts import SOURCE_ROW, has_images, named_rows, prompt_contents

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


# ---- JSON files -----------------------------------------------------------------------------------------------------

_NULL_IN_LIST = re.compile(rb"[\[,]\s*null\s*[,\]]")


def check_rows(path: Path) -> None:
    """Check that each row of a JSON file is an object; invalid JSON is reported by the reader.

    Args:
        path (`Path`): Lines of objects, a list of them, or one object of columns; may be compressed.

    Raises:
        `ValueError`: Naming the row, counted from 0.
    """
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            start = file.readline()
            if start.lstrip().startswith(b"["):
                _check_list(start + file.read())
                return
            row = 0
            for line in itertools.chain([start], file):
                if line.strip() == b"null":
                    raise _NullRowError(f"row {row} is null; it must be an object")
                row += bool(line.strip())
    except _NullRowError:
        raise
    except (OSError, ValueError, EOFError):
        return


class _NullRowError(ValueError):
    """A row that is not an object."""


def _check_list(content: bytes) -> None:
    if not _NULL_IN_LIST.search(content):  # parsing everything takes memory
        return
    rows = json.loads(content)
    for number, row in enumerate(rows):
        if row is None:
            raise _NullRowError(f"row {number} is null; it must be an object")


# ---- Images ---------------------------------------------------------------------------------------------------------

# Column names used on the hub, also for paths, addresses or bytes.
_NAMES = re.compile(
    r"((decoded|query|question)_)?(image|img|picture)s?(_?\d+|_(path|url|file|bytes|base64)s?)?"
)
_PLACES = ("<image>", "<image_1>", "<image 1>", "<|image|>", "<|image_pad|>")
_BATCH = 1000


def refuse_images(dataset: Dataset) -> None:
    """Refuse a dataset with images.

    Args:
        dataset (`datasets.Dataset`): Questions, or prompts; images are not decoded.

    Raises:
        `ValueError`: Naming the columns and the remedy.
    """
    found = columns_with_images(dataset)
    if found:
        raise ValueError(
            f"The dataset has images in the columns {', '.join(map(repr, found))}, but questions are read as text "
            "alone. Leave out the rows whose questions need their image. If no question needs one, remove the "
            f"columns: dataset.remove_columns({found})."
        )


def columns_with_images(dataset: Dataset) -> list[str]:
    """Those of [`columns_named_like_images`] that are nonempty in at least one row."""
    return [name for name in columns_named_like_images(dataset) if _has_any(dataset, name)]


def columns_named_like_images(dataset: Dataset) -> list[str]:
    """Image columns, by their names or types; they may be empty."""
    return [
        name
        for name, feature in dataset.features.items()
        if _NAMES.fullmatch(name.lower()) or has_images(feature)
    ]


def _has_any(dataset: Dataset, name: str) -> bool:
    """Whether a column is nonempty in some row; a column that is always empty does not count as an image column."""
    return any(map(_has_value, _cells(dataset, name)))


def has_empty_lists(dataset: Dataset, name: str) -> bool:
    """Whether each row of a column is an empty list; `None` does not count as one."""
    return all(cell == [] for cell in _cells(dataset, name))


def _cells(dataset: Dataset, name: str) -> Iterator[Any]:
    """Cells of a column as stored in Arrow, because decoding is slow and needs Pillow."""
    table = dataset.select_columns([name]).with_format("arrow")
    for start in range(0, len(table), _BATCH):
        yield from table[start : start + _BATCH][name].to_pylist()


def _has_value(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_value, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return any(map(_has_value, value))
    return value is not None and value not in ("", b"")


def has_image_placeholder(prompt: Any) -> bool:
    """Whether a prompt has an image placeholder in its text."""
    texts = prompt_contents(prompt)
    return any(mark in text for text in texts for mark in _PLACES)


# ---- Questions ------------------------------------------------------------------------------------------------------

SYSTEM_PROMPT = (
    "You solve problems. First reason step by step between <think> and </think>, then give the final answer as "
    "\\boxed{answer}."
)
"""Asks for the format that TRL's `think_format_reward` and `accuracy_reward` check."""

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")


def load_questions(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """Load a dataset of questions from the hub, a local file or a folder.

    Args:
        name (`str`): Hub id, e.g. `"openai/gsm8k"`; or a path: a file (JSONL, JSON, Parquet or CSV, also compressed),
            a folder of such files, or a folder saved by `datasets`.
        config (`str`, *optional*): Configuration of a hub dataset, e.g. `"main"`.
        split (`str`, *optional*, defaults to `"train"`): Split of a hub dataset or folder; slices such as
            `"train[:100]"` work for files too. A source with a single split is loaded whole, whatever the split's
            name.

    Raises:
        `FileNotFoundError`: If it is a path that does not exist.
        `ValueError`: If a file has an unknown extension or cannot be read, or a folder has no such split.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, config, split)
    if path.is_file():
        if _ending(path) not in _FORMATS:
            raise ValueError(
                f"{name} has an unsupported ending: convert the file to one of {', '.join(_FORMATS)}."
            )
        part = split[split.index("[") :] if "[" in split else ""
        try:
            if _FORMATS[_ending(path)] == "json":
                check_rows(path)
            return load_dataset(_FORMATS[_ending(path)], data_files=str(path), split=f"train{part}")
        except Exception as error:
            # Each format raises its own errors, some without a message.
            why = str(error) or type(error).__name__
            raise ValueError(
                f"{name} cannot be read as {_FORMATS[_ending(path)]} ({why}). Give a file with one problem per row."
            ) from error
    if is_path(name):
        raise FileNotFoundError(
            f"{name} does not exist: give an existing file or folder, or a hub id such as openai/gsm8k."
        )
    return load_dataset(name, config, split=split)


def _load_folder(path: Path, config: str | None, split: str) -> Dataset:
    """Load a folder saved by `datasets`, or one of files, which are assigned to splits by name as on the hub."""
    try:
        # Files written by `save_to_disk`.
        markers = [path / name for name in ("dataset_info.json", "dataset_dict.json")]
        is_saved = any(marker.exists() for marker in markers)
        for file in () if is_saved else sorted(path.rglob("*.json*")):
            check_rows(file)
        dataset = load_from_disk(str(path)) if is_saved else load_dataset(str(path), config)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a dataset ({str(error) or type(error).__name__}). Give a folder of "
            f"{', '.join(_FORMATS)} files, or a folder that save_to_disk wrote."
        ) from error
    base = split.partition("[")[0]
    if isinstance(dataset, DatasetDict):
        if base not in dataset and len(dataset) > 1:
            names = list(dataset)
            raise ValueError(
                f"{path} has no split {base!r}, only {', '.join(names)}: choose one with --dataset_train_split "
                f"{names[0]}, or with --dataset_test_split {names[0]} for evaluation."
            )
        dataset = dataset[base] if base in dataset else next(iter(dataset.values()))
    if "[" not in split:
        return dataset
    (part,) = ReadInstruction.from_spec(split).to_absolute({base: len(dataset)})
    start = part.from_ or 0
    end = len(dataset) if part.to is None else part.to
    return dataset.select(range(start, end))


def _ending(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def is_path(name: str) -> bool:
    """Whether a name is a local path rather than a hub repository (`owner/name`)."""
    path = Path(name)
    return path.exists() or name.startswith((".", "/", "~")) or _ending(path) in _FORMATS


def as_prompts(
    dataset: Dataset,
    system_prompt: str = SYSTEM_PROMPT,
    question_column: str | None = None,
    answer_column: str | None = None,
    max_unjudged: float = MAX_UNJUDGED,
) -> Dataset:
    r"""Convert questions and answers to `prompt`, `solution` and `reference`.

    It reads the columns of GSM8K (`question`, `answer` with `#### 72`), MATH (`problem`, `solution` with `\boxed{}`),
    MATH-500, AIME and AMC (`problem`, `answer`), DAPO-MATH-17K and verl (`prompt`, `reward_model.ground_truth`),
    OlympiadBench (`question`, `final_answer`), GPQA, MMLU, ARC and AQuA (options, answered by a letter), Alpaca
    (`instruction`, `input`).

    Each reference is checked before anything is generated: in a box, the reward of training must grade it correct.

    Args:
        dataset (`Dataset`): Rows with a question and an answer.
        system_prompt (`str`, *optional*): First message of each prompt; none if empty.
        question_column (`str`, *optional*): Column of the question; by default it is found by its name.
        answer_column (`str`, *optional*): Column of the answer, likewise.
        max_unjudged (`float`, *optional*, defaults to `0.5`): Refuse a dataset with a larger share of ungradable
            answers (proofs, programs, long text).

    Raises:
        `ValueError`: If question or answer columns are missing, naming the existing ones; if it has images; if rows
            have no readable question, naming them; if too few answers can be judged, with the reason.
    """
    if not 0 <= max_unjudged <= 1:
        raise ValueError(f"max_unjudged={max_unjudged}: give a share from 0 to 1.")
    if not len(dataset):
        raise ValueError("The dataset has no rows: give a file or a split that has rows.")
    refuse_images(dataset)
    form = find_form(dataset, question_column, answer_column)
    table, answers = _read(dataset, form, system_prompt, answer_column)
    solutions = _one_each([list(map(reference_answer, found)) for found in answers])
    _check_answers(answers, solutions, max_unjudged)
    table = table.append_column("solution", pa.array(solutions))
    # Set a fingerprint explicitly, because computing one would copy the whole table.
    return Dataset(InMemoryTable(table.select(COLUMNS)), fingerprint=uuid.uuid4().hex)


def _read(
    dataset: Dataset, form: Form, system_prompt: str, answer_column: str | None
) -> tuple[pa.Table, list[list[str]]]:
    """Prompts and references as a table, and the answers of each row."""
    parts: list[pa.Table] = []
    answers: list[list[str]] = []
    faults = Faults(len(dataset))
    # Not `map`, whose disk cache cannot detect changes of the functions called.
    for batch in _batches(dataset):
        prompts: list[Any] = []
        references = []
        for row in batch:
            with faults.of_next_row():
                question = _question(form, row)
                found = form.answers(row)
                prompts.append(_conversation(question, system_prompt))
                references.append(_written_solution(row, answer_column) or (found or [""])[0])
                answers.append(found)
        columns = {"prompt": prompts, "reference": references}
        parts.append(pa.table(columns, schema=_features().arrow_schema))
    faults.check()
    return pa.concat_tables(parts), answers


def _question(form: Form, row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    question = form.question(row)
    if has_image_placeholder(question):
        raise UnusableRowError("has an image placeholder in its text but no image")
    return question


COLUMNS = ["prompt", "solution", "reference"]
"""Columns that are made for each row."""

_BATCH = 1000


def _batches(dataset: Dataset) -> Iterator[list[dict[str, Any]]]:
    """Rows as dictionaries, in batches; image cells stay encoded."""
    images = columns_named_like_images(dataset)
    plain = dataset.with_format(None).remove_columns(images)
    for batch in plain.iter(batch_size=_BATCH):
        yield [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]


def _features() -> Features:
    text = Value("string")
    return Features({"prompt": [{"role": text, "content": text}], "reference": text})


def _one_each(solutions: Sequence[list[str]]) -> Sequence[Solution]:
    """One string per row; or one list of strings per row, if some row has several correct answers."""
    kept = [[text for text in row if text] for row in solutions]
    if any(len(row) > 1 for row in kept):
        return kept
    return [row[0] if row else "" for row in kept]


class Faults:
    """Collects rows that cannot be used, and the reasons.

    Args:
        count (`int`): Rows of the dataset.
    """

    def __init__(self, count: int):
        self.count, self.seen = count, 0
        self.found: dict[int, str] = {}

    @contextmanager
    def of_next_row(self) -> Iterator[None]:
        """Record the error of the row read within the context; stops early if all rows so far are unusable."""
        try:
            yield
        except UnusableRowError as why:
            self.found[self.seen] = str(why)
        self.seen += 1
        if len(self.found) == self.seen == _BATCH:
            self.check()

    def check(self) -> None:
        """Raise if there are unusable rows.

        Raises:
            `ValueError`: Naming the rows, the error of the first, and the remedy.
        """
        if not self.found:
            return
        row, why = next(iter(self.found.items()))
        seen = "" if self.seen == self.count else f" (reading stopped after {self.seen:,} of them)"
        raise ValueError(
            f"{len(self.found):,} of {self.count:,} rows cannot be used{seen}: {named_rows(self.found)} (row {row} "
            f"{why}). Fix them or remove them from the dataset. Row numbers start at 0."
        )


def _conversation(question: str | list[dict[str, Any]], system_prompt: str) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if system_prompt:
        return [{"role": "system", "content": system_prompt}, *messages]
    return messages


def _written_solution(row: Mapping[str, Any], answer_column: str | None) -> str:
    """The written-out solution; empty if the dataset has none."""
    for name in ("solution", answer_column or "answer"):
        text = row.get(name)
        if isinstance(text, str):
            return text
    return ""


def _check_answers(
    answers: Sequence[list[str]], solutions: Sequence[Solution], most: float
) -> None:
    """Log how many rows have no gradable answer, and refuse a dataset with too many."""
    reasons = {row: why for row, found in enumerate(answers) if (why := _why_not_gradable(found))}
    if reasons and len(reasons) == len(answers) and set(reasons.values()) == {"no answer"}:
        raise ValueError(
            "No row of the dataset has an answer, and without an answer no rollout can be graded."
        )
    wrong = dict.fromkeys(misjudged(solutions), "not graded as correct against itself in \\boxed{}")
    warn_of_literal_references(solutions)
    faults = dict(sorted({**reasons, **wrong}.items()))
    if not faults:
        return
    first, why = next(iter(faults.items()))
    kinds = Counter(faults.values()).most_common()
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
    problem = (
        f"{len(faults)} of {len(answers)} rows have no gradable answer ({counts}); the first is row {first}: "
        f"{_shortened((answers[first] or [''])[0])} ({why})"
    )
    if len(faults) > most * len(answers):
        raise ValueError(
            f"{problem}. That is more than max_unjudged={most:g} allows: remove such rows, name the column of final "
            "answers (--answer_column NAME), or allow them with --max_unjudged 1."
        )
    logger.warning(
        "%s. Rollouts of these rows are never correct, so the rows are ranked last: remove them to save their "
        "rollouts.",
        problem,
    )


def _why_not_gradable(answers: Sequence[str]) -> str | None:
    """Why none of a row's answers can be judged; `None` if at least one can."""
    reasons = [why_not_gradable(answer) for answer in answers] or ["no answer"]
    return reasons[0] if all(reasons) else None


def _shortened(text: str, length: int = 80) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= length else text[:length] + "…")


def with_source_rows(
    dataset: Dataset,
    name: str,
    config: str | None = None,
    split: str = "train",
) -> Dataset:
    """Add a column `source_row`: the positions of the rows in the file or split that the dataset was loaded from.

    Args:
        dataset (`Dataset`): All rows that [`load_questions`] returned for the other arguments, in order.
        name (`str`): As there.
        config (`str`, *optional*): As there.
        split (`str`, *optional*, defaults to `"train"`): As there; rows of a slice are counted in the whole split.
    """
    rows = np.arange(len(dataset))
    base, _, part = split.partition("[")
    if part and "+" not in split:
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
        size (`int`): Rows to hold out, fewer than the dataset has.
        seed (`int`): Seed of the choice.

    Returns:
        `tuple[Dataset, Dataset]`: The rest and the held-out rows.
    """
    order = rng.permutation(rng.key(seed, "held out"), np.arange(len(dataset)))
    held_out, rest = order[:size], order[size:]
    return dataset.select(sorted(rest)), dataset.select(sorted(held_out))
