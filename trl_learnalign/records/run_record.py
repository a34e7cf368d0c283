"""The record of a run: `run.json` and one Parquet table per stage.

The folder also has `log_history.json`, the trainer's log, and `stage_K_examples.json`, example prompts of a stage with
a few of their rollouts.

`run.json` holds the plan, settings, seeds, versions, notes on each phase (`trl_learnalign.records.notes`), and the
`ledger`: the cost of scoring and training of each phase, and the total (`trl_learnalign.records.notes`).
`stage_K.parquet` has one row per candidate of stage K:

| column | meaning |
|---|---|
| `index` | row of the training dataset |
| `prompt_id` | digest of the prompt's content: equal prompts have equal ids |
| `prompt` | its text |
| `right`, `wrong` | numbers of correct and incorrect rollouts; one that no reward could judge is in neither |
| `success_rate` | share of correct rollouts among the judged ones; missing if there is none |
| `learnability` | `p (1 - p)` |
| `alignment` | mean alignment of its gradient, for the selectors below; missing for others, and without a gradient |
| `score` | what the selector returned |
| `rank` | 1 is best; ties are in a seeded order |
| `selected` | whether the stage trains on it |
| `mean_completion_length` | tokens per rollout |
| `gradient_finite` | false if its gradient was not finite; its score is then 0 |

`alignment` is the mean of `V_j cos(φ_i, φ_j)` over the pool for the selector `learnalign`, the mean of `cos(φ_i, φ_j)`
for `alignment`, and `cos(φ_i, g)` with the validation set's gradient for `validation_alignment`.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from trl_learnalign.plan import Plan
from trl_learnalign.records import layout
from trl_learnalign.records.layout import (
    PHASE_NAME,
    SUBSETS,
    Entry,
    from_json,
    to_json,
    unknown_keys,
)
from trl_learnalign.records.notes import (
    Ledger,
    Note,
    SelectionNote,
    SubsetNote,
    UnknownNote,
    read_note,
)
from trl_learnalign.records.store import (
    StoreError,
    differences,
    digest_of,
    parquet,
    plain,
    read_table,
    seal_of,
    write_atomically,
    write_json,
)

# ---- Contents of `run.json` -----------------------------------------------------------------------------------------

logger = logging.getLogger(__name__)

FORMAT = 2
"""Format version of `run.json`; it increases when older versions of the package cannot read a record."""

DIGEST = "digest"
"""Key of the digest of everything else."""

AnyNote = TypeVar("AnyNote", bound=Note)


@dataclass(frozen=True, kw_only=True)
class TrainerEntry(Entry):
    """Settings of the trainer that a report shows.

    Args:
        model (`str`): Name or path of the policy; empty if it has none.
        reward_funcs (`list[str]`): Names of the reward functions.
        seed (`int`): Training seed.
        learning_rate (`float`): Peak of the schedule.
        beta (`float`): Weight of the KL term.
        loss_type (`str`): As in `GRPOConfig`.
        temperature (`float`): Sampling temperature of the rollouts.
        max_completion_length (`int`): In tokens.
        processes (`int`): Number of ranks.
        distributed_type (`str`): As named by accelerate.
        scoring_batch_prompts (`int`, *optional*): Maximum number of prompts of one generation call of scoring.
    """

    model: str
    reward_funcs: list[str]
    seed: int
    learning_rate: float
    beta: float
    loss_type: str
    temperature: float
    max_completion_length: int
    processes: int
    distributed_type: str
    scoring_batch_prompts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known when a run starts.

    Args:
        plan (`Plan`): Its phases.
        config (mapping): `LearnAlignConfig` as plain values.
        trainer (`TrainerEntry`): Settings of the trainer.
    """

    plan: Plan
    config: Mapping[str, Any]
    trainer: TrainerEntry


@dataclass(frozen=True, kw_only=True)
class RunContents(Header):
    """Contents of `run.json`.

    Args:
        run (`str`): Id of the run, also stored in its checkpoints.
        identity (mapping): What must be equal for two runs to be the same, as plain values.
        versions (mapping): Versions of Python and of the relevant libraries.
        phases (`dict[str, dict[str, Note]]`): Phase → key → note; grows during the run.
        files (mapping): Digests, by name, of files in the record folder that are read again and are in no checkpoint.
        others (mapping, *optional*): Further keys written by a later version.
    """

    run: str = ""
    identity: Mapping[str, Any]
    versions: Mapping[str, str]
    phases: dict[str, dict[str, Note]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    def add(self, phase: str, note: Note) -> None:
        """Add a note; replaces an earlier one with the same key."""
        self.phases.setdefault(phase, {})[note.key] = note

    def note(self, phase: str, kind: type[AnyNote]) -> AnyNote | None:
        """A phase's note of one kind, `None` if there is none.

        Args:
            phase (`str`): `Phase.name`, `"base"` or `"scoring"`.
            kind (`type`): A note type that occurs once per phase, thus not [`SubsetNote`].
        """
        note = self.phases.get(phase, {}).get(kind.kind)
        return note if isinstance(note, kind) else None

    def notes(self) -> Iterator[tuple[str, Note]]:
        """Phase and note, for all notes."""
        for phase, notes in self.phases.items():
            for note in notes.values():
                yield phase, note

    @property
    def subsets(self) -> dict[str, SubsetNote]:
        """Notes of `trl-learnalign select` by selector; empty for other runs."""
        notes = self.phases.get(SUBSETS, {}).values()
        return {note.selector: note for note in notes if isinstance(note, SubsetNote)}

    @property
    def last_step(self) -> int:
        """The highest optimizer step of any note; 0 without a note."""
        return max((note.step for _, note in self.notes()), default=0)

    @property
    def selector(self) -> str:
        """The selector's name, or those of all stages."""
        selector = self.config["selector"]
        return selector if isinstance(selector, str) else ", ".join(selector)

    @property
    def orders(self) -> list[str]:
        """The training order of each stage (`LearnAlignConfig.order`): one for all stages, or one per stage."""
        orders = self.config.get("order", ["shuffled"])  # default of old records
        return [orders] if isinstance(orders, str) else list(orders)

    @property
    def selects(self) -> bool:
        """Whether stages select among their candidates, as far as known; a stage may take all its candidates."""
        if self.orders == ["trainer"]:
            return False
        notes = [self.note(phase.name, SelectionNote) for phase in self.plan.stages]
        known = [note.scored for note in notes if note is not None]
        return any(known) or not known

    @property
    def is_continual(self) -> bool:
        """Whether prompts are chosen, skipped or dynamically sampled during training."""
        config = self.config
        more = config.get("oversample", 1) > 1 or config.get("max_generation_batches", 1) > 1
        learns = any(order not in ("shuffled", "trainer") for order in self.orders)
        return learns or config.get("skip_zero_advantages", False) or more

    @property
    def success_reward(self) -> str:
        """The reward function that defines success."""
        return str(self.identity["success_reward"])

    @property
    def ledger(self) -> Ledger:
        """The cost of each phase, computed from the notes."""
        ledger = Ledger(price=self.config.get("generation_price", 1.0))
        for phase, note in self.notes():
            if note.account is not None and note.charge is not None:
                ledger.charge(phase, note.account, note.charge)
        return ledger

    def until(self, step: int, under_way: Collection[str]) -> dict[str, dict[str, Note]]:
        """Notes up to an optimizer step; a run that resumes there writes the later ones again.

        Args:
            step (`int`): The step.
            under_way (collection of `str`): Phases that have not ended there. A longer plan goes on with a phase whose
                end was noted.
        """
        phases = {}
        for phase, notes in self.phases.items():
            phases[phase] = {
                key: note
                for key, note in notes.items()
                if note.step <= step and not (note.is_of_the_end and phase in under_way)
            }
        return phases

    def unknown_keys(self) -> list[str]:
        """Locations of keys that are unknown to this version."""
        places = list(self.others)
        places += unknown_keys(self.trainer, "trainer")
        for phase, notes in self.phases.items():
            for key, note in notes.items():
                place = f"phases.{phase}.{key}"
                if isinstance(note, UnknownNote):
                    places.append(place)
                else:
                    places += unknown_keys(note, place)
        return places

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {
            "format": FORMAT,
            "run": self.run,
            "identity": self.identity,
            "versions": self.versions,
            "plan": to_json(self.plan),
            "config": self.config,
            "trainer": to_json(self.trainer),
            "phases": {phase: _each_to_json(notes) for phase, notes in self.phases.items()},
            "ledger": self.ledger.to_json(),
            "files": self.files,
            **self.others,
        }


def _each_to_json(notes: Mapping[str, Note]) -> dict[str, Any]:
    return {key: to_json(note) for key, note in notes.items()}


_NEEDED = ("format", "identity", "versions", "plan", "config", "trainer", "phases")
_KEYS = (*_NEEDED, "run", "ledger", "files", DIGEST)


def contents_from_json(data: Any) -> RunContents:
    """Create from parsed JSON.

    Args:
        data: The parsed file.

    Raises:
        `ValueError`: If it is not from trl_learnalign, lacks a key, or has another format version.
    """
    if not isinstance(data, Mapping) or "plan" not in data:
        raise ValueError("it has no plan, so it was not written by trl_learnalign")
    try:
        return _contents(data)
    except (AttributeError, TypeError) as error:  # e.g. a string instead of a list
        raise ValueError(f"a part of it has the wrong type: {error}") from error


def _contents(data: Mapping[str, Any]) -> RunContents:
    # The ledger in the file is for human readers. It is not read, because the notes have the same costs.
    for key in _NEEDED:
        if key not in data:
            raise ValueError(f"it has no {key!r}")
    _check_form(data["format"])
    phases: dict[str, dict[str, Note]] = {}
    for phase, notes in data["phases"].items():
        phases[phase] = {key: read_note(phase, key, values) for key, values in notes.items()}
    plan = from_json(Plan, data["plan"], "plan")
    _check_names(plan)
    return RunContents(
        run=data.get("run", ""),
        identity=data["identity"],
        versions=data["versions"],
        plan=plan,
        config=data["config"],
        trainer=from_json(TrainerEntry, data["trainer"], "trainer"),
        phases=phases,
        files=dict(data.get("files", {})),
        others={key: value for key, value in data.items() if key not in _KEYS},
    )


def _check_form(form: int) -> None:
    if form != FORMAT:
        age = "a later" if form > FORMAT else "an earlier"
        raise ValueError(
            f"it has format {form}, of {age} version of trl_learnalign, which this version cannot read"
        )


def _check_names(plan: Plan) -> None:
    """Check that phase names have the generated form, because file names are derived from them."""
    if not plan.phases:
        raise ValueError("its plan has no phases")
    for phase in plan.phases:
        if not isinstance(phase.name, str) or not PHASE_NAME.fullmatch(phase.name):
            raise ValueError(
                f"its plan has a phase {phase.name!r}, but phases have the names warmup, stage_1, stage_2, …"
            )


def read_contents(path: Path) -> RunContents:
    """Read `run.json`.

    Args:
        path (`Path`): The file.

    Raises:
        `OSError`: If it cannot be opened.
        `ValueError`: If it is damaged, or has another format version.
    """
    return contents_from_json(json.loads(path.read_text(encoding="utf-8")))


def sealed(contents: RunContents) -> dict[str, Any]:
    """Convert to a JSON object that contains its own digest."""
    values = json.loads(json.dumps(contents.to_json(), default=plain))
    return {**values, DIGEST: _digest(values)}


def check_seal(path: Path) -> None:
    """Check that `run.json` is unchanged since it was written.

    Raises:
        `OSError`: If it cannot be opened.
        `ValueError`: If it was changed.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.pop(DIGEST, None) not in (None, _digest(values)):
        raise ValueError("its content does not match its digest")


def _digest(values: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(values, sort_keys=True).encode())


def warn_of_unknown_keys(contents: RunContents, path: Path) -> None:
    """Warn of keys that are unknown to this version, from a later version or misspelt by hand."""
    if places := contents.unknown_keys():
        logger.warning(
            "%s has entries that this version of trl_learnalign does not know. They are kept unchanged: %s.",
            path,
            ", ".join(places),
        )


# ---- Record ---------------------------------------------------------------------------------------------------------

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


def recorded(folder: Path) -> RunContents | None:
    """The contents of `run.json` in a record folder, `None` if there is none.

    Raises:
        `StoreError`: If it cannot be read.
    """
    path = folder / layout.RUN
    if not path.exists():
        return None
    try:
        check_seal(path)
        return read_contents(path)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}). Resume from the last checkpoint, which restores it: "
            "train(resume_from_checkpoint=True), or --resume_from_checkpoint true for a recipe. Without a "
            "checkpoint, move the file away and run the same command again; finished shards are reused."
        ) from error


def check_recorded(folder: Path, identity: Mapping[str, Any]) -> RunContents | None:
    """The contents of `run.json` in a record folder, `None` if there is none.

    Args:
        folder (`Path`): The record folder.
        identity (mapping): What must be equal for two runs to be the same, as plain values.

    Raises:
        `StoreError`: If the folder holds another run; names the differences.
    """
    contents = recorded(folder)
    if contents is not None:
        check_same(folder, contents, identity)
    return contents


def check_same(folder: Path, contents: RunContents, identity: Mapping[str, Any]) -> None:
    """Check that contents are of a run with this identity.

    Raises:
        `StoreError`: If they are not; names the differences.
    """
    lines = differences(contents.identity, identity, "{} was {!r} and is {!r}")
    if lines:
        raise StoreError(
            f"{folder / layout.RUN} was written by another run: {'; '.join(lines)}. Give this run another output_dir "
            "(or record_dir), or move or delete that folder."
        )


class RunRecord:
    """Manages `run.json` of a run that has begun; it is rewritten after every change.

    Args:
        folder (`Path`): The record folder.
        writes (`bool`): Whether this rank writes; the others keep the same contents in memory.
        contents (`RunContents`): The contents of `run.json`.
    """

    def __init__(self, folder: Path, writes: bool, contents: RunContents):
        self.folder = folder
        self.writes = writes
        self.contents = contents

    @property
    def path(self) -> Path:
        """Path of `run.json`."""
        return self.folder / layout.RUN

    @classmethod
    def begin(
        cls, folder: Path, writes: bool, header: Header, identity: Mapping[str, Any], run: str
    ) -> RunRecord:
        """Return the record of a new run, and write it.

        Args:
            folder (`Path`): The record folder.
            writes (`bool`): Whether this rank writes.
            header (`Header`): Plan and settings.
            identity (mapping): What must be equal for two runs to be the same; must match the run in the folder, if
                any.
            run (`str`): Its id.

        Raises:
            `StoreError`: If the folder holds another run; names the differences.
        """
        check_recorded(folder, identity)
        record = cls(folder, writes, _contents_of_begun(header, identity, run))
        record.save()
        return record

    @classmethod
    def resume(
        cls,
        folder: Path,
        writes: bool,
        header: Header,
        identity: Mapping[str, Any],
        before: RunContents,
        step: int,
        under_way: Collection[str],
    ) -> RunRecord:
        """Return the record of a resumed run; `run.json` is rebuilt.

        Args:
            folder (`Path`): The record folder.
            writes (`bool`): Whether this rank writes.
            header (`Header`): Plan and settings.
            identity (mapping): What must be equal for two runs to be the same.
            before (`RunContents`): The contents stored in the checkpoint.
            step (`int`): The checkpoint's optimizer step; notes that the interrupted run wrote later will be written
                again.
            under_way (collection of `str`): Phases that have not ended at this step.

        Raises:
            `StoreError`: If the folder holds another run.
        """
        path = folder / layout.RUN
        warn_of_unknown_keys(before, path)
        notes = before.until(step, under_way)
        beside = _beside(path, before.run)
        if beside is not None:  # notes of this step that were written after the checkpoint
            for phase, later in beside.until(step, under_way).items():
                notes[phase] = {**later, **notes.get(phase, {})}
        contents = replace(
            _contents_of_begun(header, identity, before.run),
            phases=notes,
            files=before.files,
            others=before.others,
        )
        record = cls(folder, writes, contents)
        record.save()
        return record

    def get(self, phase: str, kind: type[AnyNote]) -> AnyNote | None:
        """A phase's note of one kind, `None` if there is none; arguments as in [`RunContents.note`]."""
        return self.contents.note(phase, kind)

    def note(self, phase: str, note: Note) -> None:
        """Add a note on a phase and write the file.

        Args:
            phase (`str`): `Phase.name`, `"base"`, `"scoring"` or `"subsets"`.
            note (`Note`): The note.
        """
        self.contents.add(phase, note)
        self.save()

    def save(self) -> None:
        """Write `run.json`."""
        if self.writes:
            write_json(self.path, sealed(self.contents))

    def write_examples(self, name: str, examples: list[dict[str, Any]]) -> None:
        """Write a stage's example prompts and their rollouts into `stage_K_examples.json`."""
        if self.writes:
            path = self.folder / layout.stage_examples(name)
            write_json(path, {"stage": name, "examples": examples})

    def write_log(self, log_history: list[dict[str, Any]]) -> None:
        """Write the trainer's log so far into `log_history.json`."""
        if self.writes:
            write_json(self.folder / layout.LOG, log_history)

    def read_stage(self, name: str) -> pa.Table | None:
        """A stage's table, `None` if it is missing or was changed since it was written."""
        path = self.folder / layout.stage_table(name)
        problem = self.problem_of(path)
        if problem is None:
            return read_table(path)
        if path.name in self.contents.files:
            logger.warning(
                "%s %s: the run does not need it, but this stage's part of the report does.",
                path,
                problem,
            )
        return None

    def problem_of(self, path: Path) -> str | None:
        """What is wrong with a file of the record folder, as a phrase that follows its name; `None` if nothing is.

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
        return "is damaged: its content does not match the digest of when it was written"

    def write_file(self, name: str, content: bytes) -> Path:
        """Write a file that will be read again, and record its digest; on the main rank. Returns its path.

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
        """Write the selected prompts of a stage, with all columns of the dataset; returns the file's path."""
        return self._write_table(layout.stage_selected(name), table)

    def _write_table(self, name: str, table: pa.Table) -> Path:
        path = self.folder / name
        if self.writes:
            self.write_file(name, parquet(table))
        return path


def _contents_of_begun(header: Header, identity: Mapping[str, Any], run: str) -> RunContents:
    return RunContents(run=run, identity=identity, versions=versions(), **vars(header))


def _beside(path: Path, run: str) -> RunContents | None:
    """The contents of `run.json` on disk, if it is undamaged.

    Raises:
        `StoreError`: If it is of another run.
    """
    if not path.exists():
        return None
    try:
        check_seal(path)
        found = read_contents(path)
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be used (%s): it is restored from the checkpoint.", path, error)
        return None
    if found.run != run:
        raise StoreError(
            f"{path} belongs to another run ({found.run}) than the checkpoint ({run}). To resume from the "
            f"checkpoint, move {path.name} away; it will be restored. Or give this run another output_dir."
        )
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the relevant libraries."""
    numbers = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers
