"""Adaptive order: a posterior of every prompt's success rate, and an order of training that uses it.

`belief` holds the features of prompts, a model that predicts success rates from them, the posterior that combines its
predictions with each prompt's own outcomes, and the calibration of predictions. `order` decides which prompts come
next. `Outcomes` are what samplers, belief, reward history and report share. Everything is NumPy on numbers: no model
and no trainer is needed.

The outcome x of a rollout is 1 if it is right and 0 if it is wrong. With a graded reward it is a fraction in between,
which counts as x right and 1 - x wrong rollouts. The sum of x(1 - x) over a group is what its rewards then vary less
than right and wrong rollouts of the same mean; it is 0 if every rollout is right or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


def differ(right: np.ndarray, wrong: np.ndarray, partial: np.ndarray) -> np.ndarray:
    """Return whether the outcomes of a group differ, `(P,)` bool; its variance is not 0.

    Args:
        right, wrong, partial (`np.ndarray`): `(P,)` each, as in [`Outcomes`].
    """
    return right * wrong > partial * (right + wrong)


@dataclass(frozen=True)
class Outcomes:
    """Groups of rollouts and their outcomes. Axis: `P` groups, each the rollouts of one prompt in one generation.

    Args:
        steps (`np.ndarray`): Optimizer step of each group, counted from 0, `(P,)` int64.
        rows (`np.ndarray`): Its prompt, a row of the dataset; a prompt may occur several times.
        right (`np.ndarray`): Number of right rollouts, the sum of x.
        wrong (`np.ndarray`): Number of wrong ones, the sum of 1 - x; a rollout that could not be judged is in neither.
        partial (`np.ndarray`): Sum of x(1 - x), float64.
        phases (`np.ndarray`): Phase name, `""` if unknown.
        useful (`np.ndarray`): Whether the group has a gradient, bool.
        predicted (`np.ndarray`): Success rate predicted before the rollout, NaN without a prediction.
        prompt_tokens (`np.ndarray`): Tokens of the prompt, float64, NaN if unknown.
        completion_tokens (`np.ndarray`): Mean tokens of its completions, float64, NaN if unknown.

    Raises:
        `ValueError`: If a number is negative or of another type, or columns differ in length.
    """

    steps: np.ndarray
    rows: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    partial: np.ndarray
    phases: np.ndarray
    useful: np.ndarray
    predicted: np.ndarray
    prompt_tokens: np.ndarray
    completion_tokens: np.ndarray

    def __post_init__(self) -> None:
        shapes = {name: np.shape(values) for name, values in vars(self).items()}
        if len(set(shapes.values())) > 1 or len(shapes["rows"]) != 1:
            raise ValueError(
                f"Outcomes have the shapes {shapes}: give one row and two counts for each prompt."
            )
        for name in ("steps", "rows", "right", "wrong", "partial"):
            values, is_count = np.asarray(getattr(self, name)), name in ("steps", "rows")
            kinds, wanted = ("iu", "whole numbers") if is_count else ("iuf", "numbers")
            # A comparison with NaN is false.
            if len(values) and (values.dtype.kind not in kinds or not values.min() >= 0):
                raise ValueError(
                    f"{name} of the outcomes has the type {values.dtype} and values like {values.min()}: give "
                    f"{wanted} of at least 0."
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
        partial: np.ndarray | None = None,
        tokens: np.ndarray | None = None,
    ) -> Outcomes:
        """Create the outcomes of one step, without predictions.

        Args:
            step (`int`): The optimizer step, or another number of the generation.
            rows, right, wrong (`np.ndarray`): `(P,)` each, as in the class.
            phase (`str`, *optional*): Name of the phase.
            useful (`np.ndarray`, *optional*): `(P,)` bool; by default, groups whose outcomes differ.
            partial (`np.ndarray`, *optional*): `(P,)`; by default 0, every rollout is right or wrong.
            tokens (`np.ndarray`, *optional*): Tokens of prompt and completion, means of a group, `(P, 2)`; by default
                unknown.
        """
        count = len(rows)
        tokens = np.full((count, 2), np.nan) if tokens is None else tokens
        partial = np.zeros(count) if partial is None else partial
        return cls(
            steps=np.full(count, step, dtype=np.int64),
            rows=rows,
            right=right,
            wrong=wrong,
            partial=partial,
            phases=np.full(count, phase, dtype=object),
            useful=differ(right, wrong, partial) if useful is None else useful,
            predicted=np.full(count, np.nan),
            prompt_tokens=tokens[:, 0],
            completion_tokens=tokens[:, 1],
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
        counts = np.zeros((len(rows), 2))  # exact in any order (`success.LEVELS`)
        np.add.at(counts, places, np.stack([self.right, self.wrong], axis=1))
        return rows, counts

    def spreads(self, rows: np.ndarray) -> np.ndarray:
        """Return how much the outcomes of prompts vary within a group, and how much less than right and wrong ones.

        Args:
            rows (`np.ndarray`): The prompts of [`by_prompt`], `(P',)`.

        Returns:
            `np.ndarray`: `(P', 3)` float64, sums over the groups with two judged rollouts or more: the unbiased
            variance of an outcome, times the group's rollouts; x(1 - x); and the rollouts.
        """
        judged = self.judged.astype(np.float64)
        several = judged > 1
        squares = self.right * self.wrong - self.partial * judged
        varied = np.divide(squares, judged - 1, out=np.zeros(len(self)), where=several)
        columns = [varied, np.where(several, self.partial, 0), np.where(several, judged, 0)]
        sums = np.zeros((len(rows), 3))
        np.add.at(sums, np.searchsorted(rows, self.rows), np.stack(columns, axis=1))
        return sums

    @property
    def predictions(self) -> Outcomes:
        """The groups with a prediction."""
        return self.where(~np.isnan(self.predicted))

    @property
    def mixed(self) -> np.ndarray:
        """Whether the outcomes of a group differ, `(P,)` bool."""
        return differ(self.right, self.wrong, self.partial)

    @property
    def judged(self) -> np.ndarray:
        """Number of rollouts that could be judged, `(P,)`."""
        return self.right + self.wrong

    @property
    def success_rates(self) -> np.ndarray:
        """Share of right rollouts among the judged ones, `(P,)`, NaN where none was judged."""
        nothing = np.full(len(self), np.nan)
        return np.divide(self.right, self.judged, out=nothing, where=self.judged > 0)
