"""One scoring pass: roll out, capture and store every candidate of a stage, shard by shard.

A shard is a fixed list of prompts, cut into fixed calls of generation, each with its own seed: what a shard holds does
not depend on how many processes there are, which of them made it, or what was interrupted before. Ranks take shards in
turn; finished shards are found on disk and left alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from trl_learnalign import hashing, scoring
from trl_learnalign import trainer_bridge as bridge
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.gradients.features import FeatureEngine
from trl_learnalign.gradients.sketch import make_projection
from trl_learnalign.pool import FeatureChunks, Pool
from trl_learnalign.rollouts import RolloutGroup, roll_out
from trl_learnalign.selectors import GRADIENTS, Selector
from trl_learnalign.store import ShardStore, StoreError

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringTask:
    """What one scoring pass measures.

    Args:
        phase (`int`): `Phase.index`, part of the seeds.
        name (`str`): Name of the stage, for messages.
        candidates (`np.ndarray`): Rows of the training dataset, ascending.
        selector (`Selector`): Decides what is needed.
        success_index (`int`): Which reward function decides success.
        rollout_prompts (`int`): Prompts of one generation call.
        folder (`Path`): The store's.
        fingerprint (mapping): What the results depend on.
    """

    phase: int
    name: str
    candidates: np.ndarray
    selector: Selector
    success_index: int
    rollout_prompts: int
    folder: Path
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True)
class ScoringReport:
    """What a pass cost and covered; counts are over all ranks, and over earlier runs that it continued.

    Args:
        seconds (`float`): Wall time of this run.
        tokens_generated (`int`): Completion tokens of all rollouts.
        tokens_captured (`int`): Tokens (prompt and completion) that went through gradient capture.
        coverage (`dict`): `share` of trainable entries in the features, and names of parameters `direct`, `missing`.
    """

    seconds: float
    tokens_generated: int
    tokens_captured: int
    coverage: dict[str, Any]


class ScoringPass:
    """Runs a [`ScoringTask`] inside a trainer that is left as found. All ranks run it together.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        config (`LearnAlignConfig`): Settings.
        task (`ScoringTask`): What to measure.
        ranks (`Ranks`): The processes.
    """

    def __init__(self, trainer: GRPOTrainer, config: LearnAlignConfig, task: ScoringTask, ranks: Ranks):
        self.trainer = trainer
        self.config = config
        self.task = task
        self.ranks = ranks
        self.shards = [
            task.candidates[start : start + config.shard_prompts]
            for start in range(0, len(task.candidates), config.shard_prompts)
        ]
        self.store = ShardStore(task.folder, task.fingerprint, len(self.shards))
        self._engine: FeatureEngine | None = None
        self._coverage: dict[str, Any] = {}

    def run(self) -> tuple[Pool, ScoringReport]:
        """Measure what is not measured yet.

        Returns:
            `tuple[Pool, ScoringReport]`: The pool with all measurements, and what it took.

        Raises:
            `StoreError`: If the folder holds another run's shards, or cannot be written.
        """
        started = time.perf_counter()
        self._open_store()
        with bridge.left_as_found(self.trainer):
            if GRADIENTS in self.task.selector.needs:
                sizes = bridge.trainable_sizes(self.trainer)
                projection = make_projection(
                    self.config.projection,
                    self.config.feature_dim,
                    self.config.selection_seed,
                    self.config.capture_rank,
                    sizes,
                )
                with bridge.gradient_capture(self.trainer, projection) as capture:
                    self._engine = FeatureEngine(self.trainer, capture, self.config.capture_tokens, self.ranks.most)
                    self._measure()
                    self._coverage = capture.coverage.summary()
            else:
                self._measure()
        pool, totals = self._pool()
        return pool, ScoringReport(time.perf_counter() - started, *totals, self._coverage)

    def _open_store(self) -> None:
        problem = None
        if self.ranks.is_main:
            if differences := self.store.differences():
                problem = (
                    f"{self.task.folder} holds scores that do not fit this run. " + "; ".join(differences) + ". "
                    "Give this run another output_dir, or move or delete that folder to score anew."
                )
            elif not self.store.manifest_path.exists():
                self.store.create()
        problem = self.ranks.from_main(problem)
        if problem:
            raise StoreError(problem)

    def _measure(self) -> None:
        finished = set(self.ranks.from_main(sorted(self.store.finished())))
        missing = [number for number in range(len(self.shards)) if number not in finished]
        done = sum(len(self.shards[number]) for number in finished)
        with tqdm(
            total=len(self.task.candidates),
            initial=done,
            desc=f"{self.task.name}: scoring",
            unit="prompt",
            disable=not self.ranks.is_main or self.trainer.args.disable_tqdm,
        ) as progress:
            for first in range(0, len(missing), self.ranks.count):
                batch = missing[first : first + self.ranks.count]
                calls = max(math.ceil(len(self.shards[number]) / self.task.rollout_prompts) for number in batch)
                # A rank without a shard of its own makes the same calls, since they are collectives.
                own = batch[self.ranks.index] if self.ranks.index < len(batch) else None
                learnable = self._measure_shard(batch[0] if own is None else own, calls, keep=own is not None)
                progress.update(sum(len(self.shards[number]) for number in batch))
                progress.set_postfix_str(f"{learnable:.0%} of the last shard with V > 0")
        self.ranks.wait()

    def _measure_shard(self, number: int, calls: int, keep: bool) -> float:
        prompts = self.shards[number]
        groups = self._roll_out(number, prompts, calls)
        wanted = [i for i, group in enumerate(groups) if keep and self._needs_gradient(group)]
        if self._engine is None:
            features = torch.zeros(0, 0)
        else:
            features = self._engine.features([groups[i] for i in wanted])
        if keep:
            self.store.write(number, _shard_tensors(groups, wanted, features))
        return len(wanted) / len(groups)

    def _roll_out(self, number: int, prompts: np.ndarray, calls: int) -> list[RolloutGroup]:
        size = self.task.rollout_prompts
        # Every call has the same number of prompts (TRL gathers across ranks): the last ones repeat the first.
        padded = np.resize(prompts, calls * size)
        groups: list[RolloutGroup] = []
        for call in range(calls):
            seed = hashing.key(self.config.selection_seed, "rollouts", self.task.phase, number, call) % 2**32
            chunk = padded[call * size : (call + 1) * size].tolist()
            groups += roll_out(self.trainer, chunk, seed, self.task.success_index, self.config.success_threshold)
        return groups[: len(prompts)]

    def _needs_gradient(self, group: RolloutGroup) -> bool:
        if self._engine is None:
            return False
        if self.task.selector.only_learnable:
            return bool(scoring.learnability(group.successes.unsqueeze(0))[0] > 0)
        # Without advantages only the KL and entropy terms have a gradient.
        return bool(group.inputs["advantages"].any()) or bridge.has_regulariser(self.trainer)

    def _pool(self) -> tuple[Pool, tuple[int, int]]:
        """Gather the small measurements; features stay on disk, each rank reading its own shards."""
        own = tuple(range(self.ranks.index, len(self.shards), self.ranks.count))
        names = ("successes", "lengths", "rewards", "finite", "tokens_captured")
        measured = self.ranks.gather(
            [(number, {name: shard[name] for name in names}) for number, shard in self.store.read_all(own)]
        )
        by_number = dict(measured)
        shards = [by_number[number] for number in range(len(self.shards))]
        joined = {name: torch.cat([shard[name] for shard in shards]) for name in names}
        dim = self._engine.capture.projection.dim if self._engine else 0
        pool = Pool(
            prompts=self.task.candidates,
            dataset=self.trainer.train_dataset,
            seed=self.config.selection_seed,
            phase=self.task.phase,
            successes=joined["successes"],
            lengths=joined["lengths"],
            rewards=joined["rewards"],
            features=FeatureChunks(self.store, own, self.config.shard_prompts) if self._engine else (),
            feature_dim=dim,
            finite=joined["finite"],
            ranks=self.ranks,
        )
        return pool, (int(joined["lengths"].sum()), int(joined["tokens_captured"].sum()))


def _shard_tensors(groups: list[RolloutGroup], captured: list[int], features: torch.Tensor) -> dict[str, torch.Tensor]:
    finite = torch.ones(len(groups), dtype=torch.bool)
    finite[captured] = torch.isfinite(features).all(dim=1) if captured else True
    if not finite.all():
        bad = [groups[i].prompt for i in range(len(groups)) if not finite[i]]
        logger.warning("Gradients of prompts %s are not finite; they score 0.", bad)
    return {
        "prompts": torch.tensor([group.prompt for group in groups]),
        "successes": torch.stack([group.successes for group in groups]),
        "lengths": torch.stack([group.lengths for group in groups]),
        "rewards": torch.stack([group.rewards for group in groups]),
        "finite": finite,
        "tokens_captured": torch.tensor(
            [groups[i].tokens * groups[i].rollouts if i in set(captured) else 0 for i in range(len(groups))]
        ),
        "feature_rows": torch.tensor(captured, dtype=torch.int64),
        "features": features,
    }
