"""Prompts → rollout groups: what one prompt's `G` rollouts say, and what its gradient needs.

Axes: `G` rollouts of a prompt, `Q` prompt tokens, `C` completion tokens, `F` reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trl_learnalign import bridge
from trl_learnalign.gradients.capture import TokenBatch
from trl_learnalign.success import SuccessRule

if TYPE_CHECKING:
    from trl import GRPOTrainer

# What TRL says of the policy that sampled is left out: the policy that is scored is the one that sampled, so the
# ratio of new to old probabilities is 1 by construction, also with dropout or another attention kernel.
_LEFT_OUT = ("old_per_token_logps",)


@dataclass
class RolloutGroup:
    """One prompt's rollouts, without padding beyond its own, on the CPU.

    Args:
        prompt (`int`): Row of the dataset.
        inputs (`dict`): TRL's inputs of the loss for the `G` rollouts: `prompt_ids` and `prompt_mask` `(G, Q)`,
            `completion_ids`, `completion_mask` and per-token terms `(G, C)`, `advantages` `(G,)`.
        rewards (`torch.Tensor`): `(G, F)`, NaN where a function returned `None`.
        successes (`torch.Tensor`): `(G,)` float64 of 0, 1, and NaN where the rollout is not scorable.
        lengths (`torch.Tensor`): `(G,)` completion tokens.
        images (`int`, *optional*, defaults to 0): Images in the rollouts, which `inputs` do not have.
        raw (`dict`, *optional*): The same rows as TRL gave them: all of its tensors, with the padding of the whole
            generation. For checks; `inputs` are views of it.
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
        """G."""
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
        """One rollout as a group of its own; its advantage stays what it was among all."""
        return self.take(torch.tensor([rollout]))

    def take(self, rows: Tensor) -> RolloutGroup:
        """Some rollouts as a group of their own; their advantages stay what they were among all."""
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
    """Rollouts of some prompts on this process; all processes must call it with equally many prompts.

    Args:
        trainer (`GRPOTrainer`): The trainer, borrowed with `bridge.left_as_found`.
        prompts (sequence of `int`): Rows of the dataset.
        seed (`int`): Seed of the sampling.
        success (`SuccessRule`): Which rollouts are right.
        dataset (`datasets.Dataset`, *optional*): Where the prompts are; default: the training dataset.
    """
    count = trainer.num_generations
    dataset = trainer.train_dataset if dataset is None else dataset
    rows = [int(prompt) for prompt in prompts for _ in range(count)]
    inputs, rewards = bridge.roll_out(trainer, bridge.training_rows(trainer, dataset, rows), seed)
    images = bridge.image_counts(inputs)
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
    """Some rows of TRL's tensors, on the CPU; what is one number for the whole generation stays."""
    tensors = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[name] = value[rows].cpu() if value.ndim else value.cpu()
    return tensors


def _without_padding_of_others(
    raw: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """The rows of one prompt, with the padding cut that only its neighbours needed; and their completion tokens."""
    prompt_width, completion_width = raw["prompt_ids"].shape[1], raw["completion_ids"].shape[1]
    lengths = raw["completion_mask"].sum(dim=1)
    prompt_length = int(raw["prompt_mask"].sum(dim=1).max())
    # Truncated completions may be masked away altogether; one column stays, so that shapes stay valid.
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
    # The DAPO normaliser counts the tokens of the batch, and here the prompt is the batch.
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    inputs["num_items_in_batch"] = mask.sum().clamp(min=1)  # trl 1.8 divides by it as it is
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
        device (`torch.device`): Where the batch goes.
        pad_token_id (`int`): Fills the padding.
        rows (`slice`): Which rollouts of each prompt.
    """
    prompt_width = max(group.inputs["prompt_ids"].shape[1] for group in groups)
    completion_width = max(group.inputs["completion_ids"].shape[1] for group in groups)
    ids, masks = [], []
    for group in groups:
        # Prompts are padded on the left and completions on the right, as TRL does.
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
