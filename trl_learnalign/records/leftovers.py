"""Temporary files of runs that were killed: they take space, and nobody else takes them away.

A file is written under a temporary name that has the number of its process, and renamed when it is whole. What has
such a name and a process that is no longer there is of no use to anybody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from trl_learnalign.records import layout

logger = logging.getLogger(__name__)

AGE = 24 * 3600
"""Seconds after which a temporary file is nobody's: it is there for as long as one file is written. Numbers of
processes come again, and on a shared disk they may be of another machine."""


def sweep(*folders: Path, records: Path | None = None) -> int:
    """Delete the temporary files of processes that are no longer there; to be called before this one writes.

    Args:
        folders (`Path`): Where others write as well: what has the name of a file of ours goes, and nothing in folders
            inside.
        records (`Path`, *optional*): The record folder, which is looked through with all folders inside.

    Returns:
        `int`: How many were deleted.
    """
    places = [
        place
        for folder in folders
        for place in folder.glob(".*.tmp")
        if layout.TEMPORARY_AMONG_OTHERS.match(place.name)
    ]
    places += records.rglob(".*.tmp") if records is not None else []
    deleted = 0
    for place in dict.fromkeys(places):
        # What cannot be deleted (on a disk that is read-only) is told of by whatever writes next.
        with contextlib.suppress(OSError):
            if _is_left_over(place):
                place.unlink()
                deleted += 1
    if deleted:
        logger.info("%d temporary file(s) of runs that were killed are deleted.", deleted)
    return deleted


def _is_left_over(place: Path) -> bool:
    if not place.is_file() or place.is_symlink():
        return False
    match = layout.TEMPORARY.fullmatch(place.name)
    if match is None:
        return False
    age = time.time() - place.stat().st_mtime
    return age > AGE or not _is_at_work(int(match[1]))


def _is_at_work(process: int) -> bool:
    """Whether it may be writing. This one is not: a file with its number is of one before, as containers have it."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's
    return True
