"""Outcomes of rollouts: the columns that samplers, belief, reward history and report share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Outcomes:
    """Groups of rollouts and their outcomes. Axis: `P` groups, each the rollouts of one prompt in one generation.

    Args:
        steps (`np.ndarray`): Optimizer step of each group, counted from 0, `(P,)` int64.
        rows (`np.ndarray`): Its prompt, a row of the dataset; a prompt may occur several times.
        right (`np.ndarray`): Number of right rollouts.
        wrong (`np.ndarray`): Number of wrong ones; a rollout that could not be judged is in neither.
        phases (`np.ndarray`): Phase name, `""` if unknown.
        useful (`np.ndarray`): Whether the group has a gradient, bool.
        predicted (`np.ndarray`): Success rate predicted before the rollout, NaN without a prediction.

    Raises:
        `ValueError`: If right and wrong are no counts, or columns differ in length.
    """

    steps: np.ndarray
    rows: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    phases: np.ndarray
    useful: np.ndarray
    predicted: np.ndarray

    def __post_init__(self) -> None:
        shapes = {name: np.shape(values) for name, values in vars(self).items()}
        if len(set(shapes.values())) > 1 or len(shapes["rows"]) != 1:
            raise ValueError(
                f"Outcomes have the shapes {shapes}: give one row and two counts for each prompt."
            )
        for name in ("steps", "rows", "right", "wrong"):
            values = np.asarray(getattr(self, name))
            if len(values) and (not np.issubdtype(values.dtype, np.integer) or values.min() < 0):
                raise ValueError(
                    f"{name} of the outcomes has the type {values.dtype} and values like {values.min()}: give whole "
                    "numbers of at least 0."
                )

    @classmethod
    def at(
        cls,
        step: int,
        rows: np.ndarray,
        right: np.ndarray,
        wrong: np.ndarray,
        phase: str = "",
        useful: np.ndarray | None = None,
    ) -> Outcomes:
        """Create the outcomes of one step, without predictions.

        Args:
            step (`int`): The optimizer step, or another number of the generation.
            rows, right, wrong (`np.ndarray`): `(P,)` each, as in the class.
            phase (`str`, *optional*): Name of the phase.
            useful (`np.ndarray`, *optional*): `(P,)` bool; by default, groups with right and wrong rollouts.
        """
        count = len(rows)
        return cls(
            steps=np.full(count, step, dtype=np.int64),
            rows=rows,
            right=right,
            wrong=wrong,
            phases=np.full(count, phase, dtype=object),
            useful=(right > 0) & (wrong > 0) if useful is None else useful,
            predicted=np.full(count, np.nan),
        )

    @classmethod
    def joined(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """Return the groups of one or more parts, one part after the other."""
        names = [field.name for field in fields(cls)]
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in names
        }
        return cls(**columns)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def step(self) -> int:
        """The optimizer step of the first group, and of all groups if they were rolled out together."""
        return int(self.steps[0])

    def where(self, mask: np.ndarray | slice) -> Outcomes:
        """Return the groups where `mask` `(P,)` is true, or a slice of them."""
        return Outcomes(**{name: values[mask] for name, values in vars(self).items()})

    def of_phase(self, name: str) -> Outcomes:
        """Return the groups of one phase."""
        return self.where(self.phases == name)

    def by_step(self) -> list[Outcomes]:
        """Return the groups of each run of equal steps, in their order."""
        # Positions where the step differs from that of the previous group.
        starts = np.flatnonzero(np.diff(self.steps, prepend=-1))
        ends = np.append(starts[1:], len(self))[: len(starts)]
        return [self.where(slice(start, end)) for start, end in zip(starts, ends, strict=True)]

    def by_prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each prompt once, ascending, `(P',)`, and its right and wrong rollouts, `(P', 2)` float64."""
        rows, places = np.unique(np.asarray(self.rows, dtype=np.int64), return_inverse=True)
        counts = np.zeros((len(rows), 2))  # sums of whole numbers: exact in any order
        np.add.at(counts, places, np.stack([self.right, self.wrong], axis=1))
        return rows, counts

    @property
    def predictions(self) -> Outcomes:
        """The groups with a prediction."""
        return self.where(~np.isnan(self.predicted))

    @property
    def mixed(self) -> np.ndarray:
        """Whether a group has both right and wrong rollouts, `(P,)` bool."""
        return (self.right > 0) & (self.wrong > 0)

    @property
    def judged(self) -> np.ndarray:
        """Number of rollouts that could be judged, `(P,)`."""
        return self.right + self.wrong

    @property
    def success_rates(self) -> np.ndarray:
        """Share of right rollouts among the judged ones, `(P,)`, NaN where none was judged."""
        nothing = np.full(len(self), np.nan)
        return np.divide(self.right, self.judged, out=nothing, where=self.judged > 0)
