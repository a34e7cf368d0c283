"""Runs scenarios under whatever launcher started it, and writes what came out as JSON (main process)."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import numpy as np
import torch
from accelerate.utils import set_seed
from interruptions import Killed
from peft import LoraConfig
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.policy import gathered, is_sharded, weights_digest, zero_stage
from trl_learnalign.gradients.capture import GradientCapture
from trl_learnalign.training.checkpoints import last_complete_checkpoint
from trl_learnalign.training.phases import StageSelection

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.ops

    # Its collectives in shared memory are compiled for a minute in a new environment; without them it uses gloo's.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}

PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def is_last_rank() -> bool:
    # Read where it is asked: the digest of the reward's code must be the same on all ranks.
    return int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1


def policy(folder: Path, family: str, fsdp: bool):
    """The same weights for every launcher."""
    options: dict[str, Any] = {}
    if fsdp:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=PROCESSES)
    return type(cases.model(family)).from_pretrained(folder / family, **options)


def without_scoring(pool):
    """What training is like when nothing was scored before: stages take this pool, if there is one."""
    if pool is None:
        return nullcontext()
    return mock.patch.object(StageSelection, "select", return_value=np.asarray(pool))


class Fault:
    """Beside the reward, not in it: a reward made with other settings is another one, and its run another run."""

    def __init__(self, call: int | None):
        self.call = call

    def strike(self, call: int) -> None:
        if call == self.call and is_last_rank():
            raise OSError("the grader is gone")


class Trained:
    """The success reward; notes at which step which prompts are rolled out for training."""

    def __init__(self, kind: str, die_at_call: int | None):
        self.kind = kind
        self.fault = Fault(die_at_call)
        self.callback: LearnAlignCallback
        self.seen: list[tuple[int, int]] = []
        self.calls = 0

    def accuracy_reward(self, completions, prompts, trainer_state, **_):
        rows = [int("".join(c for c in prompt if c.isdigit())) for prompt in prompts]
        if self.callback.is_scoring:
            self.calls += 1
            self.fault.strike(self.calls)
        else:
            self.seen += {(trainer_state.global_step, row) for row in rows}
        if (
            self.kind == "by row"
        ):  # of the four rollouts of a prompt, as many are right as its row says
            return [float(i % 4 < row % 5) for i, row in enumerate(rows)]
        coins = cases.accuracy_reward(completions)
        if (
            self.kind == "lopsided"
        ):  # with shards of 4 taken in turn, every other rank finds nothing to learn
            return [coin * (row // 4 % 2) for coin, row in zip(coins, rows, strict=True)]
        return coins


def trainer_side(trainer, values: list) -> list:
    """Lists of all ranks, one after the other."""
    from trl_learnalign.distributed import Ranks

    return Ranks(trainer.accelerator).gather(values)


class Watch(TrainerCallback):
    """Digests of the weights before each step; and the same random numbers in each step of a stage.

    Virtual epochs of different length draw different numbers of seeds for their dataloader iterators.
    """

    def __init__(self, trainer, callback, kill_at):
        self.trainer, self.callback, self.kill_at, self.digests = trainer, callback, kill_at, []

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.kill_at:
            raise Killed
        self.digests.append(weights_digest(self.trainer))
        phase = self.callback.plan.phase_at(state.global_step)
        if phase.kind == "stage":
            set_seed(123 + state.global_step - phase.start, device_specific=True)


def run(
    name: str,
    folder: Path,
    fsdp: bool = False,
    lora: bool = False,
    pool: list[int] | None = None,
    **options: Any,
):
    """One training run; returns what the test compares."""
    settings = dict(
        warmup_samples=0, stages=[6], shard_size=4, scoring_batch_prompts=2, feature_dim=256
    )
    settings |= options.pop("settings", {})
    trained = Trained(options.pop("reward", "coin"), options.pop("die_at_call", None))
    data = cases.dataset(options.pop("prompts", 18))
    if options.pop("diverge", False) and RANK == 1:
        data = data.map(lambda row: {"solution": "other"})
    if options.pop("wrong_on_last_rank", False) and is_last_rank():
        features = GradientCapture.features
        GradientCapture.features = lambda *arguments: -features(*arguments)
    kill_at, resume = options.pop("kill_at", None), options.pop("resume", False)
    torch.manual_seed(0)
    model = policy(folder, options.pop("family", "qwen2"), fsdp)
    if options.pop("leaf", False):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [cases.RoutedList])
    trainer = cases.trainer(
        folder / options.pop("output", name),
        model,
        data=data,
        rewards=trained.accuracy_reward,
        per_device_train_batch_size=8 // PROCESSES,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if lora
        else None,
        **options,
    )
    if lora:
        with torch.no_grad():
            for key, parameter in trainer.model.named_parameters():
                if (
                    "lora_" in key
                ):  # not at B = 0, where half the gradients vanish; the same on every rank and backend
                    generator = torch.Generator().manual_seed(sum(map(ord, key)))
                    with gathered(trainer, parameter, write=True) as weights:
                        weights.copy_(0.1 * torch.randn(weights.shape, generator=generator))
    config = LearnAlignConfig(**settings)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    watch = Watch(trainer, callback, kill_at)
    trainer.add_callback(watch)
    trained.callback = callback
    found = last_complete_checkpoint(trainer.args.output_dir) if resume else None
    try:
        with without_scoring(pool):
            trainer.train(resume_from_checkpoint=None if found is None else str(found))
    except Killed:
        trainer.accelerator.wait_for_everyone()
    history = trainer.state.log_history
    return {
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "sharded": is_sharded(trainer),
        "zero_stage": zero_stage(trainer),
        "pools": cases.pools_of(callback),
        "grad_norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        "learning_rates": [entry["learning_rate"] for entry in history if "learning_rate" in entry],
        "digests": [*watch.digests, weights_digest(trainer)],
        "trained": sorted(trainer_side(trainer, trained.seen)),
        "scored": sum(trainer_side(trainer, [trained.calls])),
    }


def finish(folder: Path, results: dict[str, Any]) -> None:
    """Write the results, leave together, and end at once."""
    if RANK == 0:
        (folder / "results.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    # Without taking the interpreter down: a thread of gloo may still hold a tensor of the last gathering, needs the
    # interpreter to let go of it, and aborts the process if that is ending by then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def work(results_of: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> None:
    """What every worker does: (folder, scenarios) of its command line → results, written by the main process."""
    # A process that waits forever says where, and ends: killing the launcher would leave it behind without a word.
    faulthandler.dump_traceback_later(float(os.environ["WORKER_SECONDS"]), exit=True)
    folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    finish(folder, results_of(folder, scenarios))


def with_and_without_skipping(
    run: Callable[..., Any],
) -> Callable[[Path, dict[str, Any]], dict[str, Any]]:
    """Each scenario twice, as `run(key, folder, skip, **scenario)`."""

    def results_of(folder: Path, scenarios: dict[str, Any]) -> dict[str, Any]:
        return {
            key: run(key, folder, skip, **scenario)
            for name, scenario in scenarios.items()
            for key, skip in ((name, False), (f"{name}, skipped", True))
        }

    return results_of


def _results(folder: Path, scenarios: dict[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        if scenario.get("pool") in results:  # a pool that an earlier scenario selected
            scenario["pool"] = results[scenario["pool"]]["pools"]["stage_1"]
        results[name] = run(name, folder, **scenario)
    return results


if __name__ == "__main__":
    work(_results)
