r"""Final answers: read from what datasets write, kept in a form that graders parse, and graded.

Mathematics is judged by math-verify, through TRL's `accuracy_reward`. It reads LaTeX only where LaTeX is marked, so
references keep their `\boxed{}`: of a bare `3\sqrt{13}` it would read the 3. What no parser of formulas knows is
compared here: words (`\text{Evelyn}`), letters of choices (`\text{(D)}`), times of day and numbers in other bases.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from latex2sympy2_extended.math_normalization import extract_boxed_content

logger = logging.getLogger(__name__)

Solution = str | Sequence[str]
"""A right answer, or several, any of which is right."""

MAX_UNJUDGED = 0.5
"""Share of rows whose answers nothing can be compared with, above which a dataset is refused."""

LETTER_ANSWER = re.compile(r"\(?([A-Z])\)?")

_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # braces, three deep
_ARGUMENT = rf"(?:{_GROUP}|\\[a-zA-Z]+|[0-9A-Za-z])"
_FRACTION = re.compile(rf"\\([dtc]?frac)\s*({_ARGUMENT})\s*({_ARGUMENT})")
_ROOT = re.compile(r"\\sqrt\s*(\[[^\]]*\])?\s*(\\(?!frac|[dtc]frac|sqrt)[a-zA-Z]+|[0-9A-Za-z])")
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_FLOAT = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_SCIENTIFIC = re.compile(
    rf"({_NUMBER})\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{{?\s*([-+]?\d+)\s*\}}?"
)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,?\\!|\{,\}|,|\\[,; ])+\d{3})+(?!\d|\s*,\s*\d)")
_CURRENCY = re.compile(r"\s*(?:\\text\s*\{\s*\\?\$\s*\}|\\?\$|[€£¥₹])\s*(?=[\d.])")
_DOLLARS = re.compile(r"(?<!\\)\$([^$]*[^$\\])\$")
_DELIMITED = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_COUNTED = re.compile(rf"({_NUMBER}(?:/\d+)?)\s*\([A-Za-z][A-Za-z ]*\)")
_MEASURED = re.compile(rf"({_NUMBER}(?:/\d+)?)\s+([A-Za-z][A-Za-z ./]*?)\s*(?:\^\{{?\d\}}?)?")
_SHORT_UNITS = {
    "cm",
    "mm",
    "km",
    "kg",
    "mg",
    "ft",
    "lb",
    "oz",
    "ml",
    "hr",
    "mi",
    "yd",
    "in",
    "sq",
    "cu",
    "of",
}
# Longer words behind a number that are no unit: what they say is part of the answer.
_NO_UNITS = {
    "and",
    "or",
    "mod",
    "choose",
    "percent",
    "percentage",
    "pct",
    "pi",
    "sqrt",
    "sin",
    "cos",
    "tan",
    "log",
    "exp",
    "inf",
    "infinity",
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "dozen",
    "abc",
    "xyz",
    "times",
    "to",
}
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}"
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’\-]*(?: [A-Za-z'’\-]+)*")
_TIME = re.compile(r"(\d{1,2}:\d{2})(am|pm|noon)?")
_BASED = re.compile(r"([0-9A-F]+)_\{?(?:\\text\s*\{)?(\d+|[a-z]+)\}*")
_ANNOUNCED = re.compile(r"(?i)\bthe (?:final )?answer is:?\s+(.+?)\s*$")
_NOTHING = {"", "nan", "null", "n/a", "proof", "notfound", "not found"}
_LONGEST = 500  # characters
_MOST_WORDS = 6
_NUMBERS_GRADED = 200
_EXAMPLES_OF_A_KIND = 3
_DIGITS = re.compile(r"\d+")
_SMALL = Fraction(1, 1000)


def final_answer(written: Any) -> str:
    r"""The final answer in a written solution: after `####` (GSM8K), in the last `\boxed{}` (MATH), or all of it.

    Thousands separators are dropped from plain numbers, since a parser may take a comma for a list. The parts of a
    list of answers (OlympiadBench) are joined by commas.
    """
    if isinstance(written, Sequence) and not isinstance(written, str):
        return ", ".join(_without_dollars(final_answer(part)) for part in written)
    text = "" if written is None else str(written).strip()
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    elif (boxed := last_boxed(text)) is not None:
        text = boxed
    elif announcement := _ANNOUNCED.search(text.rsplit("\n", 1)[-1]):
        text = announcement[1].removesuffix(".")
    has_separators = re.fullmatch(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", text)
    return text.replace(",", "") if has_separators else text


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` or `\fbox{}` holds; `None` if there is none, or it does not end."""
    boxes = list(re.finditer(r"\\f?box(?:ed)?\s*(?:(\{)|([0-9A-Za-z]))", text))
    if not boxes:
        return None
    last = boxes[-1]
    if last[2]:  # a box without braces holds one character
        return last[2]
    depth, start = 1, last.end()
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return None


def reference_answer(answer: str) -> str:
    r"""An answer as the `solution` column holds it: a plain number, or `\boxed{}`; empty if it cannot be judged.

    Both TRL's `accuracy_reward` and [`accuracy_reward`] grade against it.

    Args:
        answer (`str`): As [`final_answer`] returns it.
    """
    if why_not_gradable(answer):
        return ""
    text = tidy(answer)
    if _PLAIN_NUMBER.fullmatch(text):
        return text
    return f"\\boxed{{{_without_dollars(answer.strip())}}}"


def why_not_gradable(answer: str) -> str | None:
    """Why no completion could be compared with an answer; `None` if the grader may try."""
    text = answer.strip()
    if text.lower() in _NOTHING:
        return "no answer"
    if text.startswith("{") and re.match(r'\{\s*"', text):
        return "tests of a program, which are not run"
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", text))
    if len(text) > _LONGEST or len(words) > _MOST_WORDS:
        return "text rather than a final answer"
    return None


def tidy(answer: str) -> str:
    r"""An answer in the notation that math-verify reads; what it means stays.

    Braces around arguments (`\frac59`), no dollar signs, thousands separators, units written as plain words ("18
    dollars", "9 (apples)") or final full stops; repeating decimals as fractions.
    """
    text = _without_dollars(answer.strip())
    if formula := _DELIMITED.fullmatch(text):
        text = (formula[1] or formula[2] or "").strip()
    if text.endswith(".") and not text.endswith("m."):
        text = text.removesuffix(".").rstrip()
    text = _CURRENCY.sub("", text, count=1)
    if thousands := _THOUSANDS.match(text):
        text = re.sub(r"[^\d+-]", "", thousands[0]) + text[thousands.end() :]
    text = _without_unit(text)
    text = text.replace("°", r"^\circ")
    if _FLOAT.fullmatch(text):
        text = _FLOAT.sub(r"\1 \\times 10^{\2}", text)
    return with_braces(_REPEATING.sub(_as_fraction, text))


def _without_dollars(text: str) -> str:
    return _DOLLARS.sub(r"\1", text)


def _without_unit(text: str) -> str:
    if count := _COUNTED.fullmatch(text):
        return count[1]
    measure = _MEASURED.fullmatch(text)
    if measure is None:
        return text
    words = re.findall(r"[A-Za-z]+", measure[2].lower())
    return measure[1] if all(map(_is_unit, words)) else text


def _is_unit(word: str) -> bool:
    """Any longer word may be one; of one or two letters only those that are known: others may be variables."""
    return word in _SHORT_UNITS or (len(word) > 2 and word not in _NO_UNITS)


def _as_fraction(match: re.Match[str]) -> str:
    sign, whole, start, period = match.groups()
    shift = 10 ** len(start)
    before = Fraction(int(whole + start or "0"), shift)
    # 0.(27) is 27/99, and stands behind the digits that come once.
    repeating = Fraction(int(period), (10 ** len(period) - 1) * shift)
    value = before + repeating
    return rf"{sign}\frac{{{value.numerator}}}{{{value.denominator}}}"


def with_braces(text: str) -> str:
    r"""`\frac59` as `\frac{5}{9}` and `\sqrt2` as `\sqrt{2}`, as TeX reads them."""
    return _FRACTION.sub(_braced_fraction, _ROOT.sub(r"\\sqrt\1{\2}", text))


def _braced_fraction(match: re.Match[str]) -> str:
    command, *parts = match.groups()
    numerator, denominator = (
        with_braces(part[1:-1]) if part.startswith("{") else part for part in parts
    )
    return rf"\{command}{{{numerator}}}{{{denominator}}}"


def alternatives(solution: Solution | None) -> list[str]:
    """The answers that count as right; none where nothing can be judged."""
    several = [solution] if isinstance(solution, str) else list(solution or ())
    return [answer for answer in several if answer]


def accuracy_reward(
    completions: list[Any],
    solution: Sequence[Solution | None],
    log_extra: Callable[..., None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Reward function for TRL's trainers: 1.0 where the boxed answer of a completion equals the solution, else 0.0.

    TRL's `accuracy_reward` decides about mathematics; answers are [`tidy`]-ed first, so that `\frac59` and `18
    dollars` are read as written. Words are compared as words, letters of choices as letters, whatever stands around
    them. A completion without a box is handed to TRL's as it is.

    Args:
        completions (`list`): Conversations (`[{"role": "assistant", "content": ...}]`) or plain strings.
        solution (`list[str]` or `list[list[str]]`): References as [`reference_answer`] writes them, or with the answer
            in `$...$`. Of a list any is right.
        log_extra (callable, *optional*): The trainer's own, for the table of completions.
        **kwargs: The dataset's other columns and the trainer's own arguments, which are not needed.

    Returns:
        `list`: One reward for each completion; `None` where the solution cannot be judged.
    """
    texts = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        texts.append(text or "")
    owners, pairs = [], []
    for row, (text, several) in enumerate(zip(texts, solution, strict=True)):
        for reference in alternatives(several):
            owners.append(row)
            pairs.append((text, reference))
    rewards: list[float | None] = [None] * len(texts)
    for row, reward in zip(owners, _rewards(pairs), strict=True):
        if reward is not None:
            rewards[row] = max(reward, rewards[row] or 0.0)
    if log_extra is not None:
        answers = [boxed_answer(text) for text in texts]
        log_extra("solution", list(solution))
        log_extra("answer", ["[none boxed]" if answer is None else answer for answer in answers])
    return rewards


def _rewards(pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    """Of completions and one reference each."""
    from trl.rewards import accuracy_reward as math_reward

    answers = [boxed_answer(text) for text, _ in pairs]
    rewards = []
    for (_, reference), answer in zip(pairs, answers, strict=True):
        rewards.append(_compared(reference, answer))
    # What no rule of ours is for is mathematics.
    rows = [row for row, reward in enumerate(rewards) if reward is None]
    messages = []
    for row in rows:
        answer = answers[row]
        text = pairs[row][0] if answer is None else f"\\boxed{{{tidy(answer)}}}"
        messages.append([{"role": "assistant", "content": text}])
    references = [_marked(pairs[row][1]) for row in rows]
    for row, reward in zip(rows, math_reward(messages, references), strict=True):
        rewards[row] = reward
    return rewards


def boxed_answer(text: str) -> str | None:
    r"""The answer in a completion's last `\boxed{}`; boxes close to each other are one list, as in math-verify."""
    if not re.search(r"\\f?box", text):
        return None
    return extract_boxed_content(text, mode="last").strip()


def _bare(solution: str) -> str:
    """The answer in a solution, without its box or dollar signs."""
    boxed = last_boxed(solution)
    return _without_dollars(solution.strip()) if boxed is None else boxed


def _marked(solution: str) -> str:
    """A solution as math-verify has to read it: tidied in its box; what has none is left to its own search."""
    boxed = last_boxed(solution)
    return solution if boxed is None else f"\\boxed{{{tidy(boxed)}}}"


def _compared(solution: str, answer: str | None) -> float | None:
    """Whether an answer is right, by the rules for what is not mathematics; `None` if they do not apply."""
    reference = _bare(solution)
    if not reference or answer is None:
        return None
    for rule in (_letters_equal, _words_equal, _times_equal, _bases_equal, _small_numbers_equal):
        equal = rule(reference, answer)
        if equal is not None:
            return float(equal)
    return None


def _unwrapped(text: str) -> str:
    r"""Without `\text{}` and its like, dollar signs, TeX's spaces and a final full stop."""
    text = _TEXT.sub(r" \1 ", _without_dollars(text))
    text = re.sub(r"\\[ ,;:!]|~|\\q?quad\b", " ", text)
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").strip()


def _letters_equal(reference: str, answer: str) -> bool | None:
    """Letters of choices: "D", "(D)", "D. 15"; several ("A, C", "AC") are a set."""
    letters = _letters(_unwrapped(reference))
    if letters is None:
        return None
    text = _unwrapped(answer)
    if _letters(text) is not None:
        return letters == _letters(text)
    label = re.match(r"\(([A-Z])\) |([A-Z])(?:[.:)] | )(?!(?:and|or) )", text)
    # A second label behind the first: the answer names several, and chooses none.
    if label is None or re.search(r"\([A-Z]\)|\b[A-Z][.:)]", text[label.end() :]):
        return False
    return letters == {label[1] or label[2]}


def _letters(text: str) -> set[str] | None:
    if re.fullmatch(r"[A-J]{2,5}", text) and list(text) == sorted(set(text)):
        return set(text)
    letters = set()
    for part in re.split(r"[,;&\s]+|\band\b|\bor\b", text):
        match = LETTER_ANSWER.fullmatch(part)
        if match:
            letters.add(match[1])
        elif part:
            return None
    return letters or None


def _words_equal(reference: str, answer: str) -> bool | None:
    """Words are no products of variables: "Navin" is not "Vinan"."""
    text = _unwrapped(reference)
    if len(text) < 2 or not _WORDS.fullmatch(text):
        return None
    if not (_TEXT.search(reference) or _reads_as_words(text)):
        return None
    return _plain_words(text) == _plain_words(_unwrapped(answer))


def _reads_as_words(text: str) -> bool:
    """Bare letters may be a product: words have a capital first, or are several."""
    words = text.split(" ")
    if len(words) == 1:
        is_name = re.fullmatch(r"[A-Z][a-z'’\-]{2,}", text) is not None
        return is_name or text.lower() in ("yes", "no", "true", "false")
    return all(len(word) > 1 for word in words[1:]) and any(len(word) > 3 for word in words)


def _plain_words(text: str) -> list[str]:
    words = re.findall(r"[\w'’\-]+", text.lower())
    return [word for word in words if word not in ("a", "an", "the")]


def _times_equal(reference: str, answer: str) -> bool | None:
    """Times of day: the half of the day counts where both give it."""
    ours, theirs = _time(reference), _time(answer)
    if ours is None or ours[2] is None:
        return None
    if theirs is None or ours[1] != theirs[1]:
        return False
    return theirs[2] in (None, ours[2])


def _time(text: str) -> re.Match[str] | None:
    compact = re.sub(r"[\s.]", "", _unwrapped(text))
    return _TIME.fullmatch(compact.lower())


def _bases_equal(reference: str, answer: str) -> bool | None:
    """Numbers in other bases: the digits count, and the base where both give it."""
    number = _BASED.fullmatch(reference.strip())
    if number is None:
        return None
    digits, _, base = re.sub(r"[\s{}]|\\text", "", answer).partition("_")
    return digits.upper() == number[1] and base in ("", number[2])


def _small_numbers_equal(reference: str, answer: str) -> bool | None:
    """Small decimals exactly: math-verify compares six places, which 2.88e-19 and 0 share."""
    first, second = _decimal(tidy(reference)), _decimal(tidy(answer))
    if first is None or second is None or max(abs(first), abs(second)) > _SMALL:
        return None
    return first == second


def _decimal(text: str) -> Fraction | None:
    match = _SCIENTIFIC.fullmatch(text)
    if match is None:
        return Fraction(text) if re.fullmatch(_NUMBER, text) else None
    exponent = int(match[2])
    # A power that a model may write, and nobody should compute.
    if abs(exponent) >= 1000:
        return None
    return Fraction(match[1]) * Fraction(10) ** exponent


def misjudged(
    solutions: Sequence[Solution | None],
    most: int = 2000,
    reward: Callable[..., Any] = accuracy_reward,
) -> list[int]:
    """Rows whose reference is not graded right with itself as the answer, through the grader of training.

    Equal references are graded once, plain numbers, which all take one path, in a sample of 200 values. Of more than
    `most` distinct references (10 ms each) those that differ in their digits alone are graded by three of them, and if
    one is wrong all of their kind count as wrong; of more than `most` such kinds a sample is looked at. Works in any
    thread; math-verify's time limits apply in the main thread alone.

    Args:
        solutions (sequence of `str`): As [`reference_answer`] writes them, or as a user has them; empty ones are left
            out. Of several answers to a row one that is graded right is enough.
        most (`int`, *optional*, defaults to `2000`): Distinct references to grade, spread over the rows.
        reward (callable, *optional*): The grader; default: [`accuracy_reward`].
    """
    rows = [alternatives(solution) for solution in solutions]
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    numbers = [solution for solution in distinct if _PLAIN_NUMBER.fullmatch(solution)]
    others = [solution for solution in distinct if not _PLAIN_NUMBER.fullmatch(solution)]
    kinds = {solution: solution for solution in others}
    if len(others) > most:
        kinds = {solution: _DIGITS.sub("0", solution) for solution in others}
        others = _spread(_examples(kinds), most)
        logger.info(
            "Of %d distinct reference answers %d were graded: see docs/datasets.md.",
            len(distinct),
            len(others),
        )
    sample = _spread(numbers, _NUMBERS_GRADED) + others
    messages = []
    for solution in sample:
        messages.append([{"role": "assistant", "content": _own_completion(solution)}])
    rewards = reward(messages, solution=sample)
    wrong = set()
    for solution, value in zip(sample, rewards, strict=True):
        if value != 1.0:
            wrong.add(kinds.get(solution, solution))

    def is_wrong(answers: list[str]) -> bool:
        return bool(answers) and all(kinds.get(answer, answer) in wrong for answer in answers)

    return [row for row, answers in enumerate(rows) if is_wrong(answers)]


def _examples(kinds: Mapping[str, str]) -> list[str]:
    """Some solutions of each kind."""
    by_kind: dict[str, list[str]] = {}
    for solution, kind in kinds.items():
        examples = by_kind.setdefault(kind, [])
        if len(examples) < _EXAMPLES_OF_A_KIND:
            examples.append(solution)
    return list(itertools.chain.from_iterable(by_kind.values()))


def _own_completion(solution: str) -> str:
    """What a completion with the reference as its answer says; a written-out one without an answer, as it is."""
    answer = final_answer(solution)
    return solution if why_not_gradable(answer) else f"\\boxed{{{_without_dollars(answer)}}}"


def _spread(items: list[str], most: int) -> list[str]:
    """At most so many items, evenly over all of them."""
    if len(items) <= most:
        return items
    return items[:: math.ceil(len(items) / most)]
