"""Runs scenarios under whatever launcher started it, and writes what came out as JSON (main process)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np
import torch
from accelerate.utils import set_seed
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign import trainer_bridge as bridge

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def policy(folder: Path, fsdp: bool, seed: int):
    """The same weights for every launcher."""
    options: dict[str, Any] = {}
    if fsdp:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=PROCESSES)
    return AutoModelForCausalLM.from_pretrained(folder / "policy", **options)


class FixedPool(LearnAlignCallback):
    """Takes a pool without scoring: what training is like when nothing was scored before."""

    pool: list[int] = []

    def _select(self, phase, step):
        return np.asarray(self.pool)


class Watch(TrainerCallback):
    """Digests of the weights before each step; and the same random numbers in each step of a stage.

    Virtual epochs of different length draw different numbers of seeds for their dataloader iterators.
    """

    def __init__(self, trainer, callback):
        self.trainer, self.callback, self.digests = trainer, callback, []

    def on_step_begin(self, args, state, control, **_):
        self.digests.append(bridge.weights_digest(self.trainer))
        phase = self.callback.plan.phase_at(state.global_step)
        if phase.kind == "stage":
            set_seed(123 + state.global_step - phase.start, device_specific=True)


def run(
    name: str, folder: Path, fsdp: bool = False, lora: bool = False, pool: list[int] | None = None, **options: Any
):
    """One training run; returns what the test compares."""
    settings = dict(warmup_samples=0, stages=[6], shard_prompts=4, rollout_prompts=2, feature_dim=256)
    settings |= options.pop("settings", {})
    rewards = options.pop("reward", cases.accuracy_reward)
    torch.manual_seed(0)
    trainer = cases.trainer(
        folder / name,
        policy(folder, fsdp, 0),
        data=cases.dataset(18),
        rewards=rewards,
        per_device_train_batch_size=8 // PROCESSES,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
        **options,
    )
    if lora:
        with torch.no_grad():
            for key, parameter in trainer.model.named_parameters():
                if "lora_" in key:  # not at B = 0, where half the gradients vanish; the same on every rank and backend
                    generator = torch.Generator().manual_seed(sum(map(ord, key)))
                    with bridge.whole(trainer, parameter, write=True) as weights:
                        weights.copy_(0.1 * torch.randn(weights.shape, generator=generator))
    config = LearnAlignConfig(**settings)
    if pool is None:
        callback = LearnAlignCallback(trainer, config)
    else:
        callback = FixedPool(trainer, config)
        callback.pool = pool
    trainer.add_callback(callback)
    watch = Watch(trainer, callback)
    trainer.add_callback(watch)
    trainer.train()
    history = trainer.state.log_history
    return {
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "sharded": bridge.is_sharded(trainer),
        "zero_stage": bridge.zero_stage(trainer),
        "pools": callback._state["pools"],
        "grad_norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        "learning_rates": [entry["learning_rate"] for entry in history if "learning_rate" in entry],
        "digests": [*watch.digests, bridge.weights_digest(trainer)],
    }


def main() -> None:
    folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = {}
    for name, scenario in scenarios.items():
        if scenario.get("pool") in results:  # a pool that an earlier scenario selected
            scenario["pool"] = results[scenario["pool"]]["pools"]["stage_1"]
        results[name] = run(name, folder, **scenario)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
