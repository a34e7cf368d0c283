"""One form of state for all that a checkpoint keeps: plain JSON values under names that are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def check_keys(what: str, state: Mapping[str, Any], known: Iterable[str]) -> None:
    """Check that a state holds what is known, and nothing else.

    Args:
        what (`str`): Whose state it is, for the message.
        state (mapping): As it was read.
        known (iterable of `str`): Its keys.

    Raises:
        `ValueError`: Naming the keys that are missing and those that nobody knows.
    """
    known = set(known)
    missing, foreign = sorted(known - state.keys()), sorted(state.keys() - known)
    if missing or foreign:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(foreign)}, which this version does not know"] if foreign else []
        raise ValueError(
            f"The state of {what} in the checkpoint {' and '.join(parts)}: it was written by another version of "
            "trl_learnalign. Resume with that version, or start anew with another output_dir."
        )
