"""Candidates → selected prompts: measure them, score them, rank them, take the best, write it down.

What a stage of [`LearnAlignCallback`] and the `select` command share: the callback says *when*, this module *what*.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_learnalign import curriculum, hashing, records, scoring
from trl_learnalign import trainer_bridge as bridge
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.distributed import Ranks
from trl_learnalign.identity import moving_identity
from trl_learnalign.measures.pool import PoolMeasurer, Report, Validation
from trl_learnalign.measures.runner import Work
from trl_learnalign.pool import Pool
from trl_learnalign.rollouts import threshold_problem
from trl_learnalign.samples import telling_positions
from trl_learnalign.selectors import Selector, combined

if TYPE_CHECKING:
    import pyarrow as pa
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The prompts that are taken.

    Args:
        positions (`np.ndarray`): Positions in the pool of those that were scored, best first.
        unscored (`np.ndarray`): Rows of the dataset that fill up what the scored ones leave free.
        rows (`np.ndarray`): All of them as rows of the dataset, best first.
    """

    positions: np.ndarray
    unscored: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Ranking:
    """What a selector makes of a pool.

    Args:
        selector (`Selector`): The selector.
        pool (`Pool`): The scored candidates, P of them.
        scores (`np.ndarray`): `(P,)` float64; NaN for those that cannot be ranked.
        ties (`np.ndarray`): Distinct numbers for all rows of the dataset, `(n,)`: equal scores are ordered by them.
    """

    selector: Selector
    pool: Pool
    scores: np.ndarray
    ties: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """Positions from best to worst, `(P,)`."""
        return scoring.rank(self.scores, self.ties[self.pool.prompts], self._ahead)

    @property
    def _ahead(self) -> np.ndarray | None:
        """Who ranks before all others, unless scores alone decide (`LearnAlignConfig.zero_learnability`)."""
        return self.eligible if self.pool.config.zero_learnability == "last" else None

    @property
    def eligible(self) -> np.ndarray:
        """`(P,)` bool: has a score of its own (for the method: learnability above 0)."""
        return self.pool.learnability > 0 if self.selector.only_learnable else ~np.isnan(self.scores)

    def take(self, size: int, candidates: np.ndarray, when_short: str, least: int) -> Choice:
        """The best prompts; with `"fill"`, larger choices contain the smaller ones.

        Args:
            size (`int`): How many are wanted, at most `len(candidates)`.
            candidates (`np.ndarray`): Rows that may be taken; the pool's, and those that were not scored
                (`pool_sample`), which come last, in tie order.
            when_short (`str`): `"fill"` takes `size` prompts all the same, `"shrink"` those that are eligible.
            least (`int`): Prompts to take at least, also with `"shrink"`.
        """
        least = size if when_short == "fill" else min(size, least)
        ties = self.ties[self.pool.prompts]
        chosen = scoring.select(self.scores, self.eligible, ties, size, when_short, self._ahead)
        if len(chosen) < least:
            chosen = scoring.select(self.scores, self.eligible, ties, least, "fill", self._ahead)
        others = np.setdiff1d(candidates, self.pool.prompts)
        unscored = others[np.argsort(self.ties[others])][: max(0, least - len(chosen))]
        return Choice(chosen, unscored, np.concatenate([self.pool.prompts[chosen], unscored]))

    def table(self, choice: Choice) -> pa.Table:
        """One row per scored candidate; columns as in `trl_learnalign.records`."""
        aligned = self.selector.alignment(self.pool, self.scores)
        return records.stage_table(self.pool, self.scores, aligned, self.order, choice.positions)

    def examples(self) -> list[dict[str, Any]]:
        """The most telling candidates with a few of their rollouts; all ranks call it together.

        Returns:
            `list[dict]`: `group` (`"top"`, `"bottom"`, `"always right"`, `"always wrong"`), `index` (row of the
            dataset) and `rollouts` (`text`, `right`, `tokens` of each).
        """
        groups = telling_positions(self.order.tolist(), self.eligible.tolist(), self.pool.success_rate.tolist())
        positions = [position for group in groups.values() for position in group]
        texts = {} if self.pool.texts is None else self.pool.texts.of(positions)
        return [
            {"group": name, "index": int(self.pool.prompts[position]), "rollouts": texts.get(position, [])}
            for name, group in groups.items()
            for position in group
        ]

    def shortfall(self, choice: Choice, wanted: int) -> str | None:
        """What a choice lacks, as the end of a sentence that begins with its name; `None` if nothing.

        Args:
            choice (`Choice`): The prompts that are taken.
            wanted (`int`): How many were asked for.
        """
        ranked, total = int(self.eligible.sum()), len(self.pool)
        unranked = int((~self.eligible[choice.positions]).sum())
        left = ranked - (len(choice.positions) - unranked)
        method = self.selector.only_learnable
        passed_over = (
            f"{left} learnable ones of negative score are left out for them, as Eq. 9 ranks them; "
            "zero_learnability='last' takes the learnable ones first"
        )
        if ranked < wanted:
            said = f"only {ranked} of {total} candidates {'are learnable' if method else 'can be ranked'}, "
            said += f"fewer than the {wanted} wanted; taken: {len(choice)}"
            said += f", {unranked} of them {'of learnability 0' if method else 'unranked'}" if unranked else ""
            said += f", {len(choice.unscored)} of them unscored" if len(choice.unscored) else ""
            return f"{said}; {passed_over}" if unranked and left else said
        if unranked and left:
            return f"{unranked} prompts of learnability 0 (p = 0 or 1) are taken; {passed_over}"
        return None

    def summary(self, choice: Choice) -> dict[str, Any]:
        """Means of selected and left-out candidates, for record, log and table; `None` where there is none."""
        pool, chosen = self.pool, choice.positions
        left = np.setdiff1d(np.arange(len(pool)), chosen)
        rate, learnability = pool.success_rate, pool.learnability
        known = not np.isnan(learnability).all()
        return {
            "pool_size": len(pool),
            "size": len(chosen),
            "success_rate": _mean(rate),
            "success_rate_selected": _mean(rate[chosen]),
            "success_rate_left_out": _mean(rate[left]),
            "learnable_share": float((learnability > 0).mean()) if known else None,
            "unlearnable_selected": int((~(learnability[chosen] > 0)).sum()) if known else None,
            "learnable_left_out": int((learnability[left] > 0).sum()) if known else None,
            "score_selected": _mean(self.scores[chosen]),
            "score_left_out": _mean(self.scores[left]),
            "gradients_not_finite": 0 if pool.finite is None else int((~pool.finite).sum()),
        }


def overlap(previous: pa.Table, chosen: np.ndarray, candidates: np.ndarray) -> float | None:
    """Share of the chosen prompts that the previous stage's ranking would have taken of the same candidates.

    Args:
        previous (`pyarrow.Table`): The previous stage's table.
        chosen (`np.ndarray`): Rows of the dataset that are chosen now.
        candidates (`np.ndarray`): Rows that could be.

    Returns:
        `float`, *optional*: `None` where there was no choice, or the previous stage scored none of the candidates.
    """
    rank = dict(zip(previous["index"].to_pylist(), previous["rank"].to_pylist(), strict=True))
    known = sorted((row for row in candidates.tolist() if row in rank), key=rank.__getitem__)
    now = set(chosen.tolist()) & set(known)
    if not now or len(now) == len(known):
        return None
    return len(now & set(known[: len(now)])) / len(now)


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


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
        dataset_digest (`str`): `records.dataset_digest` of the training dataset.
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
