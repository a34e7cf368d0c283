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
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

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
        hints = _hints(type(self))
        for key in self.others:
            if key in hints:
                raise ValueError(
                    f"{key!r} is a key that {type(self).__name__} has itself: give the other value another name."
                )


def to_json(entry: Any) -> dict[str, Any]:
    """An entry as a JSON object.

    Args:
        entry (dataclass): An [`Entry`], or a dataclass of such values without one.
    """
    values: dict[str, Any] = {}
    for name, hint in _hints(type(entry)).items():
        value = getattr(entry, name)
        if name == OTHERS:
            values.update(value)
        elif value is not None or _entry_type(hint) is None:
            values[name] = _value_to_json(value)
    return values


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
    hints = _hints(kind)
    names_without_default = _names_without_default(kind)
    arguments: dict[str, Any] = {}
    rest = dict(values)
    for name, hint in hints.items():
        if name in rest and name != OTHERS:
            value = rest.pop(name)
            arguments[name] = _value_from_json(hint, value, f"{place}.{name}")
        elif name in names_without_default:
            raise ValueError(f"{place} lacks {name!r}")
    if OTHERS in hints:
        arguments[OTHERS] = rest
    return kind(**arguments)


def _value_from_json(hint: Any, value: Any, place: str) -> Any:
    kind = _entry_type(hint)
    if kind is not None:
        # An empty object stands for nothing: so it was written where there was nothing to measure.
        may_be_missing = kind is not hint
        return None if may_be_missing and not value else from_json(kind, value, place)
    if get_origin(hint) is tuple:
        return _items_from_json(get_args(hint)[0], value, place)
    return value


def _items_from_json(hint: Any, values: Any, place: str) -> tuple[Any, ...]:
    items = []
    for number, value in enumerate(values):
        item = _value_from_json(hint, value, f"{place}[{number}]")
        items.append(item)
    return tuple(items)


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
        for key in entry.others:
            yield f"{place}.{key}"


def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields by name, in the order of the fields, `others` last."""
    hints = get_type_hints(kind)
    by_name = {}
    for each in dataclasses.fields(kind):
        by_name[each.name] = hints[each.name]
    if OTHERS in by_name:
        # The base class has it first; on disk, what has a field comes first.
        by_name[OTHERS] = by_name.pop(OTHERS)
    return by_name


def _names_without_default(kind: type) -> set[str]:
    names = set()
    for each in dataclasses.fields(kind):
        if each.default is MISSING and each.default_factory is MISSING:
            names.add(each.name)
    return names


def _entry_type(hint: Any) -> type | None:
    """The dataclass of a hint `D` or `D | None`; `None` for any other hint."""
    choices = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    for choice in choices:
        if isinstance(choice, type) and dataclasses.is_dataclass(choice):
            return choice
    return None
