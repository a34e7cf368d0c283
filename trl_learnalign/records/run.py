"""What a run leaves behind: `run.json` and one Parquet table per stage, readable with pandas.

Beside them lie `log_history.json`, what the trainer has logged, and `stage_K_examples.json`, the most telling prompts
of a stage with a few of their rollouts.

`run.json` holds the plan, settings, seeds, versions, notes on each phase (`trl_learnalign.records.notes`), and the
`ledger`: what scoring and training of each phase cost, and their total (`trl_learnalign.records.ledger`).
`stage_K.parquet` has one row per candidate of stage K:

| column | meaning |
|---|---|
| `index` | row of the training dataset |
| `prompt_id` | digest of the prompt's content: equal prompts have equal ids |
| `prompt` | its text |
| `right`, `wrong` | its rollouts that were judged so; one that no reward could judge is neither |
| `success_rate` | share of right rollouts among those that were judged; missing if there is none |
| `learnability` | `p (1 - p)` |
| `alignment` | mean alignment of its gradient, for the selectors below; missing for others, and without a gradient |
| `score` | what the selector returned |
| `rank` | 1 is best; ties in seeded order |
| `selected` | whether the stage trains on it |
| `mean_completion_length` | tokens per rollout |
| `gradient_finite` | false: its gradient was not finite, so its score is 0 |

`alignment` is the mean of `V_j cos(φ_i, φ_j)` over the pool for the selector `learnalign`, the mean of `cos(φ_i, φ_j)`
for `alignment`, and `cos(φ_i, g)` with the validation set's gradient for `validation_alignment`.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa

from trl_learnalign.records import layout
from trl_learnalign.records.contents import (
    AnyNote,
    Header,
    RunContents,
    check_seal,
    read_contents,
    sealed,
    warn_of_unknown_keys,
)
from trl_learnalign.records.notes import Note
from trl_learnalign.records.seal import digest_of, seal_of
from trl_learnalign.records.store import (
    StoreError,
    differences,
    write_atomically,
    write_json,
)
from trl_learnalign.records.tables import parquet, read_table

logger = logging.getLogger(__name__)

_PACKAGES = (
    "trl_learnalign",
    "trl",
    "transformers",
    "accelerate",
    "torch",
    "datasets",
    "deepspeed",
    "peft",
    "vllm",
)


class RunRecord:
    """`run.json`, written anew whenever something has happened.

    Args:
        folder (`Path`): The record folder.
        writes (`bool`): Whether this rank writes; the others keep the same contents in memory.
    """

    def __init__(self, folder: Path, writes: bool):
        self.folder = folder
        self.writes = writes
        self._contents: RunContents | None = None

    @property
    def path(self) -> Path:
        """`run.json`."""
        return self.folder / layout.RUN

    @property
    def has_begun(self) -> bool:
        """Whether a run has begun."""
        return self._contents is not None

    @property
    def contents(self) -> RunContents:
        """What `run.json` holds.

        Raises:
            `RuntimeError`: If no run has begun.
        """
        if self._contents is None:
            raise RuntimeError(f"{self.path} has no contents yet: a record begins with train().")
        return self._contents

    def begin(self, header: Header, identity: Mapping[str, Any], run: str) -> None:
        """Begin a run.

        Args:
            header (`Header`): Plan and settings.
            identity (mapping): What makes two runs the same; must fit what the folder holds.
            run (`str`): Its id.

        Raises:
            `StoreError`: If the folder holds another run, naming both sides.
        """
        self.check(identity)
        self._begin(header, identity, run)
        self.save()

    def go_on(
        self, header: Header, identity: Mapping[str, Any], before: RunContents, step: int
    ) -> None:
        """Go on with a run; `run.json` is made anew.

        Args:
            header (`Header`): Plan and settings.
            identity (mapping): What makes two runs the same.
            before (`RunContents`): What was noted before, by a checkpoint.
            step (`int`): Its optimizer step; what a later part of the interrupted run noted will be noted again.

        Raises:
            `StoreError`: If the folder holds another run.
        """
        warn_of_unknown_keys(before, self.path)
        notes = before.until(step, header.plan)
        beside = self._beside(before.run)
        if beside is not None:  # noted at this step, after the checkpoint
            for phase, later in beside.until(step, header.plan).items():
                notes[phase] = {**later, **notes.get(phase, {})}
        self._begin(header, identity, before.run)
        self._contents = replace(
            self.contents, phases=notes, files=before.files, others=before.others
        )
        self.save()

    def _begin(self, header: Header, identity: Mapping[str, Any], run: str) -> None:
        self._contents = RunContents(
            run=run, identity=identity, versions=versions(), **vars(header)
        )

    def _beside(self, run: str) -> RunContents | None:
        """What `run.json` holds, if it is undamaged.

        Raises:
            `StoreError`: If it is of another run.
        """
        if not self.path.exists():
            return None
        try:
            check_seal(self.path)
            found = read_contents(self.path)
        except (OSError, ValueError) as error:
            logger.warning(
                "%s cannot be used (%s): it is made anew from the checkpoint.", self.path, error
            )
            return None
        if found.run != run:
            raise StoreError(
                f"{self.path} is of another run ({found.run}) than the checkpoint ({run}). To go on with the "
                f"checkpoint, move {self.path.name} away, and it is made anew; or give this run another output_dir."
            )
        return found

    def check(self, identity: Mapping[str, Any]) -> RunContents | None:
        """What is there already, `None` if nothing is.

        Args:
            identity (mapping): What makes two runs the same, as plain values.

        Raises:
            `StoreError`: If the folder holds another run, naming both sides.
        """
        contents = self.found()
        if contents is not None:
            self.check_same(contents, identity)
        return contents

    def check_same(self, contents: RunContents, identity: Mapping[str, Any]) -> None:
        """Check that contents are of a run with this identity.

        Raises:
            `StoreError`: If they are not, naming both sides.
        """
        lines = differences(contents.identity, identity, "{} was {!r} and is {!r}")
        if lines:
            raise StoreError(
                f"{self.path} was written by another run: {'; '.join(lines)}. Give this run another output_dir "
                "(or record_dir), or move or delete that folder."
            )

    def found(self) -> RunContents | None:
        """What `run.json` holds on disk, `None` if there is none.

        Raises:
            `StoreError`: If it cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            check_seal(self.path)
            return read_contents(self.path)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.path} cannot be read ({error}): go on with the last checkpoint "
                "(train(resume_from_checkpoint=True), for a recipe --resume_from_checkpoint true), which makes it "
                "anew; without one, move it away and run the same command again: finished shards stay."
            ) from error

    def get(self, phase: str, kind: type[AnyNote]) -> AnyNote | None:
        """A phase's note of one kind, `None` if there is none; arguments as in [`RunContents.note`]."""
        return self.contents.note(phase, kind)

    def note(self, phase: str, note: Note) -> None:
        """Note something about a phase and write the file.

        Args:
            phase (`str`): `Phase.name`, `"base"`, `"scoring"` or `"subsets"`.
            note (`Note`): What there is to note.
        """
        self.contents.add(phase, note)
        self.save()

    def save(self) -> None:
        """Write `run.json`."""
        if self.writes:
            write_json(self.path, sealed(self.contents))

    def write_examples(self, name: str, examples: list[dict[str, Any]]) -> None:
        """Write a stage's telling prompts and their rollouts into `stage_K_examples.json`."""
        if self.writes:
            path = self.folder / layout.stage_examples(name)
            write_json(path, {"stage": name, "examples": examples})

    def write_log(self, log_history: list[dict[str, Any]]) -> None:
        """Write what the trainer has logged so far into `log_history.json`."""
        if self.writes:
            write_json(self.folder / layout.LOG, log_history)

    def read_stage(self, name: str) -> pa.Table | None:
        """A stage's table, `None` if there is none, or it is not as it was written."""
        path = self.folder / layout.stage_table(name)
        problem = self.problem_of(path)
        if problem is None:
            return read_table(path)
        if path.name in self.contents.files:
            logger.warning(
                "%s %s: the run does not depend on it, but what is told of this stage does.",
                path,
                problem,
            )
        return None

    def problem_of(self, path: Path) -> str | None:
        """What is wrong with a file of the record folder, in words that go on after its name; `None` if nothing is.

        Args:
            path (`Path`): A file that [`write_file`] may have written.
        """
        if not path.is_file():
            return "is missing"
        noted = self.contents.files.get(path.name)
        try:
            if noted in (None, seal_of(path).digest):
                return None
        except OSError as error:
            return f"cannot be read ({error})"
        return "is damaged: its content does not have the digest that was noted when it was written"

    def write_file(self, name: str, content: bytes) -> Path:
        """Write a file that is read again, and note its digest; on the main rank. Returns its path.

        Args:
            name (`str`): Its name in the record folder.
            content (`bytes`): Its content.
        """
        path = self.folder / name
        write_atomically(path, content)
        self.contents.files[name] = digest_of(content)
        return path

    def write_stage(self, name: str, table: pa.Table) -> Path:
        """Write a stage's table; returns its path."""
        return self._write_table(layout.stage_table(name), table)

    def write_selected(self, name: str, table: pa.Table) -> Path:
        """Write the prompts that a stage chose, with all columns of the dataset; returns the file's path."""
        return self._write_table(layout.stage_selected(name), table)

    def _write_table(self, name: str, table: pa.Table) -> Path:
        path = self.folder / name
        if self.writes:
            self.write_file(name, parquet(table))
        return path


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that matter here."""
    numbers = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers
