"""`trl-learnalign grpo`: TRL's own GRPO script and YAML, with the callback added.

The command is `trl grpo` with the settings of `LearnAlignConfig` in addition to TRL's, on the command line and in the
YAML file. As with `trl grpo`, options unknown to both are passed to `accelerate launch`. The script itself, with its
data mixtures, reward functions, PEFT and quantisation, is TRL's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from typing import Any

from accelerate.commands.launch import launch_command, launch_command_parser
from trl import DatasetMixtureConfig, GRPOConfig, GRPOTrainer, ModelConfig
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts import grpo

from trl_learnalign.cli.console import (
    OneLineParser,
    one_line_errors,
    set_up_logging,
    with_file_apart,
)
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.config.fields import did_you_mean
from trl_learnalign.training.callback import LearnAlignCallback

SETTINGS = (
    grpo.GRPOScriptArguments,
    LearnAlignConfig,
    GRPOConfig,
    ModelConfig,
    DatasetMixtureConfig,
)
"""Dataclasses whose settings the command accepts: TRL's script's in its order, with ours after the first."""


def parsed(arguments: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Settings, and the remaining arguments for `accelerate launch`: from the YAML file, then from the command line.

    Args:
        arguments (sequence of `str`): The command line, without the command's name.

    Raises:
        `OSError`, `ValueError`: If a setting or the YAML file is invalid, naming it.
    """
    parser = OneLineParser(SETTINGS, prog="trl-learnalign grpo")
    *settings, left = parser.parse_args_and_config(
        with_file_apart(arguments), return_remaining_strings=True
    )
    return settings, left


def check_launch(arguments: Sequence[str]) -> None:
    """Check that `accelerate launch` accepts the arguments that neither TRL's script nor the callback has.

    Args:
        arguments (sequence of `str`): The remaining arguments.

    Raises:
        `ValueError`: If it does not, with a suggestion for a misspelt name.
    """
    launcher = launch_command_parser()
    options = {option for action in launcher._actions for option in action.option_strings}
    ours = {f"--{item.name}" for kind in SETTINGS for item in fields(kind)}
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in options:
            meant = did_you_mean(name, sorted(ours | options))
            raise ValueError(
                f"{name} is not a setting of TRL, LearnAlign or accelerate launch{meant}"
            )


@contextmanager
def callback_added(config: LearnAlignConfig) -> Iterator[None]:
    """Add the callback to each `GRPOTrainer` that is created within the context, because TRL's script creates its own.

    Args:
        config (`LearnAlignConfig`): The callback's settings.
    """
    original = GRPOTrainer.__init__

    @wraps(original)
    def with_callback(trainer: GRPOTrainer, *arguments: Any, **options: Any) -> None:
        original(trainer, *arguments, **options)
        with one_line_errors():
            callback = LearnAlignCallback(trainer, config)
        trainer.add_callback(callback)

    GRPOTrainer.__init__ = with_callback
    try:
        yield
    finally:
        GRPOTrainer.__init__ = original


def train(arguments: Sequence[str]) -> None:
    """Run TRL's script with the callback, in this process.

    Args:
        arguments (sequence of `str`): The command line, without the command's name; the arguments of
            `accelerate launch` in it are ignored.
    """
    (script, config, *others), _launched = parsed(arguments)
    set_up_logging()
    with callback_added(config):
        grpo.main(script, *others)


def main(arguments: Sequence[str]) -> None:
    """Launch [`train`] on the processes given by the arguments or by accelerate's own configuration.

    Args:
        arguments (sequence of `str`): The command line, without the command's name.
    """
    with one_line_errors():
        _settings, left = parsed(arguments)
        launch = resolve_accelerate_config_argument(left)
        check_launch(launch)
    command = [*launch, "--module", __name__, *arguments]
    launch_command(launch_command_parser().parse_args(command))


if __name__ == "__main__":
    train(sys.argv[1:])
