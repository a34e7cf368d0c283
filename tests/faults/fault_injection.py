"""Kill a run at named and random points, resume it, and compare with the run that was never interrupted.

    python tests/faults/fault_injection.py            # all points
    python tests/faults/fault_injection.py --quick    # a dozen that differ in kind

Each run is a process of its own that dies by SIGKILL: at a named point by its own hand (before and after a rename,
half-way through a file), or at a random moment by its parent's. Of two processes one dies, and the launcher ends the
other. The run is resumed with the same command until it ends.
Then pools, the order of prompts and the final weights must be those of the uninterrupted run, bit for bit, and no
finished shard may have been measured twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import cases
import torch
from transformers import TrainerCallback, TrainerState

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records import store as store_module
from trl_learnalign.training.checkpoints import last_complete_checkpoint

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "iterations": {
        "num_iterations": 2,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
    },
    "restart": {"after_warmup": "restart"},
    "two processes": {"processes": 2, "per_device_train_batch_size": 4},
}
_LIMIT = 20  # resumptions of one run; a run that needs more does not get anywhere


def die() -> None:
    """What a crash, an out-of-memory kill or a pre-empted machine looks like."""
    os.kill(os.getpid(), signal.SIGKILL)


class Point:
    """Dies when a named event happens for the n-th time."""

    def __init__(self, event: str | None, count: int):
        self.event, self.left = event, count

    def reached(self, event: str) -> None:
        if event == self.event:
            self.left -= 1
            if self.left == 0:
                die()


class Events(TrainerCallback):
    """Steps and boundaries as events."""

    def __init__(self, point: Point, callback: LearnAlignCallback):
        self.point, self.callback = point, callback

    def on_epoch_begin(self, args, state, control, **_):
        self.point.reached("epoch")

    def on_step_begin(self, args, state, control, **_):
        self.point.reached(f"step in {self.callback.plan.phase_at(state.global_step).name}")

    def on_step_end(self, args, state, control, **_):
        self.point.reached("step end")


def watch_files(point: Point) -> None:
    """Renames of our files as events: just before, and just after."""
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        name = Path(target).name
        kind = "shard" if name.startswith("shard-") else name
        stage = Path(target).parent.parent.name if kind == "shard" else ""
        point.reached(f"before {kind} {stage}".strip())
        replace(source, target)
        point.reached(f"after {kind} {stage}".strip())

    store_module.os.replace = watched  # type: ignore[assignment]


def watch_saving(point: Point, trainer: Any) -> None:
    """The parts of a checkpoint as events."""
    for name in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
        original = getattr(trainer, name)

        def watched(
            *arguments: Any,
            _original: Callable[..., Any] = original,
            _name: str = name,
            **options: Any,
        ) -> Any:
            point.reached(f"before {_name}")
            return _original(*arguments, **options)

        setattr(trainer, name, watched)
    save_to_json = TrainerState.save_to_json

    def half(self: TrainerState, path: str) -> None:
        save_to_json(self, path)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        point.reached("half trainer_state.json")
        Path(path).write_bytes(content)

    TrainerState.save_to_json = half  # type: ignore[method-assign]


def run(folder: Path, mode: str, event: str | None, count: int) -> None:
    """One attempt at the run: begin it, or resume it."""
    point = Point(event, count)
    options = {name: value for name, value in MODES[mode].items() if name != "processes"}
    settings = {"warmup_samples": 4, "shard_prompts": 4, "feature_dim": 128}
    settings |= {name: options.pop(name) for name in ("after_warmup",) if name in options}
    seen: list[LearnAlignCallback] = []

    def accuracy_reward(
        completions: list[Any], prompts: list[Any], trainer_state: Any, **_: Any
    ) -> list[float]:
        if not seen[0].is_scoring:
            note(folder, "order", [trainer_state.global_step, sorted(set(prompts))])
        point.reached("scoring rollout" if seen[0].is_scoring else "training rollout")
        return cases.accuracy_reward(completions)

    trainer = cases.trainer(
        folder,
        data=cases.dataset(14),
        rewards=accuracy_reward,
        save_strategy="steps",
        save_steps=2,
        **options,
    )
    callback = LearnAlignCallback(trainer, LearnAlignConfig.paper(**settings))
    seen.append(callback)
    trainer.add_callback(callback)
    trainer.add_callback(Events(point, callback))
    watch_files(point)
    watch_saving(point, trainer)
    write = store_module.ShardStore.write

    def noted(self: store_module.ShardStore, number: int, tensors: Any) -> None:
        write(self, number, tensors)
        note(folder, "shards", [self.folder.parent.name, number])

    store_module.ShardStore.write = noted  # type: ignore[method-assign]
    found = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if trainer.accelerator.is_main_process:
        note(
            folder,
            "end",
            {
                "weights": digest(trainer.model),
                "pools": cases.pools_of(callback),
            },
        )


def note(folder: Path, name: str, value: Any) -> None:
    """Append a line that survives the process."""
    with open(folder.with_name(f"{folder.name}.{name}.jsonl"), "a") as file:
        file.write(json.dumps(value) + "\n")


def notes(folder: Path, name: str) -> list[Any]:
    """All lines of a name."""
    path = folder.with_name(f"{folder.name}.{name}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def digest(model: torch.nn.Module) -> str:
    """Digest of all weights."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def child(
    folder: Path, mode: str, event: str | None, count: int, environment: dict[str, str]
) -> None:
    """A forked process: imports are paid once, the rest is as real as any."""
    os.environ.update(environment)
    quiet = os.open(folder.with_name(f"{folder.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    run(folder, mode, event, count)


def attempt(
    folder: Path, mode: str, event: str | None, count: int, kill_after: float | None = None
) -> int:
    """Run a child; returns its exit code (-9 if it was killed)."""
    processes = []
    for environment in environments(MODES[mode].get("processes", 1)):
        arguments = (folder, mode, event, count, environment)
        processes.append(multiprocessing.get_context("fork").Process(target=child, args=arguments))
        processes[-1].start()
    ends = None if kill_after is None else time.monotonic() + kill_after
    while alive := [process.sentinel for process in processes if process.is_alive()]:
        timeout = None if ends is None else max(0.0, ends - time.monotonic())
        multiprocessing.connection.wait(alive, timeout)
        # As a launcher does: when one is dead, the others end too.
        if any(process.exitcode for process in processes) or (
            ends is not None and time.monotonic() >= ends
        ):
            for process in processes:
                process.kill()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    return -signal.SIGKILL if -signal.SIGKILL in codes else max(code or 0 for code in codes)


def environments(processes: int) -> list[dict[str, str]]:
    """What a launcher tells its processes."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same."""
    order: dict[int, set[str]] = {}
    for step, prompts in notes(folder, "order"):
        order.setdefault(step, set()).add(json.dumps(prompts))
    end = notes(folder, "end")[-1]
    return {
        "weights": end["weights"],
        "pools": end["pools"],
        "order": {k: sorted(v) for k, v in sorted(order.items())},
    }


def points(mode: str, quick: bool) -> list[tuple[str, int]]:
    """Named events and at which of their occurrences to die."""
    if quick:
        if mode == "iterations":
            return [("step in stage_2", 2), ("half trainer_state.json", 2)]
        if mode == "two processes":
            return [("after shard stage_1", 1), ("step in stage_2", 1)]
        if mode != "plain":
            return [("epoch", 2)] if mode == "restart" else [("step in stage_1", 2)]
    chosen = [("before shard stage_1", 1), ("after shard stage_1", 2), ("before shard stage_2", 2)]
    chosen += [
        ("step in warmup", 2),
        ("before _save_optimizer_and_scheduler", 2),
        ("scoring rollout", 3),
    ]
    if quick:
        return chosen
    chosen += [("step in stage_1", 3), ("half trainer_state.json", 3)]
    chosen += [(f"{when} shard stage_1", n) for when in ("before", "after") for n in (1, 2, 3, 4)]
    chosen += [
        (f"{when} shard {stage}", 1)
        for when in ("before", "after")
        for stage in ("stage_2", "stage_3")
    ]
    chosen += [("epoch", n) for n in (1, 2, 3, 5, 8)]
    chosen += [("step in stage_2", 1), ("step in stage_3", 1), ("step end", 1), ("step end", 6)]
    chosen += [
        ("before save_model", 1),
        ("before _save_rng_state", 3),
        ("before learnalign_complete.json", 2),
    ]
    chosen += [("after learnalign_complete.json", 2), ("before run.json", 4), ("after run.json", 6)]
    chosen += [("before stage_1.parquet", 1), ("after stage_1.parquet", 1), ("training rollout", 4)]
    if mode == "restart":
        chosen += [
            ("before initial_weights.safetensors", 1),
            ("after initial_weights.safetensors", 1),
        ]
    if mode == "iterations":
        chosen += [
            ("before learnalign_generation_0.safetensors", 1),
            ("after learnalign_generation_0.safetensors", 1),
        ]
    unique = list(dict.fromkeys(chosen))
    return unique if mode == "plain" else unique[::3] + unique[-2:]


def judge(folder: Path, reference: dict[str, Any]) -> str:
    """`"equal"`, or what is not."""
    found = outcome(folder)
    problems = [name for name, value in reference.items() if found[name] != value]
    twice = [
        shard for shard, count in Counter(map(tuple, notes(folder, "shards"))).items() if count > 1
    ]
    return (
        "equal" if not problems and not twice else f"differs in {problems}, measured twice {twice}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a dozen points that differ in kind")
    parser.add_argument(
        "--random", type=int, default=10, help="kills at random moments, none with --quick"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root, rows = Path(tempfile.mkdtemp(prefix="faults-")), []
    for mode in MODES:
        started = time.perf_counter()
        whole = root / mode
        assert attempt(whole, mode, None, 0) == 0, (root / f"{mode}.log").read_text()[-3000:]
        seconds, reference = time.perf_counter() - started, outcome(whole)
        moments = random.Random(f"{options.seed}/{mode}")
        kills: list[tuple[str, int, float | None]] = [
            (*point, None) for point in points(mode, options.quick)
        ]
        if not options.quick:
            kills += [
                ("random moment", i, moments.uniform(0.1, seconds))
                for i in range(options.random // 2)
            ]
        for number, (event, count, moment) in enumerate(kills):
            folder = root / f"{mode}-{number}"
            code, resumptions = (
                attempt(folder, mode, event if moment is None else None, count, moment),
                0,
            )
            killed = code == -signal.SIGKILL
            while code != 0 and resumptions < _LIMIT:
                resumptions += 1
                code = attempt(folder, mode, None, 0)
            log = folder.with_name(f"{folder.name}.log").read_text()
            verdict = judge(folder, reference) if code == 0 else f"does not end: {log[-400:]}"
            rows.append(
                {"mode": mode, "event": event, "count": count, "killed": killed, "verdict": verdict}
            )
            print(
                f"{mode:13} {event:40} {count:3} {'killed' if killed else 'ended before':12} {verdict}",
                flush=True,
            )
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)
    bad = [row for row in rows if row["verdict"] != "equal"]
    print(
        f"{len(rows)} kill points, {sum(row['killed'] for row in rows)} reached, {len(rows) - len(bad)} equal"
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "equal": len(rows) - len(bad)}, indent=2))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
