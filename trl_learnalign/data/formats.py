"""Detects question and answer columns, and multiple choice, in the formats of common datasets."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_learnalign.data.cells import (
    Turn,
    UnusableRowError,
    answers_of,
    is_missing,
    question_of,
    structure,
)

if TYPE_CHECKING:
    from datasets import Dataset


# ---- Multiple choice ------------------------------------------------------------------------------------------------

MOST = 26
"""Maximum number of options of a question: one for each letter."""

_LABEL = re.compile(r"\(?([A-Za-z])[).:]\s*")


@dataclass(frozen=True)
class Option:
    """An existing option of a question.

    Args:
        label (`str`): Its label in the dataset.
        text (`str`): Its text.
        place (`int`): Its position in the dataset, counting missing options.
    """

    label: str
    text: str
    place: int


def options_of(value: Any) -> list[Option]:
    """The options in a cell; empty if there are none.

    Args:
        value: A list; texts by label, as an object or as ARC's `{"text": […], "label": […]}`; the JSON of either; or
        text
            like "A) 5 B) 6". Missing values (`None`, blank) are not options, because Arrow adds the keys of other
            rows.

    Raises:
        `UnusableRowError`: If there are more options than letters.
    """
    if isinstance(value, str):
        value = structure(value) or _in_a_row(value)
    if isinstance(value, Mapping):
        texts = _listed(value.get("text"), list(value.values()))
        labels = _listed(value.get("label"), list(value))
    else:
        texts = _listed(value, [])
        labels = [letter(place) for place in range(len(texts))]
    found = []
    for place, (label, text) in enumerate(zip(labels, texts, strict=False)):
        if not is_missing(text):
            found.append(Option(str(label).strip(), str(text).strip(), place))
    if len(found) > MOST:
        raise UnusableRowError(f"has {len(found)} options, more than the {MOST} supported letters")
    return _without_labels(found)


def _listed(value: Any, otherwise: list[Any]) -> list[Any]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return list(value) if is_list else otherwise


def _in_a_row(text: str) -> list[str]:
    """Options in one text, "A) 5 B) 6": each begins with the next letter."""
    starts: list[re.Match[str]] = []
    while True:
        expected = re.compile(rf"(?:^|(?<=\s))\(?{letter(len(starts))}\)\s*")
        found = expected.search(text, starts[-1].end() if starts else 0)
        if found is None or len(starts) == MOST:
            break
        starts.append(found)
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return [text[start.end() : end] for start, end in zip(starts, ends, strict=True)]


def _without_labels(options: list[Option]) -> list[Option]:
    """Remove labels from the texts if each begins with its own: "E. coli" is not the option E."""
    bare = []
    for option in options:
        match = _LABEL.match(option.text)
        own = {letter(option.place), option.label.upper()}
        if match is None or match[1].upper() not in own or not option.text[match.end() :]:
            return options
        bare.append(Option(option.label, option.text[match.end() :], option.place))
    return bare


def right_letter(answer: Any, options: Sequence[Option]) -> str:
    """The letter of the correct option, given by its position, its label or its text; empty if it is none of them."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        keys = [option.place for option in options]
        return letter(keys.index(answer)) if answer in keys else ""
    text = "" if is_missing(answer) else str(answer).strip()
    labels = [option.label for option in options]
    bracketed = re.fullmatch(r"\((\w+)\)", text)
    for name, names in (
        (text, labels),
        (text, [option.text for option in options]),
        (bracketed[1] if bracketed else text, labels),
    ):
        if name in names:
            return letter(names.index(name))
    return ""


def shuffled(right: Any, wrong: Sequence[Any], seed: str) -> tuple[list[Option], str]:
    """Options in a seeded random order, and the letter of the correct one; empty if that one is missing.

    Args:
        right: The correct option.
        wrong (sequence): The others; missing values are skipped.
        seed (`str`): The question, so that its order is always the same, and the correct option may be at any
            position.
    """
    texts = [str(text).strip() for text in (right, *wrong) if not is_missing(text)]
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    options = [Option(letter(place), texts[drawn], place) for place, drawn in enumerate(order)]
    return options, "" if is_missing(right) else letter(order.index(0))


def with_options(question: str, options: Sequence[Option]) -> str:
    """A question with its options below it."""
    lines = [question.strip(), ""]
    lines += [f"{letter(number)}) {option.text}" for number, option in enumerate(options)]
    lines += ["", "Give the letter of the right option."]
    return "\n".join(lines)


def letter(number: int) -> str:
    """The letter of an option, counted from 0."""
    return chr(ord("A") + number)


# ---- Hints about unknown columns ------------------------------------------------------------------------------------

_LOOKED_AT = 50

_QUESTION_WORDS = (
    *("question", "problem", "query", "instruction", "prompt", "conversation", "message"),
    *("input", "task", "text"),
)
_ANSWER_WORDS = (
    *("answer", "target", "gold", "truth", "label", "solution", "output", "response", "result"),
    "reference",
)
_MARK_WORDS = ("id", "idx", "index", "uid", "uuid", "source", "split", "url", "level", "difficulty")


def likely_columns(dataset: Dataset) -> tuple[str | None, str | None]:
    """The columns that most likely have question and answer; `None` if unclear.

    Args:
        dataset (`datasets.Dataset`): The first rows are examined.
    """
    rows = dataset.with_format(None)[: min(_LOOKED_AT, len(dataset))]
    asking = {name: values for name, values in rows.items() if _most(values, _asks)}
    question = _first(asking, _QUESTION_WORDS, _mean_length)
    answering = {
        name: values
        for name, values in rows.items()
        if name != question and _most(values, answers_of)
    }
    # If there are several, the answer is the shorter text.
    answer = _first(answering, _ANSWER_WORDS, lambda values: -_mean_length(values))
    return question, answer


def _most(values: Sequence[Any], judge: Callable[[Any], Any]) -> bool:
    return bool(values) and 2 * sum(bool(judge(value)) for value in values) > len(values)


def _asks(value: Any) -> bool:
    try:
        return bool(question_of(value))
    except UnusableRowError as why:
        # Turns that end with the answer are still the question column.
        return "ends with a turn" in str(why)


def _first(
    columns: Mapping[str, Sequence[Any]],
    words: Sequence[str],
    weight: Callable[[Sequence[Any]], float],
) -> str | None:
    """The column with the first of some words in its name; otherwise that of largest weight, except ids and marks."""
    for word in words:
        for name in columns:
            if word in name.lower():
                return name
    others = [name for name in columns if not set(_words(name)) & set(_MARK_WORDS)]
    return max(others, key=lambda name: weight(columns[name]), default=None)


def _words(name: str) -> list[str]:
    return name.lower().replace("-", "_").replace(" ", "_").split("_")


def _mean_length(values: Sequence[Any]) -> float:
    lengths = [len(str(value)) for value in values if not is_missing(value)]
    return sum(lengths) / max(1, len(lengths))


# ---- Forms ----------------------------------------------------------------------------------------------------------

QUESTION_COLUMNS = ("question", "problem", "prompt", "instruction")
ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "expected_answer",
    "solution",
    "ground_truth",
    "answerkey",
    "correct",
    "answers",
    "golden_answers",
)
# In OlympiadBench a list is one answer in several parts. In other datasets a list has alternatives.
_PARTS_COLUMN = "final_answer"
# In ASDiv and SVAMP, and in OlympiadBench, these columns are part of the question.
_CONTEXT_COLUMNS = ("body", "context")
# Alpaca: the input that an instruction refers to.
_INSTRUCTION, _INPUT = "instruction", "input"
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

# Instructions in the questions of some datasets. They ask for the answer in a place where the reward does not look,
# because the system prompt asks for a box.
_OTHER_PLACES = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"^Solve the following math problem step by step\. The last line of your response should be of the form "
        r"Answer: \$?Answer .*?\n\n",
        r'\s*Remember to put your answer on its own line after "Answer:"\.?\s*$',
        r"\s*Let's think step by step and output the final answer after \"####\"\.?\s*$",
    )
]

Row = Mapping[str, Any]
Question = str | list[Turn]


@dataclass(frozen=True)
class Form:
    """How rows are read. Both functions raise `UnusableRowError` for rows that cannot be used.

    Args:
        question (callable): Row → question, as a string or a conversation.
        answers (callable): Row → its correct alternatives; empty if there is none.
    """

    question: Callable[[Row], Question]
    answers: Callable[[Row], list[str]]


def find_form(dataset: Dataset, question: str | None = None, answer: str | None = None) -> Form:
    """Determine how to read a dataset, by its columns.

    Args:
        dataset (`datasets.Dataset`): The dataset.
        question (`str`, *optional*): Column of the question; by default it is found by its name.
        answer (`str`, *optional*): Column of the answer, likewise.

    Raises:
        `ValueError`: If question or answer are not found, or if the answers are programs; with the remedy.
    """
    columns = dataset.column_names
    names = _by_lower_case(columns)
    _check_names(columns, question, answer)
    question = question or _first_of(names, QUESTION_COLUMNS)
    if answer is None:
        _refuse_programs(columns)
    answers = [answer] if answer else [names[name] for name in ANSWER_COLUMNS if name in names]
    reward_model = names.get("reward_model") if answer is None else None
    has_choices = _wrong_choices(names, answer) or (
        _options_column(names) and _marks(names, answer)
    )
    has_answer = bool(answers or reward_model or has_choices)
    if question is None or not has_answer:
        raise ValueError(_not_found(dataset, question is None, not has_answer))
    read_question = _open_question(names, question, answers)
    read_answers = _open_answers(reward_model, answers)
    if _wrong_choices(names, answer):
        return _with_wrong_choices(names, read_question)
    if has_choices:
        return _with_choices(names, answer, Form(read_question, read_answers))
    return Form(read_question, read_answers)


def find_question(columns: Sequence[str], question: str | None = None) -> Callable[[Row], Question]:
    """Determine how to read only the question, with context and options, for rewards that read answers themselves.

    Args:
        columns (sequence of `str`): The dataset's columns.
        question (`str`, *optional*): Column of the question; by default it is found by its name.

    Raises:
        `ValueError`: If there is none.
    """
    _check_names(columns, question, None)
    names = _by_lower_case(columns)
    question = question or _first_of(names, QUESTION_COLUMNS)
    if question is None:
        raise ValueError(f"its columns {list(columns)} do not include a question")
    read_question = _open_question(names, question, [])
    if _wrong_choices(names, None):
        return _with_wrong_choices(names, read_question).question
    if _options_column(names):
        return _with_choices(names, None, Form(read_question, lambda _: [])).question
    return read_question


def _by_lower_case(columns: Sequence[str]) -> dict[str, str]:
    """Names by their lower case; the first one wins."""
    return {name.lower(): name for name in reversed(columns)}


def _first_of(names: Mapping[str, str], wanted: Sequence[str]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)


def _check_names(columns: Sequence[str], question: str | None, answer: str | None) -> None:
    for setting, name in (("question_column", question), ("answer_column", answer)):
        if name is not None and name not in columns:
            raise ValueError(
                f"{setting}={name!r} is not a column of the dataset, which has {list(columns)}."
            )


def _refuse_programs(columns: Sequence[str]) -> None:
    tests = sorted(_TESTS_COLUMNS & set(columns))
    if tests:
        raise ValueError(
            f"The dataset has the columns {list(columns)}, of which {', '.join(tests)} contain programs or unit "
            "tests. This package does not execute code that a model writes. If another column contains final "
            "answers, name it with --answer_column NAME; otherwise give GRPOTrainer a reward function that runs "
            "the tests in a sandbox, and add LearnAlignCallback to it."
        )


def _not_found(dataset: Dataset, question: bool, answer: bool) -> str:
    """What is missing, and likely columns."""
    options = ("--question_column", "--answer_column")
    wanted = [question, answer]
    guesses = []
    for option, is_wanted, guess in zip(options, wanted, likely_columns(dataset), strict=True):
        if is_wanted:
            guesses.append(f"{option} {shlex.quote(guess or 'NAME')}")
    return (
        f"The dataset has the columns {dataset.column_names}; it needs a question ({', '.join(QUESTION_COLUMNS)}) "
        f"and an answer ({', '.join(ANSWER_COLUMNS)}, reward_model). Name the columns on the command line, e.g. "
        f"{' '.join(guesses)}, or rename them in code with dataset.rename_column."
    )


# ---- Questions with one answer --------------------------------------------------------------------------------------


def _open_question(
    names: Mapping[str, str], question: str, answers: Sequence[str]
) -> Callable[[Row], Question]:
    """A question with its context before it or, for an instruction, its input below it."""
    before = [names[name] for name in _CONTEXT_COLUMNS if name in names]
    below = [names[_INPUT]] if question.lower() == _INSTRUCTION and _INPUT in names else []

    def read(row: Row) -> Question:
        asked = _in_one_place(question_of(row[question]))
        if not isinstance(asked, str):
            return asked
        first = _texts(row, [name for name in before if name not in (question, *answers)])
        last = _texts(row, [name for name in below if name not in answers])
        return "\n\n".join(["\n".join([*first, asked]), *last])

    return read


def _texts(row: Row, names: Sequence[str]) -> list[str]:
    cells = [row[name] for name in names]
    return [cell.strip() for cell in cells if isinstance(cell, str) and cell.strip()]


def _in_one_place(question: Question) -> Question:
    if isinstance(question, str):
        return in_one_place(question)
    return [{**turn, "content": in_one_place(turn["content"])} for turn in question]


def in_one_place(question: str) -> str:
    """A question without instructions that ask for the answer in another place than a box."""
    for instruction in _OTHER_PLACES:
        question = instruction.sub("", question)
    return question


def _open_answers(reward_model: str | None, names: Sequence[str]) -> Callable[[Row], list[str]]:
    """Answers in one of several columns, or in verl's `reward_model`."""

    def read(row: Row) -> list[str]:
        found = _ground_truth(row[reward_model]) if reward_model else []
        for name in names:
            found = found or answers_of(row.get(name), is_one=name.lower() == _PARTS_COLUMN)
        return found

    return read


def _ground_truth(value: Any) -> list[str]:
    """The answers in verl's `reward_model`, a mapping or its text; empty without `ground_truth`."""
    value = structure(value) if isinstance(value, str) else value
    return answers_of(value.get("ground_truth")) if isinstance(value, Mapping) else []


# ---- Multiple choice ------------------------------------------------------------------------------------------------


def _wrong_choices(names: Mapping[str, str], answer: str | None) -> list[str]:
    """GPQA's columns of wrong answers; empty for other datasets."""
    if _RIGHT_CHOICE not in names or answer is not None:
        return []
    return [names[name] for name in sorted(names) if name.startswith(_WRONG_CHOICE)]


def _with_wrong_choices(names: Mapping[str, str], question: Callable[[Row], Question]) -> Form:
    right, wrong = names[_RIGHT_CHOICE], _wrong_choices(names, None)

    def options(row: Row) -> tuple[list[Option], str]:
        return shuffled(row[right], [row[name] for name in wrong], seed=str(question(row)))

    return Form(
        lambda row: _with_options(question(row), options(row)[0]),
        lambda row: [right] if (right := options(row)[1]) else [],
    )


def _options_column(names: Mapping[str, str]) -> str | None:
    return _first_of(names, _CHOICES_COLUMNS)


def _marks(names: Mapping[str, str], answer: str | None) -> list[str]:
    """Columns that may state which option is correct."""
    if answer is not None:
        return [answer]
    return [names[name] for name in _RIGHT_OPTION_COLUMNS if name in names]


def _with_choices(names: Mapping[str, str], answer: str | None, other: Form) -> Form:
    """A list of options with a correct one; rows without options are open questions."""
    column, marks = _options_column(names), _marks(names, answer)
    assert column is not None

    def read_answers(row: Row) -> list[str]:
        options = options_of(row[column])
        if not options:
            return other.answers(row)
        cells = [row[name] for name in marks if not is_missing(row[name])]
        letter = right_letter(cells[0], options) if cells else ""
        return [letter] if letter else []

    return Form(
        lambda row: _with_options(other.question(row), options_of(row[column])), read_answers
    )


def _with_options(question: Question, options: Sequence[Option]) -> Question:
    """A question with its options in its last turn."""
    if not options:
        return question
    if isinstance(question, str):
        return with_options(question, options)
    *turns, last = question
    return [*turns, {**last, "content": with_options(last["content"], options)}]
