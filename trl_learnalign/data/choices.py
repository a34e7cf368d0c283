"""Multiple choice: options and which of them is right, in the forms in which datasets keep them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_learnalign.data.cells import UnusableRowError, is_missing, structure

MOST = 26
"""Options of a question, at most: one for each letter."""

_LABEL = re.compile(r"\(?([A-Za-z])[).:]\s*")


@dataclass(frozen=True)
class Option:
    """One option that is there.

    Args:
        label (`str`): What the dataset calls it.
        text (`str`): What it says.
        place (`int`): Where the dataset has it, missing ones counted.
    """

    label: str
    text: str
    place: int


def options_of(value: Any) -> list[Option]:
    """The options in a cell; none if there are none.

    Args:
        value: A list; texts by their labels, as an object or as ARC's `{"text": […], "label": […]}`; the JSON of
            either; or text like "A) 5 B) 6". What is missing in it (`None`, blank) is no option: Arrow fills up the
            objects of other rows.

    Raises:
        `UnusableRowError`: If there are more than letters.
    """
    if isinstance(value, str):
        value = structure(value) or _in_a_row(value)
    if isinstance(value, Mapping):
        texts = _listed(value.get("text"), list(value.values()))
        labels = _listed(value.get("label"), list(value))
    else:
        texts = _listed(value, [])
        labels = [letter(place) for place in range(len(texts))]
    found = []
    for place, (label, text) in enumerate(zip(labels, texts, strict=False)):
        if not is_missing(text):
            found.append(Option(str(label).strip(), str(text).strip(), place))
    if len(found) > MOST:
        raise UnusableRowError(f"has {len(found)} options, and there are {MOST} letters for them")
    return _without_labels(found)


def _listed(value: Any, otherwise: list[Any]) -> list[Any]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_list else otherwise


def _in_a_row(text: str) -> list[str]:
    """Options that stand one after the other, "A) 5 B) 6": each begins with the letter that is next."""
    starts: list[re.Match[str]] = []
    while True:
        expected = re.compile(rf"(?:^|(?<=\s))\(?{letter(len(starts))}\)\s*")
        found = expected.search(text, starts[-1].end() if starts else 0)
        if found is None or len(starts) == MOST:
            break
        starts.append(found)
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return [text[start.end() : end] for start, end in zip(starts, ends, strict=True)]


def _without_labels(options: list[Option]) -> list[Option]:
    """Texts without the labels before them, where each has its own: "E. coli" is not the option E."""
    bare = []
    for option in options:
        match = _LABEL.match(option.text)
        own = {letter(option.place), option.label.upper()}
        if match is None or match[1].upper() not in own or not option.text[match.end() :]:
            return options
        bare.append(Option(option.label, option.text[match.end() :], option.place))
    return bare


def right_letter(answer: Any, options: Sequence[Option]) -> str:
    """The letter of the right option, given by its place, its label or its text; empty if it is none of them."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        keys = [option.place for option in options]
        return letter(keys.index(answer)) if answer in keys else ""
    text = "" if is_missing(answer) else str(answer).strip()
    labels = [option.label for option in options]
    bracketed = re.fullmatch(r"\((\w+)\)", text)
    for name, names in (
        (text, labels),
        (text, [option.text for option in options]),
        (bracketed[1] if bracketed else text, labels),
    ):
        if name in names:
            return letter(names.index(name))
    return ""


def shuffled(right: Any, wrong: Sequence[Any], seed: str) -> tuple[list[Option], str]:
    """Options in an order that the seed draws, and the letter of the right one; empty if that one is missing.

    Args:
        right: The right one.
        wrong (sequence): The others; missing ones are no options.
        seed (`str`): The question: its order is the same every time, and the right one in any place.
    """
    texts = [str(text).strip() for text in (right, *wrong) if not is_missing(text)]
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    options = [Option(letter(place), texts[drawn], place) for place, drawn in enumerate(order)]
    return options, "" if is_missing(right) else letter(order.index(0))


def with_options(question: str, options: Sequence[Option]) -> str:
    """A question with its options below it."""
    lines = [question.strip(), ""]
    lines += [f"{letter(number)}) {option.text}" for number, option in enumerate(options)]
    lines += ["", "Give the letter of the right option."]
    return "\n".join(lines)


def letter(number: int) -> str:
    """The letter of an option, counted from 0."""
    return chr(ord("A") + number)
