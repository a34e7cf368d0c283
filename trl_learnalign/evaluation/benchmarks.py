"""What models are evaluated on: known benchmarks and files of questions, each with the way it is graded.

Mathematics is graded by the reward of training, `answers.accuracy_reward` (math-verify). Of CRUXEval's two tasks there
is output prediction (CRUXEval-O) alone, not input prediction; it is graded by comparing Python literals, and nothing
that a model writes is ever executed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trl_learnalign.data.answers import accuracy_reward
from trl_learnalign.data.questions import SYSTEM_PROMPT, as_prompts, load_questions

MATH, LITERAL = "math", "literal"

_LONGEST_LITERAL = 20_000  # characters: what a model repeats without end is no answer

OUTPUT_PROMPT = (
    "What does this Python function return for the given input? Think it through, then write the returned value as a "
    "Python literal, without calls or unfinished expressions, between [ANSWER] and [/ANSWER].\n\n"
    "{code}\n\nassert f({input}) == ??"
)


@dataclass(frozen=True)
class Benchmark:
    """A set of problems and how the paper evaluates on it.

    Args:
        name (`str`): Hub id, or a path.
        config (`str`, *optional*): Configuration of a hub dataset.
        split (`str`, *optional*, defaults to `"test"`): Split of a hub dataset.
        samples (`int`, *optional*, defaults to `1`): Samples of each problem.
        temperature (`float`, *optional*, defaults to `0.0`): Sampling temperature; 0 is greedy.
        kind (`str`, *optional*, defaults to `"math"`): `"math"` or `"literal"`.
        max_new_tokens (`int`, *optional*, defaults to `2048`): Longest completion: what training on such problems
            may generate in `recipes/configs`.
    """

    name: str
    config: str | None = None
    split: str = "test"
    samples: int = 1
    temperature: float = 0.0
    kind: str = MATH
    max_new_tokens: int = 2048


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "main", max_new_tokens=1024),
    "math500": Benchmark("HuggingFaceH4/MATH-500"),
    # Four samples at 0.7 are the paper's for AMC23; for AIME24, which is as small, it does not say.
    "amc23": Benchmark("math-ai/amc23", samples=4, temperature=0.7),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", split="train", samples=4, temperature=0.7),
    "cruxeval": Benchmark("cruxeval-org/cruxeval", kind=LITERAL),
}
"""Benchmarks of the paper (Li et al., 2026; AIME24 and CRUXEval in its ACL version; of CRUXEval its outputs)."""


def find_benchmark(name: str) -> Benchmark:
    """A known benchmark by name, else a file, folder or hub dataset of questions with answers."""
    return BENCHMARKS.get(name.lower(), Benchmark(name))


def load_problems(
    benchmark: Benchmark,
    limit: int | None = None,
    system_prompt: str = SYSTEM_PROMPT,
    **columns: Any,
) -> tuple[Dataset, str]:
    """Problems of a benchmark, and how they are graded.

    Args:
        benchmark (`Benchmark`): Which one. A dataset with columns `code`, `input` and `output` is taken for output
            prediction, whatever its `kind`.
        limit (`int`, *optional*): Only the first so many.
        system_prompt (`str`, *optional*): First message of mathematical problems; none if empty.
        **columns: `question_column`, `answer_column`, `max_unjudged` of [`as_prompts`].

    Returns:
        `tuple[Dataset, str]`: Columns `prompt` (conversational) and `solution`; `"math"` or `"literal"`.

    Raises:
        `FileNotFoundError`, `ValueError`: If it is not there, or lacks columns.
    """
    rows = load_questions(benchmark.name, benchmark.config, benchmark.split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise ValueError(f"{benchmark.name} has no problems: give a file or a split that has some.")
    kind = _kind_of(benchmark, rows.column_names)
    if kind == LITERAL:
        problems = rows.map(
            _as_output_problem, remove_columns=rows.column_names, desc="Preparing prompts"
        )
        return problems, kind
    problems = as_prompts(rows, system_prompt, **columns)
    return problems.select_columns(["prompt", "solution"]), kind


def _kind_of(benchmark: Benchmark, columns: Sequence[str]) -> str:
    required = {"code", "input", "output"}
    if required <= set(columns):
        return LITERAL
    if benchmark.kind == LITERAL:
        raise ValueError(
            f"{benchmark.name} has columns {list(columns)}; output prediction needs {', '.join(sorted(required))}."
        )
    return benchmark.kind


def _as_output_problem(row: dict[str, Any]) -> dict[str, Any]:
    text = OUTPUT_PROMPT.format(code=row["code"], input=row["input"])
    return {"prompt": [{"role": "user", "content": text}], "solution": row["output"]}


def reward_of(kind: str) -> Callable[..., Sequence[float | None]]:
    """The reward function that grades a kind of problem."""
    return {MATH: accuracy_reward, LITERAL: literal_reward}[kind]


def literal_reward(
    completions: list[Any],
    solution: list[str],
    **kwargs: Any,
) -> list[float | None]:
    """Reward function for TRL's trainers: 1.0 where the answer is a Python literal equal to the solution.

    The answer is what stands between the last `[ANSWER]` and `[/ANSWER]`: a literal, or an assertion
    `assert f(…) == literal`. Equality is Python's, as in CRUXEval's assertions (`1 == 1.0`). Nothing is executed.

    Args:
        completions (`list`): Conversations (`[{"role": "assistant", "content": ...}]`) or plain strings.
        solution (`list[str]`): Python literals.
        **kwargs: The dataset's other columns and the trainer's own arguments, which are not needed.

    Returns:
        `list`: One reward for each completion; `None` where the solution itself is no literal.
    """
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"]
        for completion in completions
    ]
    pairs = zip(texts, solution, strict=True)
    return [_literal_score(text, reference) for text, reference in pairs]


def _literal_score(text: str, reference: str) -> float | None:
    can_be_judged, output = _literal(reference)
    if not can_be_judged:
        return None
    is_literal, value = _literal(_answer(text))
    return float(is_literal and bool(value == output))


def _answer(text: str) -> str:
    if "[ANSWER]" not in text:
        return ""
    _, _, rest = text.rpartition("[ANSWER]")
    answer, _, _ = rest.partition("[/ANSWER]")
    return answer.strip()


def _literal(text: str) -> tuple[bool, Any]:
    """Whether a text is a literal, and its value."""
    text = text.strip()
    if not text or len(text) > _LONGEST_LITERAL:
        return False, None
    try:
        expression = _only_expression(ast.parse(text))
        return (False, None) if expression is None else (True, ast.literal_eval(expression))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False, None


def _only_expression(tree: ast.Module) -> ast.expr | None:
    """The expression that a text consists of, or what `assert … == expression` compares with; else `None`."""
    statement = tree.body[0] if len(tree.body) == 1 else None
    if isinstance(statement, ast.Expr):
        return statement.value
    if not isinstance(statement, ast.Assert) or not isinstance(statement.test, ast.Compare):
        return None
    comparison = statement.test
    is_equality = len(comparison.ops) == 1 and isinstance(comparison.ops[0], ast.Eq)
    return comparison.comparators[0] if is_equality else None
