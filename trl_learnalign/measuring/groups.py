"""Prompts → rollout groups: what one prompt's `G` rollouts say, and what its gradient needs.

Axes: `G` rollouts of a prompt, `Q` prompt tokens, `C` completion tokens, `F` reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

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
        raw (`dict`, *optional*): The same rows as TRL gave them: all of its tensors, with the padding of the whole
            generation. For checks; `inputs` are views of it.
    """

    prompt: int
    inputs: dict[str, torch.Tensor]
    rewards: torch.Tensor
    successes: torch.Tensor
    lengths: torch.Tensor
    raw: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rollouts(self) -> int:
        """G."""
        return len(self.successes)

    @property
    def tokens(self) -> int:
        """Tokens of one padded row, `Q + C`."""
        return self.inputs["prompt_ids"].shape[1] + self.inputs["completion_ids"].shape[1]

    @property
    def prompt_tokens(self) -> torch.Tensor:
        """Prompt tokens without padding, once for each rollout; scalar."""
        return self.inputs["prompt_mask"].sum()

    def only(self, rollout: int) -> RolloutGroup:
        """One rollout as a group of its own; its advantage stays what it was among all."""
        return self.take(torch.tensor([rollout]))

    def take(self, rows: torch.Tensor) -> RolloutGroup:
        """Some rollouts as a group of their own; their advantages stay what they were among all."""
        inputs, lengths = _own_inputs(_rows_of(self.inputs, rows))
        raw = _rows_of(self.raw, rows)
        return RolloutGroup(
            self.prompt, inputs, self.rewards[rows], self.successes[rows], lengths, raw
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
    groups = []
    for i, prompt in enumerate(prompts):
        own = slice(i * count, (i + 1) * count)
        own_rewards = rewards[own].cpu()
        raw = _rows_of(inputs, own)
        group_inputs, lengths = _own_inputs(raw)
        successes = success.successes(own_rewards)
        groups.append(RolloutGroup(int(prompt), group_inputs, own_rewards, successes, lengths, raw))
    return groups


def _rows_of(inputs: Mapping[str, Any], rows: slice | torch.Tensor) -> dict[str, torch.Tensor]:
    """Some rows of TRL's tensors, on the CPU; what is one number for the whole generation stays."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return {
        name: value[rows].cpu() if value.ndim else value.cpu() for name, value in tensors.items()
    }


def _own_inputs(raw: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The rows of one prompt, with the padding cut that only its neighbours needed; and their completion tokens."""
    prompt_width, completion_width = raw["prompt_ids"].shape[1], raw["completion_ids"].shape[1]
    lengths = raw["completion_mask"].sum(dim=1)
    prompt_length = int(raw["prompt_mask"].sum(dim=1).max())
    # Truncated completions may be masked away altogether; one column stays, so that shapes stay valid.
    completion_length = max(1, int(lengths.max()))
    own: dict[str, torch.Tensor] = {}
    for name, value in raw.items():
        if value.ndim == 0 or name in _LEFT_OUT:
            continue
        if name.startswith("prompt_"):
            value = value[:, prompt_width - prompt_length :]
        elif value.ndim == 2 and value.shape[1] == completion_width:
            value = value[:, :completion_length]
        own[name] = value
    # The DAPO normaliser counts the tokens of the batch, and here the prompt is the batch.
    mask = (
        own["completion_mask"] * own["tool_mask"] if "tool_mask" in own else own["completion_mask"]
    )
    own["num_items_in_batch"] = mask.sum()
    return own, lengths


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
    width = max(group.inputs["prompt_ids"].shape[1] for group in groups)
    length = max(group.inputs["completion_ids"].shape[1] for group in groups)
    ids, mask = [], []
    for group in groups:
        part = {
            name: group.inputs[name][rows]
            for name in ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")
        }
        left, right = width - part["prompt_ids"].shape[1], length - part["completion_ids"].shape[1]
        pad = torch.nn.functional.pad
        ids.append(
            torch.cat(
                [
                    pad(part["prompt_ids"], (left, 0), value=pad_token_id),
                    pad(part["completion_ids"], (0, right), value=pad_token_id),
                ],
                dim=1,
            )
        )
        mask.append(
            torch.cat(
                [pad(part["prompt_mask"], (left, 0)), pad(part["completion_mask"], (0, right))],
                dim=1,
            )
        )
    return TokenBatch(torch.cat(ids).to(device), torch.cat(mask).to(device), length, len(groups))
