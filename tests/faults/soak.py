"""Score thousands of prompts and watch what the process holds on to: memory, open files, hooks, threads.

    python tests/faults/soak.py --prompts 5000 --json soak.json

After each shard the resident memory and the open files are noted, at the end the hooks of the model's modules. The
allocator takes its time to find its size, so the slope is fitted over the second half of the shards; a leak goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import cases

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.store import ShardStore

Row = dict[str, Any]


def count_hooks(model: nn.Module) -> int:
    """Hooks on all modules and parameters."""
    of_modules = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )
    return of_modules + sum(
        len(parameter._backward_hooks or ()) for parameter in model.parameters()
    )


def soak(prompts: int, shard_size: int, folder: Path) -> list[Row]:
    """Score `prompts` prompts once; a row for each shard."""
    trainer = cases.trainer(folder, data=cases.dataset(prompts))
    settings = LearnAlignConfig(
        warmup_samples=0,
        stages=[4],
        shard_size=shard_size,
        feature_dim=1024,
        scoring_batch_prompts=32,
    )
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    process, rows, write, started = psutil.Process(), [], ShardStore.write, time.perf_counter()

    def noted(store: ShardStore, number: int, tensors: Any) -> None:
        write(store, number, tensors)
        rows.append(
            {
                "shard": number,
                "seconds": time.perf_counter() - started,
                "resident_mb": process.memory_info().rss / 2**20,
                "open_files": process.num_fds(),
                "threads": process.num_threads(),
            }
        )

    ShardStore.write = noted  # type: ignore[method-assign]
    before = count_hooks(trainer.model)
    try:
        trainer.train()
    finally:
        ShardStore.write = write  # type: ignore[method-assign]
    rows[-1]["hooks_before"], rows[-1]["hooks_after"] = before, count_hooks(trainer.model)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--shard_size", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(options.prompts, options.shard_size, Path(folder))
    memory = np.array([row["resident_mb"] for row in rows])
    later = memory[len(memory) // 2 :]
    slope = float(np.polyfit(np.arange(len(later)), later, 1)[0]) if len(later) > 1 else 0.0
    files = sorted({row["open_files"] for row in rows})
    result = {
        "prompts": options.prompts,
        "shards": len(rows),
        "seconds": rows[-1]["seconds"],
        "resident_mb_after_first_shard": float(memory[0]),
        "resident_mb_half_way": float(later[0]),
        "resident_mb_after_last_shard": float(memory[-1]),
        "mb_per_shard_second_half": slope,
        "open_files": [files[0], files[-1]],
        "hooks": [rows[-1]["hooks_before"], rows[-1]["hooks_after"]],
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps({**result, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
