"""Scores and trains with vLLM's interface on whatever launcher started it; writes what was selected and by what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vllm_cases
from distributed_worker import PROCESSES, work

from trl_learnalign import LearnAlignCallback, LearnAlignConfig


def run(folder: Path, name: str, checkpoint: Path, **options: Any) -> dict[str, Any]:
    trainer = vllm_cases.trainer(
        folder / name, checkpoint, per_device_train_batch_size=8 // PROCESSES, **options
    )
    config = LearnAlignConfig.adaptive(warmup_samples=0, stages=[6], shard_size=4, verbose=False)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    table = callback.record.read_stage("stage_1")
    assert table is not None
    return {
        "processes": trainer.accelerator.num_processes,
        "scoring_batch_prompts": callback.state.scoring_batch_prompts,
        "success_rates": table["success_rate"].to_pylist(),
        "chosen": callback.selected("stage_1").tolist(),
        "steps": trainer.state.global_step,
    }


def results_of(folder: Path, scenarios: dict[str, Any]) -> dict[str, Any]:
    with vllm_cases.installed():
        return {
            name: run(folder, name, folder / "qwen2", **options)
            for name, options in scenarios.items()
        }


if __name__ == "__main__":
    work(results_of)
