"""vLLM, where it is installed: a staged run with the engine in the trainer's process, and one with a server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import torch
from transformers import AutoModelForCausalLM

from gpu_check.record import PartSkippedError, Record, Setting
from gpu_check.trainers import model_of_shape, prompts, trainer_on
from trl_learnalign import LearnAlignCallback, LearnAlignConfig

APART = 0.05
"""Mean difference of log-probabilities between engine and trainer; with weights of another step it is far larger."""


def run(setting: Setting, record: Record) -> None:
    """Both modes."""
    if find_spec("vllm") is None:
        raise PartSkippedError("vLLM is not installed")
    checkpoint = setting.folder / "policy"
    model_of_shape("tiny" if setting.small else "small").save_pretrained(checkpoint)
    common.tokenizer().save_pretrained(checkpoint)
    with record.attempt("colocate"):
        options = dict(vllm_mode="colocate", vllm_gpu_memory_utilization=0.2)
        record.add("colocate", **staged_run(setting, checkpoint, **options))
    with record.attempt("server"):
        if setting.other_gpu is None:
            raise PartSkippedError("a server needs a second GPU, and there is one")
        with server(checkpoint, setting.other_gpu) as url:
            options = dict(vllm_mode="server", vllm_server_base_url=url)
            record.add("server", **staged_run(setting, checkpoint, **options))


def reward_in_turn(completions: list[Any], **_: Any) -> list[float]:
    """Right and wrong in turn."""
    return [float(i % 2) for i in range(len(completions))]


def staged_run(setting: Setting, checkpoint: Path, **options: Any) -> dict[str, Any]:
    """A warm-up, a scoring and a stage.

    Args:
        setting (`Setting`): With the device.
        checkpoint (`Path`): The policy, from which the engine loads it, too.
        options: For `GRPOConfig`.

    Returns:
        `dict`: `passed`, whether the policy moved and the engine followed it, and the figures.
    """
    policy = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    before = policy.get_input_embeddings().weight.detach().clone()
    options |= dict(use_vllm=True, learning_rate=1e-2, logging_steps=1, max_completion_length=16)
    options |= dict(per_device_train_batch_size=8, model_init_kwargs=None)
    with trainer_on(setting, policy, 4, prompts(16), reward_in_turn, **options) as trainer:
        config = LearnAlignConfig(warmup_samples=4, stages=[8], shard_size=4, verbose=False)
        callback = LearnAlignCallback(trainer, config)
        trainer.add_callback(callback)
        trainer.train()
        after = trainer.model.get_input_embeddings().weight.detach().cpu()
        name = "sampling/sampling_logp_difference/mean"
        apart = [float(line[name]) for line in trainer.state.log_history if name in line]
        moved = float((after - before).norm() / before.norm())
        selected = len(callback.state.pools["stage_1"])
    is_good = moved > 0 and selected == 8 and bool(apart) and max(apart) < APART
    return {
        "passed": is_good,
        "steps": trainer.state.global_step,
        "prompts selected": selected,
        "policy moved": moved,
        "log-probabilities apart": max(apart, default=None),
    }


@contextlib.contextmanager
def server(checkpoint: Path, gpu: str) -> Iterator[str]:
    """TRL's own command for a server, on another GPU than the trainer's; TRL waits for it to answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = "from trl.cli import main; main()"
    command = [sys.executable, "-c", program, "vllm-serve", "--model", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--gpu-memory-utilization", "0.2"]
    process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
