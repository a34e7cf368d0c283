r"""Final answers: read from what datasets write, kept in a form that graders parse, and graded.

Mathematics is judged by math-verify, through TRL's `accuracy_reward`. It reads LaTeX only where LaTeX is marked, so
references keep their `\boxed{}`: of a bare `3\sqrt{13}` it would read the 3. What no parser of formulas knows is
compared here: words (`\text{Evelyn}`), letters of choices (`\text{(D)}`), times of day and numbers in other bases.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from latex2sympy2_extended.math_normalization import extract_boxed_content

logger = logging.getLogger(__name__)

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
_NO_UNITS = {
    *(
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
    ),
    *(
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
    ),
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
    elif announced := _ANNOUNCED.search(text.rsplit("\n", 1)[-1]):
        text = announced[1].removesuffix(".")
    return text.replace(",", "") if re.fullmatch(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` or `\fbox{}` holds; `None` if there is none, or it does not end."""
    boxes = list(re.finditer(r"\\f?box(?:ed)?\s*(?:(\{)|([0-9A-Za-z]))", text))
    if not boxes:
        return None
    if boxes[-1][2]:
        return boxes[-1][2]
    depth, start = 1, boxes[-1].end()
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
    tidied = tidy(answer)
    return (
        tidied
        if _PLAIN_NUMBER.fullmatch(tidied)
        else f"\\boxed{{{_without_dollars(answer.strip())}}}"
    )


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
    if delimited := _DELIMITED.fullmatch(text):
        text = (delimited[1] or delimited[2] or "").strip()
    if text.endswith(".") and not text.endswith("m."):
        text = text.removesuffix(".").rstrip()
    text = _CURRENCY.sub("", text, count=1)
    if thousands := _THOUSANDS.match(text):
        text = re.sub(r"[^\d+-]", "", thousands[0]) + text[thousands.end() :]
    text = _without_unit(text)
    text = text.replace("°", r"^\circ")
    text = _FLOAT.sub(r"\1 \\times 10^{\2}", text) if _FLOAT.fullmatch(text) else text
    return with_braces(_REPEATING.sub(_as_fraction, text))


def _without_dollars(text: str) -> str:
    return _DOLLARS.sub(r"\1", text)


def _without_unit(text: str) -> str:
    if counted := _COUNTED.fullmatch(text):
        return counted[1]
    if not (measured := _MEASURED.fullmatch(text)):
        return text
    words = re.findall(r"[A-Za-z]+", measured[2].lower())
    known = all(word in _SHORT_UNITS or (len(word) > 2 and word not in _NO_UNITS) for word in words)
    return measured[1] if known else text


def _as_fraction(match: re.Match[str]) -> str:
    sign, whole, fixed, repeated = match.groups()
    digits = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    value = digits + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
    return rf"{sign}\frac{{{value.numerator}}}{{{value.denominator}}}"


def with_braces(text: str) -> str:
    r"""`\frac59` as `\frac{5}{9}` and `\sqrt2` as `\sqrt{2}`, as TeX reads them."""
    return _FRACTION.sub(_braced_fraction, _ROOT.sub(r"\\sqrt\1{\2}", text))


def _braced_fraction(match: re.Match[str]) -> str:
    parts = [
        with_braces(part[1:-1]) if part.startswith("{") else part for part in (match[2], match[3])
    ]
    return rf"\{match[1]}{{{parts[0]}}}{{{parts[1]}}}"


def accuracy_reward(
    completions: list[Any],
    solution: list[str],
    log_extra: Callable[..., None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Reward function for TRL's trainers: 1.0 where the boxed answer of a completion equals the solution, else 0.0.

    TRL's `accuracy_reward` decides about mathematics; answers are [`tidy`]-ed first, so that `\frac59` and `18
    dollars` are read as written. Words are compared as words, letters of choices as letters, whatever stands around
    them. A completion without a box is handed to TRL's as it is.

    Args:
        completions (`list`): Conversations (`[{"role": "assistant", "content": ...}]`) or plain strings.
        solution (`list[str]`): References as [`reference_answer`] writes them, or with the answer in `$...$`.
        log_extra (callable, *optional*): The trainer's own, for the table of completions.
        **kwargs: The dataset's other columns and the trainer's own arguments, which are not needed.

    Returns:
        `list`: One reward for each completion; `None` where the solution cannot be judged.
    """
    from trl.rewards import accuracy_reward as math_reward

    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"]
        for completion in completions
    ]
    answers = [boxed_answer(text or "") for text in texts]
    rewards = [_compared(wanted, answer) for wanted, answer in zip(solution, answers, strict=True)]
    left = [row for row, reward in enumerate(rewards) if reward is None]
    asked = [
        texts[row] if answers[row] is None else f"\\boxed{{{tidy(answers[row] or '')}}}"
        for row in left
    ]
    messages = [[{"role": "assistant", "content": text or ""}] for text in asked]
    references = [_marked(solution[row]) for row in left]
    for row, reward in zip(left, math_reward(messages, references), strict=True):
        rewards[row] = reward
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("answer", ["[none boxed]" if answer is None else answer for answer in answers])
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
    wanted = _bare(solution)
    if not wanted or answer is None:
        return None
    for rule in (_letters_equal, _words_equal, _times_equal, _bases_equal, _small_numbers_equal):
        equal = rule(wanted, answer)
        if equal is not None:
            return float(equal)
    return None


def _unwrapped(text: str) -> str:
    r"""Without `\text{}` and its like, dollar signs, TeX's spaces and a final full stop."""
    text = _TEXT.sub(r" \1 ", _without_dollars(text))
    text = re.sub(r"\\[ ,;:!]|~|\\q?quad\b", " ", text)
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").strip()


def _letters_equal(wanted: str, answer: str) -> bool | None:
    """Letters of choices: "D", "(D)", "D. 15"; several ("A, C", "AC") are a set."""
    letters = _letters(_unwrapped(wanted))
    if letters is None:
        return None
    text = _unwrapped(answer)
    labelled = re.match(r"\(([A-Z])\) |([A-Z])(?:[.:)] | )(?!(?:and|or) )", text)
    if (
        _letters(text) is None
        and labelled
        and not re.search(r"\([A-Z]\)|\b[A-Z][.:)]", text[labelled.end() :])
    ):
        return letters == {labelled[1] or labelled[2]}
    return letters == _letters(text)


def _letters(text: str) -> set[str] | None:
    if re.fullmatch(r"[A-J]{2,5}", text) and list(text) == sorted(set(text)):
        return set(text)
    parts = [part for part in re.split(r"[,;&\s]+|\band\b|\bor\b", text) if part]
    found = [LETTER_ANSWER.fullmatch(part) for part in parts]
    return {match[1] for match in found if match} if found and all(found) else None


def _words_equal(wanted: str, answer: str) -> bool | None:
    """Words are no products of variables: "Navin" is not "Vinan"."""
    text = _unwrapped(wanted)
    if (
        not _WORDS.fullmatch(text)
        or len(text) < 2
        or not (_TEXT.search(wanted) or _reads_as_words(text))
    ):
        return None
    return _plain_words(text) == _plain_words(_unwrapped(answer))


def _reads_as_words(text: str) -> bool:
    """Bare letters may be a product: words have a capital first, or are several."""
    words = text.split(" ")
    if len(words) == 1:
        return bool(re.fullmatch(r"[A-Z][a-z'’\-]{2,}", text)) or text.lower() in {
            "yes",
            "no",
            "true",
            "false",
        }
    return all(len(word) > 1 for word in words[1:]) and any(len(word) > 3 for word in words)


def _plain_words(text: str) -> list[str]:
    return [
        word for word in re.findall(r"[\w'’\-]+", text.lower()) if word not in ("a", "an", "the")
    ]


def _times_equal(wanted: str, answer: str) -> bool | None:
    """Times of day: the half of the day counts where both give it."""
    sides = [
        _TIME.fullmatch(re.sub(r"[\s.]", "", _unwrapped(text)).lower()) for text in (wanted, answer)
    ]
    if sides[0] is None or sides[0][2] is None:
        return None
    return (
        sides[1] is not None and sides[0][1] == sides[1][1] and sides[1][2] in (None, sides[0][2])
    )


def _bases_equal(wanted: str, answer: str) -> bool | None:
    """Numbers in other bases: the digits count, and the base where both give it."""
    reference = _BASED.fullmatch(wanted.strip())
    if reference is None:
        return None
    digits, _, base = re.sub(r"[\s{}]|\\text", "", answer).partition("_")
    return digits.upper() == reference[1] and base in ("", reference[2])


def _small_numbers_equal(wanted: str, answer: str) -> bool | None:
    """Small decimals exactly: math-verify compares six places, which 2.88e-19 and 0 share."""
    first, second = _decimal(tidy(wanted)), _decimal(tidy(answer))
    if first is None or second is None or max(abs(first), abs(second)) > _SMALL:
        return None
    return first == second


def _decimal(text: str) -> Fraction | None:
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = int(match[2])
        return Fraction(match[1]) * Fraction(10) ** exponent if abs(exponent) < 1000 else None
    return Fraction(text) if re.fullmatch(_NUMBER, text) else None


def misjudged(
    solutions: Sequence[str], most: int = 2000, reward: Callable[..., Any] = accuracy_reward
) -> list[int]:
    """Rows whose reference is not graded right with itself as the answer, through the grader of training.

    Equal references are graded once, plain numbers, which all take one path, in a sample of 200 values. Of more than
    `most` distinct references (10 ms each) those that differ in their digits alone are graded by three of them, and if
    one is wrong all of their kind count as wrong; of more than `most` such kinds a sample is looked at. Works in any
    thread; math-verify's time limits apply in the main thread alone.

    Args:
        solutions (sequence of `str`): As [`reference_answer`] writes them, or as a user has them; empty ones are left
            out.
        most (`int`, *optional*, defaults to `2000`): Distinct references to grade, spread over the rows.
        reward (callable, *optional*): The grader; default: [`accuracy_reward`].
    """
    distinct = list(dict.fromkeys(solution for solution in solutions if solution))
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
    graded = _spread(numbers, _NUMBERS_GRADED) + others
    messages = [
        [{"role": "assistant", "content": _own_completion(solution)}] for solution in graded
    ]
    rewards = reward(messages, solution=graded)
    wrong = {
        kinds.get(solution, solution)
        for solution, found in zip(graded, rewards, strict=True)
        if found != 1.0
    }
    return [row for row, solution in enumerate(solutions) if kinds.get(solution, solution) in wrong]


def _examples(kinds: Mapping[str, str]) -> list[str]:
    """Some solutions of each kind."""
    examples: dict[str, list[str]] = {}
    for solution, kind in kinds.items():
        found = examples.setdefault(kind, [])
        if len(found) < _EXAMPLES_OF_A_KIND:
            found.append(solution)
    return [solution for found in examples.values() for solution in found]


def _own_completion(solution: str) -> str:
    """What a completion with the reference as its answer says; a written-out one without an answer, as it is."""
    answer = final_answer(solution)
    return solution if why_not_gradable(answer) else f"\\boxed{{{_without_dollars(answer)}}}"


def _spread(items: list[str], most: int) -> list[str]:
    return items[:: -(-len(items) // most)] if len(items) > most else items
