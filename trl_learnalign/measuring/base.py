"""Interfaces of measurements, their shared context, and their progress."""

from __future__ import annotations

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.rollout_groups import default_scoring_batch_prompts
from trl_learnalign.pool import FeatureChunks
from trl_learnalign.success import CutOff, SuccessRule

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


# ---- Context --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """A trainer with the options for measuring.

    Args:
        trainer (`GRPOTrainer`): The trainer; measures restore its state.
        config (`LearnAlignConfig`): Settings.
        success (`SuccessRule`): The rule for right rollouts.
        ranks (`Ranks`): The distributed processes.
        scoring_batch_prompts (`int`): Maximum number of prompts of one generation call.
        phase (`str`): `Phase.name`, part of all seeds.
        dataset (`datasets.Dataset`): The dataset of the prompts.
        told (`set[str]`): Phases that were already reported to have no learnable prompt.
    """

    trainer: GRPOTrainer
    config: LearnAlignConfig
    success: SuccessRule
    ranks: Ranks
    scoring_batch_prompts: int
    phase: str
    dataset: Any
    told: set[str] = field(default_factory=set)

    @staticmethod
    def of(
        trainer: GRPOTrainer,
        config: LearnAlignConfig,
        ranks: Ranks | None = None,
        scoring_batch_prompts: int | None = None,
        phase: str = "stage_1",
    ) -> Context:
        """Return the context of a trainer's own dataset.

        Args:
            trainer (`GRPOTrainer`): The trainer.
            config (`LearnAlignConfig`): Settings.
            ranks (`Ranks`, *optional*): The distributed processes; default: this one alone.
            scoring_batch_prompts (`int`, *optional*): Default:
                [`rollout_groups.default_scoring_batch_prompts`], which is collective over all ranks.
            phase (`str`, *optional*, defaults to `"stage_1"`): `Phase.name`.

        Raises:
            `ValueError`: If it is ambiguous which reward function decides success.
        """
        ranks = Ranks() if ranks is None else ranks
        if scoring_batch_prompts is None:
            scoring_batch_prompts = default_scoring_batch_prompts(trainer, config, ranks)
        return Context(
            trainer=trainer,
            config=config,
            success=SuccessRule.of(config, trainer.reward_func_names),
            ranks=ranks,
            scoring_batch_prompts=scoring_batch_prompts,
            phase=phase,
            dataset=trainer.train_dataset,
        )

    def no_signal(self, rewards: Tensor | None, lengths: Tensor | None) -> str | None:
        """Return why no prompt is learnable, with the remedy; `None` if some may be, or nothing was rolled out.

        Args:
            rewards (`torch.Tensor`, *optional*): Rewards of rollouts, `(P, G, F)`.
            lengths (`torch.Tensor`, *optional*): Completion tokens that are trained on, `(P, G)`.
        """
        if rewards is None or lengths is None:
            return None
        args = self.trainer.args
        limit = args.max_completion_length
        is_cut = lengths == 0 if args.mask_truncated_completions else lengths >= limit
        return self.success.problem(rewards, CutOff(float(is_cut.double().mean()), limit))

    def tell(self, problem: str | None, of: str) -> None:
        """Report once that no prompt of the phase is learnable.

        Args:
            problem (`str`, *optional*): Result of [`no_signal`].
            of (`str`): The rollouts that were checked.
        """
        if problem is not None and self.phase not in self.told:
            self.told.add(self.phase)
            logger.warning("%s: %s", of, problem)

    def of_phase(self, phase: str, dataset: Any = None) -> Context:
        """Return the context of another phase, and of another dataset if one is given."""
        return replace(self, phase=phase, dataset=self.dataset if dataset is None else dataset)


@dataclass(frozen=True)
class Validation:
    """A trusted validation set.

    Args:
        dataset (`datasets.Dataset`): Its prompts, with the columns of the training dataset.
        digest (`str`): Its `dataset_digest`.
    """

    dataset: Any
    digest: str


# ---- Progress -------------------------------------------------------------------------------------------------------

LINES = 10
"""Approximate number of plain progress lines per measurement."""


@dataclass
class Tally:
    """Counts of a shard's result.

    Args:
        prompts (`int`): Number of prompts.
        rollouts (`int`): Number of their rollouts.
        learnable (`int`): Number of prompts with learnability above 0.
        note (`str`): Other information about the last shard.
    """

    prompts: int = 0
    rollouts: int = 0
    learnable: int = 0
    note: str = ""

    def add(self, other: Tally) -> None:
        """Add the counts of a shard."""
        self.prompts += other.prompts
        self.rollouts += other.rollouts
        self.learnable += other.learnable
        self.note = other.note


def is_interactive() -> bool:
    """Whether a progress bar that redraws itself can be seen: in a terminal, or in a notebook."""
    return sys.stderr.isatty() or _is_notebook()


def _is_notebook() -> bool:
    """Whether a Jupyter kernel runs this process; an import of its package alone proves nothing."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


class Progress:
    """Counts the prompts of one measurement; a context manager. If it is interrupted, it reports how many are saved.

    Args:
        name (`str`): Stage and measure.
        total (`int`): Number of prompts, over all ranks.
        done (`int`): Number of prompts that were measured before.
        quiet (`bool`): Print nothing.
        interactive (`bool`, *optional*): Show a bar instead of lines; by default if a user can see it.
    """

    def __init__(
        self, name: str, total: int, done: int, quiet: bool, interactive: bool | None = None
    ):
        self.name, self.total, self.done = name, total, done
        self._at_start = self._at_last_line = done
        self._tally = Tally()
        self._began = time.perf_counter()
        bar = is_interactive() if interactive is None else interactive
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=" prompts",
            disable=quiet or not bar,
            dynamic_ncols=True,
        )
        self._lines = not quiet and not bar

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if kind is KeyboardInterrupt:
            kept = f"{self.done:,} of {self.total:,} prompts are kept"
            raise KeyboardInterrupt(f"{self.name}: interrupted, {kept}") from None

    def add(self, prompts: int, tally: Tally) -> None:
        """Count a finished batch of shards.

        Args:
            prompts (`int`): Its prompts, over all ranks.
            tally (`Tally`): Counts of this rank's shard.
        """
        self.done += prompts
        self._tally.add(tally)
        self._bar.set_postfix_str(self._details(), refresh=False)
        self._bar.update(prompts)
        since_last_line = self.done - self._at_last_line
        if self._lines and (self.done >= self.total or since_last_line * LINES >= self.total):
            self._at_last_line = self.done
            logger.info("%s", self.line())

    def line(self) -> str:
        """Return the progress as a line of text."""
        parts = [
            f"{self.done:,} of {self.total:,} prompts ({self.done / self.total:.0%})",
            self._details(),
        ]
        if self.done < self.total:
            left = (self.total - self.done) / self._rate()
            parts.append(f"{tqdm.format_interval(left)} left")
        return f"{self.name}: " + ", ".join(part for part in parts if part)

    def _rate(self) -> float:
        """Prompts per second."""
        seconds = time.perf_counter() - self._began
        return (self.done - self._at_start) / max(seconds, 1e-9)

    def _details(self) -> str:
        tally = self._tally
        parts = []
        if tally.rollouts:
            # Other ranks have made the same number of rollouts per prompt.
            rollouts_per_prompt = tally.rollouts / tally.prompts
            parts.append(f"{self._rate() * rollouts_per_prompt:.3g} rollouts/s")
            parts.append(f"{tally.learnable / tally.prompts:.0%} learnable")
        if tally.note:
            parts.append(tally.note)
        return ", ".join(parts)


# ---- Measures -------------------------------------------------------------------------------------------------------

ROWS, FEATURES, FIRST_HALF = "feature_rows", "features", "first_half"
SECONDS, TOKENS_READ = "seconds", "tokens_read"


@dataclass(frozen=True)
class MeasureJob:
    """The candidates of a measurement, and the folder for its results.

    Args:
        name (`str`): Name of the stage, for messages.
        candidates (`np.ndarray`): Rows of the dataset, ascending.
        folder (`Path`): The stage's folder; each measure has a subfolder.
        fingerprint (mapping): Everything that all results depend on (dataset, weights, step).
        shard_size (`int`): Prompts per shard.
        quiet (`bool`): Write plain log lines instead of a progress bar.
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

    In a shard's result, the tensors named by `small` have one row per prompt. They are gathered on all ranks. Features
    are too large for that: they come as `features`, with their rows in `feature_rows`, and stay on disk.
    """

    name: str
    # A result may also have `tokens_read`, (1,): tokens of forward passes.
    small: tuple[str, ...]

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return the settings that decide the result, as plain JSON values."""

    @abstractmethod
    def calls(self, prompts: np.ndarray) -> int:
        """Return the number of model calls for a shard."""

    @abstractmethod
    def session(self) -> AbstractContextManager[Any]:
        """Borrow the trainer's parts that measuring needs, and restore them on exit."""

    @abstractmethod
    def measure(
        self,
        number: int,
        prompts: np.ndarray,
        calls: int,
        keep: bool,
    ) -> dict[str, Tensor]:
        """Measure a shard; collective over all ranks, which pass the same `calls`.

        Args:
            number (`int`): Number of the shard.
            prompts (`np.ndarray`): Its prompts.
            calls (`int`): Number of model calls to make, at least `self.calls(prompts)`: calls may be collectives.
            keep (`bool`): Whether the result is needed; otherwise this rank makes dummy calls to keep collectives in
                sync.
        """

    def checks(self) -> dict[str, Any]:
        """Return a session's checks of its own results, as plain JSON values; they are saved with the shards."""
        return {}

    def take_checks(self, checks: Mapping[str, Any]) -> None:  # noqa: B027
        """Take the checks of the session that measured all shards, if nothing is left to measure."""

    def tally(self, prompts: int, result: Mapping[str, Tensor]) -> Tally:
        """Return the counts to show with the progress bar after a shard."""
        return Tally(prompts)


@dataclass(frozen=True)
class MeasureResult:
    """The result of a measure.

    Args:
        values (`dict[str, torch.Tensor]`): `small` results, `(P, …)`, on every rank.
        features (`FeatureChunks`): `features` of this rank's shards.
        seconds (`float`): Wall time, including that of reused shards from earlier runs.
        tokens_read (`int`): Tokens of forward passes without rollouts, also of reused shards, over all ranks.
    """

    values: dict[str, Tensor]
    features: FeatureChunks
    seconds: float
    tokens_read: int = 0
