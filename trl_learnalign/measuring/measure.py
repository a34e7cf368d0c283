"""What a measurement of a stage's candidates is: whom to measure, how, and what is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trl_learnalign.measuring.progress import Tally
from trl_learnalign.pool import FeatureChunks

ROWS, FEATURES, FIRST_HALF = "feature_rows", "features", "first_half"
SECONDS, TOKENS_READ = "seconds", "tokens_read"


@dataclass(frozen=True)
class Work:
    """Whom to measure, and where the results go.

    Args:
        name (`str`): Name of the stage, for messages.
        candidates (`np.ndarray`): Rows of the dataset, ascending.
        folder (`Path`): The stage's folder; each measure has its own below.
        fingerprint (mapping): What all results depend on (dataset, weights, step).
        shard_size (`int`): Prompts per shard.
        quiet (`bool`): No progress bar, but plain lines in the log.
    """

    name: str
    candidates: np.ndarray
    folder: Path
    fingerprint: Mapping[str, Any]
    shard_size: int
    quiet: bool = False

    @property
    def shards(self) -> list[np.ndarray]:
        """The candidates of each shard."""
        starts = range(0, len(self.candidates), self.shard_size)
        return [self.candidates[start : start + self.shard_size] for start in starts]


class Measure(ABC):
    """One kind of measurement.

    A shard's result has one row per prompt in the tensors named by `small`; these are gathered on all ranks. A result
    too large for that (features) comes as `features` with the rows it belongs to in `feature_rows`, and stays on disk.
    """

    name: str
    # Beside these, a result may have `tokens_read`, (1,): tokens of forward passes.
    small: tuple[str, ...]

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Settings that decide the result, as plain JSON values."""

    @abstractmethod
    def calls(self, prompts: np.ndarray) -> int:
        """Model calls that a shard takes."""

    @abstractmethod
    def session(self) -> AbstractContextManager[Any]:
        """Borrow what measuring needs, and give it back."""

    @abstractmethod
    def measure(
        self,
        number: int,
        prompts: np.ndarray,
        calls: int,
        keep: bool,
    ) -> dict[str, Tensor]:
        """Measure a shard; called by all ranks together with the same `calls`.

        Args:
            number (`int`): Number of the shard.
            prompts (`np.ndarray`): Its prompts.
            calls (`int`): Model calls to make, at least `self.calls(prompts)`: calls may be collectives.
            keep (`bool`): Whether the result is wanted; otherwise this rank only keeps the others company.
        """

    def checks(self) -> dict[str, Any]:
        """What a session has found out about its own results, as plain JSON values; kept beside the shards."""
        return {}

    def take_checks(self, checks: Mapping[str, Any]) -> None:  # noqa: B027
        """What the session that has measured all shards has found out, where nothing is left to measure."""

    def tally(self, prompts: int, result: Mapping[str, Tensor]) -> Tally:
        """What to say beside the progress bar after a shard."""
        return Tally(prompts)


@dataclass(frozen=True)
class Measured:
    """What a measure found.

    Args:
        values (`dict[str, torch.Tensor]`): `small` results, `(P, …)`, on every rank.
        features (`FeatureChunks`): `features` of this rank's shards.
        seconds (`float`): Wall time, also of earlier runs whose shards were found.
        tokens_read (`int`): Tokens of forward passes without rollouts, likewise, over all ranks.
    """

    values: dict[str, Tensor]
    features: FeatureChunks
    seconds: float
    tokens_read: int = 0
