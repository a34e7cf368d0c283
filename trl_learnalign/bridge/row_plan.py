"""Which process trains on which row of an optimizer step: those with a gradient, spread evenly. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Source = tuple[int, int]
"""Where a row is: rank, and place among the rows that this rank has."""


@dataclass(frozen=True)
class RowPlan:
    """Rows of an optimizer step, process by process and micro-batch by micro-batch.

    Args:
        rows (`list`): For each rank the rows that it trains on, micro-batch after micro-batch.
        sizes (`list[int]`): Rows of each micro-batch, the same on every rank: TRL gathers a value of each row.
    """

    rows: list[list[Source]]
    sizes: list[int]

    def slices(self) -> list[slice]:
        """The micro-batches, as slices of a rank's rows."""
        ends = np.cumsum(self.sizes).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]


def plan_rows(
    useful: Sequence[np.ndarray], tokens: Sequence[np.ndarray], micro_batches: int, movable: bool
) -> RowPlan | None:
    """The rows with a gradient, evenly over ranks and micro-batches.

    Every rank trains on equally many rows in every micro-batch, and on at least one: the passes of all ranks belong
    together, and the fullest rank decides when all are done. A rank with too few rows takes its shortest ones without
    a gradient. Rows of like length share a micro-batch, the longest first.

    Args:
        useful (sequence of `np.ndarray`): For each rank, which of its rows have a gradient: `bool` `(R,)`.
        tokens (sequence of `np.ndarray`): For each rank, the tokens of its rows: `int64` `(R,)`.
        micro_batches (`int`): Micro-batches that the rows of a rank make up.
        movable (`bool`): Whether rows may change their rank.

    Returns:
        `RowPlan`, *optional*: `None` if as many rows would be left as there are.
    """
    here = [np.flatnonzero(flags).tolist() for flags in useful]
    total, fullest = sum(map(len, here)), max(map(len, here))
    share = max(micro_batches, -(-total // len(here)) if movable else fullest)
    if share >= len(useful[0]):
        return None
    surplus = [(rank, place) for rank, places in enumerate(here) for place in places[share:]]
    rows = []
    for rank, places in enumerate(here):
        chosen = [(rank, place) for place in places[:share]]
        room = share - len(chosen)
        chosen, surplus = chosen + surplus[:room], surplus[room:]
        chosen += _shortest_idle(rank, useful[rank], tokens[rank], share - len(chosen))
        rows.append(sorted(chosen, key=lambda source: (-int(tokens[source[0]][source[1]]), source)))
    least, more = divmod(share, micro_batches)
    return RowPlan(rows, [least + (number < more) for number in range(micro_batches)])


def _shortest_idle(rank: int, useful: np.ndarray, tokens: np.ndarray, count: int) -> list[Source]:
    """Rows of a rank without a gradient, the cheapest ones."""
    idle = np.flatnonzero(~useful).tolist()
    shortest = sorted(idle, key=lambda place: (int(tokens[place]), place))
    return [(rank, place) for place in shortest[:count]]
