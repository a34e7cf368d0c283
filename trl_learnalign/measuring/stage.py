"""A stage's candidates, measured and ranked: what the callback and the `select` command share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trl_learnalign import bridge, curriculum, hashing
from trl_learnalign.measuring.context import Context, Validation
from trl_learnalign.measuring.identity import moving_identity
from trl_learnalign.measuring.measure import Work
from trl_learnalign.measuring.needs import Report, is_measured, measure_pool
from trl_learnalign.measuring.rounds import ROLLED_OUT, Prior, Rounds
from trl_learnalign.pool import Pool
from trl_learnalign.ranking.ranking import Ranking
from trl_learnalign.selectors import Selector, combined


@dataclass(frozen=True)
class StageMeasurer:
    """Measures and ranks the candidates of stages, with a trainer that is left as found.

    Args:
        context (`Context`): The trainer that measures, and how.
        folder (`Path`): The record folder; each stage has its own below.
        dataset_digest (`str`): `dataset_digest` of the training dataset.
        validation (`Validation`, *optional*): Trusted prompts, for selectors that compare with them.
        measured_with (mapping): `identity.measured_with` of the trainer.
        prior (callable, *optional*): With a rollout budget: what is believed before a step ([`rounds.Prior`]).
    """

    context: Context
    folder: Path
    dataset_digest: str
    validation: Validation | None = None
    measured_with: Mapping[str, Any] = field(default_factory=dict)
    prior: Prior | None = None

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
        weights = bridge.weights_digest(self.context.trainer) if weights is None else weights
        work = self.work(stage, step, candidates, weights)
        context, selector = self.context.of_phase(stage), combined(selectors)
        if self._has_rounds(selector):
            pool, report = self._rounds(context, selector, work, step).measure()
        else:
            pool, report = measure_pool(context, selector, work, self.validation)
        context.tell(context.no_signal(pool.rewards, pool.lengths), stage)
        return pool, report

    def is_measured(
        self,
        stage: str,
        step: int,
        candidates: np.ndarray,
        selectors: Sequence[Selector],
        weights: str,
    ) -> bool:
        """Whether that is all on disk already, of the policy with this digest; all ranks call it together."""
        work = self.work(stage, step, candidates, weights)
        context, selector = self.context.of_phase(stage), combined(selectors)
        if self._has_rounds(selector):
            return self._rounds(context, selector, work, step).is_measured()
        return is_measured(context, selector, work, self.validation)

    def _has_rounds(self, selector: Selector) -> bool:
        """Whether there is a budget of what this selector needs."""
        return self.context.config.rollout_budget is not None and bool(selector.needs & ROLLED_OUT)

    def _rounds(self, context: Context, selector: Selector, work: Work, step: int) -> Rounds:
        return Rounds(context, selector, work, step, self.prior, self.validation)

    def work(self, stage: str, step: int, candidates: np.ndarray, weights: str) -> Work:
        """The measuring of a stage: of all candidates, or of a sample of them (`pool_sample`).

        Args:
            stage (`str`): `Phase.name`.
            step (`int`): Optimizer step that the policy has reached.
            candidates (`np.ndarray`): Rows of the training dataset, ascending.
            weights (`str`): Digest of the policy that is measured.
        """
        trainer, config = self.context.trainer, self.context.config
        sample = curriculum.scored_sample(
            config.selection_seed, stage, candidates, config.pool_sample
        )
        return Work(
            name=stage,
            candidates=sample,
            folder=self.folder / stage,
            fingerprint={
                "dataset": self.dataset_digest,
                "candidates": hashing.digest(sample.tolist()),
                "step": step,
                "weights": weights,
                "shard_size": config.shard_size,
                **self.measured_with,
                **moving_identity(trainer),
            },
            shard_size=config.shard_size,
            quiet=trainer.args.disable_tqdm,
        )

    def rank(self, pool: Pool, selector: Selector, size: int | None = None) -> Ranking:
        """Score a measured pool; all ranks call it together and get the same.

        Args:
            pool (`Pool`): The pool.
            selector (`Selector`): Who scores it.
            size (`int`, *optional*): How many prompts will be taken at most; `None` if nobody knows.
        """
        pool = replace(pool, wanted=size)
        # The main rank's, to the last bit: all ranks must take the same prompts.
        scores = self.context.ranks.from_main(selector.score(pool))
        seed = self.context.config.selection_seed
        ties = curriculum.tie_order(seed, pool.phase, len(pool.dataset))
        return Ranking(selector, pool, scores, ties)
