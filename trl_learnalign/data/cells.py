"""Parses the cells of a dataset: structure in text, answers, conversations."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trl_learnalign.data.answers import final_answer
from trl_learnalign.data.prompts import message_text


class UnusableRowError(ValueError):
    """A row that cannot be used; its message continues "row 7 …"."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: no value, NaN (which tables write instead), or blank text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and not value.strip()


def structure(text: str) -> Any:
    """The value of a text in JSON, or as a Python literal (as in CSV files); `None` if it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def answers_of(value: Any, is_one: bool = False) -> list[str]:
    """The correct answers in a cell, each as [`final_answer`] returns it; empty if there is none.

    A list of strings, also one in JSON, holds alternatives, each of which is correct. So do the objects of datasets of
    questions with aliases: verl's `{"target": […]}`, TriviaQA's `{"value": …, "aliases": […]}`, SQuAD's `{"text":
    […]}`.

    Args:
        value: The cell: a string, a number, a list, an object.
        is_one (`bool`, *optional*, defaults to `False`): Whether a list is one answer in several parts
            (OlympiadBench).
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        parts = structure(value)
        # A text like [1, 2] is an interval, not a list of answers.
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            value = parts
    if isinstance(value, Mapping):
        value = _aliases(value)
    if is_one or isinstance(value, str) or not isinstance(value, Sequence):
        value = [value]
    answers = [final_answer(part) for part in value if not is_missing(part)]
    return list(dict.fromkeys(answer for answer in answers if answer))


def _aliases(value: Mapping[str, Any]) -> Any:
    """The answers in an object; the object's text if it has no known form, like the tests of programs."""
    if not is_missing(value.get("target")):
        return value["target"]
    if isinstance(value.get("aliases"), Sequence) and isinstance(value.get("value"), str):
        return [value["value"], *value["aliases"]]
    if isinstance(value.get("text"), Sequence):
        return value["text"]
    return json.dumps(value, default=str)


# ---- Conversations --------------------------------------------------------------------------------------------------

Turn = dict[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
"""ShareGPT's speakers, and the corresponding roles."""


def question_of(value: Any) -> str | list[Turn]:
    """The question of a row: a string, or the turns of a conversation without its system prompt.

    Args:
        value: The cell: a string, turns with `role` and `content`, or with `from` and `value` (ShareGPT); or turns in
        JSON
            (as in DAPO-MATH-17K and verl).

    Raises:
        `UnusableRowError`: If it has no question, or another form; with the remedy if there is one.
    """
    asked = as_written(value)
    if isinstance(asked, str):
        return asked
    turns = []
    for turn in asked:
        if turn["role"] != "system":
            turns.append({"role": turn["role"], "content": message_text(turn)})
    return turns[0]["content"] if len(turns) == 1 else turns


def as_written(value: Any) -> str | list[Turn]:
    """The unchanged question: its text, or all its turns, with ShareGPT's speakers converted to roles.

    Args:
        value: The cell, as in [`question_of`].

    Raises:
        `UnusableRowError`: As [`question_of`].
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = structure(value) or value
    if is_missing(value):
        raise UnusableRowError("has an empty question")
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        kind = (
            "an object" if isinstance(value, Mapping) else f"a value of type {type(value).__name__}"
        )
        raise UnusableRowError(
            f"has {kind} as its question ({_shown(value)}): a question is a text or a list of turns"
        )
    turns = [_turn(each) for each in value]
    _check(turns)
    return turns


def _turn(value: Any) -> Turn:
    if isinstance(value, str):
        raise UnusableRowError(
            f"has a list of texts as its question ({_shown(value)}, …): join them into one text, or make them turns "
            "with role and content"
        )
    if not isinstance(value, Mapping):
        raise UnusableRowError(
            f"has the turn {_shown(value)}: a turn is an object with the keys role and content"
        )
    if isinstance(value.get("role"), str):
        return dict(value)
    speaker = value.get("from")
    if not isinstance(speaker, str):
        raise UnusableRowError(
            f"has the turn {_shown(value)} without a role: turns need the keys role and content, or from and value"
        )
    if speaker not in _ROLES:
        raise UnusableRowError(
            f"has a turn from the unknown speaker {speaker!r}: use one of {', '.join(_ROLES)}"
        )
    return {"role": _ROLES[speaker], "content": value.get("value")}


def _check(turns: Sequence[Turn]) -> None:
    """Refuse turns without text, a conversation without a question, and one that contains its answer."""
    for turn in turns:
        if message_text(turn) is None:
            raise UnusableRowError(
                f"has a turn of the {turn['role']} without text ({_shown(turn.get('content'))}): images, audio and "
                "tool calls are not supported"
            )
    asked = [turn for turn in turns if turn["role"] != "system"]
    if not any((message_text(turn) or "").strip() for turn in asked):
        raise UnusableRowError("has no question: all turns but the system's are empty")
    if asked[-1]["role"] == "assistant":
        raise UnusableRowError(
            "ends with a turn of the assistant, which may contain the answer: remove that turn from the question"
        )


def _shown(value: Any) -> str:
    return repr(value)[:60]
