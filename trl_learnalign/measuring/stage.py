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
from trl_learnalign.adaptive.belief import Belief, Outcomes
from trl_learnalign.adaptive.order import after_rounds, round_sizes, sample_by_learnability
from trl_learnalign.bridge.weights import weights_digest
from trl_learnalign.measuring.base import Context, MeasureJob, Validation
from trl_learnalign.measuring.fingerprint import moving_identity
from trl_learnalign.measuring.measure_pool import ScoringReport, is_measured, measure_pool
from trl_learnalign.pool import JoinedChunks, JoinedTexts, Pool, RolloutTexts
from trl_learnalign.ranking.ranking import Ranking
from trl_learnalign.records import layout
from trl_learnalign.records.notes import RoundEntry
from trl_learnalign.records.store import write_json
from trl_learnalign.selectors import GRADIENTS, ROLLOUTS, Selector, combined

# ---- Rounds within a rollout budget ---------------------------------------------------------------------------------
# Each round is a measurement of its own, in a folder of its own below the stage's. Whoever is measured gets all G
# rollouts, in one group, so that advantages and gradients are those of training. Whom a round measures follows from
# the outcomes of the rounds before, which lie on disk, and is noted before its first rollout: a run that is killed in
# any round goes on with the same prompts.

logger = logging.getLogger(__name__)

Prior = Callable[[int], Belief]
"""Optimizer step → what is believed before it, by all outcomes so far; called on the main rank alone."""

ROLLED_OUT = frozenset({ROLLOUTS, GRADIENTS})
"""Needs that cost rollouts."""


@dataclass(frozen=True)
class Draw:
    """Whom a round measures.

    Args:
        rows (`np.ndarray`): Rows of the dataset, ascending.
        believed (`float`, *optional*): Mean success rate that was believed of them; `None` for the random sample.
    """

    rows: np.ndarray
    believed: float | None = None


class Rounds:
    """The measurement of a stage within a budget.

    Args:
        context (`Context`): The trainer that measures, and how; of the stage.
        selector (`Selector`): Who will score the pool, with `needs`.
        work (`Work`): All candidates of the stage.
        step (`int`): Optimizer step that the policy has reached.
        prior (callable, *optional*): Where the belief comes from; not asked if all rounds are noted already.
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
        # What else decides, the run's identity holds.
        made_of = [
            dict(work.fingerprint),
            context.phase,
            self.sizes,
            config.budget_exponent,
            config.selection_seed,
        ]
        self._made_of = rng.digest(made_of)

    def measure(self) -> tuple[Pool, ScoringReport]:
        """All rounds; all ranks call it together."""
        report = ScoringReport()
        pools: list[Pool] = []
        for number in self._numbers:
            draw = self._draw(number, pools)
            work = self._work(number, draw.rows)
            pool, part = measure_pool(self._context(number), self.rolls_out, work)
            entry = _entry(draw, pool)
            self._log(number, entry)
            report.join(part)
            report.rounds.append(entry)
            pools.append(pool)
        everybody = self._whole([pool.prompts for pool in pools])
        whole, part = measure_pool(self.context, self.reads, everybody, self.validation)
        report.join(part)
        return joined(whole, pools), report

    def is_measured(self) -> bool:
        """Whether all of it is on disk; all ranks call it together."""
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
        """What is read besides, of everybody who was rolled out."""
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

    # ---- Whom a round measures --------------------------------------------------------------------------------------

    def _draw(self, number: int, pools: Sequence[Pool]) -> Draw:
        """Of a round, as it was noted or as it is drawn and noted now."""
        noted = self._noted(number)
        if noted is not None:
            return noted
        drawn = None
        if self.ranks.is_main:
            drawn = self._promising(number, pools) if pools else self._sample()
            self._note(number, drawn)
        # Floating-point numbers differ between machines: the main rank's draw is everybody's.
        return self.ranks.from_main(drawn)

    def _sample(self) -> Draw:
        """The first round: nobody is preferred."""
        rows = plan.scored_sample(
            self.context.config.selection_seed,
            self.context.phase,
            self.work.candidates,
            self.sizes[0],
        )
        return Draw(rows)

    def _promising(self, number: int, pools: Sequence[Pool]) -> Draw:
        """A later round: those of whom most is expected."""
        before = self._belief_before()
        generation = before.generation + 1
        outcomes = [_outcomes(pool, generation) for pool in pools]
        belief = after_rounds(before, outcomes)
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
                f"rollout_budget={self.context.config.rollout_budget} spends rollouts by what is believed of each "
                "prompt, and this measurer was given no belief: give StageMeasurer a prior, or leave rollout_budget "
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
        """A round's prompts as they were noted, on every rank; `None` if they are not, or for other candidates."""
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


def _outcomes(pool: Pool, generation: int) -> Outcomes:
    """What came out of a round."""
    assert pool.successes is not None
    right = (pool.successes == 1).sum(dim=1).numpy()
    wrong = (pool.successes == 0).sum(dim=1).numpy()
    return Outcomes(generation, pool.prompts, right, wrong)


def _entry(draw: Draw, pool: Pool) -> RoundEntry:
    """For the record."""
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
    """One pool of what was measured in parts.

    Args:
        whole (`Pool`): Of all their prompts, without rollouts and gradients.
        parts (sequence of `Pool`): With them.
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
    ) -> tuple[Pool, ScoringReport]:
        """Measure what some selectors need of the candidates; all ranks call it together.

        Args:
            stage (`str`): `Phase.name`: folder of the measurements, and part of all seeds.
            step (`int`): Optimizer step that the policy has reached.
            candidates (`np.ndarray`): Rows of the training dataset, ascending.
            selectors (sequence of `Selector`): Who will score the pool.
            weights (`str`, *optional*): Digest of the measured policy, where it is not the trainer's as it is now:
                then everything must be on disk already ([`is_measured`]).
        """
        weights = weights_digest(self.context.trainer) if weights is None else weights
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

    def _rounds(self, context: Context, selector: Selector, work: MeasureJob, step: int) -> Rounds:
        return Rounds(context, selector, work, step, self.prior, self.validation)

    def work(self, stage: str, step: int, candidates: np.ndarray, weights: str) -> MeasureJob:
        """The measuring of a stage: of all candidates, or of a sample of them (`pool_sample`).

        Args:
            stage (`str`): `Phase.name`.
            step (`int`): Optimizer step that the policy has reached.
            candidates (`np.ndarray`): Rows of the training dataset, ascending.
            weights (`str`): Digest of the policy that is measured.
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
        ties = plan.tie_order(seed, pool.phase, len(pool.dataset))
        return Ranking(selector, pool, scores, ties)
