"""What the page says of a stage: whether there was a choice at all, what it lacked, and who is worth looking at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_learnalign.records.contents import RunContents
from trl_learnalign.records.notes import SelectionNote, SubsetNote
from trl_learnalign.report.run import Stage

GROUP_TITLES = {
    "top": "Top of the ranking",
    "bottom": "Bottom of the ranking",
    "always right": "Always right: nothing left to learn",
    "always wrong": "Always wrong: nothing to learn from",
}

_WITHOUT_SIGNAL = ("always right", "always wrong")

_DRAWN = "Some of those drawn"


def took_all(stage: Stage) -> bool:
    """Whether every candidate was scored and taken, so that the ranking has decided nothing."""
    is_scored = stage.table is not None
    return is_scored and not stage.note.not_scored and bool(stage.selected.all())


def is_draw(stage: Stage, contents: RunContents) -> bool:
    """Whether its ranking is a random draw."""
    selectors = contents.config["selector"]
    if isinstance(selectors, str):
        return selectors == "random"
    names = [phase.name for phase in contents.plan.stages]
    number = names.index(stage.name)
    return selectors[min(number, len(selectors) - 1)] == "random"


def warnings(stage: Stage) -> list[str]:
    """What the reader should know of a choice, one sentence each."""
    note = stage.note
    found = []
    if note.no_signal:
        found.append(_sentence(note.no_signal))
    if note.shortfall:
        found.append(_sentence(note.shortfall))
    else:
        found += _shortfall_of_version_0_1(note)
    if note.unscored_selected:
        found.append(
            f"{note.unscored_selected:,} of the selected prompts were not scored (pool_sample, rollout_budget)."
        )
    if note.gradients_not_finite:
        found.append(
            f"The gradients of {note.gradients_not_finite:,} prompts were not finite; they score 0."
        )
    if note.breadth is not None and note.breadth.narrowness:
        found.append(_sentence(note.breadth.narrowness))
    coverage = None if note.scoring is None else note.scoring.coverage
    if coverage is not None and coverage.missing:
        found.append(
            f"{1 - coverage.share:.2%} of the trainable entries are missing from the gradient features: "
            f"{', '.join(map(str, coverage.missing))}."
        )
    return found


def subset_warnings(subsets: Mapping[str, SubsetNote]) -> list[str]:
    """What the subsets of `trl-learnalign select` lack: once what is true of all, and of each its own.

    Args:
        subsets (mapping): Selector → its note.
    """
    common = dict.fromkeys(note.no_signal for note in subsets.values() if note.no_signal)
    found = [_sentence(cause) for cause in common]
    for name, note in subsets.items():
        if note.shortfall:
            found.append(f"{name}: {note.shortfall}.")
    return found


def _sentence(clause: str) -> str:
    ending = "" if clause.endswith((".", "?")) else "."
    return f"{clause[0].upper()}{clause[1:]}{ending}"


def _shortfall_of_version_0_1(note: SelectionNote) -> list[str]:
    """What later versions note as `shortfall`."""
    if note.learnable_share is None or note.selected is None or note.candidates is None:
        return []
    learnable = note.learnable_share * note.candidates
    if note.selected <= learnable + 0.5:
        return []
    return [
        f"Only {learnable:.0f} of {note.candidates:,} candidates were learnable, fewer than the {note.selected:,} "
        "that were taken: the others were filled in (on_shortfall)."
    ]


def length_caption(stage: Stage) -> str:
    """Of the figure of completion lengths."""
    correlation = stage.length_correlation
    caption = "Completion lengths; medians dashed."
    if correlation is not None:
        caption += f" Spearman correlation of score and length among learnable prompts: {correlation:+.2f}."
    return caption


def groups(stage: Stage, contents: RunContents) -> list[tuple[str, list[dict[str, Any]]]]:
    """Titles, and the prompts below them; of a random draw some of those drawn, for its order has no meaning.

    Args:
        stage (`Stage`): The stage.
        contents (`RunContents`): The run.
    """
    prompts = stage.prompts()
    if is_draw(stage, contents):
        drawn = [prompt for prompt in prompts if prompt["selected"]]
        return [(_DRAWN, drawn)] if drawn else []
    titled = []
    for group, title in GROUP_TITLES.items():
        members = [prompt for prompt in prompts if prompt["group"] == group]
        if members:
            titled.append((title, members))
    return titled


def badge(prompt: dict[str, Any], stage: Stage) -> str:
    """What became of a prompt; empty if it was left out.

    Args:
        prompt (`dict`): One of [`groups`].
        stage (`Stage`): The stage.
    """
    if not prompt["selected"]:
        return ""
    is_without_signal = prompt["group"] in _WITHOUT_SIGNAL and not prompt["score"]
    if stage.note.shortfall and is_without_signal:
        return "taken to fill up"
    return "selected"
