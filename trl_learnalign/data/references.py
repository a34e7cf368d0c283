"""Whether the grader reads the references of a dataset, seen before anything is generated."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_learnalign.data import literal
from trl_learnalign.data.answers import (
    Solution,
    accuracy_reward,
    alternatives,
    bare_answer,
    final_answer,
    is_plain_number,
    is_written_out,
    why_not_gradable,
)
from trl_learnalign.data.notation import plain, tidy, without_dollars
from trl_learnalign.data.shapes import same_text

logger = logging.getLogger(__name__)

_NUMBERS_GRADED = 200
_EXAMPLES_OF_A_KIND = 3
_TYPED_GRADED = 100
_DIGITS = re.compile(r"\d+")


def misjudged(
    solutions: Sequence[Solution | None],
    most: int = 2000,
    reward: Callable[..., Any] = accuracy_reward,
) -> list[int]:
    """Rows whose reference is not graded right with itself as the answer, through the grader of training.

    Equal references are graded once, plain numbers, which all take one path, in a sample of 200 values. Of more than
    `most` distinct references those that differ in their digits alone are graded by three of them, and if
    one is wrong all of their kind count as wrong; of more than `most` such kinds a sample is looked at.

    Args:
        solutions (sequence of `str`): As [`reference_answer`] writes them, or as a user has them; empty ones are left
            out. Of several answers to a row one that is graded right is enough.
        most (`int`, *optional*, defaults to `2000`): Distinct references to grade, spread over the rows.
        reward (callable, *optional*): The grader; default: [`accuracy_reward`].
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


def read_literally(solutions: Sequence[Solution | None]) -> list[int]:
    r"""Rows whose reference is not graded right as one types it without LaTeX: `sqrt(3)/4` for `\frac{\sqrt{3}}{4}`.

    The grader takes it for a text then, and a right answer that is written otherwise for a wrong one. A sample of 100
    references is looked at, of those that have another notation.

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


def say_what_is_read_literally(solutions: Sequence[Solution | None]) -> None:
    """Warn of references that only their own notation is right for."""
    rows = read_literally(solutions)
    if rows:
        logger.warning(
            "The grader reads %d of the reference answers that it tried as they are written only: another notation of "
            "them would be wrong. The first is row %d: %.80r.",
            len(rows),
            rows[0],
            solutions[rows[0]],
        )


def _typed(reference: str) -> str:
    """A reference without LaTeX; empty if it has none, or is no mathematics."""
    bare = bare_answer(reference)
    if why_not_gradable(bare) or is_written_out(reference) or literal.compared(bare, bare):
        return ""
    text = tidy(bare)
    return "" if same_text(plain(text), text) else plain(text)


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
    return solution if why_not_gradable(answer) else f"\\boxed{{{without_dollars(answer)}}}"


def _spread(items: list[str], most: int) -> list[str]:
    """At most so many items, evenly over all of them."""
    if len(items) <= most:
        return items
    return items[:: math.ceil(len(items) / most)]
