"""What a large pool costs a run: seconds of construction, of a step and of a checkpoint, by the processor's clock.

    python benchmarks/large_pool.py --prompts 1000000 --json outputs/bench/large_pool.json

A tiny model trains for six steps on prompts made on the spot; prompts are not read for features, which takes the same
in any order. What is measured are the callback's own parts: its construction, its events, and the checkpoint with
transformers' files. Figures of two commits compare if they are taken one after the other on one machine.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import cases
import common
import numpy as np
from datasets import Dataset

from trl_learnalign import LearnAlignCallback, LearnAlignConfig

EVENTS = ("on_train_begin", "on_epoch_begin", "on_step_end")
ORDERS = ("adaptive", "shuffled", "trainer")


def pool(size: int) -> Dataset:
    """Prompts of different lengths."""
    prompts = [f"{'abcdefgh'[: 1 + i % 5]}{i}?" for i in range(size)]
    return Dataset.from_dict({"prompt": prompts, "solution": [str(i % 7) for i in range(size)]})


def timed(owner: Any, name: str, spent: dict[str, list[float]]) -> None:
    """Note the seconds of each call of a method."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return method(*arguments, **options)
        finally:
            spent[name].append(time.process_time() - started)

    setattr(owner, name, call)


def measured(order: str, size: int) -> dict[str, Any]:
    """Seconds of the parts of a run, medians over steps and checkpoints."""
    spent: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        saving = dict(save_strategy="steps", save_steps=3, save_total_limit=1)
        trainer = cases.trainer(folder, data=pool(size), max_steps=6, **saving)
        started = time.process_time()
        settings = LearnAlignConfig.adaptive(order=order, adaptive_embeddings="none")
        callback = LearnAlignCallback(trainer, settings)
        construction = time.process_time() - started
        for name in EVENTS:
            timed(callback, name, spent)
        timed(trainer, "_save_checkpoint", spent)
        trainer.add_callback(callback)
        trainer.train()
        checkpoint = Path(folder) / "checkpoint-6"
        files = [*checkpoint.glob("learnalign_*"), checkpoint / "trainer_state.json"]
        size_kept = sum(path.stat().st_size for path in files)
    medians = {name: float(np.median(values)) for name, values in spent.items()}
    return {
        "order": order,
        "prompts": size,
        "construction_s": construction,
        "train_begin_s": medians["on_train_begin"],
        "epoch_begin_s": medians["on_epoch_begin"],
        "step_s": medians["on_step_end"],
        "checkpoint_s": medians["_save_checkpoint"],
        "kept_bytes": size_kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=100_000, help="size of the pool")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--json", type=Path, help="write the figures")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = [measured(order, given.prompts) for order in given.orders]
    for row in rows:
        print(
            *(f"{name} {value:.4g}" for name, value in row.items() if name != "order"), row["order"]
        )
    common.write_json(given.json, {"rows": rows}, given)


if __name__ == "__main__":
    main()
