"""The pool of a stage, the input of selectors: candidates and their measurements.

Axes: `P` candidates, `G` rollouts, `D` feature dimensions, `H` hidden dimensions, `N` passes of a previous run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from trl_learnalign import scoring
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.records.store import ShardStore

TEXTS = "rollout_texts"
"""Name of the tensor in a shard that holds the saved rollouts, as bytes."""


@dataclass(frozen=True)
class RolloutTexts:
    """Saved rollouts of a pool, on disk.

    Args:
        store (`ShardStore`): The store.
        numbers (`tuple[int]`): Shards of this rank.
        shard_size (`int`): Prompts per shard.
        ranks (`Ranks`): The distributed processes.
    """

    store: ShardStore
    numbers: tuple[int, ...]
    shard_size: int
    ranks: Ranks

    def of(self, positions: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        """Return the saved rollouts of some candidates; collective over all ranks.

        Args:
            positions (sequence of `int`): Positions in the pool.

        Returns:
            `dict`: Position → its rollouts; positions without saved rollouts are left out.
        """
        texts = []
        for number in sorted({position // self.shard_size for position in positions}):
            if number not in self.numbers:  # belongs to another rank
                continue
            tensor = self.store.read(number).get(TEXTS)
            if tensor is None:
                continue
            shard_texts = json.loads(bytes(tensor.tolist()))
            for position in positions:
                if shard_texts and position // self.shard_size == number:
                    texts.append((position, shard_texts[position % self.shard_size]))
        return {position: rollouts for position, rollouts in self.ranks.gather(texts) if rollouts}


@dataclass(frozen=True)
class FeatureChunks:
    """Features of the pool, read shard by shard from disk; an iterable of `(positions (c,), features (c, D))`.

    It can be iterated any number of times.

    Args:
        store (`ShardStore`): The store.
        numbers (`tuple[int]`): Shards of this rank.
        shard_size (`int`): Prompts per shard.
        half (`int`, *optional*): The features of the first (0) or second (1) half of each prompt's rollouts, if they
            were saved (`LearnAlignConfig.reliability`).
    """

    store: ShardStore
    numbers: tuple[int, ...]
    shard_size: int
    half: int | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, shard in self.store.read_all(self.numbers):
            if len(shard["feature_rows"]):
                yield shard["feature_rows"] + number * self.shard_size, self._features(shard)

    def of_half(self, half: int) -> FeatureChunks:
        """Return the features of one half of each prompt's rollouts."""
        return replace(self, half=half)

    def _features(self, shard: dict[str, Tensor]) -> Tensor:
        if self.half is None:
            return shard["features"]
        first = shard["first_half"]
        return first if self.half == 0 else shard["features"] - first


@dataclass(frozen=True)
class JoinedChunks:
    """Features of a pool that was measured in several parts; same interface as [`FeatureChunks`].

    Args:
        parts (`tuple[FeatureChunks]`): The parts.
        places (`tuple[torch.Tensor]`): Positions in the pool of each part's prompts.
    """

    parts: tuple[FeatureChunks, ...]
    places: tuple[Tensor, ...]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chunks, places in zip(self.parts, self.places, strict=True):
            for positions, features in chunks:
                yield places[positions], features

    def of_half(self, half: int) -> JoinedChunks:
        """Return the features of one half of each prompt's rollouts."""
        halves = [part.of_half(half) for part in self.parts]
        return replace(self, parts=tuple(halves))


@dataclass(frozen=True)
class JoinedTexts:
    """Saved rollouts of a pool that was measured in several parts; same interface as [`RolloutTexts`].

    Args:
        parts (`tuple[RolloutTexts]`): The parts.
        places (`tuple[torch.Tensor]`): Positions in the pool of each part's prompts.
    """

    parts: tuple[RolloutTexts, ...]
    places: tuple[Tensor, ...]

    def of(self, positions: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        """See [`RolloutTexts.of`]."""
        found = {}
        for texts, places in zip(self.parts, self.places, strict=True):
            pool_position = dict(enumerate(places.tolist()))
            wanted = [own for own, position in pool_position.items() if position in positions]
            for own, rollouts in texts.of(wanted).items():
                found[pool_position[own]] = rollouts
        return found


@dataclass
class Pool:
    """Candidates of one stage. Measurements that the selector does not need are `None` or empty.

    Args:
        prompts (`np.ndarray`): Rows of the training dataset, `(P,)` int64 ascending.
        dataset (`datasets.Dataset`): The training dataset.
        seed (`int`): `LearnAlignConfig.selection_seed`.
        phase (`str`): `Phase.name`.
        successes (`torch.Tensor`, *optional*): `(P, G)` float64 from 0 to 1, and NaN (cannot be scored).
        lengths (`torch.Tensor`, *optional*): Completion tokens, `(P, G)`.
        rewards (`torch.Tensor`, *optional*): `(P, G, F)`.
        texts (`RolloutTexts`, *optional*): Texts of a few rollouts of each candidate, on disk.
        features (iterable, *optional*): Gradient features of this rank, see [`FeatureChunks`].
        feature_dim (`int`): D.
        finite (`torch.Tensor`, *optional*): `(P,)` bool: whether the gradient feature is finite (or was not needed).
        target (`torch.Tensor`, *optional*): Mean gradient feature of a validation set, `(D,)`.
        hidden (iterable): Hidden-state features of this rank, as `features`, with H dimensions.
        hidden_dim (`int`): H.
        has_text (`torch.Tensor`, *optional*): `(P,)` bool: whether there was a text to compute hidden states of.
        nll (`torch.Tensor`, *optional*): Mean negative log-likelihood per token of the solution given the prompt, in
            nats, `(P,)` float64; NaN without a solution.
        nll_alone (`torch.Tensor`, *optional*): The same without the prompt.
        solution_tokens (`torch.Tensor`, *optional*): Tokens of the solution, `(P,)`; 0 without one.
        truncated (`torch.Tensor`, *optional*): `(P,)` bool: whether the solution was too long to be read whole.
        ratings (`torch.Tensor`, *optional*): Probabilities of "1" to "5" as the next token after each of five rating
            prompts, `(P, 5, 5)` float64; NaN without a solution.
        history (`np.ndarray`, *optional*): Success rate in each pass of a previous run, `(P, N)`, NaN where unknown.
        history_mean (`np.ndarray`, *optional*): Its mean over all prompts of that run, `(N,)`.
        wanted (`int`, *optional*): Maximum number of prompts that will be selected, for selectors that pick one prompt
            after the other; `None` if it is unknown.
        ranks (`Ranks`): The processes that share the features.
        config (`LearnAlignConfig`): Settings, with the options of the selectors.
    """

    prompts: np.ndarray
    dataset: Any
    seed: int
    phase: str
    successes: Tensor | None = None
    lengths: Tensor | None = None
    rewards: Tensor | None = None
    texts: RolloutTexts | JoinedTexts | None = None
    features: Any = ()
    feature_dim: int = 0
    finite: Tensor | None = None
    target: Tensor | None = None
    hidden: Any = ()
    hidden_dim: int = 0
    has_text: Tensor | None = None
    nll: Tensor | None = None
    nll_alone: Tensor | None = None
    solution_tokens: Tensor | None = None
    truncated: Tensor | None = None
    ratings: Tensor | None = None
    history: np.ndarray | None = None
    history_mean: np.ndarray | None = None
    wanted: int | None = None
    ranks: Ranks = field(default_factory=Ranks)
    config: LearnAlignConfig = field(default_factory=LearnAlignConfig)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def success_rate(self) -> np.ndarray:
        """`p`, `(P,)`; NaN where no rollout can be scored or none was made."""
        if self.successes is None:
            return np.full(len(self), np.nan)
        return scoring.success_rate(self.successes).numpy()

    @property
    def learnability(self) -> np.ndarray:
        """`V = p (1 - p)`, or its unbiased estimate if the settings ask for it, `(P,)`.

        It is 0 where no token of any rollout is trained on (`mask_truncated_completions` has masked them all).
        """
        if self.successes is None:
            return np.full(len(self), np.nan)
        unbiased = self.config.unbiased_learnability
        learnability = scoring.learnability(self.successes, unbiased).numpy()
        if self.lengths is None:
            return learnability
        has_tokens = (self.lengths.numpy() > 0).any(axis=1)
        return learnability * has_tokens
