"""Grades completions by a reward function, or by strictly and flexibly extracted answers."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_learnalign.bridge.objective import rewards_of
from trl_learnalign.data.answers import (
    LETTER_ANSWER,
    LONGEST,
    Solution,
    accuracy_reward,
    alternatives,
    boxed_answer,
    last_boxed,
)
from trl_learnalign.data.notation import tidy

if TYPE_CHECKING:
    from trl import GRPOTrainer


# ---- Extraction of answers: strict and flexible ---------------------------------------------------------------------
# The two correspond to lm-evaluation-harness's `strict-match` and `flexible-extract`. The strict figure requires both
# the format and the answer, the flexible one only the answer: a model that was not asked for a format should not be
# judged by the strict figure alone. Flexible extraction uses a marked answer if there is one.

_ANNOUNCED = re.compile(
    r"\b(?:the|my|final) answer(?: is)?(?![\w'’]| isn['’]t)|\banswer[*_]*(?=[ \t]*:)",
    re.IGNORECASE,
)
_MOST_WORDS = 5
"""Maximum number of words of a completion that is taken as an answer as a whole, unlike a sentence."""

_TAIL = 4_000
"""Number of characters at the end of a completion in which an unmarked answer is searched."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")
_PLAIN_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_LETTER = re.compile(r"\(([A-Z])\)|(?<![\w'’])([A-Z])(?![\w'’]| [a-z])")
# The length is bounded, because the end of every opening bracket is searched for; no formula is this long.
_FORMULA = re.compile(
    r"\$\$(.{1,500}?)\$\$|\$([^$\n]+)\$|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]", re.DOTALL
)
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_WORDS = re.compile(rf"{_WORD.pattern}(?: {_WORD.pattern})*")

LETTER, NUMBER, WORDS, FORMULA = "letter", "number", "words", "formula"
"""Kinds of references, which determine what is searched for."""

_PATTERNS = {
    LETTER: [_LETTER],
    NUMBER: [_NUMBER],
    FORMULA: [_FORMULA, _BOLD, _NUMBER],
}

_END_OF_THOUGHT = "</think>"


def strict_answer(text: str) -> str | None:
    r"""The answer that a completion marks as such; `None` if there is no mark.

    The marks, in order of precedence: the last `\boxed{}`, the last `####`, the last "the answer is …" or "Answer: …".
    A completion that is one line of at most five words is itself the answer.

    Args:
        text (`str`): A completion.
    """
    text = without_thoughts(text)
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed or None
    for announced in (_after_sign(text), _after_announcement(text)):
        if announced:
            return _bare(announced) or None
    is_short = len(text) <= LONGEST and "\n" not in text and len(text.split()) <= _MOST_WORDS
    return (_bare(text) or None) if is_short else None


def _after_sign(text: str) -> str:
    """The rest of the line after the last `####` that is followed by text."""
    for part in reversed(text.split("####")[1:]):
        line, _, _ = part.strip().partition("\n")
        if line:
            return line
    return ""


def _after_announcement(text: str) -> str:
    """The text after the last "the answer is" or "answer:", up to the end of the line."""
    end = len(text)
    for announcement in reversed(list(_ANNOUNCED.finditer(text))):
        line, _, _ = text[announcement.end() : end].lstrip(" \t\n*_:").partition("\n")
        if line:
            return line
        end = announcement.start()
    return ""


def flexible_answer(text: str, reference: str) -> str | None:
    """The answer in a completion, marked or not; `None` if there is none.

    Without a mark it is the last item of the reference's kind: number, letter of a choice, or words. For other
    references it is the last formula, bold text or number.

    Args:
        text (`str`): A completion.
        reference (`str`): The correct answer, of which only the kind is used.
    """
    bare = bare_reference(reference)
    kind = _kind(bare)
    strict = strict_answer(text)
    if strict is None:
        return _last(without_thoughts(text)[-_TAIL:], bare, kind)
    if kind == FORMULA or "\\" in strict:  # a formula's value is not its last number
        return strict
    found = _last(strict, bare, kind)
    return found or strict if kind == LETTER else found  # a lower-case letter


def without_thoughts(text: str) -> str:
    """The part of a completion after `</think>`; all of it without such a tag."""
    _, _, answer = text.rpartition(_END_OF_THOUGHT)
    return answer.strip()


def bare_reference(reference: str) -> str:
    """A reference without its box, in the notation of the grader."""
    boxed = last_boxed(reference)
    return tidy(reference if boxed is None else boxed)


def is_word(reference: str) -> bool:
    """Whether a reference is a word of at least four letters, which a formula parser would read as a product."""
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
    """The last item of a kind in a text; for words, as many as the reference has."""
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
    """The last match: its matching group, or the whole match."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    found = last[last.lastindex or 0]
    return found.strip()


def _bare(answer: str) -> str:
    """An answer without surrounding emphasis, without a final full stop and the text after it."""
    answer = answer.strip().strip("*_` ")
    sentence, _, _ = answer.partition(". ")
    return sentence.removesuffix(".").strip("*_` ")


# ---- Grading --------------------------------------------------------------------------------------------------------

Reward = Callable[..., Any]
"""A reward function in TRL's form; it may be async."""

THRESHOLD = 0.5
"""A completion is correct if its reward is above this, as in training (`LearnAlignConfig.success_threshold`)."""

BOXED, MARKED = "math", "marked"
"""What the strict figure requires: a box, as in the reward of training; or any mark of an answer."""


@dataclass(frozen=True)
class Verdict:
    """The grade of a completion.

    Args:
        reward (`float`, *optional*): `None` if it could not be judged.
        right (`bool`): Whether it is above the threshold; the strict figure.
        answer (`str`, *optional*): The strictly extracted answer.
        flexible_right (`bool`, *optional*): Whether the flexibly extracted answer is correct; `None` for user-defined
            rewards, which have their own extraction.
        flexible_answer (`str`, *optional*): The flexibly extracted answer.
    """

    reward: float | None
    right: bool
    answer: str | None = None
    flexible_right: bool | None = None
    flexible_answer: str | None = None


@dataclass(frozen=True)
class Grader:
    """Grades completions.

    Args:
        name (`str`): `"math"`, `"marked"`, or the source of the reward.
        reward (callable, *optional*): A user-defined reward in TRL's form; `None` to extract answers.
    """

    name: str
    reward: Reward | None = None

    @property
    def extracts(self) -> bool:
        """Whether there are a strict and a flexible figure."""
        return self.reward is None

    def verdicts(
        self,
        rows: Sequence[dict[str, Any]],
        texts: Sequence[str],
        ids: Sequence[list[int]] | None = None,
    ) -> list[Verdict]:
        """One verdict per completion.

        Args:
            rows (sequence of `dict`): Dataset rows: `prompt`, and `solution` or what the reward reads.
            texts (sequence of `str`): One completion per row.
            ids (sequence of `list[int]`, *optional*): Their tokens, which a user-defined reward may read.
        """
        if self.reward is not None:
            rewards = grade(self.reward, rows, texts, ids or [[] for _ in texts])
            return [Verdict(reward, is_right(reward)) for reward in rewards]
        strict, rewards = self._strict(rows, texts)
        references = [row["solution"] for row in rows]
        flexible, flexible_rewards = _flexible(texts, references)
        verdicts = []
        for number, reward in enumerate(rewards):
            right = is_right(reward)
            verdict = Verdict(
                reward=reward,
                right=right,
                answer=strict[number],
                flexible_right=right or is_right(flexible_rewards[number]),
                flexible_answer=flexible[number],
            )
            verdicts.append(verdict)
        return verdicts

    def _strict(
        self, rows: Sequence[dict[str, Any]], texts: Sequence[str]
    ) -> tuple[list[str | None], list[float | None]]:
        """Strictly extracted answers, and their rewards."""
        if self.name == BOXED:
            answers = [boxed_answer(text) for text in texts]
            return answers, accuracy_reward(list(texts), [row["solution"] for row in rows])
        answers = [strict_answer(text) for text in texts]
        return answers, graded_answers(answers, [row["solution"] for row in rows], as_written=True)


def is_right(reward: float | None) -> bool:
    """Whether a reward is above the threshold; false if it could not be judged."""
    return reward is not None and reward > THRESHOLD


def _flexible(
    texts: Sequence[str], references: Sequence[Solution | None]
) -> tuple[list[str | None], list[float | None]]:
    """Flexibly extracted answers and their rewards; with several references, by the best match."""
    owners, pairs = _pairs(texts, references)
    found = [flexible_answer(text, reference) for text, reference in pairs]
    graded = graded_answers(found, [reference for _, reference in pairs])
    answers: list[str | None] = [None] * len(texts)
    rewards: list[float | None] = [None] * len(texts)
    for row, answer, reward in zip(owners, found, graded, strict=True):
        if rewards[row] is None or is_right(reward) > is_right(rewards[row]):
            answers[row], rewards[row] = answer, reward
    return answers, rewards


def _pairs(
    answers: Sequence[Any], references: Sequence[Solution | None]
) -> tuple[list[int], list[tuple[Any, str]]]:
    """Each answer paired with each of its references, and the row number of each pair."""
    owners, pairs = [], []
    for row, (answer, several) in enumerate(zip(answers, references, strict=True)):
        for reference in alternatives(several):
            owners.append(row)
            pairs.append((answer, reference))
    return owners, pairs


def graded_answers(
    answers: Sequence[str | None],
    references: Sequence[Solution | None],
    as_written: bool = False,
) -> list[float | None]:
    """Rewards of extracted answers: 1.0 if an answer equals its reference.

    Args:
        answers (sequence of `str`): Extracted answers; `None` if none was found, which is wrong.
        references (sequence of `str` or of lists): Column `solution` of [`as_prompts`]; in a list, each alternative is
            correct. Empty references cannot be judged.
        as_written (`bool`, *optional*, defaults to `False`): Strings of digits must be identical, because `049` may be
            meant as a string and not as 49.
    """
    owners, pairs = _pairs(answers, references)
    verdicts = [_judged_as_text(*pair, as_written) for pair in pairs]
    open_pairs = [number for number, verdict in enumerate(verdicts) if verdict is None]
    boxed = [f"\\boxed{{{pairs[number][0]}}}" for number in open_pairs]
    graded = accuracy_reward(boxed, [pairs[number][1] for number in open_pairs]) if boxed else []
    for number, reward in zip(open_pairs, graded, strict=True):
        verdicts[number] = reward
    rewards: list[float | None] = [None] * len(answers)
    for row, verdict in zip(owners, verdicts, strict=True):
        if verdict is not None:
            rewards[row] = max(verdict, rewards[row] or 0.0)
    return rewards


def _judged_as_text(answer: str | None, reference: str, as_written: bool) -> float | None:
    """A reward if no formula grader is needed; otherwise `None`."""
    if answer is None:
        return 0.0
    bare = bare_reference(reference)
    if answer == bare:
        return 1.0
    if is_word(bare):
        return float(answer.casefold() == bare.casefold())
    if as_written and bare.isdecimal() and tidy(answer).isdecimal():
        return float(tidy(answer) == bare)
    return None


def grade(
    reward: Reward,
    rows: Sequence[dict[str, Any]],
    completions: Sequence[str],
    ids: Sequence[list[int]],
    trainer: GRPOTrainer | None = None,
) -> list[float | None]:
    """Rewards of completions; the function is called as in TRL.

    Args:
        reward (callable): TRL reward function, in any of its forms.
        rows (sequence of `dict`): Dataset rows.
        completions (sequence of `str`): One per row; converted to a conversation if the prompt is one.
        ids (sequence of `list[int]`): Their tokens.
        trainer (`GRPOTrainer`, *optional*): Provides the state that the reward sees.

    Raises:
        `RuntimeError`: If the function fails, naming it.
    """
    answers: list[Any] = list(completions)
    if not isinstance(rows[0]["prompt"], str):
        answers = [[{"role": "assistant", "content": text}] for text in completions]
    return rewards_of(reward, rows, answers, ids, trainer)


def load_reward(path: str, setting: str = "reward") -> Reward:
    """Import a reward function, also from a file in the current folder.

    Args:
        path (`str`): `"package.module:function"`.
        setting (`str`, *optional*, defaults to `"reward"`): Name of the setting, for messages.

    Raises:
        `ValueError`: Naming what cannot be imported, or does not exist.
        `TypeError`: If it is not a function.
    """
    given = f"{setting}={path!r}"
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"{given}: name a function in TRL's form, (completions, **columns) -> rewards, as "
            "'package.module:function'."
        )
    if os.getcwd() not in sys.path:  # unlike `python -m`, console scripts do not add it
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # user code may raise anything
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{given}: {module_name} cannot be imported ({why}). Install it, add its folder to PYTHONPATH, or start "
            "from its folder."
        ) from error
    function = vars(module).get(name)
    if function is None:
        raise ValueError(f"{given}: {module_name} has no {name!r}.")
    if not callable(function):
        raise TypeError(f"{given} is a {type(function).__name__}: name a function.")
    return function
