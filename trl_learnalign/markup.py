"""Escaping of untrusted text for terminals and Markdown, and readable numbers."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

_MARKS = "\\`*_[]|#~"


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table. HTML and Markdown in its cells are escaped.

    Args:
        headings (sequence of `str`): Headings of the columns.
        rows (iterable of sequences): Strings, numbers and booleans; `None` and NaN give empty cells.
    """
    lines = [_line(headings), _line(["---"] * len(headings))]
    for row in rows:
        cells = [cell(value) for value in row]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(value: Any) -> str:
    """A value on one line."""
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return plain(str(value))


def plain(text: str) -> str:
    """A text on one line, with all markup escaped."""
    safe = html.escape(text, quote=False)
    for mark in _MARKS:
        safe = safe.replace(mark, f"\\{mark}")
    return " ".join(safe.split())


# ---- Safe text and readable numbers ---------------------------------------------------------------------------------

_REPLACEMENT = 0xFFFD
_FIRST_PICTURE = 0x2400  # first of Unicode's consecutive symbols for the control characters 0 to 31
_PICTURES = {code: _FIRST_PICTURE + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES[0x7F] = 0x2421
# Characters that change the text direction, and could disguise one text as another.
_DIRECTIONS = [
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    0x200E,
    0x200F,
    0x061C,
]
_SURROGATES = range(0xD800, 0xE000)
_CONTROLS_1 = range(0x80, 0xA0)  # terminals interpret 0x9B as ESC [
_TABLE = {
    **_PICTURES,
    **dict.fromkeys(_DIRECTIONS, _REPLACEMENT),
    **dict.fromkeys(_SURROGATES, _REPLACEMENT),
    **dict.fromkeys(_CONTROLS_1, _REPLACEMENT),
}


def visible(value: Any) -> str:
    """Text with control characters, e.g. ANSI escapes, replaced by visible symbols without effect.

    HTML and rich markup are not escaped here; autoescape and `rich.text.Text` do that.
    """
    text = str(value).replace("\r\n", "\n")
    return text.translate(_TABLE)


def headline(text: str, limit: int = 110) -> str:
    """The last non-empty line (in a conversation, the question), truncated to one line."""
    lines = [line.strip() for line in str(text).splitlines()]
    line = next((line for line in reversed(lines) if line), "")
    if len(line) <= limit:
        return line
    return line[: limit - 1] + "…"


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits; empty for `None`."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with separators; empty for `None`."""
    return "" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share in percent; empty for `None`."""
    return "" if value is None else f"{value:.0%}"


def general(value: Any) -> str:
    """A number with three significant digits; anything else unchanged."""
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        return setting(value)
    # In Python, True and False are integers.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.3g}"
    return visible(value)


def setting(value: Any) -> str:
    """A setting as in YAML flow style."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def unit_of_compute(price: float) -> str:
    """The weight of each kind of token in compute, in words.

    Args:
        price (`float`): Forward equivalents of a generated token.
    """
    if price == 1:
        return "A token that is generated or read counts once, one that is trained on three times."
    generated = f"one that is generated {price:g} times"
    return f"A token that is read counts once, {generated}, one that is trained on three times."


def words(name: str) -> str:
    """A field's name as words."""
    return name.replace("_", " ")


def phase_title(name: str) -> str:
    """`stage_1` as a heading."""
    return words(name).replace("warmup", "warm-up").capitalize()
