r"""Exact values of what is written as a rational number: `\frac{1}{2^{99}}`, `3\frac{1}{2}`, `0.\overline{27}`, `7!`.

Floating-point comparison holds 2^-99 and 2^-98 for the same zero. Everything here is bounded: no number of more than
[`MOST_BITS`] bits is computed, and no string of digits that Python refuses is read.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

MOST_BITS = 20_000
"""Size of the largest numerator or denominator that is computed."""

_DEEPEST = 40
_MOST_DIGITS = 1_000
_MOST_FACTORIAL = 1_000
_MOST_TOKENS = 1_000

_TOKEN = re.compile(
    r"\s*(?:"
    r"(?P<number>\d+(?:\.\d*)?(?:\\overline\s*\{\d+\})?|\.\d+(?:\\overline\s*\{\d+\})?|\.\\overline\s*\{\d+\})"
    r"|(?P<frac>\\[dtc]?frac)(?![A-Za-z])"
    r"|(?P<times>\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|\*)"
    r"|(?P<over>\\div(?![A-Za-z])|/)"
    r"|(?P<mark>[-+^!(){}])"
    r")\s*"
)


class TooLargeError(ArithmeticError):
    """A number that nobody should compute."""


class _NoNumberError(Exception):
    pass


def exact_value(text: str) -> Fraction | None:
    r"""The value of a rational number; `None` if the text is none.

    Args:
        text (`str`): In LaTeX: digits, `+ - * / ^ !`, `\times`, `\cdot`, `\div`, `\frac{}{}`, brackets, repeating
            decimals and mixed numbers.

    Raises:
        `TooLargeError`: If a number on the way has more than [`MOST_BITS`] bits.
    """
    try:
        reader = _Reader(_tokens(text))
        value = reader.sum()
    except (_NoNumberError, ZeroDivisionError):
        return None
    return value if reader.at_end else None


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    text = text.replace(r"\left", "").replace(r"\right", "")
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None or len(tokens) == _MOST_TOKENS:
            raise _NoNumberError
        kind = match.lastgroup
        tokens.append((match[kind] if kind == "mark" else kind, match[kind]))
        position = match.end()
    return tokens


class _Reader:
    """Recursive descent over tokens; each method reads one level of binding."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._place = 0
        self._depth = 0

    @property
    def at_end(self) -> bool:
        return self._place == len(self._tokens)

    def _kind(self) -> str:
        return "" if self.at_end else self._tokens[self._place][0]

    def _take(self, *kinds: str) -> str | None:
        """The text of the next token, if it is of a kind."""
        if self._kind() not in kinds:
            return None
        self._place += 1
        return self._tokens[self._place - 1][1]

    def sum(self) -> Fraction:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _NoNumberError
        value = self._product()
        while sign := self._take("+", "-"):
            term = self._product()
            value = _bounded(value + term if sign == "+" else value - term)
        self._depth -= 1
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while True:
            if self._take("times"):
                factor = self._signed()
            elif self._take("over"):
                factor = 1 / self._signed()
            elif self._kind() in ("(", "{", "frac"):
                factor = self._power()
            else:
                return value
            value = _bounded(value * factor)

    def _signed(self) -> Fraction:
        sign = 1
        while mark := self._take("+", "-"):
            sign = -sign if mark == "-" else sign
        return sign * self._power()

    def _power(self) -> Fraction:
        base = self._atom()
        while self._take("!"):
            base = _factorial(base)
        if self._take("^"):
            return _raised(base, self._exponent())
        return base

    def _exponent(self) -> Fraction:
        """Towers are read from the top, as TeX sets them."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise TooLargeError
        exponent = self._signed()
        self._depth -= 1
        return exponent

    def _atom(self) -> Fraction:
        number = self._take("number")
        if number is not None:
            return self._mixed(number)
        if self._take("frac"):
            numerator = self._group("{", "}")
            return _bounded(numerator / self._group("{", "}"))
        return self._group("(", ")") if self._kind() == "(" else self._group("{", "}")

    def _mixed(self, number: str) -> Fraction:
        value = _decimal(number)
        if self._kind() != "frac" or not number.isdecimal():
            return value
        return value + self._atom()

    def _group(self, opening: str, closing: str) -> Fraction:
        if self._take(opening) is None:
            raise _NoNumberError
        value = self.sum()
        if self._take(closing) is None:
            raise _NoNumberError
        return value


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise TooLargeError
    return value


def _raised(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _NoNumberError  # a root
    if abs(base) == 1:
        return base ** (exponent.numerator % 2)
    if base == 0:
        return Fraction(0) if exponent > 0 else 1 / base
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > MOST_BITS:
        raise TooLargeError
    return base**exponent.numerator


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or value < 0:
        raise _NoNumberError
    if value > _MOST_FACTORIAL:
        raise TooLargeError
    return Fraction(math.factorial(value.numerator))


def _decimal(text: str) -> Fraction:
    r"""Of digits with a point and a period, `1.2\overline{5}`."""
    if len(text) > _MOST_DIGITS:
        raise TooLargeError
    digits, _, period = text.partition("\\overline")
    whole, _, places = digits.partition(".")
    value = Fraction(int(whole + places or "0"), 10 ** len(places))
    if not period:
        return value
    if "." not in digits:
        raise _NoNumberError
    period = period.strip(" {}")
    # 0.(27) is 27/99, and stands behind the digits that come once.
    return value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(places))
