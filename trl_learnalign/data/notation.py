r"""Normalises the notation of people and models to LaTeX that a parser reads, and evaluates rationals exactly.

`\frac59`, `3 1/2`, `2√3`, `pi/6`, `x**2`, `sqrt(2)`, `1{,}234`, "18 dollars" and `≥5` all have a form in LaTeX.
Every pattern here takes time proportional to the length of the text.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"

_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # braces, up to three levels
_ARGUMENT = rf"(?:{_GROUP}|\\[a-zA-Z]+|[0-9A-Za-z])"
_FRACTION = re.compile(rf"\\([dtc]?frac)\s*({_ARGUMENT})\s*({_ARGUMENT})")
_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\\(?!frac|[dtc]frac|sqrt)[a-zA-Z]+|[0-9A-Za-z])")
_FLOAT = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_BLANKS = re.compile(r"\s+")
_DIGIT_GROUPS = re.compile(r"(?<=\d)(?:,?\\!|\{,\}|\\[,; ])+(?=\d{3}(?!\d))")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?!\d| ?, ?\d)")
_CURRENCY = re.compile(r"(?:\\text ?\{ ?\\?\$ ?\}|\\?\$|[€£¥₹]) ?(?=[\d.])")
_DOLLARS = re.compile(r"(?<!\\)\$([^$]*[^$\\])\$")
_COUNTED = re.compile(rf"({NUMBER}(?:/\d+)?) ?\([A-Za-z][A-Za-z ]*\)")
_MEASURED = re.compile(rf"({NUMBER}(?:/\d+)?) ([A-Za-z][A-Za-z ./]*)(?:\^\{{?\d\}}?)?")
_SHORT_UNITS = re.compile(r"cm|mm|km|kg|mg|ft|lb|oz|ml|hr|mi|yd|in|sq|cu|of")
# Longer words after a number that are not units, because they are part of the answer.
_NO_UNITS = re.compile(
    r"and|or|mod|choose|percent(?:age)?|pct|inf|infinity|hundred|thousand|million|billion|trillion|dozen|abc|xyz|times|to"
)

_SIGNS = {
    **dict.fromkeys("−–‐‑‒﹣－", "-"),
    **dict.fromkeys("×✕", r"\times "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    **dict.fromkeys("\u00a0\u2009\u202f\u2007\u3000", " "),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    "÷": "/",
    "∕": "/",
    "⁄": "/",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∞": r"\infty ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "°": r"^\circ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    **{sign: rf"\mathbb{{{letter}}}" for sign, letter in zip("ℝℤℕℚℂ", "RZNQC", strict=True)},
    **{
        sign: rf"\frac{{{above}}}{{{below}}}"
        for sign, above, below in zip("½⅓⅔¼¾⅛", "112131", "233448", strict=True)
    },
    "％": r"\%",
    "，": ",",
    "（": "(",
    "）": ")",
}
_LETTERS = "pi theta alpha beta gamma delta lambda mu phi omega sigma rho tau"
_GREEK = dict(zip("πθαβγδλμφωσρτ", _LETTERS.split(), strict=True))
_UNICODE = str.maketrans({**_SIGNS, **{letter: f"\\{name} " for letter, name in _GREEK.items()}})
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_RADICAL = re.compile(r"√ ?(?:(\d+(?:\.\d+)?|[A-Za-z])|(?=[({\\]))")

_COMMANDS = r"sqrt|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh|ln|log|exp|infty|" + "|".join(
    _GREEK.values()
)
_WORD = re.compile(rf"(?<![A-Za-z\\])(?:{_COMMANDS})(?![A-Za-z])")
_BEHIND_LETTER = re.compile(rf"(?<=[A-Za-z])(?=\\(?:{_COMMANDS})(?![A-Za-z]))")
_COMMAND = re.compile(rf"\\({_COMMANDS})(?![A-Za-z])")
_INFINITY = re.compile(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])")
_RELATIONS = (
    (re.compile(r"<=|=<|\\leq?q?(?![A-Za-z])|\\leqslant(?![A-Za-z])"), r"\\le "),
    (re.compile(r">=|\\geq?q?(?![A-Za-z])|\\geqslant(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"!=|\\neq?(?![A-Za-z])"), r"\\ne "),
)
_STAR = re.compile(r" ?\* ?")
_EXPONENT = re.compile(r"\^ ?(?:([-+]?\d+(?![\d.]))|(?=\())")
_MIXED = re.compile(r"([-+]?\d+) (\d+) ?/ ?(\d+)")
_BRACED_ROOT = re.compile(r"\\sqrt ?(?=\()")
_SPACES = re.compile(r"(?:\\[,:;! ]|~|\\q?quad(?![A-Za-z])|\\displaystyle(?![A-Za-z])| )+")
# The blanks in 1 2 and \pi r are separators and must be kept.
_BLANK = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z])|(?<=\d) (?=\d))| ")
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)(?![A-Za-z])")


def tidy(answer: str) -> str:
    r"""An answer in the notation that math-verify reads, with the same meaning.

    Arguments get braces (`\frac59`). Dollar signs, thousands separators, units in plain words ("18 dollars", "9
    (apples)") and final full stops are removed. Plain-text formulas (`pi/6`, `√2`, `x**2`) are converted to LaTeX.
    """
    text = _BLANKS.sub(" ", without_dollars(answer.strip()))
    text = _undelimited(text)
    if text.endswith(".") and not text.endswith("m."):
        text = text.removesuffix(".").rstrip()
    text = _from_unicode(text)
    text = _CURRENCY.sub("", text, count=1)
    text = _DIGIT_GROUPS.sub("", text)
    if thousands := _THOUSANDS.match(text):
        text = thousands[0].replace(",", "") + text[thousands.end() :]
    text = _without_unit(text)
    if _FLOAT.fullmatch(text):
        text = _FLOAT.sub(r"\1 \\times 10^{\2}", text)
    return with_braces(_from_plain_text(text)).strip()


def without_dollars(text: str) -> str:
    """A text without the dollar signs around formulas."""
    return _DOLLARS.sub(r"\1", text)


def _undelimited(text: str) -> str:
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing):
            return text[2:-2].strip()
    return text


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
    text = _SUBSCRIPT.sub(lambda run: f"_{{{run[0].translate(_LOWERED)}}}", text)
    text = _RADICAL.sub(lambda root: rf"\sqrt{{{root[1]}}}" if root[1] else r"\sqrt", text)
    return text.translate(_UNICODE)


def _without_unit(text: str) -> str:
    if count := _COUNTED.fullmatch(text):
        return count[1]
    measure = _MEASURED.fullmatch(text)
    if measure is None:
        return text
    words = re.findall(r"[A-Za-z]+", measure[2].lower())
    return measure[1] if all(map(_is_unit, words)) else text


def _is_unit(word: str) -> bool:
    """Whether a word may be a unit: any longer word, and known ones of one or two letters, which may be variables."""
    if _SHORT_UNITS.fullmatch(word):
        return True
    return len(word) > 2 and not _NO_UNITS.fullmatch(word) and not _WORD.fullmatch(word)


def _from_plain_text(text: str) -> str:
    """Convert formulas typed as in a program or an email to LaTeX."""
    text = _STAR.sub(r"\\cdot ", text.replace("**", "^")) if "*" in text else text
    for pattern, command in _RELATIONS:
        text = pattern.sub(command, text)
    if mixed := _MIXED.fullmatch(text):
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if r"\text" not in text and r"\mathrm" not in text:
        text = _INFINITY.sub(r"\\infty", text)
        text = _WORD.sub(r"\\\g<0>", text)
    text = _EXPONENT.sub(lambda power: f"^{{{power[1]}}}" if power[1] else "^", text)
    return _with_groups(text)


def _with_groups(text: str) -> str:
    r"""Replace the brackets of `\sqrt(…)` and `^(…)` by braces."""
    openings = {match.end() for match in _BRACED_ROOT.finditer(text)}
    openings |= {match.end() for match in re.finditer(r"\^(?=\()", text)}
    if not openings:
        return text
    characters = list(text)
    open_brackets = []
    for place, character in enumerate(text):
        if character == "(":
            open_brackets.append(place)
        elif character == ")" and open_brackets:
            opening = open_brackets.pop()
            if opening in openings:
                characters[opening], characters[place] = "{", "}"
    return "".join(characters)


def with_braces(text: str) -> str:
    r"""Convert `\frac59` to `\frac{5}{9}` and `\sqrt2` to `\sqrt{2}`, as TeX reads them."""
    return _FRACTION.sub(_braced_fraction, _ROOT.sub(r"\\sqrt\1{\2}", text))


def _braced_fraction(match: re.Match[str]) -> str:
    command, *parts = match.groups()
    numerator, denominator = (
        with_braces(part[1:-1]) if part.startswith("{") else part for part in parts
    )
    return rf"\{command}{{{numerator}}}{{{denominator}}}"


def compact(text: str) -> str:
    r"""Remove formatting from a normalised text: blanks, `\left`, `\dfrac`."""
    text = _SPACES.sub(" ", _SIZES.sub("", text))
    return _STYLED_FRACTION.sub(r"\\frac", _BLANK.sub(lambda blank: blank[1] or "", text))


_STYLED_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_MIXED_LATEX = re.compile(r"([-+]?\d+)\\[dtc]?frac\{(\d+)\}\{(\d+)\}")
_TYPED_GROUPS = (
    (re.compile(r"\\[dtc]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\sqrt ?\{([^{}]*)\}"), r"sqrt(\1)"),
    (re.compile(r"\^ ?\{(\d+)\}"), r"**\1"),
    (re.compile(r"\^ ?\{([^{}]*)\}"), r"**(\1)"),
)
_TYPED = {
    r"\infty": "infinity",
    r"\cdot": "*",
    r"\times": "*",
    r"\le": "<=",
    r"\ge": ">=",
    r"\ne": "!=",
    r"\pm": "±",
    r"\cup": "∪",
}
_TYPED_COMMAND = re.compile(r"\\(?:infty|cdot|times|le|ge|ne|pm|cup)(?![A-Za-z])")
_DEEPEST = 10


def plain(text: str) -> str:
    r"""A normalised text in plain notation: `sqrt(3)/4`, `x**2`, `pi`, `>=`. The inverse is [`tidy`]."""
    if mixed := _MIXED_LATEX.fullmatch(text):
        return "{} {}/{}".format(*mixed.groups())
    text = _SIZES.sub("", text)
    for _ in range(_DEEPEST):  # innermost first
        before = text
        for pattern, typed in _TYPED_GROUPS:
            text = pattern.sub(typed, text)
        if text == before:
            break
    text = _TYPED_COMMAND.sub(lambda command: _TYPED[command[0]], text)
    return _COMMAND.sub(r"\1", _BEHIND_LETTER.sub(" ", text))


# ---- Exact rational values ------------------------------------------------------------------------------------------
# Floating-point comparison would treat 2^-99 and 2^-98 as the same zero. All computations are bounded: no number of
# more than [`MOST_BITS`] bits is computed, and no string of digits that Python refuses is parsed.

MOST_BITS = 20_000
"""Maximum size of a computed numerator or denominator."""

_DEEPEST_RATIONAL = 40
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
    """A number that is too large to compute."""


class _NoNumberError(Exception):
    pass


def exact_value(text: str) -> Fraction | None:
    r"""The value of a rational number; `None` if the text is not one.

    Args:
        text (`str`): In LaTeX: digits, `+ - * / ^ !`, `\times`, `\cdot`, `\div`, `\frac{}{}`, brackets, repeating
            decimals and mixed numbers.

    Raises:
        `TooLargeError`: If an intermediate number has more than [`MOST_BITS`] bits.
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
    """Recursive descent over tokens; each method reads one level of operator precedence."""

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
        """The text of the next token, if it has one of these kinds."""
        if self._kind() not in kinds:
            return None
        self._place += 1
        return self._tokens[self._place - 1][1]

    def sum(self) -> Fraction:
        self._depth += 1
        if self._depth > _DEEPEST_RATIONAL:
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
        """Towers are evaluated from the top, as in TeX."""
        self._depth += 1
        if self._depth > _DEEPEST_RATIONAL:
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
    r"""Value of a decimal with an optional period, `1.2\overline{5}`."""
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
    # 0.(27) is 27/99, shifted by the digits before the period.
    return value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(places))
