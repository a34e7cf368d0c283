"""The pool of a stage: its candidate prompts and what has been measured of them. What selectors see.

Axes: `P` candidates, `G` rollouts, `D` feature dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trl_learnalign import scoring
from trl_learnalign.distributed import Ranks
from trl_learnalign.store import ShardStore


@dataclass(frozen=True)
class FeatureChunks:
    """Features of the pool, shard by shard from disk: iterates `(positions (c,), features (c, D))` as often as asked.

    Args:
        store (`ShardStore`): Where they lie.
        numbers (`tuple[int]`): Shards of this rank.
        shard_prompts (`int`): Prompts per shard.
    """

    store: ShardStore
    numbers: tuple[int, ...]
    shard_prompts: int

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, shard in self.store.read_all(self.numbers):
            if len(shard["feature_rows"]):
                yield shard["feature_rows"] + number * self.shard_prompts, shard["features"]


@dataclass
class Pool:
    """Candidates of one stage.

    Args:
        prompts (`np.ndarray`): Rows of the training dataset, `(P,)` int64 ascending.
        dataset (`datasets.Dataset`): The training dataset.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        phase (`int`): `Phase.index`.
        successes (`torch.Tensor`, *optional*): `(P, G)` float64 of 0, 1 and NaN (not scorable).
        lengths (`torch.Tensor`, *optional*): Completion tokens, `(P, G)`.
        rewards (`torch.Tensor`, *optional*): `(P, G, F)`.
        features (iterable, *optional*): Gradient features of this rank, see [`FeatureChunks`].
        feature_dim (`int`): D.
        finite (`torch.Tensor`, *optional*): `(P,)` bool: the gradient feature is finite (or was not needed).
        ranks (`Ranks`): The processes that share the features.
        extra (`dict`): Anything else a selector asked to be measured.
    """

    prompts: np.ndarray
    dataset: Any
    seed: int
    phase: int
    successes: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    features: Any = ()
    feature_dim: int = 0
    finite: torch.Tensor | None = None
    ranks: Ranks = field(default_factory=Ranks)
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def success_rate(self) -> np.ndarray:
        """`p`, `(P,)`; NaN where no rollout is scorable or none was made."""
        if self.successes is None:
            return np.full(len(self), np.nan)
        return scoring.success_rate(self.successes).numpy()

    @property
    def learnability(self) -> np.ndarray:
        """`V = p (1 - p)`, `(P,)`."""
        if self.successes is None:
            return np.full(len(self), np.nan)
        return scoring.learnability(self.successes).numpy()
