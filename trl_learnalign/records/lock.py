"""One run at a time in a record folder: a file with host and process, which a dead owner does not keep.

Locks of the operating system do not reach over every network file system, so the file itself is the lock: it is made
in one step or not at all, and its owner writes it anew every few seconds. On the owner's own machine its process is
asked for; from another one, the file is watched for a while.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_learnalign.records import layout
from trl_learnalign.records.store import StoreError, advice

logger = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds after which an owner writes its lock anew."""

DEAD = 12
"""Beats that an owner on another machine may leave out; network file systems remember old contents for less."""


class RunLock:
    """The lock of a record folder.

    Args:
        folder (`Path`): The record folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / layout.LOCK
        self._token = secrets.token_hex(8)
        self._ours = _this_process()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep everybody else out.

        Raises:
            `StoreError`: If somebody else is at work there, naming it, or the folder cannot be written.
        """
        try:
            self._take()
        except OSError as error:
            raise StoreError(advice(error, self.path)) from error
        done = threading.Event()
        beating = threading.Thread(target=self._beat, args=(done,), daemon=True)
        beating.start()
        try:
            yield
        finally:
            done.set()
            beating.join()
            if self._owner().get("token") == self._token:
                self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._made():
            owner = self._owner()
            if self._is_alive(owner):
                raise StoreError(
                    f"Another run is at work in {self.path.parent}: process {owner.get('process')} on "
                    f"{owner.get('host')}, since {owner.get('since')}. Wait for its end, or give this run another "
                    f"output_dir (or record_dir). If you know that it is dead, delete {self.path}."
                )
            self._remove(owner)

    def _remove(self, owner: dict[str, Any]) -> None:
        """Take away what a dead owner has left, and nothing else: others may be about it at the same time."""
        taken = self.path.with_name(f".{self.path.name}.{self._token}.old.tmp")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, taken)
            if _values(taken) != owner:
                os.link(taken, self.path)  # somebody was faster
            else:
                logger.warning(
                    "%s was left behind by process %s on %s, which is no longer at work.",
                    *(self.path, owner.get("process"), owner.get("host")),
                )
            taken.unlink()

    def _made(self) -> bool:
        """Make the file unless it is there: a link is made in one step, also on network file systems."""
        temporary = self._written(0)
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return self._made_exclusively(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _made_exclusively(self, temporary: Path) -> bool:
        try:
            with open(self.path, "x") as file:
                file.write(temporary.read_text())
        except FileExistsError:
            return False
        return True

    def _written(self, beat: int) -> Path:
        temporary = self.path.with_name(f".{self.path.name}.{self._token}.tmp")
        values = {"token": self._token, **self._ours, "since": _BEGUN, "beat": beat}
        temporary.write_text(json.dumps(values))
        return temporary

    def _beat(self, done: threading.Event) -> None:
        beat = 0
        while not done.wait(BEAT):
            beat += 1
            # A beat that is missed is not yet a death.
            with contextlib.suppress(OSError):
                if self._owner().get("token") == self._token:
                    os.replace(self._written(beat), self.path)

    def _owner(self) -> dict[str, Any]:
        return _values(self.path)

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        ours = self._ours
        if owner.get("host") == ours["host"] and owner.get("boot") == ours["boot"]:
            return _started(owner.get("process")) == owner.get("started")
        return self._beats(owner)

    def _beats(self, owner: dict[str, Any]) -> bool:
        """Whether a process of another machine goes on writing the file."""
        told = not owner
        for _ in range(DEAD if owner else 2):  # of what cannot be read, the next beat tells
            time.sleep(BEAT)
            found = self._owner()
            if found != owner:
                return bool(found)
            if not told:
                logger.warning(
                    "%s is of process %s on %s: waiting whether it is still at work.",
                    *(self.path, owner.get("process"), owner.get("host")),
                )
                told = True
        return False


def _values(path: Path) -> dict[str, Any]:
    """What a lock says; empty if it is gone, or nobody can read it."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


_BEGUN = time.strftime("%Y-%m-%d %H:%M:%S")


def _this_process() -> dict[str, Any]:
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "process": process,
        "started": _started(process),
    }


def _started(process: Any) -> str | None:
    """When a process of this machine began, as text; `None` if there is none.

    Numbers of processes come again. Without `/proc` a process is told by its number alone.
    """
    if not isinstance(process, int) or process <= 0:
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    if fields and fields[0] in "ZX":
        return None  # dead, and its parent has not asked for it yet
    return fields[19] if fields else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
