"""What models are evaluated on: known benchmarks, and files of questions.

The benchmarks of the paper are put as in training: a system prompt that asks for a box, and the reward of training as
the strict figure. Files of one's own are put before the model as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trl_learnalign.data.cells import UnusableRowError
from trl_learnalign.data.forms import find_question
from trl_learnalign.data.images import check_pictures, shows_a_picture
from trl_learnalign.data.questions import SYSTEM_PROMPT, Faults, as_prompts, load_questions
from trl_learnalign.data.turns import as_written

PROMPT = "prompt"


@dataclass(frozen=True)
class Benchmark:
    """A set of problems and how the paper evaluates on it.

    Args:
        name (`str`): Hub id, or a path.
        config (`str`, *optional*): Configuration of a hub dataset.
        split (`str`, *optional*, defaults to `"test"`): Split of a hub dataset.
        samples (`int`, *optional*, defaults to `1`): Samples of each problem.
        temperature (`float`, *optional*, defaults to `0.0`): Sampling temperature; 0 is greedy.
        system_prompt (`str`, *optional*, defaults to `""`): First message of each problem; none if empty.
        max_new_tokens (`int`, *optional*, defaults to `2048`): Longest completion: what training on such problems
            may generate in `recipes/configs`.
    """

    name: str
    config: str | None = None
    split: str = "test"
    samples: int = 1
    temperature: float = 0.0
    system_prompt: str = ""
    max_new_tokens: int = 2048


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "main", system_prompt=SYSTEM_PROMPT, max_new_tokens=1024),
    "math500": Benchmark("HuggingFaceH4/MATH-500", system_prompt=SYSTEM_PROMPT),
    # Four samples at 0.7 are the paper's for AMC23; for AIME24, which is as small, it does not say.
    "amc23": Benchmark("math-ai/amc23", samples=4, temperature=0.7, system_prompt=SYSTEM_PROMPT),
    "aime24": Benchmark(
        "HuggingFaceH4/aime_2024",
        split="train",
        samples=4,
        temperature=0.7,
        system_prompt=SYSTEM_PROMPT,
    ),
}
"""Mathematical benchmarks of the paper (Li et al., 2026; AIME24 in its ACL version)."""


def find_benchmark(name: str) -> Benchmark:
    """A known benchmark by name, else a file, folder or hub dataset of questions with answers."""
    return BENCHMARKS.get(name.lower(), Benchmark(name))


def load_problems(
    benchmark: Benchmark,
    limit: int | None = None,
    question_column: str | None = None,
    **columns: Any,
) -> Dataset:
    """Problems of a benchmark with reference answers.

    Args:
        benchmark (`Benchmark`): Which one. Without a system prompt, a column `prompt` is taken as it is, like in
            training with TRL: a text is continued, a conversation answered.
        limit (`int`, *optional*): Only the first so many.
        question_column (`str`, *optional*): As for [`as_prompts`].
        **columns: `answer_column`, `max_unjudged` of [`as_prompts`].

    Returns:
        `Dataset`: Columns `prompt` and `solution`.

    Raises:
        `FileNotFoundError`, `ValueError`: If it is not there, or lacks columns.
    """
    rows = _rows(benchmark, limit)
    problems = as_prompts(rows, benchmark.system_prompt, question_column, **columns)
    problems = problems.select_columns([PROMPT, "solution"])
    if benchmark.system_prompt or question_column or not _has_prompts(rows):
        return problems
    asked = [as_written(prompt) for prompt in rows[PROMPT]]
    return Dataset.from_dict({PROMPT: asked, "solution": problems["solution"][:]})


def load_rows(
    benchmark: Benchmark,
    limit: int | None = None,
    question_column: str | None = None,
) -> Dataset:
    """Problems for a reward function of one's own: all their columns, and `prompt`.

    Args:
        benchmark (`Benchmark`): Which one; a system prompt comes before conversations.
        limit (`int`, *optional*): Only the first so many.
        question_column (`str`, *optional*): Column of the question; default: `prompt`, or found by its name.

    Raises:
        `FileNotFoundError`, `ValueError`: If it is not there, or has no questions.
    """
    rows = _rows(benchmark, limit)
    check_pictures(rows)
    is_prompt = question_column in (None, PROMPT) and PROMPT in rows.column_names
    read = _prompt_of if is_prompt else _reader(benchmark, rows, question_column)
    prompts, faults = [], Faults(len(rows))
    for row in rows:
        with faults.of_next_row():
            question = read(row)
            if shows_a_picture(question):
                raise UnusableRowError("has the place of a picture in its text, and no picture")
            prompts.append(_asked(question, benchmark, is_prompt))
    faults.check()
    others = rows.select_columns([name for name in rows.column_names if name != PROMPT])
    return others.add_column(PROMPT, prompts)


def _prompt_of(row: Mapping[str, Any]) -> Any:
    """The column `prompt`, word for word."""
    return as_written(row[PROMPT])


def _reader(
    benchmark: Benchmark, rows: Dataset, question_column: str | None
) -> Callable[[Mapping[str, Any]], Any]:
    """Row → question, as in training."""
    try:
        return find_question(rows.column_names, question_column)
    except ValueError as error:
        raise ValueError(
            f"{benchmark.name} has columns {rows.column_names} and no question: name it with --question_column NAME."
        ) from error


def _asked(question: Any, benchmark: Benchmark, is_prompt: bool) -> Any:
    """A prompt of a question: a text of a column `prompt` stays one, unless there is a system prompt."""
    if isinstance(question, str):
        if is_prompt and not benchmark.system_prompt:
            return question
        question = [{"role": "user", "content": question}]
    if benchmark.system_prompt:
        return [{"role": "system", "content": benchmark.system_prompt}, *question]
    return question


def _rows(benchmark: Benchmark, limit: int | None) -> Dataset:
    rows = load_questions(benchmark.name, benchmark.config, benchmark.split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise ValueError(f"{benchmark.name} has no problems: give a file or a split that has some.")
    return rows


def _has_prompts(rows: Dataset) -> bool:
    """Whether the column `prompt` is in TRL's form: texts, or conversations that are no text themselves."""
    if PROMPT not in rows.column_names:
        return False
    first = rows[0][PROMPT]
    return not (isinstance(first, str) and first.lstrip().startswith("[{"))
