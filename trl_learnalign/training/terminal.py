"""The story of a run on the terminal: what the package's loggers say, printed above the trainer's progress bar.

A library leaves the user's logging alone. Where nobody has set up anything for `trl_learnalign`, its lines are printed
on the main process; a level or a handler of the user's for that logger, or a handler of the root logger that prints
already, goes before.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

from rich.logging import RichHandler
from tqdm.auto import tqdm
from typing_extensions import override

PACKAGE = logging.getLogger("trl_learnalign")
PREFIX = "LearnAlign: "


class TerminalHandler(logging.Handler):
    """Prints a line with `tqdm.write`, which takes a progress bar away for it and draws it again.

    Args:
        stream (`str`): `"stdout"` or `"stderr"`, as they are when a line is printed.
        prefix (`str`, *optional*): What each line begins with.
    """

    def __init__(self, stream: Literal["stdout", "stderr"], prefix: str = ""):
        super().__init__()
        self.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        self.stream_name = stream

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=getattr(sys, self.stream_name))
        except Exception:
            self.handleError(record)


def tell_story(verbose: bool, is_main: bool) -> None:
    """Let the story be printed, unless logging was set up for it.

    Args:
        verbose (`bool`): `LearnAlignConfig.verbose`.
        is_main (`bool`): Whether this is the main process; the others only warn.
    """
    ours = [handler for handler in PACKAGE.handlers if isinstance(handler, TerminalHandler)]
    if not verbose or not is_main:
        if ours:  # of an earlier run of this process
            PACKAGE.removeHandler(ours[0])
            PACKAGE.setLevel(logging.NOTSET)
        return
    root = logging.getLogger()
    is_set_up = PACKAGE.level != logging.NOTSET or PACKAGE.handlers
    if is_set_up or root.level > logging.WARNING:
        return
    PACKAGE.setLevel(logging.INFO)
    if not any(_prints(handler) for handler in root.handlers):
        PACKAGE.addHandler(TerminalHandler("stderr", PREFIX))


def _prints(handler: logging.Handler) -> bool:
    """Whether a handler of the user's shows lines on the terminal."""
    if isinstance(handler, RichHandler | TerminalHandler):
        return True
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(handler, logging.StreamHandler) and handler.stream in streams
