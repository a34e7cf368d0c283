"""Parsers of command lines, error messages and the short training log."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import PrinterCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from trl import GRPOConfig, ModelConfig, TrlParser
from typing_extensions import override

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.config.fields import Settings, did_you_mean, sections_of
from trl_learnalign.config.learnalign import ADAPTIVE

if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)

OFFLINE_HINT = (
    " Try `make quickstart` (no GPU, no downloads), or local files on a CPU: --model_name_or_path FOLDER "
    "--dataset_name train.jsonl --use_cpu true --bf16 false."
)


def exit_with_error(problem: str, hint: str | None = None) -> NoReturn:
    """Exit with a one-line message.

    Args:
        problem (`str`): What is wrong.
        hint (`str`, *optional*): A remedy; empty if `problem` contains it. Defaults to how to run without GPU and hub.
    """
    # `python -m trl_learnalign` runs the file `__main__.py`.
    program = Path(sys.argv[0]).name.replace("__main__.py", "trl-learnalign")
    if hint is None:
        hint = OFFLINE_HINT
    sys.exit(f"{program}: {problem}.{hint}" if hint else f"{program}: {problem}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Invalid input ends a run with only its message, because a traceback would hide it."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        exit_with_error(str(error), hint="")


@contextmanager
def exit_with(prog: str) -> Iterator[None]:
    """Any error in a command that only reads and writes files ends it with one line that names the command.

    Args:
        prog (`str`): The command's name.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"{prog}: {error}")
    except (LookupError, AttributeError, ArithmeticError) as error:
        logger.debug("The input has an unexpected form", exc_info=True)
        sys.exit(
            f"{prog}: the input has an unexpected form ({type(error).__name__}: {error}). Is a file damaged, or was "
            "it written by another program?"
        )


def set_up_logging() -> None:
    """Log one line per phase on the main process, above the progress bar, and warnings on all processes.

    Deprecation warnings that transformers addresses to TRL are suppressed.
    """
    from accelerate import PartialState  # local, so that commands that only read files start faster

    from trl_learnalign.training.setup import TerminalHandler

    level = logging.INFO if PartialState().is_main_process else logging.ERROR
    logging.basicConfig(level=logging.WARNING, handlers=[TerminalHandler("stdout")])
    logging.getLogger("trl_learnalign").setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


# ---- Training log ---------------------------------------------------------------------------------------------------

SHOWN = {
    "reward": "reward {:.3f}",
    "eval_reward": "eval reward {:.3f}",
    "completions/mean_length": "{:.0f} tokens",
    "completions/clipped_ratio": "{:.0%} cut off",
    "kl": "KL {:.3g}",
    "grad_norm": "grad norm {:.3g}",
    "learning_rate": "lr {:.1e}",
}
"""Log entries shown on the terminal, and their format; trackers get all entries."""

_TELLING = ("reward", "eval_reward")


def log_line(logs: Mapping[str, Any], state: TrainerState) -> str:
    """A log as one line; empty if it has no reward.

    Args:
        logs (mapping): What the trainer logs.
        state (`TrainerState`): Progress of training.
    """
    if all(logs.get(name) is None for name in _TELLING):
        return ""
    parts = []
    for name, form in SHOWN.items():
        value = logs.get(name)
        if isinstance(value, int | float):
            parts.append(form.format(value))
    return f"step {state.global_step} of {state.max_steps}: {', '.join(parts)}"


class ShortLog(ProgressCallback):
    """The trainer's bar, with [`log_line`] above it."""

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        line = log_line(logs, state)
        if line and self.training_bar is not None:
            self.training_bar.write(line)


class ShortPrinter(PrinterCallback):
    """[`log_line`] without a bar."""

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        line = log_line(logs, state)
        if line and state.is_local_process_zero:
            print(line)


def shorten_logs(trainer: GRPOTrainer) -> None:
    """Make a trainer print its logs as one line each.

    Args:
        trainer (`GRPOTrainer`): The newly constructed trainer.
    """
    for long, short in ((ProgressCallback, ShortLog), (PrinterCallback, ShortPrinter)):
        if trainer.pop_callback(long) is not None:
            trainer.add_callback(short())


# ---- Parser ---------------------------------------------------------------------------------------------------------

FIRST = (
    *("model_name_or_path", "dataset_name", "reward_funcs", "output_dir"),
    *("stages", "selector", "top", "order", "warmup_samples", "stage_epochs", "after_warmup"),
    *("num_generations", "max_completion_length", "completions_per_step", "learning_rate"),
    *("resume_from_checkpoint", "dry_run", "push_to_hub"),
)
"""Settings that most runs set, whichever dataclass declares them; they come first in a command's help."""

USAGE = "%(prog)s [--config FILE] [--SETTING VALUE ...]"


class OneLineParser(TrlParser):
    """A `TrlParser` with one-line errors, and a help that begins with the most important options.

    For commands that train, the defaults are those of [`LearnAlignConfig.adaptive`].

    Options cannot be abbreviated: `--warmup_sample` is an error that suggests `--warmup_samples`.

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
        """Exit with the message and a suggestion for a misspelt option."""
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
        sections = {"settings of most runs": ["help", *FIRST]}
        for kind in self.dataclass_types:
            sections |= _sections_of(kind)
        placed: set[str] = set()
        for title, names in sections.items():
            sections[title] = [name for name in names if name not in placed]
            placed.update(names)
        return sections


def _sections_of(kind: type) -> dict[str, list[str]]:
    """The sections of a dataclass; a dataclass from another library is one section."""
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
    """`--config=FILE` split into two arguments, as TRL's parser requires."""
    apart: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        apart += [name, value] if name == "--config" and equals else [argument]
    return apart
