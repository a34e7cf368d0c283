"""Which columns of an unknown dataset hold the question and the answer, as far as names and contents tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl_learnalign.data.cells import UnusableRowError, answers_of, is_missing
from trl_learnalign.data.turns import question_of

if TYPE_CHECKING:
    from datasets import Dataset

_LOOKED_AT = 50

_QUESTION_WORDS = (
    *("question", "problem", "query", "instruction", "prompt", "conversation", "message"),
    *("input", "task", "text"),
)
_ANSWER_WORDS = (
    *("answer", "target", "gold", "truth", "label", "solution", "output", "response", "result"),
    "reference",
)
_MARK_WORDS = ("id", "idx", "index", "uid", "uuid", "source", "split", "url", "level", "difficulty")


def likely_columns(dataset: Dataset) -> tuple[str | None, str | None]:
    """The columns that most likely hold question and answer; `None` where nothing tells.

    Args:
        dataset (`datasets.Dataset`): The first rows are looked at.
    """
    rows = dataset.with_format(None)[: min(_LOOKED_AT, len(dataset))]
    asking = {name: values for name, values in rows.items() if _most(values, _asks)}
    question = _first(asking, _QUESTION_WORDS, _mean_length)
    answering = {
        name: values
        for name, values in rows.items()
        if name != question and _most(values, answers_of)
    }
    # Of several an answer is the shorter text.
    answer = _first(answering, _ANSWER_WORDS, lambda values: -_mean_length(values))
    return question, answer


def _most(values: Sequence[Any], judge: Callable[[Any], Any]) -> bool:
    return bool(values) and 2 * sum(bool(judge(value)) for value in values) > len(values)


def _asks(value: Any) -> bool:
    try:
        return bool(question_of(value))
    except UnusableRowError as why:
        # Turns with the answer as their last are the question all the same.
        return "ends with a turn" in str(why)


def _first(
    columns: Mapping[str, Sequence[Any]],
    words: Sequence[str],
    weight: Callable[[Sequence[Any]], float],
) -> str | None:
    """The column whose name has the first of some words in it; else the heaviest one, but for ids and marks."""
    for word in words:
        for name in columns:
            if word in name.lower():
                return name
    others = [name for name in columns if not set(_words(name)) & set(_MARK_WORDS)]
    return max(others, key=lambda name: weight(columns[name]), default=None)


def _words(name: str) -> list[str]:
    return name.lower().replace("-", "_").replace(" ", "_").split("_")


def _mean_length(values: Sequence[Any]) -> float:
    lengths = [len(str(value)) for value in values if not is_missing(value)]
    return sum(lengths) / max(1, len(lengths))
