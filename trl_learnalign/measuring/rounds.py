"""A stage's candidates measured in rounds, within a rollout budget (`LearnAlignConfig.rollout_budget`).

Each round is a measurement of its own, in a folder of its own below the stage's. Whoever is measured gets all G
rollouts, in one group, so that advantages and gradients are those of training. Whom a round measures follows from the
outcomes of the rounds before, which lie on disk, and is noted before its first rollout: a run that is killed in any
round goes on with the same prompts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_learnalign import curriculum, hashing
from trl_learnalign.adaptive.belief import Belief, Outcomes
from trl_learnalign.adaptive.rounds import after_rounds, promising, round_sizes
from trl_learnalign.measuring.context import Context, Validation
from trl_learnalign.measuring.measure import Work
from trl_learnalign.measuring.needs import Report, is_measured, measure_pool
from trl_learnalign.pool import JoinedChunks, JoinedTexts, Pool, RolloutTexts
from trl_learnalign.records import layout
from trl_learnalign.records.note_parts import RoundEntry
from trl_learnalign.records.store import write_json
from trl_learnalign.selectors import GRADIENTS, ROLLOUTS, Selector

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
        work: Work,
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
        self._made_of = hashing.digest(made_of)

    def measure(self) -> tuple[Pool, Report]:
        """All rounds; all ranks call it together."""
        report = Report()
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

    def _work(self, number: int, rows: np.ndarray) -> Work:
        name = f"{self.work.name}, round {number} of {len(self.sizes)}"
        return self._of_rows(rows, name, self._folder(number))

    def _whole(self, rounds: Sequence[np.ndarray]) -> Work:
        """What is read besides, of everybody who was rolled out."""
        rows = np.sort(np.concatenate(rounds))
        return self._of_rows(rows, self.work.name, self.work.folder)

    def _of_rows(self, rows: np.ndarray, name: str, folder: Path) -> Work:
        candidates = {"candidates": hashing.digest(rows.tolist())}
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
        rows = curriculum.scored_sample(
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
        rows = promising(
            belief,
            candidates,
            size=self.sizes[number - 1],
            focus=config.budget_exponent,
            stream=hashing.key(config.selection_seed, "round", self.context.phase, number),
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
