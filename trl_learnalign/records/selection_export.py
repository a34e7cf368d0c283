"""A selection as a dataset that others can load: the chosen prompts as Parquet, and a card that says how they came.

```
folder/
  README.md            the card
  data/train.parquet   the chosen prompts, best first
```
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from trl_learnalign.records import layout
from trl_learnalign.records.contents import RunContents
from trl_learnalign.records.notes import SelectionNote, SubsetNote
from trl_learnalign.records.store import write_atomically
from trl_learnalign.records.tables import read_table, write_table

DATA = "data/train.parquet"
"""The prompts, in the folder."""

FILES = (layout.DATASET_CARD, DATA)
"""All of what a folder holds."""

PREFIX = "selection_"
"""Of the columns that say what the selection knows of a prompt."""

FIGURES = ("score", "success_rate", "learnability", "alignment")
"""Columns of a stage's table that a selection has too, after [`PREFIX`]."""


@dataclass(frozen=True)
class Selection:
    """A choice of prompts, as a run has recorded it.

    Args:
        name (`str`): `"stage_1"`, …, or the selector of a subset.
        selector (`str`): Who has ranked the candidates.
        table (`pyarrow.Table`): The prompts, best first, with the columns of `trl_learnalign.ranking.subset`.
        note (`SelectionNote` or `SubsetNote`): What the record says of the choice.
        has_all_columns (`bool`): Whether `table` has all columns of the dataset, or prompts alone.
    """

    name: str
    selector: str
    table: pa.Table
    note: SelectionNote | SubsetNote
    has_all_columns: bool

    @property
    def missing(self) -> int:
        """Prompts that were taken and are not in the table."""
        if isinstance(self.note, SubsetNote) or self.has_all_columns:
            return 0
        return self.note.unscored_selected


def stage_selection(records: Path, contents: RunContents, stage: str | None = None) -> Selection:
    """The choice of a stage.

    Args:
        records (`Path`): The record folder.
        contents (`RunContents`): Its `run.json`.
        stage (`str`, *optional*): `"stage_1"`, …; the last one that has chosen by default.

    Raises:
        `ValueError`: If there is no such stage, or it has not chosen; naming those that have.
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
        raise ValueError(_nothing_chosen(contents, stage, list(chosen)))
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


def _nothing_chosen(contents: RunContents, stage: str | None, chosen: list[str]) -> str:
    """Why there is no selection to write."""
    stages = [phase.name for phase in contents.plan.stages]
    known = ", ".join(chosen) or "none"
    if stage is not None and stage not in stages:
        names = ", ".join(stages)
        return f"There is no {stage!r}: stages of this run are {names}; that have chosen: {known}."
    what = "This run"
    asked = stages
    if stage is not None:
        what = stage
        asked = [stage]
    notes = [contents.note(name, SelectionNote) for name in asked]
    if any(note is not None for note in notes):
        return (
            f"{what} took all prompts without scoring them: there is no choice to write. Stages that have chosen: "
            f"{known}."
        )
    return f"{what} has not chosen yet. Stages that have: {known}."


def _of_candidates(records: Path, name: str) -> pa.Table:
    """The chosen ones of a stage's table, where their own file is gone: prompts without their other columns."""
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
    """A subset of `trl-learnalign select`.

    Args:
        output_dir (`Path`): The run's output folder.
        contents (`RunContents`): Its `run.json`.
        selector (`str`, *optional*): Whose; may be left out if there is one.
        size (`int`, *optional*): Its size as it was asked for; the largest by default.

    Raises:
        `ValueError`: If there is no such subset, naming those that there are.
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
            f"selector={selector!r}: this run has subsets of {names}; name one of them."
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
    """Check that a dataset can be written here, and nothing else would be published with it.

    Raises:
        `ValueError`: If the folder holds other files, naming one.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in FILES:
            raise ValueError(
                f"{folder} holds other files ({name}), which would be published with the selection: give an empty "
                "folder."
            )


def write_selection(folder: Path, selection: Selection, card: str) -> Path:
    """Write a selection, over an earlier one.

    Args:
        folder (`Path`): Where to.
        selection (`Selection`): The prompts.
        card (`str`): Its `README.md`.

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
