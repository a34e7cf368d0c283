"""Command lines, their messages and the short training log."""

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
    """End with one clear line.

    Args:
        problem (`str`): What is wrong.
        hint (`str`, *optional*): What to try; empty if `problem` says it. Default: how to run without GPU and hub.
    """
    program = Path(sys.argv[0]).name
    if hint is None:
        hint = OFFLINE_HINT
    sys.exit(f"{program}: {problem}.{hint}" if hint else f"{program}: {problem}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends a run with its message alone: a traceback would only hide it."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        exit_with_error(str(error), hint="")


@contextmanager
def exit_with(prog: str) -> Iterator[None]:
    """Whatever goes wrong in a command that only reads and writes files ends it with one line, after its name.

    Args:
        prog (`str`): The command's name.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"{prog}: {error}")
    except (LookupError, AttributeError, ArithmeticError) as error:
        logger.debug("What was read is of another form", exc_info=True)
        sys.exit(
            f"{prog}: what it was given is of another form than this command reads ({type(error).__name__}: {error}). "
            "Is a file damaged, or written by another program?"
        )


def set_up_logging() -> None:
    """One line per phase on the main process, over the progress bar; warnings everywhere, but not what transformers
    says to TRL about names that it will drop.
    """
    from accelerate import PartialState  # commands that only read files start faster without

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
    """A log as a line; empty where it holds no reward.

    Args:
        logs (mapping): What the trainer logs.
        state (`TrainerState`): How far it is.
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
    """Let a trainer print its logs in lines.

    Args:
        trainer (`GRPOTrainer`): As it was made.
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
