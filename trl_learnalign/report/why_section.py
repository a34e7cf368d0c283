"""What the page says of why these prompts: categories of the choice beside the pool's, and the ranking's ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_learnalign.ranking.shares import shares_of
from trl_learnalign.ranking.telling import ends
from trl_learnalign.records.categories import read_categories
from trl_learnalign.records.notes import RolloutsNote
from trl_learnalign.records.shares import Shares
from trl_learnalign.report.run import Run, Stage
from trl_learnalign.report.stage_section import is_draw

SHOWN = 12
"""Categories that are shown at once; the others can be unfolded."""

ENDS = 10
"""Prompts at either end of the ranking."""


@dataclass(frozen=True)
class Bar:
    """A category of prompts.

    Args:
        name (`str`): Its name.
        pool (`float`): Its share of the pool.
        chosen (`float`): Its share of the choice.
        pool_width (`int`): Percent of the longest bar.
        chosen_width (`int`): The same.
    """

    name: str
    pool: float
    chosen: float
    pool_width: int
    chosen_width: int

    @property
    def ratio(self) -> float | None:
        """Times its share of the pool; above 1 it is over-represented."""
        return self.chosen / self.pool if self.pool else None


@dataclass(frozen=True)
class Categories:
    """A choice by one column, or by clusters.

    Args:
        shares (`Shares`): As noted.
        first (`list[Bar]`): The largest categories.
        others (`list[Bar]`): The rest of those that were noted.
    """

    shares: Shares
    first: list[Bar]
    others: list[Bar]

    @property
    def warning(self) -> str | None:
        """That the choice is far narrower than a random one."""
        narrowness = self.shares.narrowness
        if narrowness is None:
            return None
        return f"{narrowness[0].upper()}{narrowness[1:]}."

    @property
    def not_noted(self) -> int:
        """Small categories that the record does not name."""
        noted = len(self.first) + len(self.others)
        return max(0, self.shares.distinct - noted)


def categories_of(shares: tuple[Shares, ...]) -> list[Categories]:
    """How the page shows a choice by categories."""
    return [_categories(one) for one in shares]


def _categories(shares: Shares) -> Categories:
    largest = shares.categories[0]  # in either
    longest = max(largest.pool / shares.pool, largest.chosen / shares.chosen)
    bars = []
    for category in shares.categories:
        pool = category.pool / shares.pool
        chosen = category.chosen / shares.chosen
        bar = Bar(
            name=category.name,
            pool=pool,
            chosen=chosen,
            pool_width=round(100 * pool / longest),
            chosen_width=round(100 * chosen / longest),
        )
        bars.append(bar)
    return Categories(
        shares,
        first=bars[:SHOWN],
        others=bars[SHOWN:],
    )


class Why:
    """Why these prompts, of a run.

    Args:
        run (`Run`): The run.
    """

    def __init__(self, run: Run):
        self.run = run
        self._groupings = read_categories(run.folder)

    def chose(self, stage: Stage) -> bool:
        """Whether a stage has left anything out, so that there is something to explain."""
        if stage.table is None:
            return False
        return bool(stage.note.not_scored) or not stage.selected.all()

    def categories(self, stage: Stage) -> list[Categories]:
        """A stage's choice by categories."""
        return categories_of(stage.note.shares)

    def ends(self, stage: Stage) -> list[dict[str, Any]]:
        """Both ends of a stage's ranking, best first; empty where it is a random draw."""
        if stage.table is None or is_draw(stage, self.run.contents):
            return []
        frame = ends(stage.table, ENDS, self._groupings)
        is_known = frame.notna()
        plain = frame.astype(object)
        told = plain.where(is_known, None)
        return told.to_dict("records")

    def trained(self) -> list[tuple[str, list[Categories]]]:
        """Phases in adaptive order, and which categories they have trained on so far."""
        found = []
        for phase in self.run.contents.plan.stages:
            note = self.run.contents.note(phase.name, RolloutsNote)
            if note is None:
                shares = self._so_far(phase.name)
            else:
                shares = note.shares
            if shares:
                told = categories_of(shares)
                found.append((phase.name, told))
        return found

    def _so_far(self, name: str) -> tuple[Shares, ...]:
        """Of a phase that is under way: from its rollouts, as far as they are on disk."""
        contents = self.run.contents
        outcomes = self.run.outcomes
        pool = self._pool(name)
        is_adaptive = "adaptive" in contents.orders
        if outcomes is None or pool is None or not is_adaptive:
            return ()
        made = outcomes.of_phase(name)
        seed = contents.config["selection_seed"]
        return shares_of(self._groupings, pool, made.rows, seed, name)

    def _pool(self, name: str) -> np.ndarray | None:
        """Rows that a stage trains on, where the record says so."""
        by_name = {stage.name: stage for stage in self.run.stages}
        stage = by_name.get(name)
        if stage is None:
            return None
        if stage.table is not None:
            rows = stage.table["index"].to_numpy()
            return rows[stage.selected]
        size = self.run.contents.plan.dataset_size
        if stage.note.selected != size:
            return None
        return np.arange(size)
