"""The commands of `trl-learnalign`: one module each, with `main(arguments)`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leave_with(prog: str) -> Iterator[None]:
    """Bad input ends a command with one line: its message, after the command's name."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"{prog}: {error}")
