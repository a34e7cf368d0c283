"""Equality of two answers: sets, tuples, lists and assignments by their parts, numbers exactly.

Computer algebra compares only single formulas ([`Ask`]). It sorts the parts of lists, reads `(1,2)` as an interval or
a point inconsistently, and treats small numbers as zero.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from trl_learnalign.data.notation import NUMBER, TooLargeError, compact, exact_value

Ask = Callable[[str, str], bool]
"""Whether a single formula equals another: reference, answer."""

_DEEPEST = 8
_MOST_ASKED = 6  # maximum parts of a list for all-pairs comparison, after equal keys are paired
_PLACES = 6
_SMALLEST = Fraction(1, 1000)
"""Above this size, a decimal with [`_PLACES`] places or more is equal to what rounds to it: as in math-verify."""

_UNIT = re.compile(r"\\(?:text|mbox|mathrm) ?\{([^{}]*)\}(?:\^(?:\{\d\}|\d))?$")
_DEGREES = re.compile(r"\^(?:\{\\circ\}|\\circ)$")
_PERCENT = re.compile(r"(?:\\?%|\\text\{percent\}|percent)$")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"({NUMBER})(?:\\text\{{)?({'|'.join(_SCALES)})\}}?")

_JOINED = re.compile(
    r"\\(?:text|mbox|mathrm) ?\{ ?,? ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
)
_OPENING, _CLOSING = "([{", ")]}"
_BRACKET = re.compile(
    r"\\[{}]|\\[lr]angle(?![A-Za-z])|\\[lr](?:vert|brace)(?![A-Za-z])|[(\[{)\]},;]"
)
_RELATION = re.compile(r"\\(?:le|ge|ne|in|lt|gt|approx|equiv|subset\w*)(?![A-Za-z])|[=<>]")
_INEQUALITY = re.compile(r"\\(?:le|ge|ne|lt|gt)(?![A-Za-z])|[<>]")
_VARIABLE = r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\{\w+\}|\w))?(?:\([a-z](?:,[a-z])*\))?'?"
_ASSIGNED = re.compile(rf"({_VARIABLE}|\({_VARIABLE}(?:,{_VARIABLE})*\))(=|\\in(?![A-Za-z]))(.+)")
_CONDITION = re.compile(
    r"(?:\\text\{[^{}]*\})?[A-Za-z](?:,[A-Za-z])*\\in ?(?:\\(?:mathbb|mathbf|Bbb))?\{?[ZNQRC]\}?.{0,8}"
    r"|\\text\{.*\b(?:integer|natural|real)\b.*"
)
_CONDITION_BEHIND = re.compile(r"(\\text\{ ?(?:where|for|with|for all|for any|for some)\b)")
_LEADING = re.compile(r"(\\le|\\ge|\\ne|[<>])(.+)")
_BOUNDED = re.compile(rf"{_VARIABLE}(\\le|\\ge|\\ne|[<>])(.+)")
_BOUNDING = re.compile(rf"(.+?)(\\le|\\ge|\\ne|[<>]) ?{_VARIABLE}")
_FLIPPED = {"\\le": "\\ge", "\\ge": "\\le", "<": ">", ">": "<", "\\ne": "\\ne"}

_SET, _TUPLE, _LIST, _SINGLE = "set", "tuple", "list", "single"


@dataclass(frozen=True)
class Shape:
    r"""The structure of an answer.

    Args:
        kind (`str`): A set in braces, a tuple in brackets (a point, an interval), a list, or a single formula.
        parts (`tuple[str, ...]`): The parts; one for a single formula.
        brackets (`str`): Around a tuple: "()", "[)", …
        condition (`str`): The domain of its letters: `k\in\mathbb{Z}`.
    """

    kind: str
    parts: tuple[str, ...]
    brackets: str = ""
    condition: str = ""


def equal(reference: str, answer: str, ask: Ask, depth: int = 0) -> bool:
    """Whether an answer equals a reference.

    Args:
        reference (`str`): Normalised by [`trl_learnalign.data.notation.tidy`].
        answer (`str`): Likewise.
        ask (callable): Compares single formulas.
        depth (`int`, *optional*, defaults to 0): Nesting depth of brackets.
    """
    if same_text(reference, answer):
        return True
    numbers = _numbers_equal(reference, answer)
    if numbers is not None:
        return numbers
    if depth > _DEEPEST:
        return ask(reference, answer)
    return _shapes_equal(shape_of(reference), shape_of(answer), ask, depth)


def same_text(reference: str, answer: str) -> bool:
    """Whether two texts differ only in formatting."""
    return compact(reference) == compact(answer)


# ---- Numbers --------------------------------------------------------------------------------------------------------


def _numbers_equal(reference: str, answer: str) -> bool | None:
    """Whether two rational numbers are equal; `None` if one is not a number, or they are too large to compute."""
    ours, theirs = _number(reference), _number(answer)
    if ours is _TOO_LARGE or theirs is _TOO_LARGE:
        return None if ours is theirs else False
    if ours is None or theirs is None:
        return None
    if ours.value == theirs.value:
        return True
    if (
        ours.percent != theirs.percent
    ):  # 25 % is 0.25, and an answer of 25 to a question for percent
        return ours.value * ours.share == theirs.value * theirs.share
    rounded = max(ours.places, theirs.places) >= _PLACES
    if not rounded or max(abs(ours.value), abs(theirs.value)) < _SMALLEST:
        return False
    return abs(ours.value - theirs.value) <= Fraction(1, 2 * 10**_PLACES)


@dataclass(frozen=True)
class _Number:
    value: Fraction
    percent: bool = False
    places: int = 0

    @property
    def share(self) -> Fraction:
        return Fraction(1, 100) if self.percent else Fraction(1)


_TOO_LARGE = _Number(Fraction(0))


def _number(text: str) -> _Number | None:
    text = _DEGREES.sub("", compact(text))
    if scaled := _SCALED.fullmatch(text):
        return _Number(Fraction(scaled[1]) * 10 ** _SCALES[scaled[2]])
    unit = _UNIT.search(text)
    if unit is not None and not any(word in unit[1] for word in (*_SCALES, "dozen", "percent")):
        text = text[: unit.start()]
    bare = _PERCENT.sub("", text)
    try:
        value = exact_value(bare)
    except TooLargeError:
        return _TOO_LARGE
    if value is None:
        return None
    places = len(bare.partition(".")[2]) if re.fullmatch(NUMBER, bare) else 0
    return _Number(value, percent=bare != text, places=places)


# ---- Shapes ---------------------------------------------------------------------------------------------------------


def shape_of(text: str) -> Shape:
    """The structure of an answer."""
    text, condition = _without_condition(compact(_JOINED.sub(",", text)))
    inner, brackets = _enclosed(text)
    if brackets:
        parts = _split(inner)
        if brackets == r"\{\}" and not re.search(r"\\mid(?![A-Za-z])|[|:]", inner):
            return Shape(_SET, tuple(parts), condition=condition)
        if len(parts) > 1 and brackets[0] in "([":
            return Shape(_TUPLE, tuple(parts), brackets, condition)
    parts = _split(text)
    if len(parts) == 1:
        parts = _signs_expanded(parts[0])
    return Shape(_LIST if len(parts) > 1 else _SINGLE, tuple(parts), condition=condition)


def _without_condition(text: str) -> tuple[str, str]:
    r"""Split `n=3k` and `k\in\mathbb{Z}`, which form a list or are joined by "where"."""
    head = _CONDITION_BEHIND.split(text, maxsplit=1)
    if len(head) > 1 and head[0]:
        return head[0].rstrip(","), _plain_condition("".join(head[1:]))
    parts = _split(text)
    conditions = [part for part in parts[1:] if _CONDITION.fullmatch(part)]
    if not conditions:
        return text, ""
    kept = [part for part in parts if part not in conditions]
    return ",".join(kept), _plain_condition(",".join(conditions))


def _plain_condition(text: str) -> str:
    r"""Normalise `\text{ where }k\in\mathbb{Z}` to `k\inZ`."""
    return re.sub(r"\\text\{[^{}]*\}|\\(?:mathbb|mathbf|Bbb)(?![A-Za-z])|[{} ]", "", text)


def _enclosed(text: str) -> tuple[str, str]:
    """The content of a pair of brackets around the whole text, and the pair; the text and "" without one."""
    depth = 0
    first = None
    for match in _BRACKET.finditer(text):
        kind = _bracket_kind(match[0])
        depth += kind
        if first is None:
            if kind != 1 or match.start() != 0:
                return text, ""
            first = match
        if depth == 0:
            if match.end() != len(text):
                return text, ""
            brackets = first[0] + match[0]
            brackets = brackets.replace(r"\langle", "(").replace(r"\rangle", ")")
            return text[first.end() : match.start()], brackets
    return text, ""


def _bracket_kind(bracket: str) -> int:
    """1 for an opening bracket, -1 for a closing one, 0 for a separator."""
    if bracket in (r"\{", r"\langle", r"\lbrace", *_OPENING):
        return 1
    return -1 if bracket in (r"\}", r"\rangle", r"\rbrace", *_CLOSING) else 0


def _split(text: str) -> list[str]:
    """Parts between the commas and semicolons that are not inside brackets."""
    parts, start, depth = [], 0, 0
    for match in _BRACKET.finditer(text):
        depth += _bracket_kind(match[0])
        if match[0] in (",", ";") and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    parts.append(text[start:])
    return [part for part in parts if part] or [""]


def _signs_expanded(text: str) -> list[str]:
    r"""Both values of `1\pm\sqrt{2}`."""
    if r"\pm" not in text:
        return [text]
    plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
    minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
    if assigned := _ASSIGNED.fullmatch(text):
        start = assigned.start(3)
        return [text[:start] + sign[start:].removeprefix("+") for sign in (plus, minus)]
    return [plus.removeprefix("+"), minus]


# ---- Parts ----------------------------------------------------------------------------------------------------------


def _shapes_equal(ours: Shape, theirs: Shape, ask: Ask, depth: int) -> bool:
    if ours.condition and theirs.condition and not same_text(ours.condition, theirs.condition):
        return False
    if _SINGLE in (ours.kind, theirs.kind):
        return _with_a_single(ours, theirs, ask, depth)
    if {ours.kind, theirs.kind} == {_SET, _TUPLE}:
        return False
    if len(ours.parts) != len(theirs.parts):
        return _has_inequality(ours, theirs) and ask(_written(ours), _written(theirs))

    def same(first: str, second: str) -> bool:
        return equal(first, second, ask, depth + 1)

    if ours.kind == theirs.kind == _TUPLE:
        fits = ours.brackets == theirs.brackets or len(ours.parts) > 2
        return fits and all(map(same, ours.parts, theirs.parts))
    if _TUPLE in (ours.kind, theirs.kind):
        return _tuple_equals_list(ours, theirs, same)
    return _lists_equal(ours.parts, theirs.parts, same)


def _tuple_equals_list(ours: Shape, theirs: Shape, same: Ask) -> bool:
    """Whether a point equals its coordinates, `(1,2)` and `x=1,y=2`; false for an interval."""
    brackets = ours.brackets or theirs.brackets
    if brackets != "()":
        return False
    return all(map(same, map(_value, ours.parts), map(_value, theirs.parts)))


def _lists_equal(ours: Sequence[str], theirs: Sequence[str], same: Ask) -> bool:
    """Compare in any order, except for values of different letters that one side does not name."""
    our_names, their_names = list(map(_name, ours)), list(map(_name, theirs))
    one_named = all(our_names) != all(their_names) and not (any(our_names) and any(their_names))
    if one_named:
        names = our_names if all(our_names) else their_names
        ours, theirs = list(map(_value, ours)), list(map(_value, theirs))
        if len({re.sub(r"_.*", "", name) for name in names}) > 1:
            return all(map(same, ours, theirs))
    return _same_in_any_order(ours, theirs, same)


def _same_in_any_order(ours: Sequence[str], theirs: Sequence[str], same: Ask) -> bool:
    """Compare in any order; equal keys are paired first, because comparing all pairs is quadratic in the length."""
    unpaired: dict[Hashable, list[str]] = {}
    for part in theirs:
        unpaired.setdefault(_key(part), []).append(part)
    open_parts = []
    for part in ours:
        twins = unpaired.get(_key(part))
        if twins:
            twins.pop()
        else:
            open_parts.append(part)
    if len(open_parts) > _MOST_ASKED:
        return False
    left = list(itertools.chain.from_iterable(unpaired.values()))
    for part in open_parts:
        twin = next((other for other in left if same(part, other)), None)
        if twin is None:
            return False
        left.remove(twin)
    return True


def _key(part: str) -> Hashable:
    """A key that is the same for obviously equal parts."""
    number = _number(part)
    if number is None or number is _TOO_LARGE:
        return compact(part)
    return number.value, number.percent


def _with_a_single(ours: Shape, theirs: Shape, ask: Ask, depth: int) -> bool:
    """Compare two formulas, or a formula and another shape."""
    first, second = _written(ours), _written(theirs)
    names = _name(ours.parts[0]), _name(theirs.parts[0])
    if ours.kind == _SINGLE and theirs.kind == _SINGLE:
        bounds = _bounds_equal(first, second, ask, depth)
        if bounds is not None:
            return bounds
        one_is_named = bool(names[0]) != bool(names[1]) and not _is_relation(first, second)
        if one_is_named or (all(names) and names[0] == names[1]):
            return equal(_value(first), _value(second), ask, depth + 1)
        return ask(first, second)
    single, several = (ours, theirs) if ours.kind == _SINGLE else (theirs, ours)
    if _name(single.parts[0]):  # x \in \{1, 2\}, x = 1, 2
        value = _value(single.parts[0])
        if ours is single:
            return equal(value, second, ask, depth + 1)
        return equal(first, value, ask, depth + 1)
    if several.kind == _SET and len(several.parts) == 1:
        return equal(ours.parts[0], theirs.parts[0], ask, depth + 1)
    return (several.kind != _LIST and ask(first, second)) or (
        _has_inequality(ours, theirs) and ask(first, second)
    )


def _bounds_equal(first: str, second: str, ask: Ask, depth: int) -> bool | None:
    r"""Compare `\ge 5` and `x \ge 5`; a bound without a variable matches any variable."""
    if not (_LEADING.fullmatch(first) or _LEADING.fullmatch(second)):
        return None
    ours, theirs = _bound(first), _bound(second)
    if ours is None or theirs is None or ours[0] != theirs[0]:
        return False
    return equal(ours[1], theirs[1], ask, depth + 1)


def _bound(text: str) -> tuple[str, str] | None:
    if match := _LEADING.fullmatch(text) or _BOUNDED.fullmatch(text):
        return match[1], match[2]
    if match := _BOUNDING.fullmatch(text):
        return _FLIPPED[match[2]], match[1]
    return None


def _name(text: str) -> str:
    """The variable of an assignment; empty if the text is not just an assignment."""
    match = _ASSIGNED.fullmatch(text)
    return match[1] if match is not None and not _RELATION.search(match[3]) else ""


def _value(text: str) -> str:
    match = _ASSIGNED.fullmatch(text)
    return match[3] if match is not None and not _RELATION.search(match[3]) else text


def _is_relation(first: str, second: str) -> bool:
    """Whether one of two texts is an equation or inequality, and not an assignment."""
    return any(_RELATION.search(text) is not None and not _name(text) for text in (first, second))


def _has_inequality(*shapes: Shape) -> bool:
    return any(_INEQUALITY.search(part) for shape in shapes for part in shape.parts)


def _written(shape: Shape) -> str:
    text = ",".join(shape.parts)
    if shape.kind == _SET:
        return rf"\{{{text}\}}"
    return f"{shape.brackets[0]}{text}{shape.brackets[-1]}" if shape.brackets else text
