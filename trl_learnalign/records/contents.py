"""The contents of `run.json`: what is written, and what everybody reads through."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trl_learnalign.curriculum import Plan
from trl_learnalign.records.entries import Entry, from_json, to_json, unknown_keys
from trl_learnalign.records.layout import PHASE_NAME, SUBSETS
from trl_learnalign.records.ledger import Ledger
from trl_learnalign.records.notes import (
    Note,
    SelectionNote,
    SubsetNote,
    UnknownNote,
    read_note,
)
from trl_learnalign.records.seal import digest_of
from trl_learnalign.records.store import plain

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of `run.json`; a new number when a version cannot be read by those before it."""

DIGEST = "digest"
"""Key of the digest of all the rest."""

AnyNote = TypeVar("AnyNote", bound=Note)


@dataclass(frozen=True, kw_only=True)
class TrainerEntry(Entry):
    """Settings of the trainer that a report tells.

    Args:
        model (`str`): Name or path of the policy; empty if it has none.
        reward_funcs (`list[str]`): Names of the reward functions.
        seed (`int`): Seed of training.
        learning_rate (`float`): Peak of the schedule.
        beta (`float`): Weight of the KL term.
        loss_type (`str`): As in `GRPOConfig`.
        temperature (`float`): Of the rollouts.
        max_completion_length (`int`): Tokens.
        processes (`int`): Ranks.
        distributed_type (`str`): As accelerate calls it.
        scoring_batch_prompts (`int`, *optional*): Prompts of one generation call of scoring, at most.
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
    """What is known when a run begins.

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
    """`run.json`.

    Args:
        run (`str`): Id of the run, which its checkpoints have too.
        identity (mapping): What makes two runs the same, as plain values.
        versions (mapping): Versions of Python and of the libraries that matter here.
        phases (`dict[str, dict[str, Note]]`): Phase → key → note; more are added as the run goes on.
        files (mapping): Digests of files of the record folder that no checkpoint has and that are read again, by name.
        others (mapping, *optional*): What a later version wrote besides.
    """

    run: str = ""
    identity: Mapping[str, Any]
    versions: Mapping[str, str]
    phases: dict[str, dict[str, Note]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    def add(self, phase: str, note: Note) -> None:
        """Add a note, in the place of an earlier one with its key."""
        self.phases.setdefault(phase, {})[note.key] = note

    def note(self, phase: str, kind: type[AnyNote]) -> AnyNote | None:
        """A phase's note of one kind, `None` if there is none.

        Args:
            phase (`str`): `Phase.name`, `"base"` or `"scoring"`.
            kind (`type`): A note type that stands once in a phase, so not [`SubsetNote`].
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
        """The highest optimizer step that something was noted at; 0 without a note."""
        return max((note.step for _, note in self.notes()), default=0)

    @property
    def selector(self) -> str:
        """The selector's name, or those of all stages."""
        selector = self.config["selector"]
        return selector if isinstance(selector, str) else ", ".join(selector)

    @property
    def orders(self) -> list[str]:
        """In which order each stage trains on its prompts (`LearnAlignConfig.order`), one for all or one for each."""
        orders = self.config.get("order", ["shuffled"])  # of records that know no other
        return [orders] if isinstance(orders, str) else list(orders)

    @property
    def selects(self) -> bool:
        """Whether stages choose among their candidates, as far as that is known: a stage may take all there are."""
        if self.orders == ["trainer"]:
            return False
        notes = [self.note(phase.name, SelectionNote) for phase in self.plan.stages]
        known = [note.scored for note in notes if note is not None]
        return any(known) or not known

    @property
    def is_continual(self) -> bool:
        """Whether prompts are chosen, skipped or sampled while training goes on."""
        config = self.config
        more = config.get("oversample", 1) > 1 or config.get("max_generation_batches", 1) > 1
        learns = any(order not in ("shuffled", "trainer") for order in self.orders)
        return learns or config.get("skip_zero_advantages", False) or more

    @property
    def success_reward(self) -> str:
        """The reward function that decides success."""
        return str(self.identity["success_reward"])

    @property
    def ledger(self) -> Ledger:
        """What the phases cost, by their notes."""
        ledger = Ledger(price=self.config.get("generation_price", 1.0))
        for phase, note in self.notes():
            if note.account is not None and note.charge is not None:
                ledger.charge(phase, note.account, note.charge)
        return ledger

    def until(self, step: int, plan: Plan) -> dict[str, dict[str, Note]]:
        """Notes up to an optimizer step: a run that goes on there will make the later ones again.

        Args:
            step (`int`): The step.
            plan (`Plan`): Of the run that goes on: a longer one has not ended the phase that it goes on with.
        """
        under_way = {phase.name for phase in plan.phases if phase.end > step}
        phases = {}
        for phase, notes in self.phases.items():
            phases[phase] = {
                key: note
                for key, note in notes.items()
                if note.step <= step and not (note.is_of_the_end and phase in under_way)
            }
        return phases

    def unknown_keys(self) -> list[str]:
        """Places of keys that this version has no name for."""
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
        """As a JSON object."""
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
    """Read `run.json`.

    Args:
        data: The parsed file.

    Raises:
        `ValueError`: If it is not of trl_learnalign, lacks a key, or was written in another form.
    """
    if not isinstance(data, Mapping) or "plan" not in data:
        raise ValueError("it has no plan, so it is not of trl_learnalign")
    try:
        return _contents(data)
    except (AttributeError, TypeError) as error:  # a text where a list should be, and the like
        raise ValueError(f"a part of it is of the wrong kind: {error}") from error


def _contents(data: Mapping[str, Any]) -> RunContents:
    # The ledger is written for readers of the file; it is not read, since the notes have the same costs.
    for key in _NEEDED:
        if key not in data:
            raise ValueError(f"it lacks {key!r}")
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
            f"it has format {form}, of {age} version of trl_learnalign, which this one cannot read"
        )


def _check_names(plan: Plan) -> None:
    """Phases are called as they are made, and nothing else: files are called by them."""
    if not plan.phases:
        raise ValueError("its plan has no phases")
    for phase in plan.phases:
        if not isinstance(phase.name, str) or not PHASE_NAME.fullmatch(phase.name):
            raise ValueError(
                f"its plan has a phase {phase.name!r}; phases are called warmup, stage_1, stage_2, …"
            )


def read_contents(path: Path) -> RunContents:
    """Read `run.json`.

    Args:
        path (`Path`): The file.

    Raises:
        `OSError`: If it cannot be opened.
        `ValueError`: If it is damaged, or of another form.
    """
    return contents_from_json(json.loads(path.read_text(encoding="utf-8")))


def sealed(contents: RunContents) -> dict[str, Any]:
    """As a JSON object that has the digest of itself."""
    values = json.loads(json.dumps(contents.to_json(), default=plain))
    return {**values, DIGEST: _digest(values)}


def check_seal(path: Path) -> None:
    """Check that `run.json` is as it was written.

    Raises:
        `OSError`: If it cannot be opened.
        `ValueError`: If it is not.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.pop(DIGEST, None) not in (None, _digest(values)):
        raise ValueError("its content does not have the digest that it was written with")


def _digest(values: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(values, sort_keys=True).encode())


def warn_of_unknown_keys(contents: RunContents, path: Path) -> None:
    """Say what a record holds that this version does not know: of a later version, or misspelt by hand."""
    if places := contents.unknown_keys():
        logger.warning(
            "%s holds what this version of trl_learnalign does not know, and leaves as it is: %s.",
            path,
            ", ".join(places),
        )
