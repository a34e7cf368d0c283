"""How many prompts scoring generates for in one call, where no setting says it.

- vLLM schedules by itself, so a call takes a whole shard; a request to a server holds at most 1,024 prompts, those of
  all processes together.
- transformers generates as many rollouts as half of the memory holds that training leaves: the cache of prompt
  and completion, logits, and the pass over the prompt, by the model's config; on a CPU `CPU_BYTES`, `CPU_ROLLOUTS`.
- It is never fewer than training generates at once, nor more than a shard, and all processes take the least of theirs.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trl_learnalign import bridge
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.data.prompts import prompts_of
from trl_learnalign.distributed import Ranks
from trl_learnalign.gradients.capture import full_numel

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

CPU_ROLLOUTS = 512
"""Most rollouts of a call on a CPU: twice as many gain nothing (`benchmarks/scoring_batch.py`)."""

CPU_BYTES = 1 << 30
"""Memory of a call on a CPU; the same on every machine, so that the same prompts are rolled out together."""

REQUEST_PROMPTS = 1024
"""Prompts that a vLLM server takes in one request (`VLLM_MAX_COMPLETION_PROMPTS`, vLLM 0.31)."""

# float32 numbers of a vocabulary's size that sampling holds at once: logits, scores, probabilities, their order.
_LOGIT_COPIES = 4
# Hidden states and the MLP's inner ones of a layer, in hidden sizes; an MLP is four to six hidden sizes wide.
_PASS_WIDTHS = 24
# Gradients and Adam's two moments, float32: training may not have allocated them yet.
_TRAINING_BYTES = 12
# The longest prompts are found by their text, and only so many of them are tokenized.
_LONGEST = 16


def default_scoring_batch_prompts(
    trainer: GRPOTrainer, config: LearnAlignConfig, ranks: Ranks
) -> int:
    """Prompts of one generation call of a process: the setting, or a number by engine and memory.

    All ranks call it together and get the same number.

    Args:
        trainer (`GRPOTrainer`): The trainer, before `train()`.
        config (`LearnAlignConfig`): With `scoring_batch_prompts` and `shard_size`.
        ranks (`Ranks`): The processes.
    """
    if config.scoring_batch_prompts is not None:
        return config.scoring_batch_prompts
    planned = planned_scoring_batch_prompts(trainer.args, config, ranks.count)
    least = prompts_of_training(trainer.args)
    prompts = planned
    # One's own rollout function may know nothing of memory, and environments may be anything: as in training.
    if trainer.rollout_func is not None or trainer.environment_factories is not None:
        prompts = least
    elif not trainer.use_vllm:
        fitting = rollouts_that_fit(trainer) // trainer.num_generations
        prompts = max(least, min(_power_of_two(fitting), config.shard_size))
    return min(ranks.gather([prompts]))


def planned_scoring_batch_prompts(
    args: GRPOConfig, config: LearnAlignConfig, processes: int
) -> int:
    """The same before a model is loaded: exact for vLLM and with the setting, else the least that it may be.

    Args:
        args (`GRPOConfig`): Settings of the trainer.
        config (`LearnAlignConfig`): With `scoring_batch_prompts` and `shard_size`.
        processes (`int`): Processes.
    """
    if config.scoring_batch_prompts is not None:
        return config.scoring_batch_prompts
    least = prompts_of_training(args)
    if not args.use_vllm:
        return least
    most = config.shard_size
    if args.vllm_mode == "server":
        most = min(most, REQUEST_PROMPTS // processes)
    return max(least, most)


def prompts_of_training(args: GRPOConfig) -> int:
    """Prompts that a process generates for at once in training; at least 1."""
    rollouts = args.per_device_train_batch_size * args.steps_per_generation
    return max(1, rollouts // args.num_generations)


def rollouts_that_fit(trainer: GRPOTrainer) -> int:
    """Rollouts that this process has memory for; 0 if it is not known."""
    footprint = Footprint.of(trainer)
    if footprint is None:
        return 0
    device = trainer.accelerator.device
    if device.type == "cpu":
        return min(CPU_BYTES // footprint.rollout, CPU_ROLLOUTS)
    if device.type == "cuda":
        return max(0, memory_left(trainer)) // 2 // footprint.rollout
    return 0


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rollout while transformers generates it.

    Args:
        cache (`int`): Keys and values of all layers, of prompt and completion.
        logits (`int`): Of the next token, as often as sampling copies them.
        prompt_pass (`int`): Inner states of a layer, of the whole prompt.
    """

    cache: int
    logits: int
    prompt_pass: int

    @property
    def rollout(self) -> int:
        """All of them."""
        return self.cache + self.logits + self.prompt_pass

    @staticmethod
    def of(trainer: GRPOTrainer) -> Footprint | None:
        """Of a trainer's model, longest prompt and longest completion; `None` where the model has no attention."""
        config = trainer.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        layers = getattr(config, "num_hidden_layers", None)
        if not heads or not layers:
            return None
        hidden = config.hidden_size
        number_bytes = next(trainer.model.parameters()).element_size()
        cached_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        prompt_tokens = longest_prompt(trainer)
        tokens = prompt_tokens + trainer.max_completion_length
        return Footprint(
            cache=2 * layers * cached_heads * head_dim * number_bytes * tokens,
            logits=_LOGIT_COPIES * 4 * config.vocab_size,
            prompt_pass=_PASS_WIDTHS * hidden * number_bytes * prompt_tokens,
        )


def longest_prompt(trainer: GRPOTrainer) -> int:
    """Tokens of the longest prompt, found among those of the most text."""
    longest = heapq.nlargest(_LONGEST, prompts_of(trainer.train_dataset), key=_text_length)
    tokens = bridge.prompt_token_lists(trainer, longest)
    return max(len(ids) for ids in tokens)


def memory_left(trainer: GRPOTrainer) -> int:
    """Bytes of this process's GPU that are not taken by others, by weights, gradients and optimizer; may be below 0.

    Counted, not looked up: the model may not be there yet, and of what training needs nothing is.
    """
    device = trainer.accelerator.device
    free, _total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    weights, trained = 0, 0
    for parameter in trainer.model.parameters():
        entries = full_numel(parameter)
        weights += entries * parameter.element_size()
        trained += entries if parameter.requires_grad else 0
    if trainer.ref_model is not None:
        for parameter in trainer.ref_model.parameters():
            weights += full_numel(parameter) * parameter.element_size()
    # Weights in one piece also where they are partitioned: generation gathers them.
    is_partitioned = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    parts = trainer.accelerator.num_processes if is_partitioned else 1
    return free + own - weights - trained * _TRAINING_BYTES // parts


def _text_length(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, str) else len(str(prompt))


def _power_of_two(number: int) -> int:
    """The largest one up to a number; 0 below 1. Coarse, so that a little more memory changes nothing."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0
