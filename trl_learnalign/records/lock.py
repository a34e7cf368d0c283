"""The lock of a record folder, and the temporary files that killed runs left in it.

`filelock.SoftFileLease` needs no locks of the operating system, which do not work on every network file system. The
file is the lock, and its owner touches it every few seconds. An owner on this machine is dead if its process is
gone. An owner on another machine is dead if the file was not touched for [`LEASE`] seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

from trl_learnalign.records import layout
from trl_learnalign.records.store import StoreError, advice

logger = logging.getLogger(__name__)

LEASE = 60.0
"""Seconds after which an owner on another machine that has not touched the file is considered dead."""

PATIENCE = 1.25
"""Maximum number of leases that a run waits for such an owner."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a record folder.

    Args:
        folder (`Path`): The record folder; it is created if it does not exist.

    Raises:
        `StoreError`: If another run uses the folder, naming its process and machine, or the folder cannot be written.
    """
    path = folder / layout.LOCK
    lease = SoftFileLease(path, lease_duration=LEASE, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lease, path)
    except OSError as error:
        raise StoreError(advice(error, path)) from error
    try:
        yield
    finally:
        lease.release()


def _acquire(lease: SoftFileLease, path: Path) -> None:
    try:
        lease.acquire()
        return
    except Timeout:
        process, host = _owner(path)
    if host != socket.gethostname():
        logger.warning(
            "%s is locked by process %s on %s: waiting at most %.0f seconds to see whether that run is still "
            "active.",
            *(path, process, host, PATIENCE * LEASE),
        )
        _fill_if_empty(path)
        try:
            lease.acquire(timeout=PATIENCE * LEASE)
            return
        except Timeout:
            process, host = _owner(path)
    raise StoreError(
        f"Another run is using {path.parent}: process {process} on {host}. Wait until it ends, or give this run "
        f"another output_dir (or record_dir). If that run is dead, delete {path}."
    )


def _fill_if_empty(path: Path) -> None:
    """Turn an empty lock file, left by a run that was killed before it wrote its name, into one that is taken over.

    filelock keeps an empty file for ever, and takes over one that names no owner after two seconds. A line break
    does no harm to an owner that writes at the same moment: it is overwritten, or stands behind its entries.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            # Not created if its owner has just deleted it.
            file = os.open(path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(file, b"\n")
            finally:
                os.close(file)


def _owner(path: Path) -> tuple[str, str]:
    """Return process and host from the lock file; question marks where it cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    entries = dict(line.split("=", 1) for line in lines if "=" in line)
    return entries.get("pid", "?"), entries.get("host", "?")


# ---- Temporary files of killed runs ---------------------------------------------------------------------------------
# A file is written under a temporary name that contains the process id, and renamed when it is complete. A file with
# such a name is useless once its process is gone.

AGE = 24 * 3600
"""Seconds after which a temporary file has no owner: it exists only while one file is written. Process ids are reused,
and on a shared disk they may belong to another machine.
"""


def sweep(*folders: Path, records: Path | None = None) -> int:
    """Delete the temporary files of processes that no longer run; to be called before this process writes.

    Args:
        folders (`Path`): Folders that others write to as well. Only files with names of ours are deleted, and
            subfolders are not searched.
        records (`Path`, *optional*): The record folder, which is searched with all its subfolders.

    Returns:
        `int`: Number of deleted files.
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
        # The next write reports a file that cannot be deleted (on a read-only disk).
        with contextlib.suppress(OSError):
            if _is_left_over(place):
                place.unlink()
                deleted += 1
    if deleted:
        logger.info("Deleted %d temporary file(s) of killed runs.", deleted)
    return deleted


def _is_left_over(place: Path) -> bool:
    if not place.is_file() or place.is_symlink():
        return False
    match = layout.TEMPORARY.fullmatch(place.name)
    if match is None:
        return False
    age = time.time() - place.stat().st_mtime
    return age > AGE or not _is_running(int(match[1]))


def _is_running(process: int) -> bool:
    """Whether the process may be writing; our own id means an earlier process, since containers reuse ids."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # the process of another user
    return True
