"""Scores → an order and a choice: who is taken, what is said of it, and who is worth looking at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_learnalign import scoring
from trl_learnalign.pool import Pool
from trl_learnalign.ranking.stage_table import stage_table
from trl_learnalign.records.note_parts import SelectionStatistics
from trl_learnalign.selectors import Selector

if TYPE_CHECKING:
    import pyarrow as pa


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
        if self.selector.only_learnable:
            return self.pool.learnability > 0
        return ~np.isnan(self.scores)

    def take(self, size: int, candidates: np.ndarray, on_shortfall: str, least: int) -> Choice:
        """The best prompts; with `"fill"`, larger choices contain the smaller ones.

        Args:
            size (`int`): How many are wanted, at most `len(candidates)`.
            candidates (`np.ndarray`): Rows that may be taken; the pool's, and those that were not scored
                (`pool_sample`, `rollout_budget`), which come last, in tie order.
            on_shortfall (`str`): `"fill"` takes `size` prompts all the same, `"shrink"` those that are eligible.
            least (`int`): Prompts to take at least, also with `"shrink"`.
        """
        least = size if on_shortfall == "fill" else min(size, least)
        prompts, eligible, ahead = self.pool.prompts, self.eligible, self._ahead
        ties = self.ties[prompts]
        positions = scoring.select(self.scores, eligible, ties, size, on_shortfall, ahead)
        if len(positions) < least:
            positions = scoring.select(self.scores, eligible, ties, least, "fill", ahead)
        others = np.setdiff1d(candidates, prompts)
        others = others[np.argsort(self.ties[others])]
        unscored = others[: max(0, least - len(positions))]
        rows = np.concatenate([prompts[positions], unscored])
        return Choice(positions, unscored, rows)

    def table(self, choice: Choice) -> pa.Table:
        """One row per scored candidate; columns as in `trl_learnalign.records.run`."""
        alignment = self.selector.alignment(self.pool, self.scores)
        return stage_table(self.pool, self.scores, alignment, self.order, choice.positions)

    def examples(self) -> list[dict[str, Any]]:
        """The most telling candidates with a few of their rollouts; all ranks call it together.

        Returns:
            `list[dict]`: `group` (`"top"`, `"bottom"`, `"always right"`, `"always wrong"`), `index` (row of the
            dataset) and `rollouts` (`text`, `right`, `tokens` of each).
        """
        groups = telling_positions(
            self.order.tolist(), self.eligible.tolist(), self.pool.success_rate.tolist()
        )
        positions = list(itertools.chain.from_iterable(groups.values()))
        texts = {} if self.pool.texts is None else self.pool.texts.of(positions)
        examples = []
        for name, group in groups.items():
            for position in group:
                row = int(self.pool.prompts[position])
                rollouts = texts.get(position, [])
                examples.append({"group": name, "index": row, "rollouts": rollouts})
        return examples

    def shortfall(self, choice: Choice, size: int) -> str | None:
        """What a choice lacks, as the end of a sentence that begins with its name; `None` if nothing.

        Args:
            choice (`Choice`): The prompts that are taken.
            size (`int`): How many were asked for.
        """
        is_eligible = self.eligible
        eligible_count, total = int(is_eligible.sum()), len(self.pool)
        unranked_taken = int((~is_eligible[choice.positions]).sum())
        eligible_taken = len(choice.positions) - unranked_taken
        passed_over = ""
        if unranked_taken and eligible_count > eligible_taken:
            passed_over = (
                f"{eligible_count - eligible_taken} learnable ones of negative score are left out for them, as Eq. 9 "
                "ranks them; zero_learnability='last' takes the learnable ones first"
            )
        if eligible_count < size:
            can, cannot = "have a score", "without one"
            if self.selector.only_learnable:
                can, cannot = "are learnable", "of learnability 0"
            message = f"only {eligible_count} of {total} candidates {can}, "
            message += f"fewer than the {size} wanted; taken: {len(choice)}"
            if unranked_taken:
                message += f", {unranked_taken} of them {cannot}"
            if len(choice.unscored):
                message += f", {len(choice.unscored)} of them unscored"
            return f"{message}; {passed_over}" if passed_over else message
        if passed_over:
            return (
                f"{unranked_taken} prompts of learnability 0 (p = 0 or 1) are taken; {passed_over}"
            )
        return None

    def summary(self, choice: Choice) -> SelectionStatistics:
        """Counts and means of selected and left-out candidates, for record, log and table."""
        pool, selected = self.pool, choice.positions
        rest = np.setdiff1d(np.arange(len(pool)), selected)
        rate, learnability = pool.success_rate, pool.learnability
        statistics = SelectionStatistics(
            candidates=len(pool),
            selected=len(selected),
            success_rate=_mean(rate),
            success_rate_selected=_mean(rate[selected]),
            success_rate_left_out=_mean(rate[rest]),
            score_selected=_mean(self.scores[selected]),
            score_left_out=_mean(self.scores[rest]),
            gradients_not_finite=0 if pool.finite is None else int((~pool.finite).sum()),
        )
        if np.isnan(learnability).all():  # no rollouts were made
            return statistics
        is_learnable = learnability > 0
        return replace(
            statistics,
            learnable_share=float(is_learnable.mean()),
            unlearnable_selected=int((~is_learnable[selected]).sum()),
            learnable_left_out=int(is_learnable[rest].sum()),
        )


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def telling_positions(
    order: Sequence[int],
    eligible: Sequence[bool],
    success_rate: Sequence[float],
    best: int = 5,
    extremes: int = 2,
) -> dict[str, list[int]]:
    """Candidates worth showing, by group: the top and the bottom of the ranking, and prompts without a signal.

    Args:
        order (sequence of `int`): Positions from best to worst, `(P,)`.
        eligible (sequence of `bool`): `(P,)`: has a score of its own.
        success_rate (sequence of `float`): `(P,)`; NaN where there is none.
        best (`int`, *optional*, defaults to `5`): Prompts in each of `"top"` and `"bottom"`.
        extremes (`int`, *optional*, defaults to `2`): Prompts in each of `"always right"` and `"always wrong"`.
    """
    ranking = [int(position) for position in order if eligible[position]]
    top = ranking[:best]
    bottom = [position for position in ranking[-best:] if position not in top]
    groups = {"top": top, "bottom": bottom}
    at_the_ends = {*top, *bottom}
    for name, rate in (("always right", 1.0), ("always wrong", 0.0)):
        same = (int(position) for position in order if success_rate[position] == rate)
        others = (position for position in same if position not in at_the_ends)
        groups[name] = list(itertools.islice(others, extremes))
    return {name: positions for name, positions in groups.items() if positions}
