"""Prompts → rollout groups: statistics and texts of G rollouts, and prompts per generation call.

Axes: `G` rollouts of a prompt, `Q` prompt tokens, `C` completion tokens, `F` reward functions.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trl_learnalign.bridge import inference
from trl_learnalign.bridge.inference import prompt_token_lists, training_rows
from trl_learnalign.bridge.rollout_rows import image_counts
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.data.prompts import prompts_of
from trl_learnalign.distributed import Ranks
from trl_learnalign.gradients.capture import TokenBatch, full_numel
from trl_learnalign.success import SuccessRule

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer


# TRL's log-probabilities of the sampling policy are left out. The scored policy is the sampling policy, so the ratio
# of new to old probabilities is 1 by construction, also with dropout or another attention kernel.
_LEFT_OUT = ("old_per_token_logps",)


@dataclass
class RolloutGroup:
    """One prompt's rollouts, without padding beyond its own, on the CPU.

    Args:
        prompt (`int`): Row of the dataset.
        inputs (`dict`): TRL's inputs of the loss for the `G` rollouts: `prompt_ids` and `prompt_mask` `(G, Q)`,
            `completion_ids`, `completion_mask` and per-token terms `(G, C)`, `advantages` `(G,)`.
        rewards (`torch.Tensor`): `(G, F)`, NaN where a function returned `None`.
        successes (`torch.Tensor`): `(G,)` float64 from 0 to 1, and NaN where the rollout cannot be scored.
        lengths (`torch.Tensor`): `(G,)` completion tokens.
        images (`int`, *optional*, defaults to 0): Number of images in the rollouts; `inputs` do not contain it.
        raw (`dict`, *optional*): The same rows of all tensors that TRL returned, with the padding of the whole
            generation. It is for checks; `inputs` are views of it.
    """

    prompt: int
    inputs: dict[str, Tensor]
    rewards: Tensor
    successes: Tensor
    lengths: Tensor
    images: int = 0
    raw: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rollouts(self) -> int:
        """Number of rollouts, G."""
        return len(self.successes)

    @property
    def tokens(self) -> int:
        """Tokens of one padded row, `Q + C`."""
        return self.inputs["prompt_ids"].shape[1] + self.inputs["completion_ids"].shape[1]

    @property
    def prompt_tokens(self) -> Tensor:
        """Prompt tokens without padding, once for each rollout; scalar."""
        return self.inputs["prompt_mask"].sum()

    def only(self, rollout: int) -> RolloutGroup:
        """Return one rollout as a group; its advantage is still relative to the whole original group."""
        return self.take(torch.tensor([rollout]))

    def take(self, rows: Tensor) -> RolloutGroup:
        """Return some rollouts as a group; their advantages are still relative to the whole original group."""
        inputs, lengths = _without_padding_of_others(_rows_of(self.inputs, rows))
        return replace(
            self,
            inputs=inputs,
            rewards=self.rewards[rows],
            successes=self.successes[rows],
            lengths=lengths,
            raw=_rows_of(self.raw, rows),
        )


def roll_out(
    trainer: GRPOTrainer,
    prompts: Sequence[int],
    seed: int,
    success: SuccessRule,
    dataset: Any = None,
) -> list[RolloutGroup]:
    """Roll out some prompts on this process; all processes must call it with equally many prompts.

    Args:
        trainer (`GRPOTrainer`): The trainer, borrowed with `bridge.preserve_trainer_state`.
        prompts (sequence of `int`): Rows of the dataset.
        seed (`int`): Seed of the sampling.
        success (`SuccessRule`): The rule for right rollouts.
        dataset (`datasets.Dataset`, *optional*): The dataset of the prompts; default: the training dataset.
    """
    count = trainer.num_generations
    dataset = trainer.train_dataset if dataset is None else dataset
    rows = [int(prompt) for prompt in prompts for _ in range(count)]
    inputs, rewards = inference.roll_out(trainer, training_rows(trainer, dataset, rows), seed)
    images = image_counts(inputs)
    groups = []
    for i, prompt in enumerate(prompts):
        part = slice(i * count, (i + 1) * count)
        group_rewards = rewards[part].cpu()
        raw = _rows_of(inputs, part)
        group_inputs, lengths = _without_padding_of_others(raw)
        group = RolloutGroup(
            prompt=int(prompt),
            inputs=group_inputs,
            rewards=group_rewards,
            successes=success.successes(group_rewards),
            lengths=lengths,
            images=sum(images[part]),
            raw=raw,
        )
        groups.append(group)
    return groups


def _rows_of(inputs: Mapping[str, Any], rows: slice | Tensor) -> dict[str, Tensor]:
    """Return some rows of TRL's tensors, on the CPU; scalars of the whole generation are kept as they are."""
    tensors = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[name] = value[rows].cpu() if value.ndim else value.cpu()
    return tensors


def _without_padding_of_others(
    raw: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the rows of one prompt, without padding that only its neighbours needed, and their completion lengths."""
    prompt_width, completion_width = raw["prompt_ids"].shape[1], raw["completion_ids"].shape[1]
    lengths = raw["completion_mask"].sum(dim=1)
    prompt_length = int(raw["prompt_mask"].sum(dim=1).max())
    # Truncated completions may be masked completely. One column is kept, so that shapes stay valid.
    completion_length = max(1, int(lengths.max()))
    inputs: dict[str, Tensor] = {}
    for name, value in raw.items():
        if value.ndim == 0 or name in _LEFT_OUT:
            continue
        if name.startswith("prompt_"):
            value = value[:, prompt_width - prompt_length :]
        elif value.ndim == 2 and value.shape[1] == completion_width:
            value = value[:, :completion_length]
        inputs[name] = value
    # The DAPO normaliser counts the tokens of the batch, and here the batch is the prompt.
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    inputs["num_items_in_batch"] = mask.sum().clamp(min=1)  # trl 1.8 divides by it without a clamp
    return inputs, lengths


def token_batch(
    groups: Sequence[RolloutGroup],
    device: torch.device,
    pad_token_id: int,
    rows: slice = slice(None),
) -> TokenBatch:
    """Pad the rollouts of some prompts into one batch.

    Args:
        groups (sequence of `RolloutGroup`): P prompts.
        device (`torch.device`): Device of the batch.
        pad_token_id (`int`): Padding token.
        rows (`slice`): The rollouts of each prompt to include.
    """
    prompt_width = max(group.inputs["prompt_ids"].shape[1] for group in groups)
    completion_width = max(group.inputs["completion_ids"].shape[1] for group in groups)
    ids, masks = [], []
    for group in groups:
        # Prompts are padded on the left and completions on the right, as in TRL.
        left = prompt_width - group.inputs["prompt_ids"].shape[1]
        right = completion_width - group.inputs["completion_ids"].shape[1]
        prompt_ids = group.inputs["prompt_ids"][rows]
        completion_ids = group.inputs["completion_ids"][rows]
        prompt_mask = group.inputs["prompt_mask"][rows]
        completion_mask = group.inputs["completion_mask"][rows]
        padded_prompts = pad(prompt_ids, (left, 0), value=pad_token_id)
        padded_completions = pad(completion_ids, (0, right), value=pad_token_id)
        ids.append(torch.cat([padded_prompts, padded_completions], dim=1))
        padded_masks = [pad(prompt_mask, (left, 0)), pad(completion_mask, (0, right))]
        masks.append(torch.cat(padded_masks, dim=1))
    return TokenBatch(
        input_ids=torch.cat(ids).to(device),
        attention_mask=torch.cat(masks).to(device),
        completion_length=completion_width,
        prompts=len(groups),
    )


# ---- Texts of rollouts ----------------------------------------------------------------------------------------------
# A shard holds the texts as one tensor of bytes. They are written with the shard, so they exist whenever the shard
# does, and a resumed run has them without rolling out again. Only the texts of the best and the worst prompts are
# read.

MAX_CHARACTERS = 4000
"""Maximum length of a saved text. A longer text keeps its beginning and its end, where the answer is."""

Decode = Callable[[Sequence[int]], str]


def kept_texts(groups: Sequence[RolloutGroup], count: int, decode: Decode) -> Tensor:
    """Return the saved rollouts of a shard, as bytes.

    Args:
        groups (sequence of `RolloutGroup`): The rollouts of its prompts.
        count (`int`): Number of rollouts to save of each prompt.
        decode (callable): Token ids → text.

    Returns:
        `torch.Tensor`: uint8, JSON: for each prompt a list of `{"text", "right", "tokens"}`.
    """
    samples = []
    for group in groups:
        rollouts = _varied(group.successes.tolist(), count)
        samples.append([_sample(group, rollout, decode) for rollout in rollouts])
    content = json.dumps(samples).encode()
    # A bytearray, since tensors share memory and bytes are read-only.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _varied(successes: Sequence[float], count: int) -> list[int]:
    """Choose rollouts with the most variety: right and wrong ones alternate."""
    right = [i for i, success in enumerate(successes) if success > 0.5]
    others = [i for i in range(len(successes)) if i not in right]
    turns = itertools.chain.from_iterable(itertools.zip_longest(right, others))
    return [rollout for rollout in turns if rollout is not None][:count]


def _sample(group: RolloutGroup, rollout: int, decode: Decode) -> dict[str, Any]:
    mask = group.inputs["completion_mask"][rollout].bool()
    tokens = group.inputs["completion_ids"][rollout][mask].tolist()
    success = float(group.successes[rollout])
    return {
        "text": clipped(decode(tokens)),
        "right": None if math.isnan(success) else success > 0.5,
        "tokens": int(group.lengths[rollout]),
    }


def clipped(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Return the text, or its beginning and end with a note of what is left out between them."""
    if len(text) <= limit:
        return text
    head = limit * 3 // 4
    tail = limit - head
    left_out = len(text) - limit
    return f"{text[:head]}\n… {left_out:,} characters left out …\n{text[-tail:]}"


# ---- Prompts per generation call ------------------------------------------------------------------------------------
# - vLLM schedules by itself, so a call takes a whole shard. A request to a server holds at most 1,024 prompts, those
#   of all processes together.
# - With transformers, a call makes as many rollouts as fit into half of the memory that training leaves. Memory is
#   taken by the cache of prompt and completion, the logits, and the forward pass over the prompt, all computed from
# the   model's config. On a CPU the limits are `CPU_BYTES` and `CPU_ROLLOUTS`.
# - The number is never smaller than training generates at once, nor larger than a shard. All processes use the
#   smallest number of any process.

CPU_ROLLOUTS = 512
"""Maximum rollouts of a call on a CPU: twice as many gain nothing (`benchmarks/scoring_batch.py`)."""

CPU_BYTES = 1 << 30
"""Memory of a call on a CPU; equal on every machine, so that the same prompts are rolled out together."""

REQUEST_PROMPTS = 1024
"""Maximum number of prompts of one request to a vLLM server (`VLLM_MAX_COMPLETION_PROMPTS`, vLLM 0.31)."""

# Number of float32 copies of vocabulary size that sampling holds at once: logits, scores, probabilities, sort order.
_LOGIT_COPIES = 4
# Hidden states and inner MLP states of a layer, in hidden sizes; an MLP is four to six hidden sizes wide.
_PASS_WIDTHS = 24
# Gradients and Adam's two moments in float32; training may not have allocated them yet.
_TRAINING_BYTES = 12
# The longest prompts are searched by text length, and only this many of them are tokenized.
_LONGEST = 16


def default_scoring_batch_prompts(
    trainer: GRPOTrainer, config: LearnAlignConfig, ranks: Ranks
) -> int:
    """Return the prompts of one generation call of a process: the setting, or a number from engine and memory.

    The function is collective over all ranks, and all get the same number.

    Args:
        trainer (`GRPOTrainer`): The trainer, before `train()`.
        config (`LearnAlignConfig`): Settings, with `scoring_batch_prompts` and `shard_size`.
        ranks (`Ranks`): The distributed processes.
    """
    if config.scoring_batch_prompts is not None:
        return config.scoring_batch_prompts
    planned = planned_scoring_batch_prompts(trainer.args, config, ranks.count)
    least = prompts_of_training(trainer.args)
    prompts = planned
    # A custom rollout function may not limit its memory, and the memory of environments is unknown: same size as in
    # training.
    if trainer.rollout_func is not None or trainer.environment_factories is not None:
        prompts = least
    elif not trainer.use_vllm:
        fitting = rollouts_that_fit(trainer) // trainer.num_generations
        prompts = max(least, min(_power_of_two(fitting), config.shard_size))
    return min(ranks.gather([prompts]))


def planned_scoring_batch_prompts(
    args: GRPOConfig, config: LearnAlignConfig, processes: int
) -> int:
    """Return the same before a model is loaded: exact for vLLM and with the setting, otherwise a lower bound.

    Args:
        args (`GRPOConfig`): Settings of the trainer.
        config (`LearnAlignConfig`): Settings, with `scoring_batch_prompts` and `shard_size`.
        processes (`int`): Number of processes.
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
    """Return the number of prompts that a process generates for at once in training; at least 1."""
    rollouts = args.per_device_train_batch_size * args.steps_per_generation
    return max(1, rollouts // args.num_generations)


def rollouts_that_fit(trainer: GRPOTrainer) -> int:
    """Return the number of rollouts that fit into this process's memory; 0 if it is unknown."""
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
        logits (`int`): Logits of the next token, with all copies made by sampling.
        prompt_pass (`int`): Inner states of a layer, of the whole prompt.
    """

    cache: int
    logits: int
    prompt_pass: int

    @property
    def rollout(self) -> int:
        """Sum of the three."""
        return self.cache + self.logits + self.prompt_pass

    @staticmethod
    def of(trainer: GRPOTrainer) -> Footprint | None:
        """Return the footprint for a trainer's model, longest prompt and completion; `None` without attention."""
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
    """Return the tokens of the longest prompt, searched among those with the longest text."""
    longest = heapq.nlargest(_LONGEST, prompts_of(trainer.train_dataset), key=_text_length)
    tokens = prompt_token_lists(trainer, longest)
    return max(len(ids) for ids in tokens)


def memory_left(trainer: GRPOTrainer) -> int:
    """Return the bytes of the GPU left by other processes, weights, gradients and optimizer; may be negative.

    The number is computed and not measured: the model may not be loaded yet, and training has allocated nothing.
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
    # Weights count in one piece even if they are partitioned, since generation gathers them.
    is_partitioned = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    parts = trainer.accelerator.num_processes if is_partitioned else 1
    return free + own - weights - trained * _TRAINING_BYTES // parts


def _text_length(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, str) else len(str(prompt))


def _power_of_two(number: int) -> int:
    """Return the largest power of two up to a number (0 below 1): coarse, so that a little memory changes nothing."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0
