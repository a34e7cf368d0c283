"""The process in which math-verify runs: one comparison per line of input.

It imports neither torch nor trl, so that it starts within a second or two. A bad input can at most end this process:
its memory is limited, a timer stops Python code, and a watchdog stops everything else.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import logging
import math
import os
import signal
import sys
import time
from typing import Any, TextIO

MEMORY = 4 * 2**30
"""Limit of the address space in bytes: a tower of powers would otherwise use all memory."""

HARD = 4.0
"""Wall time, as a multiple of the allowed processor time, after which the process ends itself."""
_GRACE = 2.0  # additional seconds, so that the parent kills it first, if it still exists

_SMALLEST = 1e-3
"""Below this size, values must agree in relative terms, because math-verify compares decimal places."""
_CLOSE = 1e-5
_FAR = 0.01


class OutOfTimeError(BaseException):
    """Not an `Exception`, because math-verify and sympy catch these."""


def serve() -> None:
    """Answer requests on standard input until it ends.

    A request is a line of JSON, `{"reference", "answer", "seconds"}`. The reply is `{"right", "seconds"}`, or
    `{"late"}` after a timeout. Seconds are processor time, so that the load of the machine does not change results.
    The first line of output is `{"ready"}`, or `{"error"}` if math-verify cannot be imported.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # so that nothing a library prints is read as a reply
    _bound_memory()
    try:
        import math_verify  # noqa: F401
    except Exception as error:
        _reply(replies, error=repr(error))
        return
    logging.disable(logging.CRITICAL)
    _reply(replies, ready=True)
    for line in sys.stdin:
        question = json.loads(line)
        _reply(replies, **_answered(question["reference"], question["answer"], question["seconds"]))


def _reply(replies: TextIO, **content: Any) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


def _bound_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (bound, most))


def _answered(reference: str, answer: str, seconds: float) -> dict[str, bool | float]:
    # A single long operation on integers does not process signals.
    faulthandler.dump_traceback_later(seconds * HARD + _GRACE, exit=True)
    start = time.process_time()
    try:
        right = _within(seconds, reference, answer)
    except OutOfTimeError:
        return {"late": True}
    except Exception:  # includes MemoryError and RecursionError; unreadable input is not correct
        right = False
    finally:
        faulthandler.cancel_dump_traceback_later()
    return {"right": right, "seconds": time.process_time() - start}


def _within(seconds: float, reference: str, answer: str) -> bool:
    if os.name != "posix":  # only the watchdog works
        return equal(reference, answer)
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return equal(reference, answer)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _stop(*_: Any) -> None:
    raise OutOfTimeError


def equal(reference: str, answer: str) -> bool:
    r"""Whether math-verify, configured as in TRL's `accuracy_reward`, considers an answer equal to a reference.

    Args:
        reference (`str`): Text with the correct answer, in `\boxed{}` or in a form that math-verify finds.
        answer (`str`): Text with the answer, which must be delimited LaTeX.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    gold = _parsed(reference)
    marked = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    found = parse(
        answer, extraction_config=[marked], extraction_mode="first_match", parsing_timeout=None
    )
    if not gold or not found:
        return False
    size, distance = _distance(gold[0], found[0])
    if distance > _FAR:  # simplifying the difference would take a hundred times as long
        return False
    if not verify(gold, found, timeout_seconds=None):
        return False
    # For small values it compares 15 decimal places, which may all be zeros.
    return size >= _SMALLEST or distance <= _CLOSE


@functools.lru_cache(maxsize=1000)
def _parsed(reference: str) -> list[Any]:
    """A parsed reference; cached, because many answers are compared with it."""
    from math_verify import parse

    return parse(reference, parsing_timeout=None)


def _distance(gold: Any, found: Any) -> tuple[float, float]:
    """Size of two expressions at fixed values of their variables, and their relative difference.

    Returns:
        `tuple`: Infinity and 0 if that does not decide whether math-verify considers them equal.
    """
    nothing = math.inf, 0.0
    if not _are_formulas(gold, found) or gold == found:
        return nothing
    symbols = sorted(gold.free_symbols, key=str)
    # Arbitrary values that are not special in any textbook formula.
    values = {symbol: 0.7310585 + 0.1192029 * place for place, symbol in enumerate(symbols)}
    try:
        first = complex(gold.subs(values).evalf(20, chop=False))
        second = complex(found.subs(values).evalf(20, chop=False))
    except (TypeError, ValueError, ArithmeticError):  # not a number
        return nothing
    size = max(abs(first), abs(second))
    if not math.isfinite(size) or size == 0:
        return nothing
    return size, abs(first - second) / size


def _are_formulas(gold: Any, found: Any) -> bool:
    """Whether math-verify compares these by value: not words or percentages, which it reads as both 25 and 0.25."""
    from sympy import Expr, Symbol, UnevaluatedExpr

    both = (gold, found)
    if not all(isinstance(side, Expr) and not isinstance(side, Symbol) for side in both):
        return False
    return gold.free_symbols == found.free_symbols and not any(
        side.has(UnevaluatedExpr) for side in both
    )
