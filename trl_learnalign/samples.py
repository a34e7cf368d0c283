"""Texts of a few rollouts of each candidate, kept beside its measurements so that a report can show them.

A shard holds them as one tensor of bytes: written with the shard, they survive whatever the shard survives, and are
there after a resume without a rollout being made again. Only those of the best and the worst prompts are read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_learnalign.distributed import Ranks
from trl_learnalign.rollouts import RolloutGroup
from trl_learnalign.store import ShardStore

TEXTS = "rollout_texts"

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
    kept = [[_sample(group, i, decode) for i in _varied(group.successes.tolist(), count)] for group in groups]
    return torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8)


def _varied(successes: Sequence[float], count: int) -> list[int]:
    """Rollouts that show most: a right one, a wrong one, and so on in turn."""
    right = [i for i, success in enumerate(successes) if success == 1]
    others = [i for i, success in enumerate(successes) if success != 1]
    turns = [rollouts[k] for k in range(len(successes)) for rollouts in (right, others) if k < len(rollouts)]
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


@dataclass(frozen=True)
class RolloutTexts:
    """Kept rollouts of a pool, on disk.

    Args:
        store (`ShardStore`): Where they lie.
        numbers (`tuple[int]`): Shards of this rank.
        shard_prompts (`int`): Prompts per shard.
        ranks (`Ranks`): The processes.
    """

    store: ShardStore
    numbers: tuple[int, ...]
    shard_prompts: int
    ranks: Ranks

    def of(self, positions: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        """Kept rollouts of some candidates; all ranks call it together.

        Args:
            positions (sequence of `int`): Positions in the pool.

        Returns:
            `dict`: Position → its rollouts; without those of which none were kept.
        """
        found = []
        for number in sorted({position // self.shard_prompts for position in positions} & set(self.numbers)):
            tensor = self.store.read(number).get(TEXTS)
            texts = [] if tensor is None else json.loads(bytes(tensor.tolist()))
            own = (position for position in positions if position // self.shard_prompts == number)
            found += [(position, texts[position % self.shard_prompts]) for position in own if texts]
        return {position: rollouts for position, rollouts in self.ranks.gather(found) if rollouts}


def telling_positions(
    order: Sequence[int], eligible: Sequence[bool], success_rate: Sequence[float], best: int = 5, extremes: int = 2
) -> dict[str, list[int]]:
    """Candidates worth showing, by group: the top and the bottom of the ranking, and prompts without a signal.

    Args:
        order (sequence of `int`): Positions from best to worst, `(P,)`.
        eligible (sequence of `bool`): `(P,)`: has a score of its own.
        success_rate (sequence of `float`): `(P,)`; NaN where there is none.
        best (`int`, *optional*, defaults to `5`): Prompts in each of `"top"` and `"bottom"`.
        extremes (`int`, *optional*, defaults to `2`): Prompts in each of `"always right"` and `"always wrong"`.
    """
    ranked = [int(position) for position in order if eligible[position]]
    top = ranked[:best]
    found = {"top": top, "bottom": [position for position in ranked[-best:] if position not in top]}
    shown = {position for positions in found.values() for position in positions}
    for name, rate in (("always right", 1.0), ("always wrong", 0.0)):
        same = (int(p) for p in order if success_rate[p] == rate and int(p) not in shown)
        found[name] = [position for position, _ in zip(same, range(extremes), strict=False)]
    return {name: positions for name, positions in found.items() if positions}
