r"""Final answers: extraction from references and completions, and the reward that compares them.

References keep their `\boxed{}`, because TRL's `accuracy_reward` grades against the same column and parses a bare
`3\sqrt{13}` as 3. Here both sides are normalised to one notation ([`trl_learnalign.data.notation`]). Answers that are
not mathematics are compared as text ([`trl_learnalign.data.answers`]), numbers and parts of lists exactly
([`trl_learnalign.data.equality`]), and formulas by math-verify in a separate process
([`trl_learnalign.data.mathematics`]).
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_learnalign.data import equality, mathematics
from trl_learnalign.data.equality import same_text
from trl_learnalign.data.notation import plain, tidy, without_dollars
from trl_learnalign.data.prompts import message_text

logger = logging.getLogger(__name__)

# ---- Answers that are not mathematics -------------------------------------------------------------------------------

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
    """Whether an answer is correct, by the rules for answers that are not mathematics.

    Args:
        reference (`str`): The correct answer, without a box.
        answer (`str`): The answer to judge, without a box.

    Returns:
        `bool`: `None` if the reference is of none of these kinds.
    """
    for rule in (_letters_equal, _words_equal, _times_equal, _bases_equal):
        equal = rule(reference, answer)
        if equal is not None:
            return equal
    return None


def _unwrapped(text: str) -> str:
    r"""Without `\text{}` and similar commands, dollar signs, TeX spaces and a final full stop."""
    text = _TEXT.sub(r" \1 ", without_dollars(text))
    text = _TEX_SPACES.sub(" ", text)
    return _BLANKS.sub(" ", text).strip().removesuffix(".").strip()


def _letters_equal(reference: str, answer: str) -> bool | None:
    """Compare choice letters: "D", "(D)", "d", "D. 15", "option D"; several letters ("A, C", "AC") form a set."""
    letters = _letters(_unwrapped(reference), LETTER_ANSWER)
    if letters is None:
        return None
    text = _unwrapped(answer)
    return letters == (_letters(text, _ONE_LETTER) or _stated_letter(text))


def _stated_letter(text: str) -> set[str]:
    """The last letter that a sentence states as its answer, or the single label at its start."""
    text = _EMPHASIS.sub("", text)
    stated = [*_STATED.finditer(text), *_STATED_BEFORE.finditer(text)]
    if stated:
        return {max(stated, key=lambda match: match.start(1))[1].upper()}
    label = _LABEL.match(text)
    # If a second label follows the first, the answer lists several options and chooses none.
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
    """Compare words, which must not be read as products of variables: "Navin" is not "Vinan"."""
    text = _unwrapped(reference)
    if len(text) < 2 or not _WORDS.fullmatch(text):
        return None
    if not (_TEXT.search(reference) or _reads_as_words(text)):
        return None
    return _plain_words(text) == _plain_words(_unwrapped(answer))


def _reads_as_words(text: str) -> bool:
    """Whether a text is words; bare letters may be a product, so words begin with a capital, or are several."""
    words = text.split(" ")
    if len(words) == 1:
        is_name = re.fullmatch(r"[A-Z][a-z'’\-]{2,}", text) is not None
        return is_name or text.lower() in ("yes", "no", "true", "false")
    return all(len(word) > 1 for word in words[1:]) and any(len(word) > 3 for word in words)


def _plain_words(text: str) -> list[str]:
    words = re.findall(r"[\w'’\-]+", text.lower())
    return [word for word in words if word not in ("a", "an", "the")]


def _times_equal(reference: str, answer: str) -> bool | None:
    """Compare times of day; "a.m." and "p.m." count if both have one."""
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
    """Compare numbers in other bases by their digits, and by the base if both have one."""
    number = _BASED.fullmatch(reference.strip())
    if number is None:
        return None
    digits, _, base = re.sub(r"[\s{}]|\\text", "", answer).partition("_")
    return digits.upper() == number[1] and base in ("", number[2])


# ---- Answers --------------------------------------------------------------------------------------------------------

Solution = str | Sequence[str]
"""A correct answer, or several alternatives."""

MAX_UNJUDGED = 0.5
"""Share of rows with ungradable answers above which a dataset is refused."""

LONGEST = 1_000
"""Maximum characters of a graded answer; a longer one is wrong, because no reference is half as long."""

_LONGEST_REFERENCE = 500
_TAIL = 2_000  # final characters of a completion without a box in which an answer is searched
_MOST_WORDS = 6
_MOST_BOXES = 10
_NEAR = 70  # maximum characters between boxes of one list
_PATIENCE = 5

_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ANNOUNCED = re.compile(r"(?i)\bthe (?:final )?answer is:?\s+(?=\S)")
_NOTHING = {"", "nan", "null", "n/a", "proof", "notfound", "not found"}
_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*(?:(\{)|([0-9A-Za-z]))?")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MARKED_LATEX = re.compile(r"\$|\\\(|\\\[|\s\[")


def final_answer(written: Any) -> str:
    r"""The final answer in a written solution: after `####` (GSM8K), in the last `\boxed{}` (MATH), or all of it.

    Thousands separators are removed from plain numbers, because a parser may read the comma as a list. The parts of a
    list of answers (OlympiadBench) are joined by commas.
    """
    if isinstance(written, Sequence) and not isinstance(written, str):
        return ", ".join(without_dollars(final_answer(part)) for part in written)
    text = "" if written is None else str(written).strip()
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    elif (boxed := last_boxed(text)) is not None:
        text = boxed
    else:
        line = text.rsplit("\n", 1)[-1]
        if announcement := _ANNOUNCED.search(line):
            text = line[announcement.end() :].removesuffix(".")
    has_separators = re.fullmatch(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", text)
    return text.replace(",", "") if has_separators else text


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{}` or `\fbox{}`; `None` if there is none, or it is not closed."""
    boxes = _boxes(text, most=1)
    return boxes[-1].content if boxes else None


@dataclass(frozen=True)
class _Box:
    start: int
    end: int
    content: str | None


def _boxes(text: str, most: int) -> list[_Box]:
    """The last boxes of a text, at most `most`."""
    boxes = []
    for opening in list(_BOX.finditer(text))[-most:]:
        if opening[2]:  # a box without braces has one character
            boxes.append(_Box(opening.start(), opening.end(), opening[2]))
            continue
        end = _group_end(text, opening.end()) if opening[1] else None
        content = None if end is None else text[opening.end() : end - 1].strip()
        boxes.append(_Box(opening.start(), end or len(text), content))
    return boxes


def _group_end(text: str, start: int) -> int | None:
    """The end of the group whose opening brace is just before `start`."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end()
    return None


def boxed_answer(text: str) -> str | None:
    r"""The answer in a completion's last `\boxed{}`, empty if it is not closed; `None` if there is no box."""
    boxes = _boxes(text, most=1)
    return (boxes[-1].content or "") if boxes else None


def _boxed_list(text: str) -> str:
    r"""Contents of the last boxes if they are close together, `\boxed{1}` and `\boxed{2}`; empty for a single box."""
    boxes = _boxes(text, _MOST_BOXES)
    near: list[_Box] = []
    for box in reversed(boxes):
        if near and not 0 <= near[-1].start - box.end <= _NEAR:
            break
        near.append(box)
    contents = [box.content or "" for box in reversed(near)]
    return ", ".join(contents) if len(contents) > 1 else ""


def reference_answer(answer: str) -> str:
    r"""An answer in the form of the `solution` column: a plain number, or `\boxed{}`; empty if it cannot be judged.

    Both TRL's `accuracy_reward` and [`accuracy_reward`] grade against it.

    Args:
        answer (`str`): As returned by [`final_answer`].
    """
    if why_not_gradable(answer):
        return ""
    text = tidy(answer)
    if is_plain_number(text):
        return text
    return f"\\boxed{{{without_dollars(answer.strip())}}}"


def is_plain_number(text: str) -> bool:
    """Whether a text consists of digits with an optional sign and decimal point."""
    return _PLAIN_NUMBER.fullmatch(text) is not None


def why_not_gradable(answer: str) -> str | None:
    """Why no completion could be compared with an answer; `None` if the grader can be used."""
    text = answer.strip()
    if text.lower() in _NOTHING:
        return "no answer"
    if text.startswith("{") and re.match(r'\{\s*"', text):
        return "unit tests of a program, which are not executed"
    if len(text) > _LONGEST_REFERENCE or len(_words(text)) > _MOST_WORDS:
        return "text rather than a final answer"
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", text))


def alternatives(solution: Solution | None) -> list[str]:
    """The correct alternatives; empty if the solution cannot be judged."""
    several = [solution] if isinstance(solution, str) else list(solution or ())
    return [answer for answer in several if answer]


# ---- The reward -----------------------------------------------------------------------------------------------------


def accuracy_reward(
    completions: list[Any],
    solution: Sequence[Solution | None],
    log_extra: Callable[..., None] | None = None,
    grading_seconds: float = mathematics.SECONDS,
    **kwargs: Any,
) -> list[float | None]:
    r"""Reward function for TRL's trainers: 1.0 if the boxed answer of a completion equals the solution, else 0.0.

    The last `\boxed{}` counts; if the solution is a list, boxes close together form a list. In a completion without a
    box, math-verify looks for LaTeX that is announced as the answer, as in TRL's `accuracy_reward`. Answers are
    normalised to one notation ([`tidy`]) and compared as words, choice letters, exact numbers, or formulas, depending
    on the solution. An answer of more than [`LONGEST`] characters is wrong. No completion can raise an error, and the
    time for an answer is limited.

    Args:
        completions (`list`): Conversations (`[{"role": "assistant", "content": ...}]`) or plain strings.
        solution (`list[str]` or `list[list[str]]`): References as written by [`reference_answer`], or with the answer
            in `$...$`. In a list, each alternative is correct.
        log_extra (callable, *optional*): The trainer's own, for the table of completions.
        grading_seconds (`float`, *optional*): Processor time for an answer, after which it counts as wrong; wall time
            may be four times as long. After five such answers, the others of a call get a tenth of the time.
        **kwargs: Other columns of the dataset and other arguments of the trainer, which are ignored.

    Returns:
        `list`: One reward per completion; `None` if the solution cannot be judged.

    Raises:
        `RuntimeError`: If math-verify cannot be started.
    """
    texts = [_text(completion) for completion in completions]
    patience = _Patience(grading_seconds)
    rewards: list[float | None] = []
    for text, several in zip(texts, solution, strict=True):
        verdicts = [_verdict(text, reference, patience) for reference in alternatives(several)]
        judged = [verdict for verdict in verdicts if verdict is not None]
        rewards.append(float(any(judged)) if judged else None)
    if log_extra is not None:
        answers = [boxed_answer(text) for text in texts]
        log_extra("solution", list(solution))
        log_extra("answer", ["[none boxed]" if answer is None else answer for answer in answers])
    return rewards


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return (message_text(completion[-1]) or "") if completion else ""


class _Patience:
    """Time limit per answer, which shrinks after timeouts, because a model repeats what takes long to grade."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._late = 0

    def judged(self, reference: str, answer: str, is_boxed: bool) -> bool:
        seconds = self._seconds if self._late < _PATIENCE else self._seconds / 10
        right, late = _judged(reference, answer, is_boxed, seconds)
        self._late += late
        return right


def _verdict(text: str, reference: str, patience: _Patience) -> bool | None:
    """Whether a completion has the correct answer; `None` if the reference is not an answer."""
    answer = boxed_answer(text)
    if not is_written_out(reference) and why_not_gradable(bare_answer(reference)):
        return None
    if answer is None:
        tail = text[-_TAIL:]
        return _MARKED_LATEX.search(tail) is not None and patience.judged(reference, tail, False)
    if patience.judged(reference, answer, True):
        return True
    several = _boxed_list(text)
    if not several or len(equality.shape_of(tidy(bare_answer(reference))).parts) == 1:
        return False
    return patience.judged(reference, several, True)


def bare_answer(solution: str) -> str:
    """The answer in a solution, without its box or dollar signs."""
    return without_dollars(final_answer(solution))


def is_written_out(solution: str) -> bool:
    """Whether a solution is sentences or formulas between dollar signs, which math-verify has to search."""
    text = solution.strip()
    if final_answer(text) != text:
        return False
    bare = without_dollars(text)
    if re.search(r"(?<!\\)\$(?!\d)", bare) or (bare != text and not text.startswith("$")):
        return True
    return len(_words(bare)) > 1 and compared(bare, bare) is None


@functools.lru_cache(maxsize=10_000)
def _judged(reference: str, answer: str, is_boxed: bool, seconds: float) -> tuple[bool, bool]:
    """Whether an answer is correct, and whether it timed out; cached, because rollouts of a prompt repeat answers."""
    if is_boxed and (not answer or len(answer) > LONGEST):
        return False, False
    timed = _Timed(seconds)
    try:
        return _right(reference, answer, is_boxed, timed), False
    except mathematics.OutOfTimeError:
        return False, True


def _right(reference: str, answer: str, is_boxed: bool, timed: _Timed) -> bool:
    if is_written_out(reference):
        return timed.equal(reference, _in_box(tidy(answer)) if is_boxed else answer)
    bare = bare_answer(reference)
    if not is_boxed:
        return timed.equal(_in_box(tidy(bare)), answer)
    equal = compared(bare, answer)
    if equal is not None:
        return equal
    return equality.equal(tidy(bare), tidy(answer), timed.formulas_equal)


def _in_box(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


class _Timed:
    """Comparisons by math-verify for one answer, within a common time limit."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def formulas_equal(self, reference: str, answer: str) -> bool:
        return self.equal(_in_box(reference), _in_box(answer))

    def equal(self, reference: str, answer: str) -> bool:
        if self._seconds <= 0:
            raise mathematics.OutOfTimeError
        verdict = mathematics.WORKER.equal(reference, answer, self._seconds)
        self._seconds -= verdict.seconds
        return verdict.right


# ---- Check of references --------------------------------------------------------------------------------------------

_NUMBERS_GRADED = 200
_EXAMPLES_OF_A_KIND = 3
_TYPED_GRADED = 100
_DIGITS = re.compile(r"\d+")


def misjudged(
    solutions: Sequence[Solution | None],
    most: int = 2000,
    reward: Callable[..., Any] = accuracy_reward,
) -> list[int]:
    """Rows whose reference is not graded correct with itself as the answer, by the grader of training.

    Equal references are graded once. Plain numbers, which share one code path, are graded on a sample of 200 values.
    If there are more than `most` distinct references, those that differ only in their digits are graded by three of
    them, and all count as wrong if one is. If there are more than `most` such kinds, a sample is graded.

    Args:
        solutions (sequence of `str`): As written by [`reference_answer`], or by a user; empty ones are skipped. Of
            several alternatives in a row, one that is graded correct is enough.
        most (`int`, *optional*, defaults to `2000`): Distinct references to grade, evenly spaced over the rows.
        reward (callable, *optional*): The grader; defaults to [`accuracy_reward`].
    """
    rows = [alternatives(solution) for solution in solutions]
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    numbers = [solution for solution in distinct if is_plain_number(solution)]
    others = [solution for solution in distinct if not is_plain_number(solution)]
    kinds = {solution: solution for solution in others}
    if len(others) > most:
        kinds = {solution: _DIGITS.sub("0", solution) for solution in others}
        others = _spread(_examples(kinds), most)
        logger.info(
            "There are %d distinct reference answers; a sample of %d was graded (docs/datasets.md).",
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


def read_literally(solutions: Sequence[Solution | None]) -> list[int]:
    r"""Rows whose reference is not matched by its plain-text form: `sqrt(3)/4` for `\frac{\sqrt{3}}{4}`.

    The grader treats such a reference as text, and a correct answer in another notation as wrong. A sample of 100 of
    the references that have another notation is checked.

    Args:
        solutions (sequence of `str`): As in [`misjudged`].
    """
    rows: dict[str, int] = {}
    for row, solution in enumerate(solutions):
        for reference in alternatives(solution):
            rows.setdefault(reference, row)
    typed = {reference: text for reference in rows if (text := _typed(reference))}
    sample = _spread(list(typed), _TYPED_GRADED)
    rewards = accuracy_reward([f"\\boxed{{{typed[reference]}}}" for reference in sample], sample)
    wrong = [reference for reference, reward in zip(sample, rewards, strict=True) if reward != 1.0]
    return sorted({rows[reference] for reference in wrong})


def warn_of_literal_references(solutions: Sequence[Solution | None]) -> None:
    """Warn of references that only match answers in the same notation."""
    rows = read_literally(solutions)
    if rows:
        logger.warning(
            "The grader recognises %d of the sampled reference answers only in their exact notation and grades any "
            "other notation as wrong. The first is row %d: %.80r.",
            len(rows),
            rows[0],
            solutions[rows[0]],
        )


def _typed(reference: str) -> str:
    """A reference in plain text; empty if it has no LaTeX, or is not mathematics."""
    bare = bare_answer(reference)
    if why_not_gradable(bare) or is_written_out(reference) or compared(bare, bare):
        return ""
    text = tidy(bare)
    return "" if same_text(plain(text), text) else plain(text)


def _examples(kinds: Mapping[str, str]) -> list[str]:
    """Example solutions of each kind."""
    by_kind: dict[str, list[str]] = {}
    for solution, kind in kinds.items():
        examples = by_kind.setdefault(kind, [])
        if len(examples) < _EXAMPLES_OF_A_KIND:
            examples.append(solution)
    return list(itertools.chain.from_iterable(by_kind.values()))


def _own_completion(solution: str) -> str:
    """A completion with the reference as its answer; a written-out solution without an answer is used unchanged."""
    answer = final_answer(solution)
    return solution if why_not_gradable(answer) else f"\\boxed{{{without_dollars(answer)}}}"


def _spread(items: list[str], most: int) -> list[str]:
    """At most `most` items, evenly spaced."""
    if len(items) <= most:
        return items
    return items[:: math.ceil(len(items) / most)]
