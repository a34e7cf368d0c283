"""Releases of TRL: the oldest that works, those that were tested, and the one that is installed."""

from __future__ import annotations

import trl
from packaging.version import Version

OLDEST = "1.8"
"""Before it, the trainer has neither an entropy bonus nor several environments, which the bridge reads."""

TESTED = (
    "1.8",
    "1.9",
    "1.10",
    "1.11",
    "1.12",
    "1.13",
    "1.14",
    "1.15",
    "1.16",
)
"""Minor releases of docs/compatibility.md, oldest first."""

REMEDY = f"pip install 'trl>={OLDEST},<={TESTED[-1]}.99'"


def installed() -> Version:
    """The installed release."""
    return Version(trl.__version__)


def is_before(release: str) -> bool:
    """Whether the installed release is older than one such as `"1.9"`; its own development versions are not."""
    return installed().release < Version(release).release


def is_tested() -> bool:
    """Whether the installed minor release was tested."""
    found = installed()
    return f"{found.major}.{found.minor}" in TESTED


def untested_notice() -> str:
    """One line that says what is known of an untested release."""
    return (
        f"trl {trl.__version__} is untested: trl_learnalign was tested with {', '.join(TESTED)}. All names and "
        "signatures that it needs are there; gradient features are compared with the gradient of TRL's own "
        "loss on the first prompts (check_gradients), and nothing is selected if they differ."
    )


def hint() -> str:
    """What else may be the reason that names are missing."""
    if is_before("1.15") or not is_before("1.16"):
        return ""
    return " trl 1.15 computes log-probabilities with Triton alone: where it is not installed, that release cannot."
