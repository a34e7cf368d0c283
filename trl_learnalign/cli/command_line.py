"""Settings as they were given, before they are made into dataclasses: some decide how the others are to be read."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser


class OneLineParser(TrlParser):
    """`TrlParser` whose errors are one line: its usage lists hundreds of settings.

    Args:
        dataclass_types: As in `TrlParser`.
        **kwargs: As in `TrlParser`.
    """

    def error(self, message: str) -> NoReturn:
        """End with the message alone."""
        raise ValueError(message)


@dataclass(frozen=True)
class GivenSettings:
    """Settings by their names.

    Args:
        values (`dict`): All of them: command line over YAML file over defaults.
        command_line (`dict`): Those given on the command line.
        file (`dict`): Those given in the YAML file.
    """

    values: dict[str, Any]
    command_line: dict[str, Any]
    file: dict[str, Any]


def given_settings(classes: Sequence[type], arguments: Sequence[str], prog: str | None = None) -> GivenSettings:
    """Read the command line, and the YAML file that `--config` names, without making dataclasses of them.

    Args:
        classes (sequence of `type`): The dataclasses.
        arguments (sequence of `str`): The command line, without the program's name.
        prog (`str`, *optional*): The program's name in `--help`.

    Raises:
        `ValueError`: If an argument is not known or has a value of another type, or the file cannot be read.
    """
    parser = OneLineParser(classes, prog=prog)
    remaining, file = _without_file(arguments)
    parser.set_defaults_with_config(**file)
    values = vars(parser.parse_args(remaining))
    unset = object()
    names = {item.name for cls in classes for item in dataclasses.fields(cls)}
    explicit = vars(parser.parse_args(remaining, argparse.Namespace(**dict.fromkeys(names, unset))))
    command_line = {name: value for name, value in explicit.items() if value is not unset}
    return GivenSettings(values, command_line, file)


def _without_file(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    remaining = list(arguments)
    if "--config" not in remaining:
        return remaining, {}
    place = remaining.index("--config")
    if place + 1 == len(remaining):
        raise ValueError("--config: name a YAML file.")
    path = Path(remaining[place + 1])
    del remaining[place : place + 2]
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    settings = yaml.safe_load(path.read_text())
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path}: the file must hold settings, one `name: value` a line.")
    settings.pop("env", None)  # environment variables, which TRL's parser sets
    return remaining, settings
