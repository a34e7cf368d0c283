"""Interfaces of measurements, their shared context, their progress, and the shards that they are made by."""

from __future__ import annotations

import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.generation import default_scoring_batch_prompts
from trl_learnalign.pool import FeatureChunks
from trl_learnalign.records.layout import CHECKS
from trl_learnalign.records.store import ShardStore, StoreError, write_json
from trl_learnalign.rng import digest
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
        warned (`set[str]`): Phases that were already reported to have no learnable prompt.
    """

    trainer: GRPOTrainer
    config: LearnAlignConfig
    success: SuccessRule
    ranks: Ranks
    scoring_batch_prompts: int
    phase: str
    dataset: Any
    warned: set[str] = field(default_factory=set)

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
                [`generation.default_scoring_batch_prompts`], which is collective over all ranks.
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

    def warn_once(self, problem: str | None, of: str) -> None:
        """Report once that no prompt of the phase is learnable.

        Args:
            problem (`str`, *optional*): Result of [`no_signal`].
            of (`str`): The rollouts that were checked.
        """
        if problem is not None and self.phase not in self.warned:
            self.warned.add(self.phase)
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


# ---- Shards ---------------------------------------------------------------------------------------------------------
# A shard is a fixed list of prompts. It is measured with a fixed number of model calls, each with its own seed. So the
# result of a shard does not depend on the number of processes, on the process that made it, or on earlier
# interruptions. (Rollouts of a vLLM server, or of an engine that several processes share, do depend on them.) Ranks
# take shards in turn, and finished shards on disk are reused.


def store_of(work: MeasureJob, measure: Measure) -> ShardStore:
    """Return the store of a measure for a job."""
    return ShardStore(
        work.folder / measure.name,
        {**work.fingerprint, **measure.fingerprint()},
        shards=len(work.shards),
    )


def is_finished(work: MeasureJob, measure: Measure, ranks: Ranks) -> bool:
    """Whether a matching store with all shards exists; collective over all ranks."""
    if not ranks.is_main:
        return bool(ranks.from_main(None))
    store = store_of(work, measure)
    whole = (
        store.manifest_path.exists()
        and not store.differences()
        and len(store.finished()) == len(work.shards)
    )
    return bool(ranks.from_main(whole))


def run(work: MeasureJob, measure: Measure, ranks: Ranks) -> MeasureResult:
    """Measure the missing shards; collective over all ranks.

    Raises:
        `StoreError`: If the folder holds another run's shards, or cannot be written.
    """
    store = store_of(work, measure)
    _open(store, ranks)
    finished = set(ranks.from_main(sorted(store.finished())))
    missing = [number for number in range(len(work.shards)) if number not in finished]
    if missing:
        with measure.session():
            _measure(work, measure, ranks, store, missing)
        if ranks.is_main:
            _keep_checks(store, measure)
    else:
        measure.take_checks(ranks.from_main(_checks_of(store) if ranks.is_main else None) or {})
    ranks.wait()
    # Each rank reads every `count`-th shard, and all ranks share the small results.
    numbers = tuple(range(ranks.index, len(work.shards), ranks.count))
    names = (*measure.small, SECONDS, TOKENS_READ)
    parts = []
    for number, shard in store.read_all(numbers):
        parts.append((number, {name: shard[name] for name in names}))
    by_number = dict(ranks.gather(parts))
    values = {}
    for name in names:
        values[name] = torch.cat([by_number[number][name] for number in range(len(work.shards))])
    seconds = float(values.pop(SECONDS).sum())
    tokens_read = int(values.pop(TOKENS_READ).sum())
    features = FeatureChunks(store, numbers, work.shard_size)
    return MeasureResult(values, features, seconds, tokens_read)


def _keep_checks(store: ShardStore, measure: Measure) -> None:
    """Write the checks made so far; they are written before the shards, so that every finished store has them."""
    checks = measure.checks()
    if checks != _checks_of(store):
        write_json(store.folder / CHECKS, {"checks": checks, "digest": digest(checks)})


def _checks_of(store: ShardStore) -> dict[str, Any] | None:
    """Return the checks made when the shards were measured; `None` if they are missing or damaged."""
    try:
        found = json.loads((store.folder / CHECKS).read_text())
        is_whole = found["digest"] == digest(found["checks"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found["checks"] if is_whole else None


def _open(store: ShardStore, ranks: Ranks) -> None:
    problem = None
    if ranks.is_main:
        if differences := store.differences():
            problem = (
                f"{store.folder} contains measurements of another run. {'; '.join(differences)}. Give this run "
                "another output_dir, or move or delete that folder to measure again."
            )
        elif not store.manifest_path.exists():
            store.create()
    if problem := ranks.from_main(problem):
        raise StoreError(problem)


def _measure(
    work: MeasureJob,
    measure: Measure,
    ranks: Ranks,
    store: ShardStore,
    missing: list[int],
) -> None:
    shards = work.shards
    total = len(work.candidates)
    ready = total - sum(len(shards[number]) for number in missing)
    title = f"{work.name}: {measure.name}"
    if ready and ranks.is_main:
        logger.info("%s: %s of %s prompts are already measured", title, f"{ready:,}", f"{total:,}")
    interactive = False if work.quiet else None  # log lines instead of a bar
    with Progress(title, total, ready, not ranks.is_main, interactive) as progress:
        for batch in batches(shards, missing, ranks.count):
            calls = measure.calls(shards[batch[0]])
            # A rank without a shard makes the same calls, since they may be collectives.
            keep = ranks.index < len(batch)
            number = batch[ranks.index] if keep else batch[0]
            began = time.perf_counter()
            try:
                result = measure.measure(number, shards[number], calls, keep)
            except Exception as error:
                _log_out_of_memory(error, measure)
                logger.error(
                    "%s: rank %d failed while measuring shard %d of %s; the other ranks will stop too. Finished "
                    "shards are kept: fix the cause and run the same command again to continue.",
                    measure.name,
                    ranks.index,
                    number,
                    work.name,
                )
                raise
            if ranks.is_main:
                _keep_checks(store, measure)
            tally = Tally()
            if keep:
                # Ranks work in parallel, so each shard of a batch is charged its share of the batch's time.
                seconds = (time.perf_counter() - began) / len(batch)
                amounts = {SECONDS: torch.tensor([seconds], dtype=torch.float64)}
                nothing = {TOKENS_READ: torch.zeros(1, dtype=torch.int64)}
                store.write(number, {**nothing, **result, **amounts})
                tally = measure.tally(len(shards[number]), result)
            progress.add(sum(len(shards[number]) for number in batch), tally)


def batches(
    shards: Sequence[np.ndarray], missing: Sequence[int], ranks: int
) -> Iterator[list[int]]:
    """Yield shards that ranks measure in parallel, one each, of equal length, so that their calls have equal sizes.

    Args:
        shards (sequence of `np.ndarray`): The candidates of each shard; the last may be shorter than the others.
        missing (sequence of `int`): Numbers of those to measure, ascending.
        ranks (`int`): Number of ranks.
    """
    for _length, numbers in groupby(missing, key=lambda number: len(shards[number])):
        alike = list(numbers)
        for first in range(0, len(alike), ranks):
            yield alike[first : first + ranks]


def _log_out_of_memory(error: Exception, measure: Measure) -> None:
    """Log the remedy for a GPU out of memory: a smaller call samples differently, so it is not made silently."""
    if isinstance(error, torch.OutOfMemoryError):
        logger.error(
            "%s: the GPU ran out of memory. Set a smaller scoring_batch_prompts (now %s) or capture_max_tokens, "
            "and first move this stage's folder away, since its rollouts were generated in larger batches.",
            measure.name,
            measure.fingerprint().get("scoring_batch_prompts", "not used"),
        )
