"""Known benchmarks, files of questions, and tasks of lm-evaluation-harness (Gao et al.).

The benchmarks of the paper use the prompts of training: a system prompt that asks for a box, and the reward of
training for the strict figure. User files are passed to the model unchanged.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_learnalign import rng
from trl_learnalign.data.cells import UnusableRowError, as_written
from trl_learnalign.data.formats import find_question
from trl_learnalign.data.loading import (
    SYSTEM_PROMPT,
    Faults,
    as_prompts,
    has_image_placeholder,
    load_questions,
    refuse_images,
)
from trl_learnalign.evaluation.grading import is_right
from trl_learnalign.evaluation.results import EvaluationFolder
from trl_learnalign.records import layout
from trl_learnalign.records.store import write_atomically, write_json

PROMPT = "prompt"


@dataclass(frozen=True)
class Benchmark:
    """A set of problems and the paper's evaluation settings for it.

    Args:
        name (`str`): Hub id, or a path.
        config (`str`, *optional*): Configuration of a hub dataset.
        split (`str`, *optional*, defaults to `"test"`): Split of a hub dataset.
        samples (`int`, *optional*, defaults to `1`): Samples of each problem.
        temperature (`float`, *optional*, defaults to `0.0`): Sampling temperature; 0 is greedy.
        system_prompt (`str`, *optional*, defaults to `""`): First message of each problem; none if empty.
        max_new_tokens (`int`, *optional*, defaults to `2048`): Maximum completion length: that of training on such
            problems in `recipes/configs`.
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
    # The paper uses four samples at 0.7 for AMC23; for AIME24, which is as small, it does not state the setting.
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
    """A known benchmark by name, otherwise a file, folder or hub dataset of questions with answers."""
    return BENCHMARKS.get(name.lower(), Benchmark(name))


def load_problems(
    benchmark: Benchmark,
    limit: int | None = None,
    question_column: str | None = None,
    **columns: Any,
) -> Dataset:
    """Problems of a benchmark with reference answers.

    Args:
        benchmark (`Benchmark`): The benchmark. Without a system prompt, a column `prompt` is used unchanged, like in
            training with TRL: a string is continued, a conversation answered.
        limit (`int`, *optional*): Use only this many problems from the start.
        question_column (`str`, *optional*): As for [`as_prompts`].
        **columns: `answer_column`, `max_unjudged` of [`as_prompts`].

    Returns:
        `Dataset`: Columns `prompt` and `solution`.

    Raises:
        `FileNotFoundError`, `ValueError`: If it does not exist, or lacks columns.
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
    """Problems for a user-defined reward function: all their columns, and `prompt`.

    Args:
        benchmark (`Benchmark`): The benchmark; its system prompt is put before conversations.
        limit (`int`, *optional*): Use only this many problems from the start.
        question_column (`str`, *optional*): Column of the question; defaults to `prompt`, or is found by its name.

    Raises:
        `FileNotFoundError`, `ValueError`: If it does not exist, or has no questions.
    """
    rows = _rows(benchmark, limit)
    refuse_images(rows)
    is_prompt = question_column in (None, PROMPT) and PROMPT in rows.column_names
    read = _prompt_of if is_prompt else _reader(benchmark, rows, question_column)
    prompts, faults = [], Faults(len(rows))
    for row in rows:
        with faults.of_next_row():
            question = read(row)
            if has_image_placeholder(question):
                raise UnusableRowError("has an image placeholder in its text but no image")
            prompts.append(_asked(question, benchmark, is_prompt))
    faults.check()
    others = rows.select_columns([name for name in rows.column_names if name != PROMPT])
    return others.add_column(PROMPT, prompts)


def _prompt_of(row: Mapping[str, Any]) -> Any:
    """The unchanged column `prompt`."""
    return as_written(row[PROMPT])


def _reader(
    benchmark: Benchmark, rows: Dataset, question_column: str | None
) -> Callable[[Mapping[str, Any]], Any]:
    """A function that reads the question of a row, as in training."""
    try:
        return find_question(rows.column_names, question_column)
    except ValueError as error:
        raise ValueError(
            f"{benchmark.name} has no question column, only {rows.column_names}: name it with --question_column "
            "NAME."
        ) from error


def _asked(question: Any, benchmark: Benchmark, is_prompt: bool) -> Any:
    """The prompt of a question; a string in a column `prompt` stays a string, unless there is a system prompt."""
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
        raise ValueError(f"{benchmark.name} has no problems: give a file or a split that has rows.")
    return rows


def _has_prompts(rows: Dataset) -> bool:
    """Whether the column `prompt` has TRL's form: strings or conversations, not conversations written as text."""
    if PROMPT not in rows.column_names:
        return False
    first = rows[0][PROMPT]
    return not (isinstance(first, str) and first.lstrip().startswith("[{"))


# ---- lm-evaluation-harness ------------------------------------------------------------------------------------------
# The harness has hundreds of benchmarks, with the prompts and metrics behind published figures; a user-defined task is
# a YAML file. The records pair two models problem by problem like those of [`evaluate`].

_NOTHING_FOUND = "[invalid]"
"""What the harness's filters return if they find no answer."""

_FLEXIBLE = "flexible"
_MODELS = {"transformers": "hf", "vllm": "vllm"}
"""The harness's names of the backends."""

_TASK_NAME = re.compile(r"^task:\s*['\"]?([^\s'\"]+)", re.MULTILINE)


def evaluate_tasks(
    tasks: Sequence[str],
    model: str,
    output: Path,
    backend: str = "transformers",
    model_args: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    **options: Any,
) -> dict[str, EvaluationFolder]:
    """Evaluate a model on tasks of the harness.

    Args:
        tasks (sequence of `str`): Names, or user-defined YAML files.
        model (`str`): Hub id or folder; its chat template is used if it has one.
        output (`Path`): Records are written into one folder per task in it.
        backend (`str`, *optional*, defaults to `"transformers"`): Or `"vllm"`.
        model_args (mapping, *optional*): Further arguments of the harness's model: `dtype`, …
        system_prompt (`str`, *optional*): First message.
        **options: Of `lm_eval.simple_evaluate`: `batch_size`, `limit`, `device`, …

    Returns:
        `dict`: Folder of each task by its name.

    Raises:
        `ImportError`: If lm-evaluation-harness is not installed.
        `ValueError`: If a file has no task, or a task is unknown.
        `StoreError`: If a folder holds another evaluation.
    """
    simple_evaluate, manager = _harness()
    names = [task_name(task) for task in tasks]
    task_manager = _tasks(manager, tasks)
    settings = _settings(model, backend, model_args, system_prompt, options)
    for name in names:
        folder = EvaluationFolder(output / name)
        if folder.settings():
            folder.begin(settings)  # refuses a folder with another evaluation before running
    results = simple_evaluate(
        model=_MODELS[backend],
        model_args={"pretrained": model, **(model_args or {})},
        tasks=names,
        task_manager=task_manager,
        apply_chat_template=settings["chat_template"],
        system_instruction=system_prompt,
        log_samples=True,
        **options,
    )
    return _kept(results["samples"], output, settings)


def _settings(
    model: str,
    backend: str,
    model_args: Mapping[str, Any] | None,
    system_prompt: str | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What the records depend on."""
    settings = {
        "model": model,
        "backend": backend,
        "harness": importlib.metadata.version("lm_eval"),
        "chat_template": _has_chat_template(model),
        "system_prompt": system_prompt,
        **(model_args or {}),
        **options,
    }
    settings.pop("device", None)
    return settings


def _tasks(manager: Any, tasks: Sequence[str]) -> Any:
    """The harness's task index, including tasks in files; raises if a requested task is unknown."""
    files = [Path(task) for task in tasks if Path(task).is_file()]
    folders = [str(file.resolve().parent) for file in files]
    task_manager = manager(include_path=folders or None)
    for task in tasks:
        if not task_manager.match_tasks([task_name(task)]):
            raise ValueError(
                f"harness={task} is not a task of lm-evaluation-harness: `lm_eval ls tasks` lists the tasks."
            )
    return task_manager


def _harness() -> tuple[Any, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "--harness needs lm-evaluation-harness: pip install 'trl-learnalign[lm-eval]'."
        ) from error
    return simple_evaluate, TaskManager


def _has_chat_template(model: str) -> bool:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).chat_template is not None


def task_name(task: str) -> str:
    """The name of a task: the argument itself, or the entry `task:` of a YAML file.

    Raises:
        `ValueError`: If a file has no such entry.
    """
    if not task.endswith((".yaml", ".yml")):
        return task
    if not Path(task).is_file():
        raise FileNotFoundError(f"{task} does not exist: give the YAML file of a task.")
    found = _TASK_NAME.search(Path(task).read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(
            f"{task} is not a task of lm-evaluation-harness: it has no line `task: NAME`."
        )
    return found[1]


def records_of(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of a task, from the samples that the harness logs: one sample per problem and filter.

    Args:
        samples (sequence of mappings): `doc_id`, `filter`, `metrics`, `filtered_resps`, `resps`, `target` and
            `arguments`. The first metric is used. A filter with "flexible" in its name gives the flexible figure, the
            first other filter the strict one.
    """
    by_problem: dict[int, dict[str, Mapping[str, Any]]] = {}
    for sample in samples:
        by_problem.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    return [_record(index, by_problem[index]) for index in sorted(by_problem)]


def _record(index: int, filters: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    flexible = [name for name in filters if name.startswith(_FLEXIBLE)]
    strict = [name for name in filters if name not in flexible] or flexible
    sample = filters[strict[0]]
    value = _value(sample)
    record = {
        "index": index,
        "prompt_id": rng.digest(sample["arguments"]),
        "prompt": sample["arguments"],
        "solution": sample["target"],
        "completions": [{"text": text} for text in _texts(sample["resps"])],
        "rewards": [value],
        "right": [is_right(value)],
        "answers": [_answer(sample)],
    }
    if flexible and flexible[0] != strict[0]:
        of_flexible = filters[flexible[0]]
        record["flexible_right"] = [is_right(_value(of_flexible))]
        record["flexible_answers"] = [_answer(of_flexible)]
    return record


def _value(sample: Mapping[str, Any]) -> float:
    return float(sample[sample["metrics"][0]])


def _answer(sample: Mapping[str, Any]) -> Any:
    found = sample["filtered_resps"]
    first = found[0] if found else None
    return None if first in (_NOTHING_FOUND, "") else first


def _texts(responses: Sequence[Sequence[Any]]) -> list[str]:
    return [str(response) for request in responses for response in request]


def _kept(
    samples_of: Mapping[str, Sequence[Mapping[str, Any]]],
    output: Path,
    settings: Mapping[str, Any],
) -> dict[str, EvaluationFolder]:
    """Folders with the records of each task; a group has several."""
    folders = {}
    for name, samples in samples_of.items():
        folder = EvaluationFolder(output / name)
        folder.begin(dict(settings))
        lines = []
        for record in records_of(samples):
            line = json.dumps(record, ensure_ascii=False, default=str)
            lines.append(f"{line}\n")
        write_atomically(folder.records_path, "".join(lines).encode())
        write_json(folder.path / layout.SUMMARY, folder.summary())
        folders[name] = folder
    return folders
