"""Trains with and without the rows that have no gradient on prompts with pictures; writes what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import picture_cases
import torch
from distributed_worker import PROCESSES, RANK, with_and_without_skipping, work
from skipping_worker import Weights
from transformers import AutoModelForImageTextToText

from trl_learnalign.bridge.policy import is_sharded, zero_stage
from trl_learnalign.bridge.skipping import install_skipping
from trl_learnalign.distributed import Ranks


def run(
    name: str,
    folder: Path,
    skip: bool,
    pictures: str,
    counts: list[int],
    lora: bool = False,
    **options: Any,
) -> Any:
    """One run; plain SGD, so that the weights tell the gradients."""
    settings = dict(
        max_steps=3, max_grad_norm=0.0, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant"
    )
    settings |= {"per_device_train_batch_size": 8 // PROCESSES, **options}
    torch.manual_seed(0)  # of adapters
    trainer = picture_cases.trainer(
        folder / name,
        pictures,
        policy=AutoModelForImageTextToText.from_pretrained(folder / pictures),
        peft_config=picture_cases.adapter() if lora else None,
        data=picture_cases.dataset(counts),
        rewards=picture_cases.half_idle_reward,
        mixed=0 in counts,
        **settings,
    )
    weights = Weights(trainer)
    skipper = install_skipping(trainer) if skip else None
    assert not isinstance(skipper, str), skipper
    trainer.train()
    weights.take()
    if RANK == 0:
        torch.save(torch.stack(weights.snapshots).diff(dim=0), folder / f"{name}.pt")
    return {
        "processes": trainer.accelerator.num_processes,
        "sharded": is_sharded(trainer),
        "zero_stage": zero_stage(trainer),
        "rows": Ranks(trainer.accelerator).gather([weights.rows]),
    }


if __name__ == "__main__":
    work(with_and_without_skipping(run))
