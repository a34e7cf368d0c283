"""A stage's candidates, measured and ranked: what the callback and the `select` command share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_learnalign import bridge, curriculum, hashing
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring.groups import threshold_problem
from trl_learnalign.measuring.identity import moving_identity
from trl_learnalign.measuring.needs import PoolMeasurer, Report, Validation
from trl_learnalign.measuring.shards import Work
from trl_learnalign.pool import Pool
from trl_learnalign.ranking.ranking import Ranking
from trl_learnalign.selectors import Selector, combined

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageScorer:
    """Measures and ranks the candidates of stages, with a trainer that is left as found.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        config (`LearnAlignConfig`): Settings.
        ranks (`Ranks`): The processes.
        folder (`Path`): The record folder; each stage has its own below.
        success_index (`int`): Which reward function decides success.
        rollout_prompts (`int`): Prompts of one generation call.
        dataset_digest (`str`): `dataset_digest` of the training dataset.
        validation (`Validation`, *optional*): Trusted prompts, for selectors that compare with them.
        measured_with (mapping): `identity.measured_with` of the trainer.
    """

    trainer: GRPOTrainer
    config: LearnAlignConfig
    ranks: Ranks
    folder: Path
    success_index: int
    rollout_prompts: int
    dataset_digest: str
    validation: Validation | None = None
    measured_with: Mapping[str, Any] = field(default_factory=dict)

    def scored(self, stage: str, candidates: np.ndarray) -> np.ndarray:
        """The candidates that are scored: all, or a sample of them (`pool_sample`)."""
        return curriculum.scored_sample(self.config.selection_seed, stage, candidates, self.config.pool_sample)

    def measure(
        self,
        stage: str,
        step: int,
        candidates: np.ndarray,
        selectors: Sequence[Selector],
        weights: str | None = None,
    ) -> tuple[Pool, Report]:
        """Measure what some selectors need of the candidates; all ranks call it together.

        Args:
            stage (`str`): `Phase.name`: folder of the measurements, and part of all seeds.
            step (`int`): Optimizer step that the policy has reached.
            candidates (`np.ndarray`): Rows of the training dataset, ascending.
            selectors (sequence of `Selector`): Who will score the pool.
            weights (`str`, *optional*): Digest of the measured policy, where it is not the trainer's as it is now:
                then everything must be on disk already ([`is_measured`]).
        """
        weights = bridge.weights_digest(self.trainer) if weights is None else weights
        work = self.work(stage, step, self.scored(stage, candidates), weights)
        pool, report = self._measurer(stage).measure(work, combined(selectors))
        self._explain_success(pool)
        return pool, report

    def _explain_success(self, pool: Pool) -> None:
        """Say why no prompt is learnable, where the rewards tell."""
        if pool.rewards is None:
            return
        name = self.trainer.reward_func_names[self.success_index]
        said = threshold_problem(pool.rewards[..., self.success_index], self.config.success_threshold, name)
        if said is not None:
            logger.warning("%s: %s", pool.phase, said)

    def is_measured(
        self, stage: str, step: int, candidates: np.ndarray, selectors: Sequence[Selector], weights: str
    ) -> bool:
        """Whether that is all on disk already, of the policy with this digest; all ranks call it together."""
        work = self.work(stage, step, self.scored(stage, candidates), weights)
        return self._measurer(stage).is_measured(work, combined(selectors))

    def work(self, stage: str, step: int, scored: np.ndarray, weights: str) -> Work:
        """The measuring of a stage; `weights` is the digest of the policy that is measured."""
        return Work(
            name=stage,
            candidates=scored,
            folder=self.folder / stage,
            fingerprint={
                "dataset": self.dataset_digest,
                "candidates": hashing.digest(scored.tolist()),
                "step": step,
                "weights": weights,
                "shard_prompts": self.config.shard_prompts,
                **self.measured_with,
                **moving_identity(self.trainer),
            },
            shard_prompts=self.config.shard_prompts,
            quiet=self.trainer.args.disable_tqdm,
        )

    def rank(self, pool: Pool, selector: Selector) -> Ranking:
        """Score a measured pool; all ranks call it together and get the same."""
        scores = self.ranks.from_main(selector.score(pool))
        ties = curriculum.tie_order(self.config.selection_seed, pool.phase, len(pool.dataset))
        return Ranking(selector, pool, scores, ties)

    def _measurer(self, stage: str) -> PoolMeasurer:
        return PoolMeasurer(
            self.trainer,
            self.config,
            self.ranks,
            stage,
            self.success_index,
            self.rollout_prompts,
            self.validation,
        )
