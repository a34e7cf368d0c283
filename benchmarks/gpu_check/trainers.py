"""What the parts share: trainers on a device, clocks that wait for it, and peaks of its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import common
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer

from gpu_check.record import Setting

# Parameters of these shapes are random: nothing is downloaded, and speed does not depend on them.
SHAPES = ("SmolLM2-135M", "Qwen2.5-0.5B")


def shapes(setting: Setting) -> tuple[str, ...]:
    """Names of the models whose speed is measured."""
    return ("tiny",) if setting.small else SHAPES


def model_of_shape(name: str) -> PreTrainedModel:
    """A randomly initialised model in float32.

    Args:
        name (`str`): One of [`SHAPES`], or `"tiny"`.
    """
    if name == "Qwen2.5-0.5B":
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=151936,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                max_position_embeddings=4096,
                tie_word_embeddings=True,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=1,
            )
        )
    return common.make_model({"SmolLM2-135M": "smollm"}.get(name, name), 0)


def prompts(count: int) -> Dataset:
    """Prompts of one length, which say their number."""
    return Dataset.from_dict({"prompt": [f"question {number:6d}?" for number in range(count)]})


def number_of(prompt: str) -> int:
    """The number of a prompt of [`prompts`]."""
    return int(prompt.removeprefix("question ").removesuffix("?"))


@contextmanager
def trainer_on(
    setting: Setting,
    policy: PreTrainedModel,
    rollouts: int,
    data: Dataset,
    reward: Callable[..., list[float]],
    **options: Any,
) -> Iterator[GRPOTrainer]:
    """An unmodified `GRPOTrainer` on the device, whose policy does not move.

    Args:
        setting (`Setting`): With the device.
        policy (`PreTrainedModel`): The model.
        rollouts (`int`): G.
        data (`datasets.Dataset`): Prompts.
        reward (callable): Reward function.
        options: For `GRPOConfig`.
    """
    settings = dict(
        use_cpu=not setting.on_gpu,
        learning_rate=0.0,
        max_grad_norm=0.0,
        logging_steps=10**6,
        shuffle_dataset=False,
        seed=0,
    )
    with common.make_trainer(
        policy, rollouts, dataset=data, reward=reward, **{**settings, **options}
    ) as trainer:
        yield trainer


def seconds(setting: Setting) -> float:
    """Wall-clock, once all that was asked of the device is done."""
    if setting.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gigabytes(setting: Setting, method: Callable[[], Any]) -> float | None:
    """Most memory of the device during a call beyond what was taken before it, in GB; `None` where it is unknown."""
    if not setting.on_gpu:
        found = common.peak_megabytes(method)
        return None if found is None else found / 1e3
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    method()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def free_gigabytes(setting: Setting) -> float:
    """Memory of the device that nobody has taken, in GB; of a CPU always 1."""
    if not setting.on_gpu:
        return 1.0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 1e9
