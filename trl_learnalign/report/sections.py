"""Sections of the report: stage, adaptive order, rollout budget, selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_learnalign import markup
from trl_learnalign.diversity import read_categories, shares_of, top_and_bottom
from trl_learnalign.records.notes import (
    BeliefNote,
    GroupDistribution,
    RolloutsNote,
    RoundEntry,
    SelectionNote,
    SubsetNote,
)
from trl_learnalign.records.run_record import RunContents
from trl_learnalign.records.summary import rollouts_of_run
from trl_learnalign.report.run_data import Run, Stage

GROUP_TITLES = {
    "top": "Top of the ranking",
    "bottom": "Bottom of the ranking",
    "always right": "Always right: nothing left to learn",
    "always wrong": "Always wrong: nothing to learn from",
}

_WITHOUT_SIGNAL = ("always right", "always wrong")

_DRAWN = "Some of the drawn prompts"


def took_all(stage: Stage) -> bool:
    """Whether every candidate was scored and selected, so that the ranking had no effect."""
    is_scored = stage.table is not None
    return is_scored and not stage.note.not_scored and bool(stage.selected.all())


def is_draw(stage: Stage, contents: RunContents) -> bool:
    """Whether the stage's ranking is random."""
    selectors = contents.config["selector"]
    if isinstance(selectors, str):
        return selectors == "random"
    names = [phase.name for phase in contents.plan.stages]
    number = names.index(stage.name)
    return selectors[min(number, len(selectors) - 1)] == "random"


def warnings(stage: Stage) -> list[str]:
    """Warnings about a selection, one sentence each."""
    note = stage.note
    found = []
    if note.no_signal:
        found.append(_sentence(note.no_signal))
    if note.shortfall:
        found.append(_sentence(note.shortfall))
    if note.unscored_selected:
        found.append(
            f"{note.unscored_selected:,} of the selected prompts were not scored (pool_sample, rollout_budget)."
        )
    if note.gradients_not_finite:
        found.append(
            f"The gradients of {note.gradients_not_finite:,} prompts were not finite; these prompts got score 0."
        )
    if note.breadth is not None and note.breadth.narrowness:
        found.append(_sentence(note.breadth.narrowness))
    coverage = None if note.scoring is None else note.scoring.coverage
    if coverage is not None and coverage.missing:
        found.append(
            f"{1 - coverage.share:.2%} of the trainable parameters are missing from the gradient features: "
            f"{', '.join(map(str, coverage.missing))}."
        )
    return found


def subset_warnings(subsets: Mapping[str, SubsetNote]) -> list[str]:
    """Warnings about the subsets of `trl-learnalign select`: common ones once, then those of each subset.

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


def length_caption(stage: Stage) -> str:
    """Caption of the figure of completion lengths."""
    correlation = stage.length_correlation
    caption = "Completion lengths; medians dashed."
    if correlation is not None:
        caption += f" Spearman correlation of score and length among learnable prompts: {correlation:+.2f}."
    return caption


def groups(stage: Stage, contents: RunContents) -> list[tuple[str, list[dict[str, Any]]]]:
    """Titles and the prompts below them; for a random ranking a sample, because its order has no meaning.

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
    """Label of a selected prompt; empty if it was not selected.

    Args:
        prompt (`dict`): One of [`groups`].
        stage (`Stage`): The stage.
    """
    if not prompt["selected"]:
        return ""
    is_without_signal = prompt["group"] in _WITHOUT_SIGNAL and not prompt["score"]
    if stage.note.shortfall and is_without_signal:
        return "taken to complete the stage"
    return "selected"


# ---- Adaptive order -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseRow:
    """A completed phase.

    Args:
        name (`str`): `Phase.name`.
        order (`str`): The training order of its prompts.
        rollouts (`RolloutsNote`): Statistics of its rollouts.
        belief (`BeliefNote`, *optional*): Accuracy of the predicted success rates.
    """

    name: str
    order: str
    rollouts: RolloutsNote
    belief: BeliefNote | None

    @property
    def chooses(self) -> bool:
        """Whether more prompts were rolled out than trained on."""
        return self.rollouts.groups != self.rollouts.groups_trained

    @property
    def brier_of_the_mean(self) -> float | None:
        """Brier score of the constant prediction with the phase's own share of correct rollouts."""
        share = None if self.belief is None else self.belief.seen
        return None if share is None else share * (1 - share)


def phase_rows(contents: RunContents) -> list[PhaseRow]:
    """The completed phases of runs with continual selection; empty for other runs."""
    if not contents.is_continual:
        return []
    stages = [phase.name for phase in contents.plan.stages]
    orders = contents.orders * (len(stages) if len(contents.orders) == 1 else 1)
    by_name = dict(zip(stages, orders, strict=True))
    rows = []
    for phase in contents.plan.phases:
        rollouts = contents.note(phase.name, RolloutsNote)
        if rollouts is not None:
            order = by_name.get(phase.name, "shuffled")  # the warm-up has no entry
            rows.append(
                PhaseRow(phase.name, order, rollouts, contents.note(phase.name, BeliefNote))
            )
    return rows


def order_sentence(contents: RunContents) -> str:
    """A summary of the run's rollouts in words; empty without notes on them."""
    rollouts = rollouts_of_run(contents)
    if rollouts is None or not rollouts.groups:
        return ""
    useful = markup.percent(rollouts.useful_share)
    clause = f"{useful} of the {rollouts.groups:,} groups that were rolled out had a gradient"
    if rollouts.mixed != rollouts.useful:
        clause += f", {markup.percent(rollouts.mixed_share)} both correct and wrong rollouts"
    if rollouts.groups != rollouts.groups_trained:
        clause += f", and {rollouts.groups_trained:,} groups were trained on"
    if rollouts.skipped_share is not None:
        clause += (
            f"; {markup.percent(rollouts.skipped_share)} of the tokens were left out of training without changing "
            "any gradient"
        )
    return f"{clause}.{_belief_sentence(contents)}"


def _belief_sentence(contents: RunContents) -> str:
    notes = [contents.note(phase.name, BeliefNote) for phase in contents.plan.phases]
    beliefs = [note for note in notes if note is not None and note.rollouts]
    total = sum(note.rollouts for note in beliefs)
    if not total:
        return ""
    # Means over rollouts: phases are weighted by their number of rollouts.
    prediction = sum(note.rollouts * (note.predicted or 0.0) for note in beliefs) / total
    outcome = sum(note.rollouts * (note.seen or 0.0) for note in beliefs) / total
    return (
        f" The predicted mean success rate was {markup.percent(prediction)}, and the observed one "
        f"{markup.percent(outcome)}."
    )


def reason_for_no_skipping(contents: RunContents) -> str | None:
    """Why nothing was skipped although skipping was requested; otherwise `None`."""
    rollouts = rollouts_of_run(contents)
    return None if rollouts is None else rollouts.not_skipped


# ---- Rollout budget -------------------------------------------------------------------------------------------------


def rounds_of(note: SelectionNote) -> tuple[RoundEntry, ...]:
    """The rounds of a selection; empty without a budget."""
    if note.scoring is None:
        return ()
    return note.scoring.rounds


def pool_learnable_share(note: SelectionNote) -> float | None:
    """Share of all candidates that are learnable; with a budget, estimated from the random sample."""
    rounds = rounds_of(note)
    if rounds:
        return rounds[0].learnable_share
    return note.learnable_share


def budget_sentence(note: SelectionNote) -> str | None:
    """How a selection used its rollout budget; `None` without one."""
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
    share = markup.percent(part.learnable_share)
    return f"{share} of them learnable"


# ---- Selection ------------------------------------------------------------------------------------------------------

SHOWN = 12
"""Number of categories that are shown at once; the others can be expanded."""

ENDS = 10
"""Number of prompts shown at either end of the ranking."""


@dataclass(frozen=True)
class GroupBar:
    """A category of prompts.

    Args:
        name (`str`): Its name.
        pool (`float`): Its share of the pool.
        chosen (`float`): Its share of the selection.
        pool_width (`int`): Length of the pool's bar in percent of the longest bar.
        chosen_width (`int`): Length of the selection's bar, likewise.
    """

    name: str
    pool: float
    chosen: float
    pool_width: int
    chosen_width: int

    @property
    def ratio(self) -> float | None:
        """Share of the selection over share of the pool; above 1 the category is over-represented."""
        return self.chosen / self.pool if self.pool else None


@dataclass(frozen=True)
class Categories:
    """The distribution of a selection by one column, or by clusters.

    Args:
        shares (`GroupDistribution`): The note.
        first (`list[GroupBar]`): The largest categories.
        others (`list[GroupBar]`): The rest of the recorded categories.
    """

    shares: GroupDistribution
    first: list[GroupBar]
    others: list[GroupBar]

    @property
    def warning(self) -> str | None:
        """A warning if the selection is far narrower than a random one."""
        narrowness = self.shares.narrowness
        if narrowness is None:
            return None
        return f"{narrowness[0].upper()}{narrowness[1:]}."

    @property
    def not_noted(self) -> int:
        """Number of small categories that the record does not name."""
        noted = len(self.first) + len(self.others)
        return max(0, self.shares.distinct - noted)


def categories_of(shares: tuple[GroupDistribution, ...]) -> list[Categories]:
    """The distributions of a selection by category, prepared for the page."""
    return [_categories(one) for one in shares]


def _categories(shares: GroupDistribution) -> Categories:
    largest = shares.categories[0]  # in pool and selection together
    longest = max(largest.pool / shares.pool, largest.chosen / shares.chosen)
    bars = []
    for category in shares.categories:
        pool = category.pool / shares.pool
        chosen = category.chosen / shares.chosen
        bar = GroupBar(
            name=category.name,
            pool=pool,
            chosen=chosen,
            pool_width=round(100 * pool / longest),
            chosen_width=round(100 * chosen / longest),
        )
        bars.append(bar)
    return Categories(
        shares,
        first=bars[:SHOWN],
        others=bars[SHOWN:],
    )


class SelectionExplanation:
    """Explains which prompts a run selected.

    Args:
        run (`Run`): The run.
    """

    def __init__(self, run: Run):
        self.run = run
        self._groupings = read_categories(run.folder)

    def chose(self, stage: Stage) -> bool:
        """Whether a stage has left out any candidate, so that there is something to explain."""
        if stage.table is None:
            return False
        return bool(stage.note.not_scored) or not stage.selected.all()

    def categories(self, stage: Stage) -> list[Categories]:
        """A stage's selection by category."""
        return categories_of(stage.note.shares)

    def ends(self, stage: Stage) -> list[dict[str, Any]]:
        """Both ends of a stage's ranking, best first; empty for a random ranking."""
        if stage.table is None or is_draw(stage, self.run.contents):
            return []
        frame = top_and_bottom(stage.table, ENDS, self._groupings)
        is_known = frame.notna()
        plain = frame.astype(object)
        return plain.where(is_known, None).to_dict("records")

    def trained(self) -> list[tuple[str, list[Categories]]]:
        """Phases in adaptive order, and the categories they have trained on so far."""
        found = []
        for phase in self.run.contents.plan.stages:
            note = self.run.contents.note(phase.name, RolloutsNote)
            if note is None:
                shares = self._so_far(phase.name)
            else:
                shares = note.shares
            if shares:
                found.append((phase.name, categories_of(shares)))
        return found

    def _so_far(self, name: str) -> tuple[GroupDistribution, ...]:
        """Category distributions of an unfinished phase, from its rollouts on disk."""
        contents = self.run.contents
        outcomes = self.run.outcomes
        pool = self._pool(name)
        is_adaptive = "adaptive" in contents.orders
        if outcomes is None or pool is None or not is_adaptive:
            return ()
        made = outcomes.of_phase(name)
        seed = contents.config["selection_seed"]
        return shares_of(self._groupings, pool, made.rows, seed, name)

    def _pool(self, name: str) -> np.ndarray | None:
        """Rows that a stage trains on, if recorded."""
        by_name = {stage.name: stage for stage in self.run.stages}
        stage = by_name.get(name)
        if stage is None:
            return None
        if stage.table is not None:
            rows = stage.table["index"].to_numpy()
            return rows[stage.selected]
        size = self.run.contents.plan.dataset_size
        if stage.note.selected != size:
            return None
        return np.arange(size)
