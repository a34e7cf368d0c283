"""Trains in adaptive order under whatever launcher started it; writes which prompts came when."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import sampling_cases
import torch
from distributed_worker import PROCESSES, RANK, policy
from interruptions import KillAt, Killed

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, bridge
from trl_learnalign.training.checkpoints import last_complete_checkpoint

COMPLETIONS = 8


def run(
    folder: Path, name: str, fsdp: bool, kill_at: int | None, **settings: Any
) -> dict[str, Any]:
    """One run, interrupted and gone on with if `kill_at` says so."""
    if kill_at is not None:
        attempt(folder, name, fsdp, kill_at, **settings)
    return attempt(folder, name, fsdp, None, **settings)


def attempt(
    folder: Path, name: str, fsdp: bool, kill_at: int | None, **settings: Any
) -> dict[str, Any]:
    trainer = sampling_cases.trainer(
        folder / name,
        rows=list(range(24)),
        policy=policy(folder, "qwen2", fsdp),
        max_steps=-1,
        per_device_train_batch_size=COMPLETIONS // PROCESSES,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-3,
    )
    config = LearnAlignConfig(warmup_samples=0, stages=[1.0], order="adaptive", **settings)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    found = last_complete_checkpoint(folder / name)
    try:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    except Killed:
        trainer.accelerator.wait_for_everyone()
    digest = bridge.weights_digest(trainer)
    history = callback.folder / "reward_history.parquet"
    trainer.accelerator.wait_for_everyone()
    table = pd.read_parquet(history) if history.exists() else pd.DataFrame()
    return {
        "processes": trainer.accelerator.num_processes,
        "sharded": bridge.is_sharded(trainer),
        "order": table.get("index", pd.Series(dtype=int)).tolist(),
        "predicted": table.get("predicted", pd.Series(dtype=float)).tolist(),
        "right": table.get("right", pd.Series(dtype=int)).tolist(),
        "digest": digest,
        "trained": callback.record.contents.ledger.total.tokens_trained,
    }


def main() -> None:
    faulthandler.dump_traceback_later(float(os.environ["WORKER_SECONDS"]), exit=True)
    folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = {name: run(folder, name, **scenario) for name, scenario in scenarios.items()}
    if RANK == 0:
        (folder / "results.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
