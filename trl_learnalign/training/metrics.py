"""What log and trackers are told of a selection, and of a phase that has ended."""

from __future__ import annotations

from collections.abc import Sequence

from trl_learnalign.data.categories import CLUSTER
from trl_learnalign.records.note_parts import STATISTICS, Breadth
from trl_learnalign.records.notes import BeliefNote, RolloutsNote, SelectionNote, TrainingNote
from trl_learnalign.records.shares import Shares, spread_line
from trl_learnalign.selectors import GRADIENTS, ROLLOUTS, Selector

PREFIX = "learnalign/"

TOLD = 3
"""Columns by which a line of the log tells a choice, at most."""

_TRACKED_AS = {"candidates": "pool_size", "selected": "size"}
"""Fields whose metrics have other names: dashboards know them by these."""


def selection_metrics(note: SelectionNote, stage: int) -> dict[str, float]:
    """Metrics of a selection for `report_to`; what is not known is left out.

    Args:
        note (`SelectionNote`): The selection, scored.
        stage (`int`): Number of the stage, from 1.
    """
    values: dict[str, float | None] = {}
    for name in STATISTICS:
        values[_TRACKED_AS.get(name, name)] = getattr(note, name)
    values["overlap"] = note.overlap
    values["stage"] = stage
    if note.scoring is not None:
        values["scoring_seconds"] = note.scoring.seconds
        if note.scoring.coverage is not None:  # not if all was found measured
            values["coverage"] = note.scoring.coverage.share
        values["scoring_rounds"] = len(note.scoring.rounds) or None
    values["not_scored"] = note.not_scored or None
    if note.reliability is not None:
        # Without a positive correlation of the halves nothing is predicted; a curve needs a number all the same.
        values["reliability"] = note.reliability.predicted or 0.0
        values["reliability_overlap"] = note.reliability.overlap_halves
    if note.breadth is not None:
        values |= _breadth_metrics(note.breadth)
    for shares in note.shares:
        values |= _share_metrics(shares)
    known = {}
    for name, value in values.items():
        if value is not None:
            known[PREFIX + name] = value
    return known


def _breadth_metrics(breadth: Breadth) -> dict[str, float | None]:
    return {
        "effective_directions": breadth.directions,
        "effective_directions_random": breadth.directions_random,
        "signal_covered": breadth.covered,
        "signal_covered_random": breadth.covered_random,
        "nearest_similarity": breadth.similarity,
        "nearest_similarity_random": breadth.similarity_random,
    }


def _share_metrics(shares: Shares) -> dict[str, float | None]:
    return {
        f"effective_categories/{shares.by}": shares.effective,
        f"effective_categories_random/{shares.by}": shares.effective_random,
    }


def trained_metrics(note: RolloutsNote) -> dict[str, float]:
    """Metrics of the categories that a phase has trained on, for `report_to`; empty where none are noted.

    Args:
        note (`RolloutsNote`): What its rollouts came to.
    """
    values = {}
    for shares in note.shares:
        values[f"{PREFIX}effective_categories_trained/{shares.by}"] = shares.effective
        values[f"{PREFIX}effective_categories_trained_random/{shares.by}"] = shares.effective_random
    return values


def scoring_line(selector: Selector, candidates: int, rollouts: int) -> str:
    """What is about to be measured, in one line of the log.

    Args:
        selector (`Selector`): Who will rank the candidates.
        candidates (`int`): How many there are.
        rollouts (`int`): Of each, where the selector wants them.
    """
    line = f"scoring {candidates:,} prompts for {selector.name}"
    if selector.needs & {ROLLOUTS, GRADIENTS}:
        line += f", {rollouts} rollouts each"
    return line


def training_line(note: TrainingNote) -> str:
    """A phase that has ended, in one line of the log.

    Args:
        note (`TrainingNote`): What its training was.
    """
    line = f"ended at step {note.step:,}"
    if note.reward is not None:
        line += f", mean reward {note.reward:.3g}"
    return line


def selection_lines(note: SelectionNote) -> list[str]:
    """A selection in a few lines of the log, each of which fits a terminal.

    Args:
        note (`SelectionNote`): The selection, scored.
    """
    assert note.scoring is not None
    seconds = note.scoring.seconds
    candidates = f"{note.candidates:,} candidates"
    if note.not_scored:
        candidates += f" ({note.not_scored:,} more were not scored)"
    lines = [f"selected {note.selected:,} of {candidates}, in {seconds:.1f} s"]
    if note.learnable_share is not None:
        share = f"{note.learnable_share:.0%} of the candidates"
        lines.append(f"learnable (solved sometimes, not always): {share}")
    selected, rest = note.success_rate_selected, note.success_rate_left_out
    if selected is not None:
        rates = f"mean success rate: {selected:.2f} of the selected"
        lines.append(rates if rest is None else f"{rates}, {rest:.2f} of the rest")
    if note.overlap is not None:
        share = f"{note.overlap:.0%} of the selected"
        lines.append(f"the ranking of the stage before would have taken {share} too")
    return lines + _spread_lines(note.shares)


def _spread_lines(shares: Sequence[Shares]) -> list[str]:
    """By columns alone: of clusters, as of directions, the report says more."""
    by_column = [one for one in shares if one.by != CLUSTER]
    return [spread_line(one) for one in by_column[:TOLD]]


def phase_line(rollouts: RolloutsNote, belief: BeliefNote | None) -> str:
    """What the rollouts of a phase came to, in one line of the log.

    Args:
        rollouts (`RolloutsNote`): Its rollouts.
        belief (`BeliefNote`, *optional*): What was believed of them.
    """
    if not rollouts.groups:
        return "nothing is known of its rollouts"
    line = f"{rollouts.useful_share:.0%} of {rollouts.groups:,} groups had a gradient"
    if rollouts.mixed != rollouts.useful:
        line += f", {rollouts.mixed_share:.0%} both right and wrong rollouts"
    if belief is not None and belief.predicted is not None:
        line += f" (predicted {belief.predicted:.2f}, seen {belief.seen:.2f})"
    parts = [line]
    if rollouts.groups_trained != rollouts.groups:
        parts.append(f"{rollouts.groups_trained:,} were chosen to be trained on")
    if rollouts.skipped_share is not None:
        skipped = f"{rollouts.skipped_share:.0%} of the tokens were not trained on"
        if rollouts.idle_share:
            skipped += (
                f" ({rollouts.idle_share:.0%} without a gradient were, since a step needs a row)"
            )
        parts.append(skipped)
    parts += _spread_lines(rollouts.shares)
    return "; ".join(parts)
