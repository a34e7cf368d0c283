"""Measures and ranks a stage's candidates, at once or in rounds within a rollout budget."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_learnalign import plan, rng
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import Belief
from trl_learnalign.adaptive.order import after_rounds, round_sizes, sample_by_learnability
from trl_learnalign.bridge.policy import weights_digest
from trl_learnalign.measuring.base import Context, MeasureJob, Validation
from trl_learnalign.measuring.fingerprint import moving_identity
from trl_learnalign.measuring.measure_pool import is_measured, measure_pool
from trl_learnalign.pool import JoinedChunks, JoinedTexts, Pool, RolloutTexts
from trl_learnalign.ranking import Ranking
from trl_learnalign.records import layout
from trl_learnalign.records.notes import RoundEntry, ScoringEntry
from trl_learnalign.records.store import write_json
from trl_learnalign.scoring import outcome_sums
from trl_learnalign.selectors import GRADIENTS, ROLLOUTS, Selector, combined

logger = logging.getLogger(__name__)

# ---- Rounds within a rollout budget ---------------------------------------------------------------------------------
# Each round is a separate measurement in its own subfolder of the stage's folder. A measured prompt gets all G
# rollouts in one group, so that advantages and gradients are those of training. The prompts of a round follow from the
# outcomes of earlier rounds, which are on disk, and are recorded before the round's first rollout. So a run that is
# killed in any round resumes with the same prompts.

Prior = Callable[[int], Belief]
"""Optimizer step → the belief before it, from all outcomes so far; called on the main rank alone."""

ROLLED_OUT = frozenset({ROLLOUTS, GRADIENTS})
"""Needs that cost rollouts."""


@dataclass(frozen=True)
class Draw:
    """The prompts of a round.

    Args:
        rows (`np.ndarray`): Rows of the dataset, ascending.
        believed (`float`, *optional*): Their predicted mean success rate; `None` for the random sample.
    """

    rows: np.ndarray
    believed: float | None = None


class Rounds:
    """The measurement of a stage within a budget.

    Args:
        context (`Context`): Trainer and options for measuring the stage.
        selector (`Selector`): The selector that will score the pool, with `needs`.
        work (`MeasureJob`): All candidates of the stage.
        step (`int`): Optimizer step of the current policy.
        prior (callable, *optional*): Returns the belief; not called if all rounds are recorded already.
        validation (`Validation`, *optional*): Trusted prompts, for selectors that compare with them.
    """

    def __init__(
        self,
        context: Context,
        selector: Selector,
        work: MeasureJob,
        step: int,
        prior: Prior | None,
        validation: Validation | None = None,
    ):
        config = context.config
        assert config.rollout_budget is not None
        self.context, self.ranks = context, context.ranks
        self.work, self.validation = work, validation
        self.rolls_out = replace(selector, needs=selector.needs & ROLLED_OUT)
        self.reads = replace(selector, needs=selector.needs - ROLLED_OUT)
        self.sizes = round_sizes(len(work.candidates), config.rollout_budget, config.budget_rounds)
        self._step, self._prior = step, prior
        self._belief: Belief | None = None
        # The run's identity contains everything else that decides the rounds.
        made_of = [
            dict(work.fingerprint),
            context.phase,
            self.sizes,
            config.budget_exponent,
            config.selection_seed,
        ]
        self._made_of = rng.digest(made_of)

    def measure(self) -> tuple[Pool, ScoringEntry]:
        """Measure all rounds; collective over all ranks."""
        report = ScoringEntry.of({})
        pools: list[Pool] = []
        for number in self._numbers:
            draw = self._draw(number, pools)
            work = self._work(number, draw.rows)
            pool, part = measure_pool(self._context(number), self.rolls_out, work)
            entry = _entry(draw, pool)
            self._log(number, entry)
            report += replace(part, rounds=(entry,))
            pools.append(pool)
        everybody = self._whole([pool.prompts for pool in pools])
        whole, part = measure_pool(self.context, self.reads, everybody, self.validation)
        report += part
        return joined(whole, pools), report

    def is_measured(self) -> bool:
        """Whether all rounds are on disk; collective over all ranks."""
        rolled_out = []
        for number in self._numbers:
            draw = self._noted(number)
            if draw is None:
                return False
            work = self._work(number, draw.rows)
            if not is_measured(self._context(number), self.rolls_out, work):
                return False
            rolled_out.append(draw.rows)
        everybody = self._whole(rolled_out)
        return is_measured(self.context, self.reads, everybody, self.validation)

    @property
    def _numbers(self) -> range:
        return range(1, len(self.sizes) + 1)

    # ---- One round --------------------------------------------------------------------------------------------------

    def _context(self, number: int) -> Context:
        # The name of the phase is part of the rollouts' seeds.
        return self.context.of_phase(f"{self.context.phase} round {number}", self.context.dataset)

    def _work(self, number: int, rows: np.ndarray) -> MeasureJob:
        name = f"{self.work.name}, round {number} of {len(self.sizes)}"
        return self._of_rows(rows, name, self._folder(number))

    def _whole(self, rounds: Sequence[np.ndarray]) -> MeasureJob:
        """Return the job of the measurements without rollouts, for all prompts that were rolled out."""
        rows = np.sort(np.concatenate(rounds))
        return self._of_rows(rows, self.work.name, self.work.folder)

    def _of_rows(self, rows: np.ndarray, name: str, folder: Path) -> MeasureJob:
        candidates = {"candidates": rng.digest(rows.tolist())}
        fingerprint = {**self.work.fingerprint, **candidates}
        return replace(
            self.work,
            name=name,
            candidates=rows,
            folder=folder,
            fingerprint=fingerprint,
        )

    def _folder(self, number: int) -> Path:
        return self.work.folder / layout.round_folder(number)

    # ---- Prompts of a round -----------------------------------------------------------------------------------------

    def _draw(self, number: int, pools: Sequence[Pool]) -> Draw:
        """Return the recorded prompts of a round, or draw and record them now."""
        noted = self._noted(number)
        if noted is not None:
            return noted
        drawn = None
        if self.ranks.is_main:
            drawn = self._promising(number, pools) if pools else self._sample()
            self._note(number, drawn)
        # Floating-point numbers differ between machines, so all ranks use the main rank's draw.
        return self.ranks.from_main(drawn)

    def _sample(self) -> Draw:
        """Draw the first round, a uniform random sample."""
        rows = plan.scored_sample(
            self.context.config.selection_seed,
            self.context.phase,
            self.work.candidates,
            self.sizes[0],
        )
        return Draw(rows)

    def _promising(self, number: int, pools: Sequence[Pool]) -> Draw:
        """Draw a later round: prompts with high expected learnability."""
        before = self._belief_before()
        graded = self.context.config.is_graded
        outcomes = [_outcomes(pool, self._step, graded) for pool in pools]
        belief = after_rounds(before, outcomes, before.generation + 1)
        rolled_out = np.concatenate([pool.prompts for pool in pools])
        candidates = np.setdiff1d(self.work.candidates, rolled_out)
        config = self.context.config
        rows = sample_by_learnability(
            belief,
            candidates,
            size=self.sizes[number - 1],
            focus=config.budget_exponent,
            stream=rng.key(config.selection_seed, "round", self.context.phase, number),
        )
        believed = belief.posterior(rows, belief.generation + 1)
        mean = float(believed.success_rate.mean())
        return Draw(rows, mean)

    def _belief_before(self) -> Belief:
        if self._prior is None:
            raise ValueError(
                f"rollout_budget={self.context.config.rollout_budget} chooses prompts by a belief about their "
                "success rates, but this measurer has none: pass prior to StageMeasurer, or leave rollout_budget "
                "unset."
            )
        if self._belief is None:
            self._belief = self._prior(self._step)
        return self._belief

    def _path(self, number: int) -> Path:
        return self._folder(number) / layout.ROUND_PROMPTS

    def _note(self, number: int, draw: Draw) -> None:
        content = {
            "made_of": self._made_of,
            "rows": draw.rows,
            "believed": draw.believed,
        }
        path = self._path(number)
        write_json(path, content)

    def _noted(self, number: int) -> Draw | None:
        """Return a round's recorded prompts, on every rank; `None` if there are none for these candidates."""
        draw = self._read(number) if self.ranks.is_main else None
        return self.ranks.from_main(draw)

    def _read(self, number: int) -> Draw | None:
        path = self._path(number)
        if not path.exists():
            return None
        content: dict[str, Any] = json.loads(path.read_text())
        if content["made_of"] != self._made_of:
            return None
        rows = np.array(content["rows"], dtype=np.int64)
        return Draw(rows, content["believed"])

    def _log(self, number: int, entry: RoundEntry) -> None:
        if not self.ranks.is_main:
            return
        logger.info(
            "%s, round %d of %d: %d prompts, %.0f %% of them learnable.",
            self.work.name,
            number,
            len(self.sizes),
            entry.prompts,
            100 * entry.learnable_share,
        )


def _outcomes(pool: Pool, step: int, graded: bool) -> Outcomes:
    """Return the outcomes of a round."""
    assert pool.successes is not None
    right, wrong, partial = outcome_sums(pool.successes, graded)
    return Outcomes.at(step, pool.prompts, right, wrong, partial=partial)


def _entry(draw: Draw, pool: Pool) -> RoundEntry:
    """Return the entry of a round for the record."""
    assert pool.successes is not None
    rates = pool.success_rate
    known = rates[~np.isnan(rates)]
    success_rate = None
    if len(known):
        success_rate = float(known.mean())
    is_learnable = pool.learnability > 0
    return RoundEntry(
        prompts=len(pool),
        rollouts=pool.successes.numel(),
        success_rate=success_rate,
        believed=draw.believed,
        learnable_share=float(is_learnable.mean()),
    )


def joined(whole: Pool, parts: Sequence[Pool]) -> Pool:
    """Join a pool that was measured in parts.

    Args:
        whole (`Pool`): The pool of all prompts, without rollouts and gradients.
        parts (sequence of `Pool`): The pools of the rounds, with rollouts and gradients.
    """
    places = []
    for part in parts:
        found = np.searchsorted(whole.prompts, part.prompts)
        places.append(torch.from_numpy(found))
    order = torch.cat(places).argsort()
    columns: dict[str, Any] = {}
    for name in ("successes", "lengths", "rewards", "finite"):
        values = [getattr(part, name) for part in parts]
        if values[0] is not None:
            columns[name] = torch.cat(values)[order]
    texts = [part.texts for part in parts if isinstance(part.texts, RolloutTexts)]
    pool = replace(whole, texts=JoinedTexts(tuple(texts), tuple(places)), **columns)
    pool.feature_dim = parts[0].feature_dim
    if pool.feature_dim:
        features = [part.features for part in parts]
        pool.features = JoinedChunks(tuple(features), tuple(places))
    return pool


# ---- Stage ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageMeasurer:
    """Measures and ranks the candidates of stages with a trainer, whose state is restored.

    Args:
        context (`Context`): Trainer and options for measuring.
        folder (`Path`): The record folder; each stage has a subfolder.
        dataset_digest (`str`): `dataset_digest` of the training dataset.
        validation (`Validation`, *optional*): Trusted prompts, for selectors that compare with them.
        measured_with (mapping): `fingerprint.measured_with` of the trainer.
        prior (callable, *optional*): With a rollout budget: returns the belief before a step ([`Prior`]).
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
    ) -> tuple[Pool, ScoringEntry]:
        """Measure what some selectors need of the candidates; collective over all ranks.

        Args:
            stage (`str`): `Phase.name`: folder of the measurements, and part of all seeds.
            step (`int`): Optimizer step of the current policy.
            candidates (`np.ndarray`): Rows of the training dataset, ascending.
            selectors (sequence of `Selector`): The selectors that will score the pool.
            weights (`str`, *optional*): Digest of the measured policy, if it is not the trainer's current one.
                Everything must then be on disk already ([`is_measured`]).
        """
        weights = weights_digest(self.context.trainer) if weights is None else weights
        work = self.work(stage, step, candidates, weights)
        context, selector = self.context.of_phase(stage), combined(selectors)
        if self._has_rounds(selector):
            pool, report = self._rounds(context, selector, work, step).measure()
        else:
            pool, report = measure_pool(context, selector, work, self.validation)
        context.warn_once(context.no_signal(pool.rewards, pool.lengths), stage)
        return pool, report

    def is_measured(
        self,
        stage: str,
        step: int,
        candidates: np.ndarray,
        selectors: Sequence[Selector],
        weights: str,
    ) -> bool:
        """Whether these measurements of the policy with this digest are all on disk; collective over all ranks."""
        work = self.work(stage, step, candidates, weights)
        context, selector = self.context.of_phase(stage), combined(selectors)
        if self._has_rounds(selector):
            return self._rounds(context, selector, work, step).is_measured()
        return is_measured(context, selector, work, self.validation)

    def _has_rounds(self, selector: Selector) -> bool:
        """Whether the budget limits what this selector needs."""
        return self.context.config.rollout_budget is not None and bool(selector.needs & ROLLED_OUT)

    def _rounds(self, context: Context, selector: Selector, work: MeasureJob, step: int) -> Rounds:
        return Rounds(context, selector, work, step, self.prior, self.validation)

    def work(self, stage: str, step: int, candidates: np.ndarray, weights: str) -> MeasureJob:
        """Return the job of a stage: all candidates, or a sample of them (`pool_sample`).

        Args:
            stage (`str`): `Phase.name`.
            step (`int`): Optimizer step of the current policy.
            candidates (`np.ndarray`): Rows of the training dataset, ascending.
            weights (`str`): Digest of the measured policy.
        """
        trainer, config = self.context.trainer, self.context.config
        sample = plan.scored_sample(config.selection_seed, stage, candidates, config.pool_sample)
        return MeasureJob(
            name=stage,
            candidates=sample,
            folder=self.folder / stage,
            fingerprint={
                "dataset": self.dataset_digest,
                "candidates": rng.digest(sample.tolist()),
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
        """Score a measured pool; collective, and equal on all ranks.

        Args:
            pool (`Pool`): The pool.
            selector (`Selector`): The selector that scores it.
            size (`int`, *optional*): Maximum number of prompts that will be selected; `None` if it is unknown.
        """
        pool = replace(pool, wanted=size)
        # Bit for bit those of the main rank: all ranks must select the same prompts.
        scores = self.context.ranks.from_main(selector.score(pool))
        seed = self.context.config.selection_seed
        ties = plan.tie_order(seed, pool.phase, len(pool.dataset))
        return Ranking(selector, pool, scores, ties)
