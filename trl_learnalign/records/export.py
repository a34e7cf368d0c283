"""Exports a selection as a dataset with a card.

```
folder/
  README.md            the card
  data/train.parquet   the chosen prompts, best first
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from trl_learnalign import markup, version
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.records import layout
from trl_learnalign.records.notes import GroupDistribution, SelectionNote, SubsetNote
from trl_learnalign.records.run_record import RunContents
from trl_learnalign.records.store import read_table, write_atomically, write_table
from trl_learnalign.version import ARXIV

DATA = "data/train.parquet"
"""File of the prompts in the folder."""

FILES = (layout.DATASET_CARD, DATA)
"""All files of the folder."""

PREFIX = "selection_"
"""Prefix of the columns with the selection's figures for a prompt."""

FIGURES = ("score", "success_rate", "learnability", "alignment")
"""Columns of a stage's table that are also in an exported selection, after [`PREFIX`]."""


@dataclass(frozen=True)
class Selection:
    """A selection of prompts, as recorded by a run.

    Args:
        name (`str`): `"stage_1"`, …, or the selector of a subset.
        selector (`str`): The selector that ranked the candidates.
        table (`pyarrow.Table`): The prompts, best first, with the columns of `trl_learnalign.ranking`.
        note (`SelectionNote` or `SubsetNote`): The record's note on the selection.
        has_all_columns (`bool`): Whether `table` has all columns of the dataset, or only the prompts.
    """

    name: str
    selector: str
    table: pa.Table
    note: SelectionNote | SubsetNote
    has_all_columns: bool

    @property
    def missing(self) -> int:
        """Number of selected prompts that are not in the table."""
        if isinstance(self.note, SubsetNote) or self.has_all_columns:
            return 0
        return self.note.unscored_selected


def stage_selection(records: Path, contents: RunContents, stage: str | None = None) -> Selection:
    """The selection of a stage.

    Args:
        records (`Path`): The record folder.
        contents (`RunContents`): Its `run.json`.
        stage (`str`, *optional*): `"stage_1"`, …; defaults to the last stage with a selection.

    Raises:
        `ValueError`: If there is no such stage or it has no selection; the message names the stages that have one.
    """
    stages = [phase.name for phase in contents.plan.stages]
    chosen: dict[str, SelectionNote] = {}
    for candidate in stages:
        noted = contents.note(candidate, SelectionNote)
        if noted is not None and noted.scored:
            chosen[candidate] = noted
    name = stage
    if name is None and chosen:
        name = list(chosen)[-1]
    if name is None or name not in chosen:
        raise ValueError(_no_selection(contents, stage, list(chosen)))
    note = chosen[name]
    path = layout.inside(records, layout.stage_selected(name))
    has_all_columns = path.exists()
    if has_all_columns:
        table = read_table(path)
    else:
        table = _of_candidates(records, name)
    selectors = contents.config["selector"]
    selector = selectors
    if not isinstance(selectors, str):
        number = stages.index(name)
        last = len(selectors) - 1
        selector = selectors[min(number, last)]
    return Selection(name, selector, table, note, has_all_columns)


def _no_selection(contents: RunContents, stage: str | None, chosen: list[str]) -> str:
    """The reason why there is no selection to write."""
    stages = [phase.name for phase in contents.plan.stages]
    known = ", ".join(chosen) or "none"
    if stage is not None and stage not in stages:
        names = ", ".join(stages)
        return f"There is no stage {stage!r}: the stages of this run are {names}; those with a selection: {known}."
    what = "This run"
    asked = stages
    if stage is not None:
        what = stage
        asked = [stage]
    notes = [contents.note(name, SelectionNote) for name in asked]
    if any(note is not None for note in notes):
        return (
            f"{what} took all prompts without scoring them, so it has no selection to write. Stages with a "
            f"selection: {known}."
        )
    return f"{what} has no selection yet. Stages with a selection: {known}."


def _of_candidates(records: Path, name: str) -> pa.Table:
    """The selected rows of a stage's table, if the file of selected prompts is missing; without other columns."""
    candidates = read_table(layout.inside(records, layout.stage_table(name)))
    taken = candidates.filter(candidates["selected"]).sort_by("rank")
    ranks = range(1, len(taken) + 1)
    columns = {
        "prompt": taken["prompt"],
        "prompt_id": taken["prompt_id"],
        f"{PREFIX}index": taken["index"],
        f"{PREFIX}rank": pa.array(ranks, pa.int64()),
    }
    for figure in FIGURES:
        columns[PREFIX + figure] = taken[figure]
    return pa.table(columns)


def subset_selection(
    output_dir: Path, contents: RunContents, selector: str | None = None, size: int | None = None
) -> Selection:
    """A subset selected by `trl-learnalign select`.

    Args:
        output_dir (`Path`): The run's output folder.
        contents (`RunContents`): Its `run.json`.
        selector (`str`, *optional*): The selector; may be omitted if there is only one.
        size (`int`, *optional*): The requested size; defaults to the largest.

    Raises:
        `ValueError`: If there is no such subset; the message names the existing ones.
        `FileNotFoundError`: If its file was removed.
    """
    subsets = contents.subsets
    name = selector
    if name is None and len(subsets) == 1:
        (name,) = subsets
    note = subsets.get(name or "")
    if name is None or note is None:
        names = ", ".join(subsets)
        raise ValueError(
            f"selector={selector!r}: this run has subsets by {names}; name one of them."
        )
    sizes = [int(text) for text in note.sizes]
    wanted = max(sizes) if size is None else size
    if wanted not in sizes:
        known = ", ".join(note.sizes)
        raise ValueError(f"top={size}: {name} has subsets of {known} prompts.")
    file = f"{layout.subset(wanted)}.parquet"
    path = layout.inside(output_dir, layout.SUBSETS, layout.selector_folder(name), file)
    table = read_table(path)
    return Selection(name, name, table, note, has_all_columns=True)


def check_folder(folder: Path) -> None:
    """Check that a dataset can be written into a folder, and that no other file would be published with it.

    Raises:
        `ValueError`: If the folder has other files, naming one.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in FILES:
            raise ValueError(
                f"{folder} contains other files ({name}), which would be published with the selection: give an "
                "empty folder."
            )


def write_selection(folder: Path, selection: Selection, card: str) -> Path:
    """Write a selection; replaces an earlier one.

    Args:
        folder (`Path`): The target folder.
        selection (`Selection`): The prompts.
        card (`str`): Content of its `README.md`.

    Returns:
        `Path`: The folder, for `datasets.load_dataset`.

    Raises:
        `ValueError`: As [`check_folder`].
    """
    check_folder(folder)
    path = folder / DATA
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, selection.table)
    write_atomically(folder / layout.DATASET_CARD, card.encode(errors="replace"))
    return folder


# ---- Dataset card ---------------------------------------------------------------------------------------------------

SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
)
"""Size categories of the hub: upper limit of the rows, and name of the category."""

AT_HOME = ("record_dir", "push_to_hub_id")
"""Settings that name local places and do not affect the selection."""

CATEGORIES = 12
"""Maximum number of categories of a column that are named."""

MEANINGS = {
    "index": "row of the file that the prompt was read from, or of the training dataset",
    "rank": "1 is best",
    "score": "the selector's score; the selection has the highest",
    "success_rate": "p, the share of its rollouts that are correct",
    "learnability": "V = p (1 - p)",
    "alignment": "mean alignment of its policy gradient with those of the pool",
}


def card_of(contents: RunContents, selection: Selection) -> str:
    """The dataset card, with its metadata.

    Args:
        contents (`RunContents`): `run.json`.
        selection (`Selection`): What is published.
    """
    count = len(selection.table)
    title = f"{count:,} prompts selected by {selection.selector}"
    sections = {
        "How they were selected": _paragraph(_how(contents, selection)),
        "Figures": _figures(selection),
        "Categories": _categories(selection.note.shares),
        "Columns": _columns(selection),
        "Settings": _settings(contents),
        "Limits": _list(_limits(contents, selection)),
        "Citation": f"```bibtex\n{version.BIBTEX}\n```",
    }
    parts = [f"# {markup.plain(title)}"]
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
    version = contents.versions.get("trl_learnalign", "(unknown version)")
    everybody = f"a dataset of {contents.plan.dataset_size:,} prompts"
    if note.candidates is not None and note.candidates != contents.plan.dataset_size:
        everybody = f"{note.candidates:,} candidates of {everybody}"
    yield (
        f"{len(selection.table):,} of {everybody}, ranked by the selector `{selection.selector}` of "
        f"trl_learnalign {version} ([LearnAlign](https://arxiv.org/abs/{ARXIV}))."
    )
    state = "before training" if not note.step else f"after {note.step:,} optimizer steps of GRPO"
    yield f"They were selected for {_model(trainer.model)}, {state}."
    if note.success_rate is not None:
        yield (
            f"Each of {note.candidates:,} candidates got {contents.plan.geometry.rollouts} rollouts (temperature "
            f"{trainer.temperature:g}, at most {trainer.max_completion_length:,} tokens), graded by the reward "
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
        yield f"Shortfall of the selection: {markup.plain(note.shortfall)}."


def _model(name: str) -> str:
    """A model's name; of a local path only the last part, to keep local paths private."""
    if not name:
        return "an unnamed policy"
    path = PurePath(name)
    is_folder = path.is_absolute() or len(path.parts) > 2 or name.startswith(".")
    return f"the policy `{path.name}`, a local folder" if is_folder else f"the policy `{name}`"


def _figures(selection: Selection) -> str:
    note = selection.note
    rows = [
        ("scored candidates", note.candidates, None),
        ("mean success rate", note.success_rate_selected, note.success_rate_left_out),
        ("mean score", note.score_selected, note.score_left_out),
        ("share with 0 < p < 1", note.learnable_share_selected, None),
        ("share with 0 < p < 1 of all candidates", note.learnable_share, None),
    ]
    breadth = note.breadth
    if breadth is not None:
        rows += [
            ("effective directions of their gradient features", breadth.directions, None),
            (
                "effective directions of a random selection of this size",
                breadth.directions_random,
                None,
            ),
        ]
    if isinstance(note, SelectionNote) and note.reliability is not None:
        agreement = "predicted rank correlation with a repeated scoring"
        rows.append((agreement, note.reliability.predicted, None))
    known = [row for row in rows if row[1] is not None]
    if not known:
        return ""
    return markup.table(["", "chosen", "left out"], known)


def _categories(all_shares: tuple[GroupDistribution, ...]) -> str:
    parts = []
    for shares in all_shares:
        parts.append(
            f"By {markup.plain(shares.by)}: an effective {shares.effective:.1f} of {shares.distinct} categories (a "
            f"random selection of this size: {shares.effective_random:.1f})."
        )
        rows = []
        for category in shares.categories[:CATEGORIES]:
            in_pool = f"{category.pool / shares.pool:.1%}"
            in_choice = f"{category.chosen / shares.chosen:.1%}"
            rows.append((category.name, in_pool, in_choice))
        parts.append(
            markup.table([markup.plain(shares.by), "of the pool", "of the selection"], rows)
        )
    return "\n\n".join(parts)


def _columns(selection: Selection) -> str:
    names = selection.table.column_names
    rows = [(PREFIX + name, text) for name, text in MEANINGS.items() if PREFIX + name in names]
    theirs = [name for name in names if not name.startswith(PREFIX)]
    quoted = ", ".join(markup.plain(name) for name in theirs)
    return f"Of the dataset: {quoted}. Of the selection:\n\n{markup.table(['column', 'meaning'], rows)}"


def _settings(contents: RunContents) -> str:
    """Settings that differ from their defaults."""
    defaults = dataclasses.asdict(LearnAlignConfig())
    nothing = object()
    changed: dict[str, Any] = {}
    for name, value in contents.config.items():
        if name not in AT_HOME and value != defaults.get(name, nothing):
            changed[name] = _published(value)
    versions = ", ".join(f"{name} {number}" for name, number in contents.versions.items())
    text = yaml.safe_dump(changed, sort_keys=True, allow_unicode=True)
    return f"Settings that differ from the defaults of trl_learnalign:\n\n```yaml\n{text}```\n\nMade with {versions}."


def _published(value: Any) -> Any:
    """A setting's value; of a local path only the last part."""
    if isinstance(value, str) and PurePath(value).is_absolute():
        return f"…/{PurePath(value).name}"
    return value


def _limits(contents: RunContents, selection: Selection) -> Iterable[str]:
    """Limits of the selection's evidence, and what the record does not contain."""
    note = selection.note
    rollouts = contents.plan.geometry.rollouts
    yield (
        "A selection for one policy at one step may not suit another: success rates and gradients are those of the "
        "policy named above."
    )
    if note.success_rate is not None:
        error = 0.5 / rollouts**0.5
        yield f"A success rate from {rollouts} rollouts has a standard error of up to {error:.2f}."
    else:
        yield "No success rates were measured: the selector needs no rollouts, or the record does not include them."
    has_reliability = isinstance(note, SelectionNote) and note.reliability is not None
    if not has_reliability:
        yield "The reliability of the ranking with other rollouts was not measured."
    if not note.shares:
        yield "The record does not show which categories of prompts the selection favours."
    for shares in note.shares:
        if shares.narrowness:
            yield f"The selection is narrow: {markup.plain(shares.narrowness)}."
    if note.breadth is not None and note.breadth.narrowness:
        yield f"The selection is narrow: {note.breadth.narrowness}."
    if isinstance(note, SelectionNote) and note.unscored_selected:
        yield (
            f"{note.unscored_selected:,} of the selected prompts were not scored; they complete the requested "
            "number."
        )
    if not selection.has_all_columns:
        yield (
            "The record does not include the file of the selected prompts. It has their text and no other column "
            "of the dataset, so answers have to be joined by `selection_index`."
        )
    if selection.missing:
        yield f"{selection.missing:,} further selected prompts are missing from this record."
    yield (
        "This record does not show whether training on these prompts beats training on a random selection of the "
        "same size."
    )
    yield "The name and licence of the source dataset are not in the record: please add them."


def _paragraph(sentences: Iterable[str]) -> str:
    return " ".join(sentences)


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
