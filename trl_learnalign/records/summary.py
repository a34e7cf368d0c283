"""A run phase by phase: what its page, its model card and `summary.json` show in a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trl_learnalign.records.contents import RunContents
from trl_learnalign.records.note_parts import SelectionStatistics
from trl_learnalign.records.notes import (
    BASE,
    MetricsNote,
    RolloutsNote,
    SelectionNote,
    TrainingNote,
)
from trl_learnalign.statistics import wilson

TOKENS = ("tokens_given", "tokens_trained", "tokens_idle")
"""Counts of a `RolloutsNote` where something is skipped."""


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy after a phase.

    Args:
        phase (`str`): `"base"`, `"warmup"`, `"stage_1"`, …
        step (`int`): Optimizer steps done.
        value (`float`): Share of right answers.
        count (`int`): Problems.
        right (`tuple[bool]`): Whether each was answered rightly; empty if it is not known.
        problem_set (`str`, *optional*): Digest of the problems: equal ones can be paired.
    """

    phase: str
    step: int
    value: float
    count: int
    right: tuple[bool, ...] = ()
    problem_set: str | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of a binomial share (Wilson): of the problems, not of training seeds."""
        if not self.count:
            return 0.0, 1.0
        share = wilson(round(self.value * self.count), self.count)
        return share.low, share.high


@dataclass(frozen=True, kw_only=True)
class PhaseSummary:
    """A phase in one row; `None` where nothing is known.

    Args:
        name (`str`): `"base"`, `"warmup"`, `"stage_1"`, …
        selected (`int`, *optional*): Prompts that it trains on; as planned until it has selected.
        candidates (`int`, *optional*): Prompts that were scored.
        success_rate_selected (`float`, *optional*): Mean over the selected when they were scored.
        success_rate_left_out (`float`, *optional*): Mean over the rest.
        planned_steps (`int`, *optional*): Optimizer steps of the plan.
        steps (`int`, *optional*): Optimizer steps as they came, once the phase has ended.
        reward (`float`, *optional*): Mean training reward.
        useful (`float`, *optional*): Share of the groups of rollouts made for training that had a gradient.
        tokens_skipped (`float`, *optional*): Share of the tokens that was not trained on, where some are skipped.
        accuracy (`Accuracy`, *optional*): Held-out accuracy at its end.
    """

    name: str
    selected: int | None = None
    candidates: int | None = None
    success_rate_selected: float | None = None
    success_rate_left_out: float | None = None
    planned_steps: int | None = None
    steps: int | None = None
    reward: float | None = None
    useful: float | None = None
    tokens_skipped: float | None = None
    accuracy: Accuracy | None = None


def accuracies(contents: RunContents) -> list[Accuracy]:
    """Held-out accuracy before the first phase and after each, as far as it was measured."""
    measurements = [accuracy_of(contents, BASE)]
    measurements += [accuracy_of(contents, phase.name) for phase in contents.plan.phases]
    return [accuracy for accuracy in measurements if accuracy is not None]


def accuracy_of(contents: RunContents, phase: str) -> Accuracy | None:
    """Held-out accuracy after a phase, `None` if it was not measured.

    Args:
        contents (`RunContents`): The run.
        phase (`str`): `Phase.name`, or `"base"`.
    """
    note = contents.note(phase, MetricsNote)
    if note is None or note.accuracy is None:
        return None
    return Accuracy(
        phase=phase,
        step=note.step,
        value=note.accuracy,
        count=note.problems,
        right=tuple(note.right),
        problem_set=note.problem_set,
    )


def phase_summaries(contents: RunContents) -> list[PhaseSummary]:
    """One row for each phase, and before them one for the policy as it was given, if it was measured."""
    rows = []
    base = accuracy_of(contents, BASE)
    if base is not None:
        rows.append(PhaseSummary(name=BASE, accuracy=base))
    for phase in contents.plan.phases:
        selection: SelectionStatistics = (
            contents.note(phase.name, SelectionNote) or SelectionStatistics()
        )
        training = contents.note(phase.name, TrainingNote)
        rollouts = contents.note(phase.name, RolloutsNote)
        rows.append(
            PhaseSummary(
                name=phase.name,
                selected=selection.selected or phase.size or None,
                candidates=selection.candidates,
                success_rate_selected=selection.success_rate_selected,
                success_rate_left_out=selection.success_rate_left_out,
                planned_steps=phase.steps,
                steps=None if training is None else training.steps,
                reward=None if training is None else training.reward,
                useful=None if rollouts is None else rollouts.useful_share,
                tokens_skipped=None if rollouts is None else rollouts.skipped_share,
                accuracy=accuracy_of(contents, phase.name),
            )
        )
    return rows


def rollouts_of_run(contents: RunContents) -> RolloutsNote | None:
    """What the rollouts of all phases that have ended came to together; `None` if no phase noted it.

    Different prompts of several phases may be the same: their number is not known, and that of the last phase stands.
    """
    notes = [contents.note(phase.name, RolloutsNote) for phase in contents.plan.phases]
    known = [note for note in notes if note is not None]
    if not known:
        return None
    sums: dict[str, Any] = {}
    for name in ("groups", "useful", "mixed", "groups_trained", *TOKENS):
        counts = [getattr(note, name) for note in known if getattr(note, name) is not None]
        sums[name] = sum(counts) if counts else None
    return replace(known[-1], **sums)
