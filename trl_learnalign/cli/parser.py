"""Command lines: errors in one line, no option is guessed, and `--help` begins with what matters."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from trl import GRPOConfig, ModelConfig, TrlParser
from typing_extensions import override

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.config.fields import Settings, did_you_mean, sections_of
from trl_learnalign.config.learnalign import ADAPTIVE

FIRST = (
    *("model_name_or_path", "dataset_name", "reward_funcs", "output_dir"),
    *("stages", "selector", "top", "order", "warmup_samples", "stage_epochs", "after_warmup"),
    *("num_generations", "max_completion_length", "completions_per_step", "learning_rate"),
    *("resume_from_checkpoint", "dry_run", "push_to_hub"),
)
"""Settings that most runs set, whoever declares them; those that a command has stand at the top of its help."""

USAGE = "%(prog)s [--config FILE] [--SETTING VALUE ...]"


class OneLineParser(TrlParser):
    """`TrlParser` whose errors are one line, and whose help begins with what matters.

    Where a command trains, its defaults are those of [`LearnAlignConfig.adaptive`].

    An option is its whole name: `--warmup_sample` is an error that names `--warmup_samples`.

    Args:
        dataclass_types (sequence of `type`): As in `TrlParser`.
        prog (`str`, *optional*): The program's name in `--help`.
    """

    def __init__(self, dataclass_types: Sequence[type], prog: str | None = None):
        self.shown: list[argparse.Action] = []
        super().__init__(dataclass_types, prog=prog, allow_abbrev=False)
        if LearnAlignConfig in dataclass_types:
            self.set_defaults(**ADAPTIVE)

    @override
    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.shown.append(action)
        return action

    @override
    def error(self, message: str) -> NoReturn:
        """End with the message alone, and the option that may have been meant."""
        raise ValueError(message + self._meant(message))

    def _meant(self, message: str) -> str:
        options = [option for action in self.shown for option in action.option_strings]
        for word in re.findall(r"--[\w-]+", message):
            if word not in options:
                return did_you_mean(word, options)
        return ""

    @override
    def format_help(self) -> str:
        formatter = self.formatter_class(self.prog)
        formatter.add_usage(USAGE, [], [])
        for title, names in self._sections().items():
            formatter.start_section(title)
            for name in names:
                formatter.add_arguments(action for action in self.shown if action.dest == name)
            formatter.end_section()
        return formatter.format_help()

    def _sections(self) -> dict[str, list[str]]:
        """Titles and the settings below them, each setting once."""
        sections = {"what most runs set": ["help", *FIRST]}
        for kind in self.dataclass_types:
            sections |= _sections_of(kind)
        placed: set[str] = set()
        for title, names in sections.items():
            sections[title] = [name for name in names if name not in placed]
            placed.update(names)
        return sections


def _sections_of(kind: type) -> dict[str, list[str]]:
    """The sections of a dataclass; one that is none of our settings is a section by itself."""
    for foreign, title in (
        (GRPOConfig, "the trainer: TRL's GRPOConfig, transformers' TrainingArguments"),
        (ModelConfig, "the model: TRL's ModelConfig"),
    ):
        if issubclass(kind, foreign):
            return {title: [field.name for field in dataclasses.fields(kind)]}
    if issubclass(kind, Settings):
        return sections_of(kind)
    sections = {}
    for part in reversed(kind.__mro__):
        if dataclasses.is_dataclass(part) and inspect.get_annotations(part):
            first_line = (inspect.getdoc(part) or part.__name__).splitlines()[0]
            sections[first_line.rstrip(".")] = list(inspect.get_annotations(part))
    return sections


def with_file_apart(arguments: Sequence[str]) -> list[str]:
    """`--config=FILE` as two arguments, as TRL's parser wants it."""
    apart: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        apart += [name, value] if name == "--config" and equals else [argument]
    return apart
