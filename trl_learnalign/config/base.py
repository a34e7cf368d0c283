"""What a part of the settings is: a dataclass whose fields carry their help and are checked by their types."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_type_hints

from trl_learnalign.config.checks import check_of


def setting(default: Any, text: str) -> Any:
    """A field of a part.

    Args:
        default: Its default; a list is copied for each object.
        text (`str`): What `--help` and docs/configuration.md say.
    """
    metadata = {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """A part of the settings. A new one is a file with a subclass, named among the bases of `LearnAlignConfig`.

    Each value is checked by the declared type of its field ([`checks.check_of`]).

    Raises:
        `ValueError`: At construction, naming the setting, its value and the remedy.
    """

    def __post_init__(self) -> None:
        # Not by `field.type`: transformers' parser overwrites it with a type that has lost its `Annotated`.
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            check = check_of(kind)
            setattr(self, name, check(name, getattr(self, name)))
        self._check_together()

    def _check_together(self) -> None:
        """Check settings against each other; a part that does calls `super()` first."""


def parts_of(config: type[Settings]) -> dict[type, list[str]]:
    """The parts that a class is put together from, and the names of the settings that each declares, in their order.

    Args:
        config (`type`): `LearnAlignConfig`, or a class made like it.
    """
    parts = {
        part: list(inspect.get_annotations(part))
        for part in reversed(config.__mro__)
        if is_dataclass(part)
    }
    return {part: names for part, names in parts.items() if names}
