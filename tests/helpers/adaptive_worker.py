"""Trains in adaptive order under whatever launcher started it; writes which prompts came when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import sampling_cases
from distributed_worker import PROCESSES, policy, work
from interruptions import KillAt, Killed
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.policy import is_sharded, weights_digest
from trl_learnalign.records.layout import to_json
from trl_learnalign.records.notes import BeliefNote, Note, RolloutsNote
from trl_learnalign.training.checkpoints import last_complete_checkpoint

COMPLETIONS = 8


def run(
    folder: Path, name: str, fsdp: bool, kill_at: int | None, graded: bool = False, **settings: Any
) -> dict[str, Any]:
    """One run, interrupted and gone on with if `kill_at` says so."""
    if kill_at is not None:
        attempt(folder, name, fsdp, kill_at, graded, **settings)
    return attempt(folder, name, fsdp, None, graded, **settings)


def attempt(
    folder: Path, name: str, fsdp: bool, kill_at: int | None, graded: bool = False, **settings: Any
) -> dict[str, Any]:
    trainer = sampling_cases.trainer(
        folder / name,
        rows=list(range(24)),
        policy=policy(folder, "qwen2", fsdp),
        max_steps=-1,
        per_device_train_batch_size=COMPLETIONS // PROCESSES,
        # transformers makes no checkpoint of weights that are sharded as they are loaded.
        save_strategy="no" if fsdp else "steps",
        save_steps=1,
        learning_rate=1e-3,
        logging_steps=1,  # losses are averaged over processes when they are logged
        rewards=sampling_cases.graded_reward if graded else sampling_cases.right_reward,
    )
    settings |= {"success_range": sampling_cases.GRADES} if graded else {}
    config = LearnAlignConfig(
        warmup_samples=0, stages=[1.0], order="adaptive", **{"stage_epochs": 1, **settings}
    )
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    seen = Advantages(trainer)
    found = last_complete_checkpoint(folder / name)
    try:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    except Killed:
        trainer.accelerator.wait_for_everyone()
    digest = weights_digest(trainer)
    history = callback.folder / "reward_history.parquet"
    trainer.accelerator.wait_for_everyone()
    notes = [to_json(note) for note in notes_of(callback)]
    callback.ranks.agree("the notes of the phase", notes)
    table = pd.read_parquet(history) if history.exists() else pd.DataFrame()
    return {
        "processes": trainer.accelerator.num_processes,
        "sharded": is_sharded(trainer),
        "order": table.get("index", pd.Series(dtype=int)).tolist(),
        "predicted": table.get("predicted", pd.Series(dtype=float)).tolist(),
        "right": table.get("right", pd.Series(dtype=int)).tolist(),
        "lengths": table.get("completion_tokens", pd.Series(dtype=float)).tolist(),
        "digest": digest,
        "notes": notes,
        "trained": callback.record.contents.ledger.total.tokens_trained,
        **(seen.found() if config.baseline == "belief" else {}),
    }


class Advantages(TrainerCallback):
    """What the trainer's table of completions has of each step, and the mean of the losses that they led to."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.advantages: list[list[float]] = []
        trainer.add_callback(self)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.advantages.append(list(self.trainer._logs["advantages"]))

    def found(self) -> dict[str, Any]:
        loss = self.trainer.state.log_history[-1]["train_loss"]
        return {"advantages": self.advantages, "loss": loss}


def notes_of(callback: LearnAlignCallback) -> list[Note]:
    """What is noted of the stage's rollouts, once it has ended; every process has it."""
    found = [callback.record.get("stage_1", kind) for kind in (RolloutsNote, BeliefNote)]
    return [note for note in found if note is not None]


if __name__ == "__main__":
    work(
        lambda folder, scenarios: {
            name: run(folder, name, **scenario) for name, scenario in scenarios.items()
        }
    )
