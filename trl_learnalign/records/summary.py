"""A run in a table, one row for each phase, and the section of the model card that shows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_learnalign import version
from trl_learnalign.intervals import wilson
from trl_learnalign.plan import Plan
from trl_learnalign.records import layout
from trl_learnalign.records.notes import (
    BASE,
    MetricsNote,
    RolloutsNote,
    SelectionNote,
    SelectionStatistics,
    TrainingNote,
)
from trl_learnalign.records.run_record import RunContents
from trl_learnalign.records.store import write_atomically
from trl_learnalign.version import __version__


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy after a phase.

    Args:
        phase (`str`): `"base"`, `"warmup"`, `"stage_1"`, …
        step (`int`): Completed optimizer steps.
        value (`float`): Share of correct answers.
        count (`int`): Number of problems.
        right (`tuple[bool]`): Whether each answer was correct; empty if unknown.
        problem_set (`str`, *optional*): Digest of the problems; runs with equal digests can be paired.
    """

    phase: str
    step: int
    value: float
    count: int
    right: tuple[bool, ...] = ()
    problem_set: str | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of a binomial proportion (Wilson): over problems, not over training seeds."""
        if not self.count:
            return 0.0, 1.0
        share = wilson(round(self.value * self.count), self.count)
        return share.low, share.high


@dataclass(frozen=True, kw_only=True)
class PhaseSummary:
    """A phase in one row; `None` marks unknown values.

    Args:
        name (`str`): `"base"`, `"warmup"`, `"stage_1"`, …
        selected (`int`, *optional*): Prompts that the phase trains on; the planned number until it has selected.
        candidates (`int`, *optional*): Prompts that were scored.
        success_rate_selected (`float`, *optional*): Mean over the selected prompts at scoring time.
        success_rate_left_out (`float`, *optional*): Mean over the other candidates.
        planned_steps (`int`, *optional*): Optimizer steps of the plan.
        steps (`int`, *optional*): Actual optimizer steps, once the phase has ended.
        reward (`float`, *optional*): Mean training reward.
        useful (`float`, *optional*): Share of the rollout groups made for training that had a gradient.
        tokens_skipped (`float`, *optional*): Share of the tokens that was not trained on, if skipping is enabled.
        accuracy (`Accuracy`, *optional*): Held-out accuracy at the end of the phase.
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
    """Held-out accuracy before the first phase and after each phase, where it was measured."""
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
    """One row per phase, preceded by one for the initial policy if it was measured."""
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


TOKENS = ("tokens_given", "tokens_trained", "tokens_idle")
"""Counts of a `RolloutsNote` that exist only with skipping."""


def rollouts_of_run(contents: RunContents) -> RolloutsNote | None:
    """Sum of the rollout notes of all completed phases; `None` if no phase has one.

    The number of distinct prompts over several phases is unknown, because phases may share prompts; the number of the
    last phase is reported.
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


# ---- Section of the model card --------------------------------------------------------------------------------------

BEGIN, END = "<!-- trl_learnalign: begin -->", "<!-- trl_learnalign: end -->"


def section(contents: RunContents) -> str:
    """The section in Markdown.

    Args:
        contents (`RunContents`): `run.json`.
    """
    phases = phase_summaries(contents)
    columns = {
        heading: name
        for heading, name in COLUMNS.items()
        if name in ALWAYS or any(getattr(phase, name) is not None for phase in phases)
    }
    headings = ["phase", *columns, "held-out accuracy"]
    lines = [
        BEGIN,
        "## Data selection",
        "",
        " ".join(_sentences(contents)),
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
        *(_row(phase, list(columns.values())) for phase in phases),
        "",
        f"`{contents.success_reward}` decides whether a rollout is correct; reward functions: "
        f"{', '.join(f'`{name}`' for name in contents.trainer.reward_funcs)}.",
        "",
        "```bibtex",
        version.BIBTEX,
        "```",
        END,
    ]
    return "\n".join(lines)


COLUMNS = {
    "prompts": "selected",
    "of": "candidates",
    "success rate, selected": "success_rate_selected",
    "rest": "success_rate_left_out",
    "useful groups": "useful",
    "tokens not trained on": "tokens_skipped",
    "steps": "steps",
}
"""Headings of the table and the phase attribute of each; columns without any value are omitted."""

ALWAYS = ("selected", "steps")


def _sentences(contents: RunContents) -> list[str]:
    """How the prompts were chosen."""
    config, rollouts = contents.config, contents.plan.geometry.rollouts
    made_with = f"trl_learnalign {__version__}"
    sentences = []
    if contents.selects:
        sentences.append(
            f"Trained on prompts selected with [LearnAlign](https://arxiv.org/abs/{version.ARXIV}) "
            f"(selector `{contents.selector}`, {made_with}), {rollouts} rollouts per prompt, "
            f"projected gradients of {config['feature_dim']} dimensions, selection seed {config['selection_seed']}."
        )
    else:
        sentences.append(
            f"Trained on {_pool(contents.plan)} with {made_with}, "
            f"{rollouts} rollouts per prompt, selection seed {config['selection_seed']}."
        )
    if "adaptive" in contents.orders:
        sentences.append(
            "The order of the prompts was adaptive: each generation had those with the largest expected gain, by "
            "success rates that were estimated from all rollouts so far."
        )
    rolled_out = rollouts_of_run(contents)
    if rolled_out is not None and rolled_out.groups != rolled_out.groups_trained:
        sentences.append(
            f"Of {rolled_out.groups:,} groups of rollouts, {rolled_out.groups_trained:,} were selected for training "
            "(dynamic sampling)."
        )
    if rolled_out is not None and rolled_out.skipped_share is not None:
        sentences.append(
            f"Rollouts without an advantage, {rolled_out.skipped_share:.0%} of the tokens, were left out of the loss, "
            "which does not change its gradient."
        )
    return sentences


def _pool(plan: Plan) -> str:
    return f"all of a pool of {plan.prompts}" if plan.dataset_size else "a stream of prompts"


def _row(phase: PhaseSummary, columns: list[str]) -> str:
    accuracy = None if phase.accuracy is None else phase.accuracy.value
    cells = [phase.name, *(getattr(phase, name) for name in columns), accuracy]
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def with_section(card: str, text: str) -> str:
    """A model card with the section; it replaces an earlier version or is appended."""
    if BEGIN in card and END in card:
        before, rest = card.split(BEGIN, 1)
        _last_version, after = rest.split(END, 1)
        return before + text + after
    return f"{card.rstrip()}\n\n{text}\n"


def describe(folder: Path, contents: RunContents) -> None:
    """Add the section to the model card of an output folder; it replaces an earlier version.

    Args:
        folder (`Path`): The output folder; nothing is written if it has no card.
        contents (`RunContents`): `run.json`.
    """
    path = folder / layout.MODEL_CARD
    if path.is_file():
        card = path.read_text(encoding="utf-8")
        write_atomically(path, with_section(card, section(contents)).encode())


def renew(folder: Path, contents: RunContents) -> None:
    """Bring the section of a model card up to date, if there is one; arguments as in [`describe`]."""
    path = folder / layout.MODEL_CARD
    if path.is_file() and BEGIN in path.read_text(encoding="utf-8", errors="replace"):
        describe(folder, contents)
