"""Safe text and Markdown of strings that others wrote, and readable numbers."""

from __future__ import annotations

import html
import json
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


# ---- Safe text and readable numbers ---------------------------------------------------------------------------------

_REPLACEMENT = 0xFFFD
_FIRST_PICTURE = 0x2400  # Unicode's pictures of the control characters 0 to 31, one after the other
_PICTURES = {code: _FIRST_PICTURE + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES[0x7F] = 0x2421
# Characters that turn the direction of what follows: they could make a text look like another.
_DIRECTIONS = [
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    0x200E,
    0x200F,
    0x061C,
]
_SURROGATES = range(0xD800, 0xE000)
_CONTROLS_1 = range(0x80, 0xA0)  # terminals take 0x9B for ESC [
_TABLE = {
    **_PICTURES,
    **dict.fromkeys(_DIRECTIONS, _REPLACEMENT),
    **dict.fromkeys(_SURROGATES, _REPLACEMENT),
    **dict.fromkeys(_CONTROLS_1, _REPLACEMENT),
}


def visible(value: Any) -> str:
    """Text with control characters, ANSI escapes for one, as pictures: a terminal or browser shows them, and no more.

    HTML and rich markup are not its business: autoescape and `rich.text.Text` take care of them.
    """
    text = str(value).replace("\r\n", "\n")
    return text.translate(_TABLE)


def headline(text: str, limit: int = 110) -> str:
    """The last line with content (in a conversation, the question), cut to one line."""
    lines = [line.strip() for line in str(text).splitlines()]
    line = next((line for line in reversed(lines) if line), "")
    if len(line) <= limit:
        return line
    return line[: limit - 1] + "…"


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; empty for nothing."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with separators; empty for nothing."""
    return "" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share; empty for nothing."""
    return "" if value is None else f"{value:.0%}"


def general(value: Any) -> str:
    """Three significant digits of a number; anything else as it is."""
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        return setting(value)
    # True and False are integers to Python.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.3g}"
    return visible(value)


def setting(value: Any) -> str:
    """A setting as in YAML flow style."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def unit_of_compute(price: float) -> str:
    """How often each token counts in compute.

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
