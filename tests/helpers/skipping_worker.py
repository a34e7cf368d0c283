"""Trains with and without the rows that have no gradient under whatever launcher started it; writes what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import sampling_cases
import torch
from distributed_worker import PROCESSES, RANK, policy, with_and_without_skipping, work
from skipping_cases import half_idle_reward
from transformers import TrainerCallback

from trl_learnalign.bridge.dynamic_sampling import install_dynamic_sampling
from trl_learnalign.bridge.inference import RolledOut
from trl_learnalign.bridge.policy import gathered, is_sharded, zero_stage
from trl_learnalign.bridge.skipping import ZeroAdvantageFilter, install_skipping
from trl_learnalign.distributed import Ranks


def nothing_on_the_last_rank(completions: list[Any], **_: Any) -> list[float]:
    return [coin * (RANK < PROCESSES - 1) for coin in cases.accuracy_reward(completions)]


REWARDS = {"half idle": half_idle_reward, "lopsided": nothing_on_the_last_rank}


class Weights(TrainerCallback):
    """All weights before each step and at the end, and the rows of each forward pass with a gradient on this rank."""

    def __init__(self, trainer):
        self.trainer, self.snapshots, self.rows = trainer, [], []
        trainer.add_callback(self)
        trainer.model.get_input_embeddings().register_forward_hook(self._see)

    def _see(self, module, inputs, output):
        if torch.is_grad_enabled():
            self.rows.append(inputs[0].shape[0])

    def on_step_begin(self, *_, **__):
        self.take()

    def take(self):
        parts = []
        for _, parameter in self.trainer.model.named_parameters():
            with gathered(self.trainer, parameter) as weights:
                parts.append(weights.detach().flatten().double().clone())
        self.snapshots.append(torch.cat(parts))


def run(
    name: str,
    folder: Path,
    skip: bool,
    fsdp: bool = False,
    family: str | None = None,
    dynamic: dict[str, Any] | None = None,
    completions: int = 8,
    **options: Any,
):
    """One run; plain SGD, so that the weights tell the gradients on every backend."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = policy(folder, "qwen2", fsdp) if family is None else cases.model(family, **dropout)
    settings = dict(
        max_steps=3, max_grad_norm=0.0, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant"
    )
    settings |= {"per_device_train_batch_size": completions // PROCESSES, **options}
    observed: list[RolledOut] = []
    if dynamic is None:
        reward = REWARDS[settings.pop("reward", "half idle")]
        trainer = cases.trainer(
            folder / name, model, rewards=reward, data=cases.dataset(16), **settings
        )
    else:
        trainer = sampling_cases.trainer(folder / name, policy=model, **settings)
        install_dynamic_sampling(trainer, sampling_cases.More(), **dynamic, observe=observed.append)
    weights = Weights(trainer)
    skipper = install_skipping(trainer) if skip else None
    trainer.train()
    weights.take()
    if RANK == 0:
        torch.save(torch.stack(weights.snapshots).diff(dim=0), folder / f"{name}.pt")
    return {
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "sharded": is_sharded(trainer),
        "zero_stage": zero_stage(trainer),
        "rows": Ranks(trainer.accelerator).gather([weights.rows]),
        "observed": [
            [out.asked_rows.tolist(), out.useful.tolist(), out.trained.tolist()] for out in observed
        ],
        "counts": skipper.state_dict() if isinstance(skipper, ZeroAdvantageFilter) else None,
    }


if __name__ == "__main__":
    work(with_and_without_skipping(run))
