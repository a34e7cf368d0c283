"""The runs that are killed: a small one of each kind, how it is begun or resumed, and what it must come to."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS.parent / "scripts"), str(TESTS.parent)]

import cases  # noqa: E402
import same_results  # noqa: E402
import torch  # noqa: E402
from fault_events import Events, Fault  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from trl_learnalign import LearnAlignCallback, LearnAlignConfig  # noqa: E402
from trl_learnalign.records import store as store_module  # noqa: E402
from trl_learnalign.training.checkpoints import last_complete_checkpoint  # noqa: E402

RECIPE = "recipe"
"""Resume as recipes do: at the newest whole checkpoint, if there is one."""

OWN_SCRIPT = "own script"
"""Resume by `train(resume_from_checkpoint=True)`, if there is a checkpoint."""

ANEW = "anew"
"""`train()`."""

REFUSED = 3
"""What a process returns that has ended with an error; its message is noted."""


@dataclass(frozen=True)
class Job:
    """A kind of run.

    Args:
        settings (mapping): Beside those of the paper.
        options (mapping): Of the trainer, beside those of `cases.trainer`.
        processes (`int`): How many.
        steps (`int`): Optimizer steps that it takes.
        prompts (`int`): In the dataset.
    """

    settings: dict[str, Any]
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    prompts: int = 14

    @property
    def interval(self) -> int:
        """Steps from a checkpoint to the next one."""
        return self.options.get("save_steps", 2)


ADAPTIVE = dict(warmup_samples=0, stages=[1.0], order="adaptive", skip_zero_advantages=True)
STAGED = dict(warmup_samples=4, shard_size=4, feature_dim=128)
MID_GENERATION = dict(num_iterations=2, steps_per_generation=2, save_steps=1)

JOBS = {
    "adaptive": Job({**ADAPTIVE, "stage_steps": [8]}, 8),
    "dynamic sampling": Job(
        {**ADAPTIVE, "stage_steps": [6], "oversample": 1.5, "max_generation_batches": 3}, 6
    ),
    "mid-generation": Job({**ADAPTIVE, "stage_steps": [12]}, 12, MID_GENERATION),
    "rollout budget": Job(
        {
            **STAGED,
            "stages": [6],
            "selector": "learnability",
            "rollout_budget": 0.4,
            "budget_rounds": 3,
        },
        5,
        prompts=24,
    ),
    "compute budget": Job({**ADAPTIVE, "stage_steps": [12], "compute_budget": 2250}, 8),
    "staged": Job(STAGED, 10),
    "restart": Job({**STAGED, "after_warmup": "restart"}, 10),
    "trainer's order": Job(
        dict(warmup_samples=0, stages=[1.0], order="trainer", skip_zero_advantages=True),
        8,
        {"max_steps": 8},
    ),
    "two processes": Job(
        {**ADAPTIVE, "stage_steps": [6]}, 6, {"per_device_train_batch_size": 4}, processes=2
    ),
    "two processes, staged": Job(
        {**STAGED, "stages": [6]}, 5, {"per_device_train_batch_size": 4}, processes=2
    ),
}


BESIDE = "NOTES_BESIDE"
"""Environment variable: the folder of notes, by default that in which the output folder lies."""


def beside(folder: Path, ending: str) -> Path:
    """A file about a run, outside its output folder."""
    return Path(os.environ.get(BESIDE, folder.parent)) / f"{folder.name}.{ending}"


def note(folder: Path, name: str, value: Any) -> None:
    """Append a line that survives the process."""
    with open(beside(folder, f"{name}.jsonl"), "a") as file:
        file.write(json.dumps(value) + "\n")


def notes(folder: Path, name: str) -> list[Any]:
    """All lines of a name."""
    path = beside(folder, f"{name}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Steps(TrainerCallback):
    """Notes at which step an attempt begins, and which ones it ends."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            note(self.folder, "steps", {"begun": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            note(self.folder, "steps", {"ended": state.global_step})


def run(folder: Path, name: str, way: str, fault: Fault | None, **options: Any) -> None:
    """One attempt: begin a run, or resume it.

    Args:
        folder (`Path`): The output folder.
        name (`str`): Of the job.
        way (`str`): How it is resumed: one of the ways above, or a checkpoint.
        fault (`Fault`, *optional*): What goes wrong in this process.
        options: Of the trainer, beside the job's.
    """
    torch.set_num_threads(1)
    job, events = JOBS[name], Events(folder, fault)
    made: list[LearnAlignCallback] = []

    def accuracy_reward(
        completions: list[Any], prompts: list[Any], trainer_state: Any, **_: Any
    ) -> list[float]:
        if not made[0].is_scoring:
            note(folder, "order", [trainer_state.global_step, sorted(set(prompts))])
        return cases.accuracy_reward(completions)

    trainer = cases.trainer(
        folder,
        data=cases.dataset(job.prompts),
        rewards=events.watched(accuracy_reward),
        **{"save_strategy": "steps", "save_steps": 2, **job.options, **options},
    )
    callback = LearnAlignCallback(trainer, LearnAlignConfig(**job.settings))
    made.append(callback)
    for each in (callback, events, Steps(folder)):
        trainer.add_callback(each)
    _note_shards(folder)
    events.watch_saving(trainer)
    events.watch_files()
    _train(trainer, folder, way)
    note(folder, "seconds", time.process_time())
    note(folder, f"events_{trainer.accelerator.process_index}", events.labels)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        note(folder, "end", _described(trainer, callback, folder))
    trainer.accelerator.end_training()


def _train(trainer: Any, folder: Path, way: str) -> None:
    checkpoint: Any = None
    if way == RECIPE:
        found = last_complete_checkpoint(folder)
        checkpoint = None if found is None else str(found)
    elif way == OWN_SCRIPT:
        has_one = folder.is_dir() and get_last_checkpoint(str(folder)) is not None
        checkpoint = True if has_one else None
    elif way != ANEW:
        checkpoint = way
    trainer.train(resume_from_checkpoint=checkpoint)


def _note_shards(folder: Path) -> None:
    write = store_module.ShardStore.write

    def noted(self: store_module.ShardStore, number: int, tensors: Any) -> None:
        write(self, number, tensors)
        note(folder, "shards", [str(self.folder.relative_to(folder)), number])

    store_module.ShardStore.write = noted  # type: ignore[method-assign]


def _described(trainer: Any, callback: LearnAlignCallback, folder: Path) -> dict[str, Any]:
    """What must be the same, seconds left out."""
    logged = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    records = {}
    for path in sorted(callback.folder.rglob("*.json")):
        text = path.read_text().replace(str(folder), "OUTPUT")
        records[str(path.relative_to(callback.folder))] = _without_times(json.loads(text))
    records.pop("log_history.json", None)
    return {
        "weights": same_results.weights(trainer),
        "steps": trainer.state.global_step,
        "tables": same_results.tables(callback.folder),
        "records": records,
        "log": {f"{i} at {entry['step']}": _without_times(entry) for i, entry in enumerate(logged)},
    }


# The id and the digest of a record, and what depends on them, differ from run to run.
# What scoring has checked of itself is of the shards that the last attempt has measured.
_OF_ITS_OWN = {"run", "digest", "self_check", "coverage", "learnalign/coverage"}
_TIMES = ("second", "step_time", "per_sec", "runtime", "time/", "duration")


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_times(each)
            for key, each in value.items()
            if key not in _OF_ITS_OWN and not any(part in key for part in _TIMES)
        }
    if isinstance(value, list):
        return [_without_times(each) for each in value]
    return value


def outcome(folder: Path) -> dict[str, Any]:
    """What a run came to that has ended; with the order of prompts by step, whatever attempt rolled them out."""
    order: dict[int, set[str]] = {}
    for step, prompts in notes(folder, "order"):
        order.setdefault(step, set()).add(json.dumps(prompts))
    found = notes(folder, "end")[-1]
    return {**found, "order": {str(step): sorted(each) for step, each in sorted(order.items())}}
