"""Texts of a few rollouts of each candidate, kept beside its measurements so that a report can show them.

A shard holds them as one tensor of bytes: written with the shard, they survive whatever the shard survives, and are
there after a resume without a rollout being made again. Only those of the best and the worst prompts are read back.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_learnalign.measuring.groups import RolloutGroup

MAX_CHARACTERS = 4000
"""Of a kept text; longer ones keep their beginning and their end, where the answer is."""

Decode = Callable[[Sequence[int]], str]


def kept_texts(groups: Sequence[RolloutGroup], count: int, decode: Decode) -> Tensor:
    """The kept rollouts of a shard, as bytes.

    Args:
        groups (sequence of `RolloutGroup`): Its prompts' rollouts.
        count (`int`): Rollouts to keep of each prompt.
        decode (callable): Token ids → text.

    Returns:
        `torch.Tensor`: uint8, JSON: for each prompt a list of `{"text", "right", "tokens"}`.
    """
    samples = []
    for group in groups:
        rollouts = _varied(group.successes.tolist(), count)
        samples.append([_sample(group, rollout, decode) for rollout in rollouts])
    content = json.dumps(samples).encode()
    # A bytearray: tensors share memory, and bytes cannot be written to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _varied(successes: Sequence[float], count: int) -> list[int]:
    """Rollouts that show most: a right one, a wrong one, and so on in turn."""
    right = [i for i, success in enumerate(successes) if success == 1]
    others = [i for i, success in enumerate(successes) if success != 1]
    turns = itertools.chain.from_iterable(itertools.zip_longest(right, others))
    return [rollout for rollout in turns if rollout is not None][:count]


def _sample(group: RolloutGroup, rollout: int, decode: Decode) -> dict[str, Any]:
    mask = group.inputs["completion_mask"][rollout].bool()
    tokens = group.inputs["completion_ids"][rollout][mask].tolist()
    success = float(group.successes[rollout])
    return {
        "text": clipped(decode(tokens)),
        "right": None if math.isnan(success) else bool(success),
        "tokens": int(group.lengths[rollout]),
    }


def clipped(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text, or its beginning and end with a note of what is left out between them."""
    if len(text) <= limit:
        return text
    head = limit * 3 // 4
    tail = limit - head
    left_out = len(text) - limit
    return f"{text[:head]}\n… {left_out:,} characters left out …\n{text[-tail:]}"
