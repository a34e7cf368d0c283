"""Texts of a few rollouts of each candidate, kept beside its measurements so that a report can show them.

A shard holds them as one tensor of bytes: written with the shard, they survive whatever the shard survives, and are
there after a resume without a rollout being made again. Only those of the best and the worst prompts are read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trl_learnalign.measuring.groups import RolloutGroup

MAX_CHARACTERS = 4000
"""Of a kept text; longer ones keep their beginning and their end, where the answer is."""

Decode = Callable[[Sequence[int]], str]


def kept_texts(groups: Sequence[RolloutGroup], count: int, decode: Decode) -> torch.Tensor:
    """The kept rollouts of a shard, as bytes.

    Args:
        groups (sequence of `RolloutGroup`): Its prompts' rollouts.
        count (`int`): Rollouts to keep of each prompt.
        decode (callable): Token ids → text.

    Returns:
        `torch.Tensor`: uint8, JSON: for each prompt a list of `{"text", "right", "tokens"}`.
    """
    kept = [
        [_sample(group, i, decode) for i in _varied(group.successes.tolist(), count)]
        for group in groups
    ]
    return torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8)


def _varied(successes: Sequence[float], count: int) -> list[int]:
    """Rollouts that show most: a right one, a wrong one, and so on in turn."""
    right = [i for i, success in enumerate(successes) if success == 1]
    others = [i for i, success in enumerate(successes) if success != 1]
    turns = [
        rollouts[k]
        for k in range(len(successes))
        for rollouts in (right, others)
        if k < len(rollouts)
    ]
    return turns[:count]


def _sample(group: RolloutGroup, rollout: int, decode: Decode) -> dict[str, Any]:
    mask = group.inputs["completion_mask"][rollout].bool()
    success = float(group.successes[rollout])
    return {
        "text": clipped(decode(group.inputs["completion_ids"][rollout][mask].tolist())),
        "right": None if success != success else bool(success),
        "tokens": int(group.lengths[rollout]),
    }


def clipped(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text, or its beginning and end with a note of what is left out between them."""
    if len(text) <= limit:
        return text
    head, tail = limit * 3 // 4, limit - limit * 3 // 4
    return f"{text[:head]}\n… {len(text) - limit:,} characters left out …\n{text[-tail:]}"
