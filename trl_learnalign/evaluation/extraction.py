r"""Where the answer of a completion is looked for: *strict* where it is marked as one, *flexible* wherever one stands.

The two are lm-evaluation-harness's `strict-match` and `flexible-extract`. The strict figure asks for the format as
well as for the answer, the flexible one for the answer alone: a model that was never asked for a format should not be
judged by the first only. The flexible one looks into what is marked, where something is.
"""

from __future__ import annotations

import re

from trl_learnalign.data.answers import LONGEST, boxed_answer, last_boxed
from trl_learnalign.data.literal import LETTER_ANSWER
from trl_learnalign.data.notation import tidy

_ANNOUNCED = re.compile(
    r"\b(?:the|my|final) answer(?: is)?(?![\w'’]| isn['’]t)|\banswer[*_]*(?=[ \t]*:)",
    re.IGNORECASE,
)
_MOST_WORDS = 5
"""Words of a completion that is taken for an answer as a whole; a sentence is none."""

_TAIL = 4_000
"""Characters at the end of a completion in which an answer is looked for that nothing marks."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")
_PLAIN_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_LETTER = re.compile(r"\(([A-Z])\)|(?<![\w'’])([A-Z])(?![\w'’]| [a-z])")
# No formula is so long; a bound, since the end of every opening bracket is looked for.
_FORMULA = re.compile(
    r"\$\$(.{1,500}?)\$\$|\$([^$\n]+)\$|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]", re.DOTALL
)
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_WORDS = re.compile(rf"{_WORD.pattern}(?: {_WORD.pattern})*")

LETTER, NUMBER, WORDS, FORMULA = "letter", "number", "words", "formula"
"""Kinds of references: they say what is looked for."""

_PATTERNS = {
    LETTER: [_LETTER],
    NUMBER: [_NUMBER],
    FORMULA: [_FORMULA, _BOLD, _NUMBER],
}

_END_OF_THOUGHT = "</think>"


def strict_answer(text: str) -> str | None:
    r"""The answer that a completion marks as one; `None` if it marks none.

    Marks are, first come first served: the last `\boxed{}`, the last `####`, the last "the answer is …" or
    "Answer: …"; or the completion is one line of five words at most, and so the answer itself.

    Args:
        text (`str`): A completion.
    """
    text = without_thoughts(text)
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed or None
    for announced in (_behind_the_sign(text), _behind_the_words(text)):
        if announced:
            return _bare(announced) or None
    is_short = len(text) <= LONGEST and "\n" not in text and len(text.split()) <= _MOST_WORDS
    return (_bare(text) or None) if is_short else None


def _behind_the_sign(text: str) -> str:
    """The rest of the line behind the last `####` that something follows."""
    for part in reversed(text.split("####")[1:]):
        line, _, _ = part.strip().partition("\n")
        if line:
            return line
    return ""


def _behind_the_words(text: str) -> str:
    """What follows the last "the answer is" or "answer:", up to the end of the line."""
    end = len(text)
    for announcement in reversed(list(_ANNOUNCED.finditer(text))):
        line, _, _ = text[announcement.end() : end].lstrip(" \t\n*_:").partition("\n")
        if line:
            return line
        end = announcement.start()
    return ""


def flexible_answer(text: str, reference: str) -> str | None:
    """The answer that stands in a completion, marked or not; `None` if there is none.

    Without a mark it is the last of what the reference is: number, letter of a choice, or words; of anything else the
    last formula, bold text or number.

    Args:
        text (`str`): A completion.
        reference (`str`): The right answer, of which the kind alone is looked at.
    """
    bare = bare_reference(reference)
    kind = _kind(bare)
    strict = strict_answer(text)
    if strict is None:
        return _last(without_thoughts(text)[-_TAIL:], bare, kind)
    if kind == FORMULA or "\\" in strict:  # the last number in a formula is not its value
        return strict
    found = _last(strict, bare, kind)
    return found or strict if kind == LETTER else found  # a small letter


def without_thoughts(text: str) -> str:
    """What a completion says after its reasoning, if it closes that with `</think>`; all of it if not."""
    _, _, answer = text.rpartition(_END_OF_THOUGHT)
    return answer.strip()


def bare_reference(reference: str) -> str:
    """A reference without its box, in the notation of the grader."""
    boxed = last_boxed(reference)
    return tidy(reference if boxed is None else boxed)


def is_word(reference: str) -> bool:
    """Whether a reference is a word of at least four letters: no parser of formulas should multiply them."""
    return len(reference) > 3 and _WORD.fullmatch(reference) is not None


def _kind(reference: str) -> str:
    if LETTER_ANSWER.fullmatch(reference):
        return LETTER
    if _PLAIN_NUMBER.fullmatch(reference):
        return NUMBER
    if _WORDS.fullmatch(reference):
        return WORDS
    return FORMULA


def _last(text: str, reference: str, kind: str) -> str | None:
    """The last of a kind in a text; as many words as the reference has."""
    if kind == WORDS:
        said = _WORD.findall(text)
        count = len(reference.split())
        return " ".join(said[-count:]) or None
    for pattern in _PATTERNS[kind]:
        found = _last_of(pattern, text)
        if found is not None:
            return found
    return None


def _last_of(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match: its group that took part, or all of it."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    found = last[last.lastindex or 0]
    return found.strip()


def _bare(answer: str) -> str:
    """An answer without the emphasis around it, the full stop after it, and what a full stop ends."""
    answer = answer.strip().strip("*_` ")
    sentence, _, _ = answer.partition(". ")
    return sentence.removesuffix(".").strip("*_` ")
