"""The story of a run on the terminal: what the package's loggers say, printed over the trainer's progress bar.

A library leaves the user's logging alone. Where nobody has set up anything for `trl_learnalign`, its lines are printed
on the main process; a level or a handler of the user's for that logger, or a handler of the root logger that prints
already, goes before.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import Literal, TextIO

from rich.logging import RichHandler
from tqdm.auto import tqdm
from typing_extensions import override

from trl_learnalign.measuring.progress import is_interactive

PACKAGE = logging.getLogger("trl_learnalign")
PREFIX = "LearnAlign: "


class TerminalHandler(logging.Handler):
    """Prints a line without tearing the progress bar that is under way.

    Where the bar can be seen, tqdm takes it away for the line and draws it again; a line that is longer than the
    terminal is broken between words. In a log file the bar is left alone: a line of its own is begun, and nothing but
    text is written.

    Args:
        stream (`str`): `"stdout"` or `"stderr"`, as they are when a line is printed.
        prefix (`str`, *optional*): What each line begins with.
    """

    def __init__(self, stream: Literal["stdout", "stderr"], prefix: str = ""):
        super().__init__()
        self.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        self.stream_name = stream
        self.bar_is_open = False

    @property
    def stream(self) -> TextIO:
        """Where lines go."""
        return sys.stdout if self.stream_name == "stdout" else sys.stderr

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if is_interactive():
                tqdm.write(_wrapped(line), file=self.stream)
            else:
                self._write(line)
        except Exception:
            self.handleError(record)

    def _write(self, line: str) -> None:
        begins_anew = self.bar_is_open and _is_same_file(self.stream, sys.stderr)
        self.stream.write(f"\n{line}\n" if begins_anew else f"{line}\n")
        self.stream.flush()


def _wrapped(line: str) -> str:
    """A line that is broken between words where the terminal would break it anywhere."""
    width = shutil.get_terminal_size().columns
    return textwrap.fill(
        line,
        width,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def _is_same_file(one: TextIO, other: TextIO) -> bool:
    if one is other:
        return True
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except OSError:  # a stream of a notebook or of a test has no file
        return False


@dataclass
class _SetUp:
    """What was set up here, as against by the user.

    Args:
        level (`int`, *optional*): The package's level, if it was.
    """

    level: int | None = None


_OURS = _SetUp()


def tell_story(verbose: bool, is_main: bool) -> None:
    """Let the story be printed, unless logging was set up for it.

    Args:
        verbose (`bool`): `LearnAlignConfig.verbose`.
        is_main (`bool`): Whether this is the main process; the others only warn.
    """
    if not verbose or not is_main:
        _fall_silent()
        return
    root = logging.getLogger()
    is_set_up = PACKAGE.level != logging.NOTSET or PACKAGE.handlers
    if is_set_up or root.level > logging.WARNING:
        return
    PACKAGE.setLevel(logging.INFO)
    _OURS.level = logging.INFO
    if not any(_prints(handler) for handler in root.handlers):
        PACKAGE.addHandler(TerminalHandler("stderr", PREFIX))


def _fall_silent() -> None:
    """Take back what an earlier run of this process has set up, and nothing else."""
    if _OURS.level != PACKAGE.level:
        return
    _OURS.level = None
    PACKAGE.setLevel(logging.NOTSET)
    for handler in _terminals():
        PACKAGE.removeHandler(handler)


def _prints(handler: logging.Handler) -> bool:
    """Whether a handler of the user's shows lines on the terminal."""
    if isinstance(handler, RichHandler | TerminalHandler):
        return True
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(handler, logging.StreamHandler) and handler.stream in streams


def _terminals() -> list[TerminalHandler]:
    handlers = [*PACKAGE.handlers, *logging.getLogger().handlers]
    return [handler for handler in handlers if isinstance(handler, TerminalHandler)]


def note_bar(is_open: bool) -> None:
    """The trainer's progress bar is under way, or is not any more.

    Args:
        is_open (`bool`): Whether it is.
    """
    for handler in _terminals():
        handler.bar_is_open = is_open
