"""Scores → an order and a choice: who is taken, what is said of it, and who is worth looking at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_learnalign import scoring
from trl_learnalign.pool import Pool
from trl_learnalign.ranking.stage_table import stage_table
from trl_learnalign.records.notes import SelectionStatistics
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
        return (
            self.pool.learnability > 0 if self.selector.only_learnable else ~np.isnan(self.scores)
        )

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
        """One row per scored candidate; columns as in `trl_learnalign.records.run`."""
        aligned = self.selector.alignment(self.pool, self.scores)
        return stage_table(self.pool, self.scores, aligned, self.order, choice.positions)

    def examples(self) -> list[dict[str, Any]]:
        """The most telling candidates with a few of their rollouts; all ranks call it together.

        Returns:
            `list[dict]`: `group` (`"top"`, `"bottom"`, `"always right"`, `"always wrong"`), `index` (row of the
            dataset) and `rollouts` (`text`, `right`, `tokens` of each).
        """
        groups = telling_positions(
            self.order.tolist(), self.eligible.tolist(), self.pool.success_rate.tolist()
        )
        positions = [position for group in groups.values() for position in group]
        texts = {} if self.pool.texts is None else self.pool.texts.of(positions)
        return [
            {
                "group": name,
                "index": int(self.pool.prompts[position]),
                "rollouts": texts.get(position, []),
            }
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
            said += (
                f", {unranked} of them {'of learnability 0' if method else 'unranked'}"
                if unranked
                else ""
            )
            said += f", {len(choice.unscored)} of them unscored" if len(choice.unscored) else ""
            return f"{said}; {passed_over}" if unranked and left else said
        if unranked and left:
            return f"{unranked} prompts of learnability 0 (p = 0 or 1) are taken; {passed_over}"
        return None

    def summary(self, choice: Choice) -> SelectionStatistics:
        """Counts and means of selected and left-out candidates, for record, log and table."""
        pool, chosen = self.pool, choice.positions
        left = np.setdiff1d(np.arange(len(pool)), chosen)
        rate, learnability = pool.success_rate, pool.learnability
        known = not np.isnan(learnability).all()
        return SelectionStatistics(
            candidates=len(pool),
            selected=len(chosen),
            success_rate=_mean(rate),
            success_rate_selected=_mean(rate[chosen]),
            success_rate_left_out=_mean(rate[left]),
            learnable_share=float((learnability > 0).mean()) if known else None,
            unlearnable_selected=int((~(learnability[chosen] > 0)).sum()) if known else None,
            learnable_left_out=int((learnability[left] > 0).sum()) if known else None,
            score_selected=_mean(self.scores[chosen]),
            score_left_out=_mean(self.scores[left]),
            gradients_not_finite=0 if pool.finite is None else int((~pool.finite).sum()),
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
    ranked = [int(position) for position in order if eligible[position]]
    top = ranked[:best]
    found = {"top": top, "bottom": [position for position in ranked[-best:] if position not in top]}
    shown = {position for positions in found.values() for position in positions}
    for name, rate in (("always right", 1.0), ("always wrong", 0.0)):
        same = (int(p) for p in order if success_rate[p] == rate and int(p) not in shown)
        found[name] = [position for position, _ in zip(same, range(extremes), strict=False)]
    return {name: positions for name, positions in found.items() if positions}
