"""How completions are graded: by a reward function, or by extracting answers, strictly and flexibly."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_learnalign import bridge
from trl_learnalign.data.answers import (
    Solution,
    accuracy_reward,
    alternatives,
    boxed_answer,
)
from trl_learnalign.data.notation import tidy
from trl_learnalign.evaluation.extraction import (
    bare_reference,
    flexible_answer,
    is_word,
    strict_answer,
)

if TYPE_CHECKING:
    from trl import GRPOTrainer

Reward = Callable[..., Any]
"""In TRL's form; it may be async."""

THRESHOLD = 0.5
"""A completion is right above this reward, as in training (`LearnAlignConfig.success_threshold`)."""

BOXED, MARKED = "math", "marked"
"""What the strict figure asks for: the reward of training, which reads boxes; or any mark of an answer."""


@dataclass(frozen=True)
class Verdict:
    """What a completion is worth.

    Args:
        reward (`float`, *optional*): `None` where it could not be judged.
        right (`bool`): Whether it is above the threshold; the strict figure.
        answer (`str`, *optional*): What was found strictly.
        flexible_right (`bool`, *optional*): Whether it is right wherever the answer stands; `None` for rewards of
            one's own, which extract what they like.
        flexible_answer (`str`, *optional*): What was found flexibly.
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
        name (`str`): `"math"`, `"marked"`, or where the reward is from.
        reward (callable, *optional*): A reward of one's own, in TRL's form; `None` to extract answers.
    """

    name: str
    reward: Reward | None = None

    @property
    def extracts(self) -> bool:
        """Whether there is a strict and a flexible figure."""
        return self.reward is None

    def verdicts(
        self,
        rows: Sequence[dict[str, Any]],
        texts: Sequence[str],
        ids: Sequence[list[int]] | None = None,
    ) -> list[Verdict]:
        """One verdict for each completion.

        Args:
            rows (sequence of `dict`): Dataset rows: `prompt`, and `solution` or what the reward reads.
            texts (sequence of `str`): A completion of each.
            ids (sequence of `list[int]`, *optional*): Its tokens, which a reward of one's own may read.
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
        """Answers that stand where they were asked for, and their rewards."""
        if self.name == BOXED:
            answers = [boxed_answer(text) for text in texts]
            return answers, accuracy_reward(list(texts), [row["solution"] for row in rows])
        answers = [strict_answer(text) for text in texts]
        return answers, graded_answers(answers, [row["solution"] for row in rows], as_written=True)


def is_right(reward: float | None) -> bool:
    """Whether a reward is above the threshold; what could not be judged is not."""
    return reward is not None and reward > THRESHOLD


def _flexible(
    texts: Sequence[str], references: Sequence[Solution | None]
) -> tuple[list[str | None], list[float | None]]:
    """Answers wherever they stand, and their rewards; with several references, by the one that suits best."""
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
    """Each answer with each of its references, and whose row each pair is of."""
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
    """Rewards of extracted answers: 1.0 where one has the value of its reference.

    Args:
        answers (sequence of `str`): Extracted; `None` where nothing was found, which is wrong.
        references (sequence of `str` or of lists): Column `solution` of [`as_prompts`]; of a list any is right, and
            empty ones cannot be judged.
        as_written (`bool`, *optional*, defaults to `False`): Strings of digits have to be the same ones: `049` may be
            meant as a string, and not as 49.
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
    """A reward where no grader of formulas is needed; `None` where one is."""
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
    """Rewards of completions, called as TRL does.

    Args:
        reward (callable): TRL reward function, in any of its forms.
        rows (sequence of `dict`): Dataset rows.
        completions (sequence of `str`): One for each row; where its prompt is a conversation, the reward gets one.
        ids (sequence of `list[int]`): Their tokens.
        trainer (`GRPOTrainer`, *optional*): Whose state the reward sees.

    Raises:
        `RuntimeError`: If the function fails, naming it.
    """
    answers: list[Any] = list(completions)
    if not isinstance(rows[0]["prompt"], str):
        answers = [[{"role": "assistant", "content": text}] for text in completions]
    return bridge.rewards_of(reward, rows, answers, ids, trainer)


def load_reward(path: str, setting: str = "reward") -> Reward:
    """A reward function by where it is, also in a file of the current folder.

    Args:
        path (`str`): `"package.module:function"`.
        setting (`str`, *optional*, defaults to `"reward"`): Where it was given, for messages.

    Raises:
        `ValueError`: Naming what cannot be imported, or is not there.
        `TypeError`: If it is no function.
    """
    given = f"{setting}={path!r}"
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"{given}: name a function in TRL's form, (completions, **columns) -> rewards, as "
            "'package.module:function'."
        )
    if os.getcwd() not in sys.path:  # commands, unlike `python -m`, do not look there
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever its code does
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{given}: {module_name} cannot be imported ({why}). It must be installed, on PYTHONPATH or in the "
            "current folder."
        ) from error
    function = vars(module).get(name)
    if function is None:
        raise ValueError(f"{given}: {module_name} has no {name!r}.")
    if not callable(function):
        raise TypeError(f"{given} is a {type(function).__name__}: name a function.")
    return function
