"""Entries of a record: dataclasses that are written as JSON objects and read back.

An entry's keys on disk are its field names, so that neither is spelled twice. Values are such as JSON gives back:
numbers, texts, lists, mappings by text, and other entries. What a value is without:

- `None` is written as `null`; an entry that may be missing (`Cost | None`) is left out instead;
- a field with a default may be missing on disk, any other may not;
- keys without a field of their own, of a later version for one, stay in `others` and are written back as they came.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

OTHERS = "others"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What entries have in common.

    Args:
        others (mapping, *optional*): Keys on disk without a field of their own, with their values.

    Raises:
        `ValueError`: If a key of `others` is that of a field.
    """

    open: ClassVar[bool] = False
    """Whether `others` is what users put there, and so nothing to wonder at."""

    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := sorted(self.others.keys() & _hints(type(self)).keys()):
            raise ValueError(
                f"{taken[0]!r} is a key that {type(self).__name__} has itself: give the other value another name."
            )


def to_json(entry: Any) -> dict[str, Any]:
    """An entry as a JSON object.

    Args:
        entry (dataclass): An [`Entry`], or a dataclass of such values without one.
    """
    written = {}
    for name, hint in _hints(type(entry)).items():
        value = getattr(entry, name)
        if value is not None or _entry_type(hint) is None:
            written[name] = _value_to_json(value)
    others = written.pop(OTHERS, {})
    return {**written, **others}


def _value_to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _value_to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value_to_json(item) for item in value]
    return value


def from_json(kind: type[T], values: Any, place: str) -> T:
    """Read an entry.

    Args:
        kind (`type`): The dataclass.
        values (mapping): The JSON object.
        place (`str`): Where it stands, for messages.

    Raises:
        `ValueError`: If it is no object, or lacks a key; naming the place.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} is {values!r} and should be an object")
    hints = dict(_hints(kind))
    keeps_others = hints.pop(OTHERS, None) is not None
    required = _required(kind)
    read: dict[str, Any] = {}
    for name, hint in hints.items():
        if name in values:
            read[name] = _value_from_json(hint, values[name], f"{place}.{name}")
        elif name in required:
            raise ValueError(f"{place} lacks {name!r}")
    if keeps_others:
        read[OTHERS] = {key: value for key, value in values.items() if key not in hints}
    return kind(**read)


def _value_from_json(hint: Any, value: Any, place: str) -> Any:
    if (kind := _entry_type(hint)) is not None:
        # An empty object stands for nothing: so it is written where there was nothing to measure.
        missing = not value and kind is not hint
        return None if missing else from_json(kind, value, place)
    arguments = get_args(hint)
    if get_origin(hint) is tuple and (kind := _entry_type(arguments[0])) is not None:
        return tuple(from_json(kind, item, f"{place}[{i}]") for i, item in enumerate(value))
    return value


def unknown_keys(entry: Any, place: str) -> Iterator[str]:
    """Places of the keys that no field is there for, in an entry and those below it.

    Args:
        entry (dataclass): As in [`to_json`].
        place (`str`): Where it stands.
    """
    for name in _hints(type(entry)):
        value = getattr(entry, name)
        if dataclasses.is_dataclass(value):
            yield from unknown_keys(value, f"{place}.{name}")
    if isinstance(entry, Entry) and not entry.open:
        yield from (f"{place}.{key}" for key in entry.others)


def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields by name, in the order of the fields, `others` last."""
    hints = get_type_hints(kind)
    names = [each.name for each in dataclasses.fields(kind)]
    return {name: hints[name] for name in sorted(names, key=lambda name: name == OTHERS)}


def _required(kind: type) -> frozenset[str]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return frozenset(each.name for each in fields if each.default is missing and each.default_factory is missing)


def _entry_type(hint: Any) -> type | None:
    """The dataclass of a hint `D` or `D | None`; `None` for any other hint."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    return kinds[0] if len(kinds) == 1 else None  # type: ignore[return-value]
