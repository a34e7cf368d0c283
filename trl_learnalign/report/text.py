"""Text of others (prompts, completions, paths) made safe to look at, and numbers made readable."""

from __future__ import annotations

import json
from typing import Any

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
# Characters that turn the direction of what follows: they could make a text look like another.
_DIRECTIONS = dict.fromkeys(
    [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C], 0xFFFD
)
_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
_CONTROLS_1 = dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # terminals take 0x9B for ESC [
_TABLE = _PICTURES | _DIRECTIONS | _SURROGATES | _CONTROLS_1


def visible(value: Any) -> str:
    """Text with control characters, ANSI escapes for one, as pictures: a terminal or browser shows them, and no more.

    HTML and rich markup are not its business: autoescape and `rich.text.Text` take care of them.
    """
    return str(value).replace("\r\n", "\n").translate(_TABLE)


def headline(text: str, limit: int = 110) -> str:
    """The last line with content (in a conversation, the question), cut to one line."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    line = lines[-1] if lines else ""
    return line if len(line) <= limit else line[: limit - 1] + "…"


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; empty for nothing."""
    return "" if value is None or value != value else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with separators; empty for nothing."""
    return "" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share; empty for nothing."""
    return "" if value is None else f"{value:.0%}"


def general(value: Any) -> str:
    """Three significant digits of a number; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return (
            setting(value)
            if isinstance(value, (dict, list))
            else ""
            if value is None
            else visible(value)
        )
    return f"{value:.3g}"


def setting(value: Any) -> str:
    """A setting as in YAML flow style."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def words(name: str) -> str:
    """A field's name as words."""
    return name.replace("_", " ")


def phase_title(name: str) -> str:
    """`stage_1` as a heading."""
    return words(name).replace("warmup", "warm-up").capitalize()
