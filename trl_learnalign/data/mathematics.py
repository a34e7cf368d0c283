"""Equality of two formulas by math-verify, in a separate process that is killed after a time limit.

The input is text written by a model. A tower of powers keeps computer algebra busy for hours, and no time limit within
a process can stop a single long operation on integers. math-verify's own limits use signals, which only the main
thread receives. Comparisons therefore run in a worker process ([`trl_learnalign.data.mathematics_worker`]), which is
killed if it does not answer in time.

The worker starts with the first comparison, as a fresh interpreter that does not run the main module again. It thus
works together with CUDA, in notebooks, and in scripts without a main guard. It ends with its parent process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from typing import Any, NamedTuple

from trl_learnalign.data.mathematics_worker import HARD

logger = logging.getLogger(__name__)

SECONDS = 3.0
"""Processor time for an answer, including all of its parts; wall time may be four times as long."""

START = 120.0
"""Seconds within which the worker must be ready; on an idle machine it takes one or two."""

_GRACE = 1.0  # seconds on top of four times that, after which the worker is killed
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from trl_learnalign.data.mathematics_worker import serve; serve()"
)


class OutOfTimeError(Exception):
    """No result within the time limit."""


class Verdict(NamedTuple):
    """Whether two formulas are equal, and the processor time of the comparison."""

    right: bool
    seconds: float


class Worker:
    """A process that compares formulas, and is restarted after it was killed. Thread-safe; one comparison at a time.

    Args:
        start (`float`, *optional*): Seconds within which it must be ready.
    """

    def __init__(self, start: float = START) -> None:
        self._start_seconds = start
        self._warned_kinds: set[str] = set()
        self._forget()
        atexit.register(self.end)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._owner = os.getpid()

    def _own(self) -> None:
        """Forget the worker after a fork, which shares the pipes of its parent; the fork starts its own."""
        if os.getpid() != self._owner:
            self._forget()

    def start(self) -> None:
        """Start the process if it is not running; this takes a second or two."""
        self._own()
        with self._lock:
            self._ensure()

    def equal(self, reference: str, answer: str, seconds: float = SECONDS) -> Verdict:
        r"""Whether an answer equals a reference.

        Args:
            reference (`str`): In a form that math-verify reads: in `\boxed{}`, or a text in which it searches.
            answer (`str`): Likewise; LaTeX must be delimited.
            seconds (`float`, *optional*): Maximum processor time; wall time is limited to four times that and a
                second.

        Raises:
            `OutOfTimeError`: If it took longer.
            `RuntimeError`: If no worker can be started.
        """
        question = {"reference": reference, "answer": answer, "seconds": seconds}
        self._own()
        with self._lock:
            self._ensure()
            reply = self._reply_to(self._process, json.dumps(question), seconds * HARD + _GRACE)
            if reply is None:
                self._end()
        if reply is None or "late" in reply:
            kind = "exceeded the time limit of" if reply else "crashed or stopped"
            self._warn_once(kind, answer, seconds)
            raise OutOfTimeError
        return Verdict(reply["right"], reply["seconds"])

    @property
    def pid(self) -> int | None:
        """Id of the running process, if any."""
        return None if self._process is None else self._process.pid

    def end(self) -> None:
        """Kill the process, if there is one; the next comparison starts another."""
        if os.getpid() == self._owner:
            with self._lock:
                self._end()

    def _warn_once(self, kind: str, answer: str, seconds: float) -> None:
        if kind in self._warned_kinds:
            return
        self._warned_kinds.add(kind)
        logger.warning(
            "An answer was graded as wrong because it %s math-verify, whose limit was %.3g s: %r. Further answers "
            "of this kind are not reported.",
            kind,
            seconds,
            answer[:80],
        )

    def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([str(place) for place in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # so that Ctrl-C only interrupts the parent
        )
        # A new queue per process, because the reader of a killed one may still add its last line.
        self._replies = queue.SimpleQueue()
        reader = threading.Thread(
            target=_read, args=(self._process.stdout, self._replies), daemon=True
        )
        reader.start()
        reply = self._next(self._start_seconds)
        if reply is None or "error" in reply:
            self._end()
            why = "it did not start" if reply is None else reply["error"]
            raise RuntimeError(
                f"The process that grades mathematics is not available ({why}): {sys.executable} must be a Python "
                "that can import math_verify (pip install math-verify)."
            )

    def _reply_to(self, process: Any, line: str, seconds: float) -> dict[str, Any] | None:
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except OSError:  # it has died in the meantime
            return None
        return self._next(seconds)

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """The next reply; `None` if there is none in time, or the process has ended."""
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            return None
        return json.loads(line) if line.endswith("\n") else None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unsent data
                    pipe.close()


def _read(pipe: Any, replies: queue.SimpleQueue[str]) -> None:
    """Put lines into a queue, and "" at the end, because reading a pipe has no timeout on some systems."""
    try:
        for line in pipe:
            replies.put(line)
    except ValueError:  # closed in the meantime
        pass
    replies.put("")


WORKER = Worker()
"""The worker of this process."""
