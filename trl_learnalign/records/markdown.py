"""Tables in Markdown, of texts that are other people's."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

_MARKS = "\\`*_[]|#~"


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table. No HTML and no Markdown of its texts takes effect.

    Args:
        headings (sequence of `str`): Of the columns.
        rows (iterable of sequences): Texts, numbers, switches; nothing for `None` and NaN.
    """
    lines = [_line(headings), _line(["---"] * len(headings))]
    for row in rows:
        cells = [cell(value) for value in row]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(value: Any) -> str:
    """A value in one line."""
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return plain(str(value))


def plain(text: str) -> str:
    """A text in one line, of which nothing is markup."""
    safe = html.escape(text, quote=False)
    for mark in _MARKS:
        safe = safe.replace(mark, f"\\{mark}")
    return " ".join(safe.split())
