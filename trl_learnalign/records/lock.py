"""One run at a time in a record folder: a lock file that a dead owner does not keep.

`filelock.SoftFileLease` needs no locks of the operating system, which do not reach over every network file system: the
file is the lock, and its owner touches it every few seconds. An owner on this machine is dead if its process is gone;
one on another machine, if the file was not touched for [`LEASE`] seconds.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

from trl_learnalign.records import layout
from trl_learnalign.records.store import StoreError, advice

logger = logging.getLogger(__name__)

LEASE = 60.0
"""Seconds after which an owner on another machine that has not touched the file is dead."""

PATIENCE = 1.25
"""Leases that a run waits for such an owner at most."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a record folder.

    Args:
        folder (`Path`): The record folder; it is made if there is none.

    Raises:
        `StoreError`: If another run is at work there, naming its process and machine, or the folder cannot be written.
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
            "%s is held by process %s on %s: waiting at most %.0f seconds to see whether that run is still at work.",
            *(path, process, host, PATIENCE * LEASE),
        )
        try:
            lease.acquire(timeout=PATIENCE * LEASE)
            return
        except Timeout:
            process, host = _owner(path)
    raise StoreError(
        f"Another run is at work in {path.parent}: process {process} on {host}. Wait for its end, or give this run "
        f"another output_dir (or record_dir). If you know that it is dead, delete {path}."
    )


def _owner(path: Path) -> tuple[str, str]:
    """Process and host by the lock file; question marks where it cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    entries = dict(line.split("=", 1) for line in lines if "=" in line)
    return entries.get("pid", "?"), entries.get("host", "?")
