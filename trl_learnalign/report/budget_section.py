"""What the page says of scoring within a rollout budget."""

from __future__ import annotations

from trl_learnalign.records.note_parts import RoundEntry
from trl_learnalign.records.notes import SelectionNote
from trl_learnalign.report import text


def rounds_of(note: SelectionNote) -> tuple[RoundEntry, ...]:
    """The rounds of a selection; none without a budget."""
    if note.scoring is None:
        return ()
    return note.scoring.rounds


def pool_learnable_share(note: SelectionNote) -> float | None:
    """Share of all candidates that are learnable: within a budget, the random sample's."""
    rounds = rounds_of(note)
    if rounds:
        return rounds[0].learnable_share
    return note.learnable_share


def budget_sentence(note: SelectionNote) -> str | None:
    """How a selection spent its budget; `None` without one."""
    rounds = rounds_of(note)
    if not rounds or note.candidates is None:
        return None
    everybody = note.candidates + note.not_scored
    parts = [
        f"Rolled out {note.candidates:,} of {everybody:,} candidates within the budget",
        f"a random sample of {rounds[0].prompts:,}, {_learnable(rounds[0])}",
    ]
    for number, part in enumerate(rounds[1:], start=2):
        parts.append(f"round {number}: {part.prompts:,} prompts, {_learnable(part)}")
    return f"{parts[0]}: {'; '.join(parts[1:])}."


def _learnable(part: RoundEntry) -> str:
    share = text.percent(part.learnable_share)
    return f"{share} of them learnable"
