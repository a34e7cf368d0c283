"""How a command speaks: bad input ends it with one line, progress is one line per phase."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

logger = logging.getLogger(__name__)

OFFLINE_HINT = (
    " Try `make quickstart` (no GPU, no downloads), or local files on a CPU: --model_name_or_path FOLDER "
    "--dataset_name train.jsonl --use_cpu true --bf16 false."
)


def leave(problem: str, hint: str | None = None) -> NoReturn:
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
        leave(str(error), hint="")


@contextmanager
def leave_with(prog: str) -> Iterator[None]:
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

    from trl_learnalign.training.terminal import TerminalHandler

    level = logging.INFO if PartialState().is_main_process else logging.ERROR
    logging.basicConfig(level=logging.WARNING, handlers=[TerminalHandler("stdout")])
    logging.getLogger("trl_learnalign").setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
