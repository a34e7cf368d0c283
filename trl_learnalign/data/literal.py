"""Answers that are no mathematics: words, letters of choices, times of day, numbers in other bases."""

from __future__ import annotations

import re

from trl_learnalign.data.notation import without_dollars

LETTER_ANSWER = re.compile(r"\(?([A-Z])\)?")

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}"
)
_TEX_SPACES = re.compile(r"\\[ ,;:!]|~|\\q?quad\b")
_BLANKS = re.compile(r"\s+")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’\-]*(?: [A-Za-z'’\-]+)*")
_TIME = re.compile(r"(\d{1,2}:\d{2})(am|pm|noon)?")
_BASED = re.compile(r"([0-9A-F]+)_\{?(?:\\text\s*\{)?(\d+|[a-z]+)\}*")
_ONE_LETTER = re.compile(r"\(?([A-Za-z])\)?")
_SEVERAL_LETTERS = re.compile(r"[A-J]{2,5}")
_BETWEEN_LETTERS = re.compile(r"[,;&\s]+|\band\b|\bor\b")
_EMPHASIS = re.compile(r"[*_]+")
_STATED = re.compile(
    r"\b(?:answer|option|choice)(?: is)? ?:? ?(?:option |choice )?\(?([A-Za-z])\)?(?![\w'’])",
    re.IGNORECASE,
)
_STATED_BEFORE = re.compile(r"\(?\b([A-Z])\)? is (?:the )?(?:correct|right|answer)", re.IGNORECASE)
_LABEL = re.compile(r"\(([A-Za-z])\)(?= |,|$)|([A-Za-z])(?:[.:)]|,)(?= |$)|([A-Z]) (?!and |or )")
_OTHER_LABEL = re.compile(r"\([A-Z]\)|\b[A-Z][.:)]|\b(?:and|or) [A-Z]\b")


def compared(reference: str, answer: str) -> bool | None:
    """Whether an answer is right, by the rules for what is not mathematics.

    Args:
        reference (`str`): The right answer, without a box.
        answer (`str`): The one to judge, likewise.

    Returns:
        `bool`: `None` if the reference is none of these kinds.
    """
    for rule in (_letters_equal, _words_equal, _times_equal, _bases_equal):
        equal = rule(reference, answer)
        if equal is not None:
            return equal
    return None


def _unwrapped(text: str) -> str:
    r"""Without `\text{}` and its like, dollar signs, TeX's spaces and a final full stop."""
    text = _TEXT.sub(r" \1 ", without_dollars(text))
    text = _TEX_SPACES.sub(" ", text)
    return _BLANKS.sub(" ", text).strip().removesuffix(".").strip()


def _letters_equal(reference: str, answer: str) -> bool | None:
    """Letters of choices: "D", "(D)", "d", "D. 15", "option D"; several ("A, C", "AC") are a set."""
    letters = _letters(_unwrapped(reference), LETTER_ANSWER)
    if letters is None:
        return None
    text = _unwrapped(answer)
    return letters == (_letters(text, _ONE_LETTER) or _stated_letter(text))


def _stated_letter(text: str) -> set[str]:
    """The letter that a sentence names last as its answer, or the one label that it begins with."""
    text = _EMPHASIS.sub("", text)
    stated = [*_STATED.finditer(text), *_STATED_BEFORE.finditer(text)]
    if stated:
        return {max(stated, key=lambda match: match.start(1))[1].upper()}
    label = _LABEL.match(text)
    # A second label behind the first: the answer names several, and chooses none.
    if label is None or _OTHER_LABEL.search(text, label.end()):
        return set()
    return {label[label.lastindex or 0].upper()}


def _letters(text: str, one: re.Pattern[str]) -> set[str] | None:
    if _SEVERAL_LETTERS.fullmatch(text) and list(text) == sorted(set(text)):
        return set(text)
    letters = set()
    for part in _BETWEEN_LETTERS.split(text):
        match = one.fullmatch(part)
        if match:
            letters.add(match[1].upper())
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
