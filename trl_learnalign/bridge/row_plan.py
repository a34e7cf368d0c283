"""Which groups and rows of rollouts are trained on, and on which process. Pure."""

from __future__ import annotations

import math
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
        parts = []
        end = 0
        for size in self.sizes:
            parts.append(slice(end, end + size))
            end += size
        return parts


def plan_rows(
    useful: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    in_loss: Sequence[np.ndarray],
    micro_batches: int,
    movable: bool,
) -> RowPlan | None:
    """The rows with a gradient, evenly over ranks and over as few micro-batches as they were.

    Every rank trains on equally many rows in every micro-batch: the passes of all ranks belong together, and the
    fullest rank decides when all are done. A rank with too few rows takes some without a gradient, and one where there
    is none: the shortest of those that the loss sees a token of, so that what the loss reports is about something. A
    micro-batch has no more rows than before; which of them are needed are the last ones, at whose end gradients are
    exchanged. Rows of like length share a micro-batch.

    Args:
        useful (sequence of `np.ndarray`): For each rank, which of its rows have a gradient: `bool` `(R,)`.
        tokens (sequence of `np.ndarray`): For each rank, the tokens of its rows: `int64` `(R,)`.
        in_loss (sequence of `np.ndarray`): For each rank, how many of them the loss is over: `int64` `(R,)`.
        micro_batches (`int`): Micro-batches that the rows of a rank make up.
        movable (`bool`): Whether rows may change their rank.

    Returns:
        `RowPlan`, *optional*: `None` if as many rows would be left as there are.
    """
    share = _share(useful, movable)
    rows_before = len(useful[0])
    if share >= rows_before:
        return None
    sources: list[Source] = []
    for rank, flags in enumerate(useful):
        sources += _places(rank, flags)
    rows = spread(sources, len(useful), share)
    for rank, chosen in enumerate(rows):
        missing = share - len(chosen)
        idle = sorted(
            _places(rank, ~useful[rank]),
            key=lambda source: (not _length(in_loss, source), _length(tokens, source), source),
        )
        chosen += idle[:missing]
        chosen.sort(key=lambda source: (-_length(tokens, source), source))
    return RowPlan(rows, _sizes(share, rows_before, micro_batches))


def with_an_image(
    useful: Sequence[np.ndarray], images: Sequence[np.ndarray], tokens: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The rows with a gradient, and, if none of them has an image though others have, the shortest one that has.

    Args:
        useful (sequence of `np.ndarray`): For each rank, which of its rows have a gradient: `bool` `(R,)`.
        images (sequence of `np.ndarray`): For each rank, the images of its rows: `int64` `(R,)`.
        tokens (sequence of `np.ndarray`): For each rank, the tokens of its rows: `int64` `(R,)`.
    """
    flags = [np.array(rows) for rows in useful]
    shown = [source for rank, counts in enumerate(images) for source in _places(rank, counts > 0)]
    if shown and not any(flags[rank][place] for rank, place in shown):
        rank, place = min(shown, key=lambda source: (_length(tokens, source), source))
        flags[rank][place] = True
    return flags


def _share(useful: Sequence[np.ndarray], movable: bool) -> int:
    """Rows that each rank trains on: at least one."""
    counts = [int(flags.sum()) for flags in useful]
    fullest = max(counts)
    if movable:
        fullest = math.ceil(sum(counts) / len(counts))
    return max(1, fullest)


def _sizes(share: int, rows_before: int, micro_batches: int) -> list[int]:
    """Rows of each micro-batch: as few micro-batches as there can be, the last ones, evenly filled."""
    most = math.ceil(rows_before / micro_batches)
    needed = math.ceil(share / most)
    least, more = divmod(share, needed)
    empty = [0] * (micro_batches - needed)
    larger = [least + 1] * more
    smaller = [least] * (needed - more)
    return empty + larger + smaller


def _places(rank: int, flags: np.ndarray) -> list[Source]:
    return [(rank, int(place)) for place in np.flatnonzero(flags)]


def _length(tokens: Sequence[np.ndarray], source: Source) -> int:
    rank, place = source
    return int(tokens[rank][place])


def spread(sources: Sequence[Source], ranks: int, share: int) -> list[list[Source]]:
    """For each rank up to `share` rows: those that are there, and what is too much elsewhere.

    Args:
        sources (sequence of `(int, int)`): Rows, at most `ranks * share`.
        ranks (`int`): Number of ranks.
        share (`int`): Most rows of a rank.
    """
    here: list[list[Source]] = [[] for _ in range(ranks)]
    surplus: list[Source] = []
    for source in sources:
        rank, _ = source
        has_room = len(here[rank]) < share
        (here[rank] if has_room else surplus).append(source)
    for rows in here:
        room = share - len(rows)
        rows += surplus[:room]
        surplus = surplus[room:]
    return here


def choose_groups(
    useful: np.ndarray, learnability: np.ndarray, batches: np.ndarray, count: int
) -> np.ndarray:
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
    arrival = np.arange(len(useful))
    # Equal success rates may differ in their last bits.
    best_first = -np.round(learnability, 12)
    # The last key counts first. Where there is nothing to learn, arrival alone counts.
    keys = (
        arrival,
        np.where(useful, best_first, 0.0),
        np.where(useful, batches, 0),
        ~useful,
    )
    order = np.lexsort(keys)
    return np.sort(order[:count])
