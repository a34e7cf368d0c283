"""The forms in which datasets keep questions and answers: which columns they are in, and what they look like."""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_learnalign.data.answers import final_answer
from trl_learnalign.data.prompts import message_text

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "expected_answer",
    "solution",
    "ground_truth",
    "answerkey",
    "correct",
)
# ASDiv and SVAMP, OlympiadBench: the question is not whole without.
_CONTEXT_COLUMNS = ("body", "context")
_CHOICES_COLUMNS = ("choices", "options")
_RIGHT_OPTION_COLUMNS = ("answer", "answerkey", "correct", "label")
_RIGHT_CHOICE = "correct answer"  # GPQA
_WRONG_CHOICE = "incorrect answer"
_TESTS_COLUMNS = {
    "test_list",
    "test_cases",
    "unit_tests",
    "public_tests",
    "private_tests",
    "hidden_tests",
    "input_output",
    "canonical_solution",
    "entry_point",
    "fn_name",
    "starter_code",
}

# Instructions that some datasets write into their questions. They ask for the answer in a place where the reward does
# not look: the system prompt asks for a box.
_OTHER_PLACES = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"^Solve the following math problem step by step\. The last line of your response should be of the form "
        r"Answer: \$?Answer .*?\n\n",
        r'\s*Remember to put your answer on its own line after "Answer:"\.?\s*$',
        r"\s*Let's think step by step and output the final answer after \"####\"\.?\s*$",
    )
]


@dataclass(frozen=True)
class Form:
    """How the rows of a dataset are read.

    Args:
        question (callable): Row → question, as a text or a conversation.
        answer (callable): Row → final answer as text; empty if there is none.
    """

    question: Callable[[Mapping[str, Any]], str | list[dict[str, str]]]
    answer: Callable[[Mapping[str, Any]], str]


def find_form(
    columns: Sequence[str],
    question: str | None = None,
    answer: str | None = None,
) -> Form:
    """How to read a dataset with these columns.

    Args:
        columns (sequence of `str`): The dataset's columns.
        question (`str`, *optional*): Column of the question; default: found by its name.
        answer (`str`, *optional*): Column of the answer, likewise.

    Raises:
        `ValueError`: If question or answer are not found, or if the answers are programs; with what to do.
    """
    names = {name.lower(): name for name in reversed(columns)}
    _check_names(columns, question, answer)
    if question is None:
        question = next((names[name] for name in QUESTION_COLUMNS if name in names), None)
    if answer is None:
        _refuse_programs(columns)
    if question is not None and (form := _choices_form(names, question, answer)) is not None:
        return form
    answers = [answer] if answer else [names[name] for name in ANSWER_COLUMNS if name in names]
    reward_model = names.get("reward_model") if answer is None else None
    has_answer = bool(answers) or reward_model is not None
    if question is None or not has_answer:
        raise ValueError(_not_found(columns, question is None, not has_answer))
    contexts = [names[name] for name in _CONTEXT_COLUMNS if name in names]
    return _open_form(
        question, [name for name in contexts if name != question], reward_model, answers
    )


def _open_form(
    question: str,
    contexts: Sequence[str],
    reward_model: str | None,
    answers: Sequence[str],
) -> Form:
    """Questions with one answer, which may be in one of several columns, or in verl's `reward_model`."""

    def read_question(row: Mapping[str, Any]) -> str | list[dict[str, str]]:
        return _in_context(_question(row[question]), [row[name] for name in contexts])

    def read_answer(row: Mapping[str, Any]) -> str:
        ground_truth = _ground_truth(row[reward_model]) if reward_model else ""
        return ground_truth or _first_answer(row, answers)

    return Form(read_question, read_answer)


def _check_names(columns: Sequence[str], question: str | None, answer: str | None) -> None:
    for setting, name in (("question_column", question), ("answer_column", answer)):
        if name is not None and name not in columns:
            raise ValueError(f"{setting}={name!r}: the dataset has columns {list(columns)}.")


def _refuse_programs(columns: Sequence[str]) -> None:
    tests = sorted(_TESTS_COLUMNS & set(columns))
    if tests:
        raise ValueError(
            f"The dataset has columns {list(columns)}: {', '.join(tests)} belong to programs and their tests, and "
            "nothing that a model writes is executed here. If another column holds final answers, name it: "
            "--answer_column NAME; else give GRPOTrainer a reward function that runs the tests in a sandbox, and add "
            "LearnAlignCallback to it."
        )


def _not_found(columns: Sequence[str], question: bool, answer: bool) -> str:
    guesses = [name if re.fullmatch(r"\w+", name) else f"'{name}'" for name in columns]
    remedy = []
    if question:
        remedy.append(f"--question_column {guesses[0]}")
    if answer:
        remedy.append(f"--answer_column {guesses[-1]}")
    return (
        f"The dataset has columns {list(columns)}; it needs a question ({', '.join(QUESTION_COLUMNS)}) and an answer "
        f"({', '.join(ANSWER_COLUMNS)}, reward_model). Name those that hold them, e.g. {' '.join(remedy)} "
        "on the command line. Rename them with dataset.rename_column in code."
    )


def _question(value: Any) -> str | list[dict[str, str]]:
    """A text, or the turns of a conversation without its system prompt; DAPO-MATH-17K and verl keep conversations."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = _structure(value) or value
    if isinstance(value, str):
        return in_one_place(value)
    turns = []
    for turn in value:
        if turn.get("role") != "system":
            text = in_one_place(message_text(turn) or "")
            turns.append({"role": turn["role"], "content": text})
    return turns[0]["content"] if len(turns) == 1 else turns


def _in_context(
    question: str | list[dict[str, str]],
    contexts: Sequence[Any],
) -> str | list[dict[str, str]]:
    if not isinstance(question, str):
        return question
    texts = [context.strip() for context in contexts if isinstance(context, str)]
    return "\n".join([*texts, question])


def in_one_place(question: str) -> str:
    """A question without instructions that ask for the answer anywhere but in a box."""
    for instruction in _OTHER_PLACES:
        question = instruction.sub("", question)
    return question


def _ground_truth(value: Any) -> str:
    """Verl's `reward_model`: a mapping, or its text; empty if there is no `ground_truth` in it."""
    value = _structure(value) if isinstance(value, str) else value
    return _answer_text(value.get("ground_truth")) if isinstance(value, Mapping) else ""


def _first_answer(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((text for name in names if (text := _answer_text(row.get(name)))), "")


def _answer_text(value: Any) -> str:
    """The final answer in a cell: a text, a number, a list of parts, or the JSON text of such a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        parts = _structure(value)
        # An answer like [1, 2] is an interval, not a list of answers.
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            value = parts
    if isinstance(value, Mapping):
        value = json.dumps(value)
    return final_answer(value)


def _structure(text: str) -> Any:
    """What a text spells in JSON, or as a Python literal (CSV files keep these); `None` if neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _choices_form(
    names: Mapping[str, str],
    question: str,
    answer: str | None = None,
) -> Form | None:
    """Multiple choice: GPQA's columns of answers; or a list of options and which of them is right."""
    wrong = [names[name] for name in sorted(names) if name.startswith(_WRONG_CHOICE)]
    if _RIGHT_CHOICE in names and wrong and answer is None:
        right = names[_RIGHT_CHOICE]

        def shuffled(row: Mapping[str, Any]) -> tuple[list[str], int]:
            options = [str(row[name]).strip() for name in (right, *wrong)]
            # The question is the seed: the order is the same every time, and the right one in any place.
            seeded = random.Random(str(row[question]))
            order = seeded.sample(range(len(options)), len(options))
            return [options[place] for place in order], order.index(0)

        return Form(
            lambda row: _with_options(row[question], shuffled(row)[0]),
            lambda row: _letter(shuffled(row)[1]),
        )
    options = next((names[name] for name in _CHOICES_COLUMNS if name in names), None)
    marks = [answer] if answer else [names[name] for name in _RIGHT_OPTION_COLUMNS if name in names]
    if options is None or not marks:
        return None
    return Form(
        lambda row: _with_options(row[question], _options(row[options])[0]),
        lambda row: _right_letter(_first_cell(row, marks), *_options(row[options])),
    )


def _first_cell(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row[name] is not None), None)


def _options(value: Any) -> tuple[list[str], list[str]]:
    """Texts and labels of options: a list, or texts with labels (ARC, CommonsenseQA)."""
    if isinstance(value, str):  # a list in JSON, or "A) 5 B) 6"
        value = _structure(value) or re.split(r"\s*\(?\b[A-Z]\)\s*", value)[1:]
    if isinstance(value, Mapping):
        texts = list(value.get("text", value.values()))
        labels = list(value.get("label", value.keys()))
    else:
        texts = list(value or [])
        labels = [_letter(place) for place in range(len(texts))]
    # The label may stand before the text once more.
    texts = [re.sub(r"^\(?[A-Z][).:]\s*", "", str(text)) for text in texts]
    return texts, [str(label) for label in labels]


def _right_letter(answer: Any, texts: list[str], labels: list[str]) -> str:
    """The letter of the right option, given by its place, its label or its text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return _letter(answer) if 0 <= answer < len(texts) else ""
    text = str(answer or "").strip()
    for names in (labels, texts):
        if text in names:
            return _letter(names.index(text))
    return ""


def _with_options(question: Any, options: Sequence[str]) -> str:
    lines = [str(question).strip(), ""]
    lines += [f"{_letter(place)}) {option}" for place, option in enumerate(options)]
    lines += ["", "Give the letter of the right option."]
    return "\n".join(lines)


def _letter(place: int) -> str:
    return chr(ord("A") + place)
