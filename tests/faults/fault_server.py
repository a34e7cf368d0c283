"""Attempts at a run, forked from a process that has imported everything: a second each rather than ten."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
from fault_events import Fault
from fault_jobs import ANEW, BESIDE, JOBS, REFUSED, beside, note, run

_HANGS = 600
"""Seconds after which an attempt is taken to hang. Not a measure of speed: others may use the machine."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, of one or several processes.

    Args:
        folder (`Path`): The output folder.
        job (`str`): Its name.
        way (`str`): How it is resumed.
        fault (`Fault`, *optional*): What goes wrong in a process.
        kill_after (`float`, *optional*): Seconds of the processor after which one is killed.
        linger (`float`, *optional*, defaults to 0.0): Seconds that the others live on.
        options (mapping, *optional*): Of the trainer.
        beside (`Path`, *optional*): Where notes and log go; by default, where the output folder lies.
    """

    folder: Path
    job: str
    way: str
    fault: Fault | None = None
    kill_after: float | None = None
    linger: float = 0.0
    options: dict[str, Any] | None = None
    beside: Path | None = None

    def run(self) -> int:
        """Returns the exit code: 0, `REFUSED`, -9 if it was killed, -15 if it hangs."""
        running = [self._start(rank, env) for rank, env in enumerate(_environments(self.job))]
        victim, began, codes, ends = running[-1], time.monotonic(), {}, None
        stopped: set[int] = set()
        while running:
            for process in list(running):
                if process == victim and _used(process) >= (self.kill_after or math.inf):
                    _kill([process])
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    running.remove(process)
                    codes[process] = os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if any(codes.values()) and ends is None:
                ends = now + self.linger  # as a launcher does: when one is dead, the others end too
            if now - began > _HANGS:
                return _end_hanging(running)
            if ends is not None and now >= ends:
                stopped.update(running)
                _kill(running)
            time.sleep(0.005)
        return _worst([code for process, code in codes.items() if process not in stopped])

    def _start(self, rank: int, environment: dict[str, str]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process:
            return process
        os.environ.update(environment)
        if self.beside is not None:
            os.environ[BESIDE] = str(self.beside)
        _have_done(lambda: self._go(rank), beside(self.folder, "log"))

    def _go(self, rank: int) -> None:
        fault = self.fault if self.fault is not None and self.fault.rank == rank else None
        try:
            run(self.folder, self.job, self.way, fault, **(self.options or {}))
        except Exception as error:
            note(self.folder, "errors", [type(error).__name__, str(error)])
            raise


def _used(process: int) -> float:
    """Seconds of the processor."""
    with suppress(psutil.Error):
        times = psutil.Process(process).cpu_times()
        return times.user + times.system
    return 0.0


def _kill(processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _end_hanging(processes: list[int]) -> int:
    _kill(processes)
    for process in processes:
        os.waitpid(process, 0)
    return -signal.SIGTERM


def _worst(codes: list[int]) -> int:
    """Of the processes that ended by themselves; what others make of one that was killed says nothing."""
    return -signal.SIGKILL if -signal.SIGKILL in codes else max(codes)


def _environments(job: str) -> list[dict[str, str]]:
    """What a launcher tells its processes."""
    processes = JOBS[job].processes
    threads = {"OMP_NUM_THREADS": "1"}  # more threads of tiny models only wait for each other
    if processes == 1:
        return [threads]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**threads, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["WORLD_SIZE"] = str(processes)
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def import_everything(root: Path) -> None:
    """Import what runs import while they run: a forked process has it from the beginning.

    No run takes place in this process: it would leave threads and the state of accelerate behind.
    """
    for job in ("adaptive", "staged"):
        folder = root / f"imports of {job}"
        process = os.fork()
        if process == 0:
            _have_done(functools.partial(_write_imports, folder, job), Path(f"{folder}.log"))
        _, status = os.waitpid(process, 0)
        assert status == 0, Path(f"{folder}.log").read_text()[-3000:]
        for name in json.loads(Path(f"{folder}.json").read_text()):
            with suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # accelerate collects garbage after every run


def _write_imports(folder: Path, job: str) -> None:
    before = set(sys.modules)
    run(folder, job, ANEW, None)
    Path(f"{folder}.json").write_text(json.dumps(sorted(set(sys.modules) - before)))


def _have_done(work: Callable[[], None], log: Path) -> NoReturn:
    """Do something in a process that was forked for it, and end the process."""
    code = 1
    try:
        quiet = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        work()
        code = 0
    except Exception:
        traceback.print_exc()
        code = REFUSED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
