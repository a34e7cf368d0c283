"""What the page says of continual selection."""

from __future__ import annotations

from dataclasses import dataclass

from trl_learnalign.records.contents import RunContents
from trl_learnalign.records.notes import BeliefNote, RolloutsNote
from trl_learnalign.records.summary import rollouts_of_run
from trl_learnalign.report import text


@dataclass(frozen=True)
class PhaseRow:
    """A phase that has ended.

    Args:
        name (`str`): `Phase.name`.
        order (`str`): In which order its prompts came.
        rollouts (`RolloutsNote`): What its rollouts came to.
        belief (`BeliefNote`, *optional*): What was believed of them.
    """

    name: str
    order: str
    rollouts: RolloutsNote
    belief: BeliefNote | None

    @property
    def chooses(self) -> bool:
        """Whether more was rolled out than trained on."""
        return self.rollouts.groups != self.rollouts.groups_trained

    @property
    def brier_of_the_mean(self) -> float | None:
        """Brier score of whoever always says the phase's own share of right rollouts."""
        share = None if self.belief is None else self.belief.seen
        return None if share is None else share * (1 - share)


def phase_rows(contents: RunContents) -> list[PhaseRow]:
    """The phases that have ended, for runs with continual selection; empty for others."""
    if not contents.is_continual:
        return []
    stages = [phase.name for phase in contents.plan.stages]
    orders = contents.orders * (len(stages) if len(contents.orders) == 1 else 1)
    by_name = dict(zip(stages, orders, strict=True))
    rows = []
    for phase in contents.plan.phases:
        rollouts = contents.note(phase.name, RolloutsNote)
        if rollouts is not None:
            order = by_name.get(phase.name, "shuffled")  # the warm-up's
            rows.append(
                PhaseRow(phase.name, order, rollouts, contents.note(phase.name, BeliefNote))
            )
    return rows


def order_sentence(contents: RunContents) -> str:
    """What the run's rollouts came to, in plain words; empty if nothing is noted of them."""
    rollouts = rollouts_of_run(contents)
    if rollouts is None or not rollouts.groups:
        return ""
    useful = text.percent(rollouts.useful_share)
    clause = f"{useful} of the {rollouts.groups:,} groups that were rolled out had a gradient"
    if rollouts.mixed != rollouts.useful:
        clause += f", {text.percent(rollouts.mixed_share)} both right and wrong rollouts"
    if rollouts.groups != rollouts.groups_trained:
        clause += f", and {rollouts.groups_trained:,} groups were trained on"
    if rollouts.skipped_share is not None:
        clause += (
            f"; {text.percent(rollouts.skipped_share)} of the tokens were left out of training, which changes no "
            "gradient"
        )
    return f"{clause}.{_belief_sentence(contents)}"


def _belief_sentence(contents: RunContents) -> str:
    notes = [contents.note(phase.name, BeliefNote) for phase in contents.plan.phases]
    beliefs = [note for note in notes if note is not None and note.rollouts]
    total = sum(note.rollouts for note in beliefs)
    if not total:
        return ""
    # Means over rollouts: phases count by how many they made.
    prediction = sum(note.rollouts * (note.predicted or 0.0) for note in beliefs) / total
    outcome = sum(note.rollouts * (note.seen or 0.0) for note in beliefs) / total
    return (
        f" The belief expected {text.percent(prediction)} of the rollouts to be right, and {text.percent(outcome)} "
        "were."
    )


def why_nothing_was_skipped(contents: RunContents) -> str | None:
    """Why nothing was skipped although it was asked for; `None` if it was, or was not asked for."""
    rollouts = rollouts_of_run(contents)
    return None if rollouts is None else rollouts.not_skipped
