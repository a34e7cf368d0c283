"""Tasks of lm-evaluation-harness (Gao et al.), asked and graded as it does, kept as records of ours.

Hundreds of benchmarks come with it, with the prompts and metrics that published figures rest on; a task of one's own
is a YAML file. The records pair two models problem by problem like those of [`evaluate`].
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_learnalign import hashing
from trl_learnalign.evaluation.grading import is_right
from trl_learnalign.evaluation.records import EvaluationFolder
from trl_learnalign.records import layout
from trl_learnalign.records.store import write_atomically, write_json

_NOTHING_FOUND = "[invalid]"
"""What the harness's filters put where they find no answer."""

_FLEXIBLE = "flexible"
_MODELS = {"transformers": "hf", "vllm": "vllm"}
"""Backends by the harness's names of them."""

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
        tasks (sequence of `str`): Names, or YAML files of one's own.
        model (`str`): Hub id or folder; its chat template is used if it has one.
        output (`Path`): Records go into a folder for each task in it.
        backend (`str`, *optional*, defaults to `"transformers"`): Or `"vllm"`.
        model_args (mapping, *optional*): Further arguments of the harness's model: `dtype`, …
        system_prompt (`str`, *optional*): First message.
        **options: Of `lm_eval.simple_evaluate`: `batch_size`, `limit`, `device`, …

    Returns:
        `dict`: Folder of each task by its name.

    Raises:
        `ImportError`: If lm-evaluation-harness is not installed.
        `ValueError`: If a file holds no task, or a task is not known.
        `StoreError`: If a folder holds another evaluation.
    """
    simple_evaluate, manager = _harness()
    names = [task_name(task) for task in tasks]
    task_manager = _tasks(manager, tasks)
    settings = _settings(model, backend, model_args, system_prompt, options)
    for name in names:
        folder = EvaluationFolder(output / name)
        if folder.settings():
            folder.begin(settings)  # refuses another evaluation before this one has run
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
    """The harness's index of tasks, with those in files; all that are asked for are known."""
    files = [Path(task) for task in tasks if Path(task).is_file()]
    folders = [str(file.resolve().parent) for file in files]
    task_manager = manager(include_path=folders or None)
    for task in tasks:
        if not task_manager.match_tasks([task_name(task)]):
            raise ValueError(
                f"harness={task}: no task of lm-evaluation-harness; `lm_eval ls tasks` lists them."
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
    """The name of a task: itself, or what a YAML file says after `task:`.

    Raises:
        `ValueError`: If a file says nothing.
    """
    if not task.endswith((".yaml", ".yml")):
        return task
    if not Path(task).is_file():
        raise FileNotFoundError(f"{task} does not exist: give the YAML file of a task.")
    found = _TASK_NAME.search(Path(task).read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(
            f"{task} has no line `task: NAME`: it is no task of lm-evaluation-harness."
        )
    return found[1]


def records_of(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of a task, from the samples that the harness logs: one for each problem and filter.

    Args:
        samples (sequence of mappings): `doc_id`, `filter`, `metrics`, `filtered_resps`, `resps`, `target` and
            `arguments`. The first metric counts. A filter that is called flexible gives the flexible figure, the first
            other one the figure itself.
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
        "prompt_id": hashing.digest(sample["arguments"]),
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
