"""What a cell of a dataset says: whether it says anything, what structure its text spells, which answers it gives."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trl_learnalign.data.answers import final_answer


class UnusableRowError(ValueError):
    """A row that nothing can be made of; its message continues "row 7 …"."""


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: no value, NaN (tables write it for one), or blank text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and not value.strip()


def structure(text: str) -> Any:
    """What a text spells in JSON, or as a Python literal (CSV files keep these); `None` if neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def answers_of(value: Any, is_one: bool = False) -> list[str]:
    """The right answers of a cell, each as [`final_answer`] gives it; empty if there is none.

    A list of texts, also one in JSON, holds several answers, any of which is right. So do the objects of datasets of
    questions with aliases: verl's `{"target": […]}`, TriviaQA's `{"value": …, "aliases": […]}`, SQuAD's
    `{"text": […]}`.

    Args:
        value: The cell: a text, a number, a list, an object.
        is_one (`bool`, *optional*, defaults to `False`): A list is one answer in several parts (OlympiadBench).
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        parts = structure(value)
        # An answer like [1, 2] is an interval, not a list of answers.
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            value = parts
    if isinstance(value, Mapping):
        value = _aliases(value)
    if is_one or isinstance(value, str) or not isinstance(value, Sequence):
        value = [value]
    answers = [final_answer(part) for part in value if not is_missing(part)]
    return list(dict.fromkeys(answer for answer in answers if answer))


def _aliases(value: Mapping[str, Any]) -> Any:
    """The answers in an object; the object's text where it is of no known form, as tests of programs are."""
    if not is_missing(value.get("target")):
        return value["target"]
    if isinstance(value.get("aliases"), Sequence) and isinstance(value.get("value"), str):
        return [value["value"], *value["aliases"]]
    if isinstance(value.get("text"), Sequence):
        return value["text"]
    return json.dumps(value, default=str)
