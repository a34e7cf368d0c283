"""Checks of one value: each takes a setting's name and value, and gives back the value as a run uses it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

Check = Callable[[str, Any], Any]
"""`check(name, value)`: the value that a run uses, or a `ValueError` that names setting, value and remedy."""


def check_of(kind: Any) -> Check:
    """The check of a setting, by its declared type.

    Args:
        kind: `Annotated[type, check]` names its check; `Literal[...]`, `bool`, `float`, `str` and `str | None` have
            theirs. A type that takes `None` is checked for everything else.

    Raises:
        `TypeError`: If the type says nothing about its values.
    """
    if get_origin(kind) is Annotated:
        plain, check = get_args(kind)
        return optional(check) if type(None) in get_args(plain) else check
    if get_origin(kind) is Literal:
        return one_of(get_args(kind))
    if kind == str | None:
        return optional(text)
    if kind not in _CHECKS:
        raise TypeError(
            f"{kind}: declare the setting as Annotated[type, check], with a check of config/checks.py."
        )
    return _CHECKS[kind]


def optional(check: Check) -> Check:
    """`None`, or what the check takes."""

    def check_unless_none(name: str, value: Any) -> Any:
        return None if value is None else check(name, value)

    return check_unless_none


def whole(least: int) -> Check:
    """A whole number of at least `least`, as an `int`; texts and floats that say one are taken."""

    def check_whole(name: str, value: Any) -> int:
        try:
            number = int(value)
            is_whole = not isinstance(value, bool) and number == float(value)
        except (TypeError, ValueError, OverflowError):
            is_whole = False
        if not is_whole or number < least:
            raise ValueError(f"{name}={value!r}: give a whole number of at least {least}.")
        return number

    return check_whole


def each(check: Check) -> Check:
    """A list of what the check takes; one value counts as a list of it."""

    def check_each(name: str, value: Any) -> list[Any]:
        return [check(name, item) for item in as_list(value)]

    return check_each


def one_of(choices: Sequence[str]) -> Check:
    """One of these texts."""

    def check_choice(name: str, value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}.")
        return value

    return check_choice


def switch(name: str, value: Any) -> bool:
    """True or false, and nothing that only looks like it: YAML reads `off` as a switch, but `"off"` as a text."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: give true or false.")
    return value


def number(name: str, value: Any) -> float:
    """A finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}={value!r}: give a number.")
    return value


def at_least_one(name: str, value: Any) -> float:
    """A factor of at least 1."""
    factor = number(name, value)
    if factor < 1:
        raise ValueError(f"{name}={value!r}: give a number of at least 1.")
    return factor


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    given = number(name, value)
    if given <= 0:
        raise ValueError(f"{name}={value!r}: give a number above 0.")
    return given


def not_negative(name: str, value: Any) -> float:
    """A finite number of at least 0."""
    given = number(name, value)
    if given < 0:
        raise ValueError(f"{name}={value!r}: give a number of at least 0.")
    return given


def share(name: str, value: Any) -> float:
    """A share from 0 to 1."""
    given = number(name, value)
    if not 0 <= given <= 1:
        raise ValueError(f"{name}={value!r}: give a share from 0 to 1.")
    return given


def memory(name: str, value: Any) -> float:
    """A share above 0 and at most 1."""
    given = number(name, value)
    if not 0 < given <= 1:
        raise ValueError(f"{name}={value!r}: give a number above 0 and at most 1.")
    return given


def text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: give a text.")
    return value


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that is none: the nearest one, or nothing.

    Args:
        name (`str`): What was given.
        names (iterable of `str`): What there is.
    """
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else "."


def as_list(value: Any) -> list[Any]:
    """A list of the values: a scalar in YAML (`stages: 1000`) reaches a setting that is a list as it is."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_list else [value]


_CHECKS: dict[Any, Check] = {bool: switch, float: number, str: text}
