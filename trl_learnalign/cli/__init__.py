"""`trl-learnalign COMMAND …`: each command is a module of this package; the others are shared with recipes."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from trl_learnalign.version import __version__

COMMANDS: dict[str, str] = {
    "grpo": "TRL's own GRPO script and YAML file, with the callback added",
    "plan": "print steps, rollouts and disk of a run without loading a model",
    "select": "warm up, score and select, and write subsets for any trainer",
    "export": "write the selected prompts of a run as a dataset with a card, and push it",
    "report": "rewrite report.html of a run, and show its best prompts",
    "compare": "compare runs",
    "evaluate": "accuracy on benchmarks, with intervals; two models compared in pairs",
}
"""Name → description; the module of the same name has `main(arguments)`. It is imported only when called."""


def usage() -> str:
    """The text of `trl-learnalign --help`."""
    width = max(map(len, COMMANDS), default=0)
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: trl-learnalign COMMAND [--help] … | --version", "", "commands:", *lines]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments (sequence of `str`, *optional*): The command line, without the program's name.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"trl-learnalign {__version__}")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        sys.exit(f"trl-learnalign: {name!r} is not a command.{meant}\n{usage()}")
    importlib.import_module(f"trl_learnalign.cli.{name}").main(rest)
