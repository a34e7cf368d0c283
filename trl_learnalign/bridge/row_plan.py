"""Which groups and rows of rollouts are trained on, and on which process. Pure."""

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
        sizes (`list[int]`): Rows of each micro-batch, the same on every rank: TRL gathers a value of each row. The
            first ones may be empty, the last one is not.
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
    """The rows with a gradient, evenly over ranks and over as few micro-batches as they were.

    Every rank trains on equally many rows in every micro-batch: the passes of all ranks belong together, and the
    fullest rank decides when all are done. A rank with too few rows takes its shortest ones without a gradient, and
    one is trained on where there is none. A micro-batch has no more rows than before; which of them are needed are the
    last ones, at whose end gradients are exchanged. Rows of like length share a micro-batch.

    Args:
        useful (sequence of `np.ndarray`): For each rank, which of its rows have a gradient: `bool` `(R,)`.
        tokens (sequence of `np.ndarray`): For each rank, the tokens of its rows: `int64` `(R,)`.
        micro_batches (`int`): Micro-batches that the rows of a rank make up.
        movable (`bool`): Whether rows may change their rank.

    Returns:
        `RowPlan`, *optional*: `None` if as many rows would be left as there are.
    """
    counts = [int(flags.sum()) for flags in useful]
    share = max(1, -(-sum(counts) // len(counts)) if movable else max(counts))
    if share >= len(useful[0]):
        return None
    sources = [(rank, int(place)) for rank, flags in enumerate(useful) for place in np.flatnonzero(flags)]
    rows = spread(sources, len(useful), share)
    for rank, chosen in enumerate(rows):
        chosen += _shortest_idle(rank, useful[rank], tokens[rank], share - len(chosen))
        chosen.sort(key=lambda source: (-int(tokens[source[0]][source[1]]), source))
    before = -(-len(useful[0]) // micro_batches)
    needed = -(-share // before)
    least, more = divmod(share, needed)
    sizes = [0] * (micro_batches - needed) + [least + (number < more) for number in range(needed)]
    return RowPlan(rows, sizes)


def _shortest_idle(rank: int, useful: np.ndarray, tokens: np.ndarray, count: int) -> list[Source]:
    """Rows of a rank without a gradient, the cheapest ones."""
    idle = np.flatnonzero(~useful).tolist()
    shortest = sorted(idle, key=lambda place: (int(tokens[place]), place))
    return [(rank, place) for place in shortest[:count]]


def spread(sources: Sequence[Source], ranks: int, share: int) -> list[list[Source]]:
    """For each rank up to `share` rows: those that are there, and what is too much elsewhere.

    Args:
        sources (sequence of `(int, int)`): Rows, at most `ranks * share`.
        ranks (`int`): Number of ranks.
        share (`int`): Most rows of a rank.
    """
    here = [[source for source in sources if source[0] == rank] for rank in range(ranks)]
    surplus = [source for rows in here for source in rows[share:]]
    spread_rows = []
    for rows in here:
        room = max(0, share - len(rows))
        spread_rows.append(rows[:share] + surplus[:room])
        surplus = surplus[room:]
    return spread_rows


def choose_groups(useful: np.ndarray, learnability: np.ndarray, batches: np.ndarray, count: int) -> np.ndarray:
    """The groups of rollouts to train on, in the order of their arrival.

    Those with a gradient come first: batch after batch, and within the one that has too many, those with the largest
    learnability, equal ones by their arrival. If there are too few, groups without a gradient fill up.

    Args:
        useful (`np.ndarray`): Which groups have a gradient, in the order of their arrival: `bool` `(P,)`.
        learnability (`np.ndarray`): How much there is to learn from each, such as p(1 - p): `float64` `(P,)`.
        batches (`np.ndarray`): In which batch each was rolled out: `int64` `(P,)`.
        count (`int`): Groups to choose, at most `P`.

    Returns:
        `np.ndarray`: Numbers of the groups, ascending: `int64` `(count,)`.
    """
    # Equal success rates may differ in their last bits.
    rank_by = np.round(np.where(useful, -learnability, 0.0), 12)
    first = np.where(useful, batches, 0)
    order = np.lexsort((np.arange(len(useful)), rank_by, first, ~useful))
    return np.sort(order[:count])
