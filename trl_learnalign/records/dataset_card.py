"""The card of a selection: how its prompts were chosen, from the record alone, and what the record does not say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.records import citation, markdown
from trl_learnalign.records.contents import RunContents
from trl_learnalign.records.notes import SelectionNote
from trl_learnalign.records.selection_export import DATA, PREFIX, Selection
from trl_learnalign.records.shares import Shares

SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
)
"""Of the hub: a limit, and what a dataset with fewer rows is called."""

AT_HOME = ("record_dir", "push_to_hub_id")
"""Settings that say where something lies, not how prompts were chosen."""

CATEGORIES = 12
"""Categories of a column that are named."""

MEANINGS = {
    "index": "row of the file that the prompt was read from, or of the training dataset",
    "rank": "1 is best",
    "score": "what the selector gave it; the highest come first",
    "success_rate": "p, the share of right ones among its rollouts",
    "learnability": "V = p (1 - p)",
    "alignment": "mean alignment of its policy gradient with those of the pool",
}


def card_of(contents: RunContents, selection: Selection) -> str:
    """The card, with its metadata.

    Args:
        contents (`RunContents`): `run.json`.
        selection (`Selection`): What is published.
    """
    count = len(selection.table)
    title = f"{count:,} prompts chosen by {selection.selector}"
    sections = {
        "How they were chosen": _paragraph(_how(contents, selection)),
        "Figures": _figures(selection),
        "Categories": _categories(selection.note.shares),
        "Columns": _columns(selection),
        "Settings": _settings(contents),
        "Limits": _list(_limits(contents, selection)),
        "Citation": f"```bibtex\n{citation.BIBTEX}\n```",
    }
    parts = [f"# {markdown.plain(title)}"]
    for heading, body in sections.items():
        if body:
            parts += [f"## {heading}", body]
    text = "\n\n".join(parts)
    card = DatasetCard(f"---\n{_metadata(title, count).to_yaml()}\n---\n\n{text}\n")
    return str(card)


def _metadata(title: str, count: int) -> DatasetCardData:
    size = next((name for limit, name in SIZES if count < limit), "n>1M")
    data_files = [{"split": "train", "path": DATA}]
    return DatasetCardData(
        pretty_name=title,
        size_categories=[size],
        task_categories=["text-generation"],
        tags=["trl", "grpo", "reinforcement-learning", "data-selection", "learnalign"],
        configs=[{"config_name": "default", "data_files": data_files}],
    )


def _how(contents: RunContents, selection: Selection) -> Iterable[str]:
    """Sentences on how the prompts were chosen."""
    note = selection.note
    trainer = contents.trainer
    config = contents.config
    version = contents.versions.get("trl_learnalign", "of an unknown version")
    everybody = f"a dataset of {contents.plan.dataset_size:,} prompts"
    if note.candidates is not None and note.candidates != contents.plan.dataset_size:
        everybody = f"{note.candidates:,} candidates of {everybody}"
    yield (
        f"{len(selection.table):,} of {everybody}, ranked by the selector `{selection.selector}` of "
        f"trl_learnalign {version} ([LearnAlign](https://arxiv.org/abs/{citation.ARXIV}))."
    )
    state = "as it was given" if not note.step else f"after {note.step:,} optimizer steps of GRPO"
    yield f"They were chosen for {_model(trainer.model)}, {state}."
    if note.success_rate is not None:
        yield (
            f"Each of {note.candidates:,} candidates got {contents.plan.geometry.rollouts} rollouts (temperature "
            f"{trainer.temperature:g}, at most {trainer.max_completion_length:,} tokens), judged by the reward "
            f"function `{contents.success_reward}`."
        )
    coverage = None if note.scoring is None else note.scoring.coverage
    if coverage is not None:
        yield (
            f"Policy gradients over {coverage.share:.1%} of the trainable parameters were projected to "
            f"{config.get('feature_dim', 'an unknown number of')} dimensions."
        )
    yield f"The seed of the selection is {config['selection_seed']}."
    if note.shortfall:
        yield f"What the choice lacks: {markdown.plain(note.shortfall)}."


def _model(name: str) -> str:
    """A model's name; of a folder the last part, since the rest is nobody's business."""
    if not name:
        return "a policy without a name"
    path = PurePath(name)
    is_folder = path.is_absolute() or len(path.parts) > 2 or name.startswith(".")
    return f"the policy `{path.name}`, a local folder" if is_folder else f"the policy `{name}`"


def _figures(selection: Selection) -> str:
    note = selection.note
    rows = [
        ("candidates that were scored", note.candidates, None),
        ("mean success rate", note.success_rate_selected, note.success_rate_left_out),
        ("mean score", note.score_selected, note.score_left_out),
        ("share with 0 < p < 1", note.learnable_share_selected, None),
        ("share with 0 < p < 1 of all candidates", note.learnable_share, None),
    ]
    breadth = note.breadth
    if breadth is not None:
        rows += [
            ("directions that their features point in, about", breadth.directions, None),
            ("the same of as many random prompts", breadth.directions_random, None),
        ]
    if isinstance(note, SelectionNote) and note.reliability is not None:
        agreement = "rank correlation with another scoring, predicted"
        rows.append((agreement, note.reliability.predicted, None))
    known = [row for row in rows if row[1] is not None]
    if not known:
        return ""
    return markdown.table(["", "chosen", "left out"], known)


def _categories(all_shares: tuple[Shares, ...]) -> str:
    parts = []
    for shares in all_shares:
        parts.append(
            f"By {markdown.plain(shares.by)}: from about {shares.effective:.1f} of {shares.distinct} categories (as "
            f"many random prompts: {shares.effective_random:.1f})."
        )
        rows = []
        for category in shares.categories[:CATEGORIES]:
            in_pool = f"{category.pool / shares.pool:.1%}"
            in_choice = f"{category.chosen / shares.chosen:.1%}"
            rows.append((category.name, in_pool, in_choice))
        parts.append(
            markdown.table([markdown.plain(shares.by), "of the pool", "of the choice"], rows)
        )
    return "\n\n".join(parts)


def _columns(selection: Selection) -> str:
    names = selection.table.column_names
    rows = [(PREFIX + name, text) for name, text in MEANINGS.items() if PREFIX + name in names]
    theirs = [name for name in names if not name.startswith(PREFIX)]
    quoted = ", ".join(markdown.plain(name) for name in theirs)
    return f"Of the dataset: {quoted}. Of the selection:\n\n{markdown.table(['column', 'meaning'], rows)}"


def _settings(contents: RunContents) -> str:
    """Settings that are not at their defaults."""
    defaults = dataclasses.asdict(LearnAlignConfig())
    nothing = object()
    changed: dict[str, Any] = {}
    for name, value in contents.config.items():
        if name not in AT_HOME and value != defaults.get(name, nothing):
            changed[name] = _published(value)
    versions = ", ".join(f"{name} {number}" for name, number in contents.versions.items())
    text = yaml.safe_dump(changed, sort_keys=True, allow_unicode=True)
    return (
        f"Other than the defaults of trl_learnalign:\n\n```yaml\n{text}```\n\nMade with {versions}."
    )


def _published(value: Any) -> Any:
    """A setting's value; of a file's place on somebody's machine the last part."""
    if isinstance(value, str) and PurePath(value).is_absolute():
        return f"…/{PurePath(value).name}"
    return value


def _limits(contents: RunContents, selection: Selection) -> Iterable[str]:
    """What the reader should not read into it, and what the record does not say."""
    note = selection.note
    rollouts = contents.plan.geometry.rollouts
    yield (
        "What teaches one policy at one step need not teach another: success rates and gradients are those of the "
        "policy named above."
    )
    if note.success_rate is not None:
        error = 0.5 / rollouts**0.5
        yield f"A success rate from {rollouts} rollouts has a standard error of up to {error:.2f}."
    else:
        yield "No success rates were measured: the selector needs no rollouts, or the record lacks them."
    has_reliability = isinstance(note, SelectionNote) and note.reliability is not None
    if not has_reliability:
        yield "How far the ranking would repeat itself with other rollouts was not measured."
    if not note.shares:
        yield "Which categories of prompts the choice favours is not in the record."
    for shares in note.shares:
        if shares.narrowness:
            yield f"The choice is narrow: {markdown.plain(shares.narrowness)}."
    if note.breadth is not None and note.breadth.narrowness:
        yield f"The choice is narrow: {note.breadth.narrowness}."
    if isinstance(note, SelectionNote) and note.unscored_selected:
        yield f"{note.unscored_selected:,} of the chosen prompts were not scored, and fill the choice up."
    if not selection.has_all_columns:
        yield (
            "The record lacks the file of the chosen prompts, and has their text and no other column of the dataset: "
            "answers have to be joined by `selection_index`."
        )
    if selection.missing:
        yield f"{selection.missing:,} further prompts were taken that this record does not hold."
    yield "That training on them beats as many random prompts is not shown by this record: compare."
    yield "Name and licence of the dataset that the prompts come from are not in the record: add them."


def _paragraph(sentences: Iterable[str]) -> str:
    return " ".join(sentences)


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
