"""Why these prompts: which categories a choice comes from, and the tables that trackers are shown of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from trl_learnalign import bridge
from trl_learnalign.data.categories import Grouping
from trl_learnalign.ranking.clusters import cluster_grouping
from trl_learnalign.ranking.ranking import Choice, Ranking
from trl_learnalign.ranking.shares import shares_of
from trl_learnalign.ranking.telling import ends, share_table
from trl_learnalign.records.shares import Shares

logger = logging.getLogger(__name__)

SHORT = {
    "fill": "prompts that teach nothing make up the number",
    "shrink": "fewer are taken than were wanted",
}
"""What is done where too few prompts can teach something, by `LearnAlignConfig.on_shortfall`."""

REMEDY = "learnalign_coverage and learnalign_logdet choose more broadly"


def shares_of_choice(
    ranking: Ranking, choice: Choice, candidates: np.ndarray, groupings: Sequence[Grouping]
) -> tuple[Shares, ...]:
    """A choice by columns and, where prompts have features, by clusters; all ranks call it together.

    Args:
        ranking (`Ranking`): What it was taken from.
        choice (`Choice`): The prompts that are taken.
        candidates (`np.ndarray`): Rows of the dataset that could have been, scored or not.
        groupings (sequence of `Grouping`): By columns.
    """
    pool = ranking.pool
    clusters = cluster_grouping(pool)
    everything = [*groupings]
    if clusters is not None:
        everything.append(clusters)
    return shares_of(everything, candidates, choice.rows, pool.seed, pool.phase)


def warn_of_narrow(name: str, shares: Sequence[Shares], remedy: str = REMEDY) -> None:
    """Say so where a choice is far narrower than random ones.

    Args:
        name (`str`): Whose choice it is.
        shares (sequence of `Shares`): By columns and clusters.
        remedy (`str`, *optional*): What helps.
    """
    for one in shares:
        if one.is_narrow:
            logger.warning("%s: %s; %s.", name, one.narrowness, remedy)


def warn_of_shortfall(name: str, shortfall: str | None, on_shortfall: str) -> None:
    """Say what a choice lacks, if anything, and what was done about it.

    Args:
        name (`str`): Whose choice it is.
        shortfall (`str`, *optional*): `Ranking.shortfall`.
        on_shortfall (`str`): `LearnAlignConfig.on_shortfall`.
    """
    if shortfall is None:
        return
    done = SHORT[on_shortfall]
    logger.warning("%s: %s (on_shortfall=%r: %s).", name, shortfall, on_shortfall, done)


class ChoiceTables:
    """Shows choices in the trackers of `report_to`.

    Args:
        tables (`bridge.TrackerTables`): The trackers.
        count (`int`): Prompts at either end of the ranking (`LearnAlignConfig.log_prompt_table`); 0: nothing is shown.
        groupings (sequence of `Grouping`): By columns.
    """

    def __init__(self, tables: bridge.TrackerTables, count: int, groupings: Sequence[Grouping]):
        self.tables = tables
        self.count = count
        self.groupings = groupings

    def show(self, name: str, table: pa.Table, shares: Sequence[Shares]) -> None:
        """Show a stage's choice: its best and worst prompts, and its categories.

        Args:
            name (`str`): `Phase.name`.
            table (`pyarrow.Table`): The stage's table.
            shares (sequence of `Shares`): Its categories.
        """
        if self.count and self.tables.is_on:
            prompts = ends(table, self.count, self.groupings)
            self.tables.show(f"learnalign/prompts/{name}", prompts)
        self._show_categories(f"learnalign/categories/{name}", shares)

    def show_trained(self, name: str, shares: Sequence[Shares]) -> None:
        """Show the categories of what a phase has trained on."""
        self._show_categories(f"learnalign/categories_trained/{name}", shares)

    def _show_categories(self, name: str, shares: Sequence[Shares]) -> None:
        if self.count and self.tables.is_on:
            self.tables.show(name, share_table(shares))
