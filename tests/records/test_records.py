"""`run.json`: each note is read as it was written, older forms are read too, and no misspelt key passes in silence."""

import ast
import dataclasses
import json
import logging
import re
from pathlib import Path

import cases
import jinja2
import pytest

import trl_learnalign
from trl_learnalign.plan import Geometry, Phase, Plan
from trl_learnalign.records import layout, notes
from trl_learnalign.records.layout import from_json, to_json
from trl_learnalign.records.notes import (
    KINDS,
    CalibrationBin,
    Cost,
    CoverageEntry,
    Ledger,
    MeasuresNote,
    MetricsNote,
    Note,
    PolicyNote,
    Reliability,
    RepeatedPrompt,
    ScoringEntry,
    SelectionNote,
    SelectionStatistics,
    SubsetNote,
    TrainingNote,
    UnknownNote,
    read_note,
)
from trl_learnalign.records.run_record import (
    Header,
    RunContents,
    RunRecord,
    TrainerEntry,
    contents_from_json,
    recorded,
)
from trl_learnalign.records.store import StoreError
from trl_learnalign.records.summary import phase_summaries
from trl_learnalign.report import read_run
from trl_learnalign.report.page import environment, render

STORED = cases.STORED_RUN
COST = Cost(tokens_generated=5, tokens_prompt=4, tokens_forward=3, tokens_trained=2, seconds=0.5)
SCORING = ScoringEntry(
    seconds=0.5,
    tokens_generated=5,
    tokens_prompt=4,
    tokens_captured=2,
    tokens_read=0,
    coverage=CoverageEntry(share=0.75, missing=["lm_head.weight"]),
    self_check={"gradients": {"worst": 1e-7}},
    measures={"gradients": {"seconds": 0.5, "tokens_read": 0}},
)
HALVES = Reliability(
    rollouts=4,
    spearman_halves=0.5,
    overlap_halves=0.25,
    overlap_by_chance=0.5,
    overlap_size=6,
    spearman={"4": 0.6, "8": None},
)
ROLLED_OUT = notes.RolloutsNote(
    step=8,
    groups=12,
    useful=9,
    mixed=8,
    prompts=7,
    groups_trained=6,
    tokens_given=100,
    tokens_trained=75,
    tokens_idle=5,
    repeated=(RepeatedPrompt(index=3, prompt="1+1", times=4, first=0.25, last=None),),
)
BELIEVED = notes.BeliefNote(
    step=8,
    rollouts=48,
    predicted=0.5,
    seen=0.25,
    brier=0.2,
    auc=None,
    calibration_error=0.25,
    bins=(CalibrationBin(low=0.0, high=1.0, groups=12, rollouts=48, predicted=0.5, seen=0.25),),
    concentration=4.0,
)
STATISTICS = vars(
    SelectionStatistics(candidates=12, selected=6, success_rate=0.5, learnable_share=0.75)
)
NOTES = [
    (
        "stage_1",
        SelectionNote(
            step=2, scored=True, cost=COST, scoring=SCORING, reliability=HALVES, **STATISTICS
        ),
    ),
    ("stage_2", SelectionNote(step=8, scored=False, selected=6)),
    ("stage_1", TrainingNote(step=8, steps=6, reward=0.25, training_seconds=0.5, cost=COST)),
    ("warmup", TrainingNote(step=2, steps=2)),
    ("base", MetricsNote(step=0, others={"accuracy": 0.25, "n_eval": 8, "mine": [1, 2]})),
    ("warmup", PolicyNote(step=2, weights="0123", scoring_batch_prompts=4)),
    ("base", notes.EmbeddingNote(step=0, cost=COST)),
    ("scoring", MeasuresNote(step=2, measures={"rollouts": {"seconds": 0.5}}, cost=COST)),
    (
        "subsets",
        SubsetNote(step=2, selector="mine:score", sizes={"3": 3}, scoring=SCORING, **STATISTICS),
    ),
    ("stage_1", ROLLED_OUT),
    ("stage_1", BELIEVED),
    ("stage_1", UnknownNote(step=8, others={"worth": {"mean": 0.1}})),
]


def through_a_file(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("phase", "note"), NOTES, ids=lambda value: getattr(type(value), "__name__", None)
)
def test_each_note_is_read_as_it_was_written(phase, note):
    key = note.key or "worth"
    assert read_note(phase, key, through_a_file(to_json(note))) == note


def test_every_kind_of_note_is_among_them():
    of_the_module = {
        kind for kind in vars(notes).values() if isinstance(kind, type) and issubclass(kind, Note)
    }
    written = {type(note) for _, note in NOTES}
    assert of_the_module - {Note, notes.ChargedNote} == written
    assert set(KINDS.values()) == written - {SubsetNote, UnknownNote}


def test_keys_on_disk_are_the_names_of_the_fields():
    (_, note), *_ = NOTES
    written = to_json(note)
    assert {"step", "candidates", "selected", "scored", "overlap"} <= set(written)
    assert written["overlap"] is None  # a value that is not known
    assert "others" not in written
    assert "reliability" not in to_json(NOTES[1][1])  # a part that is not there
    assert written["scoring"]["coverage"]["missing"] == ["lm_head.weight"]


def test_a_new_kind_of_note_is_one_dataclass(monkeypatch):
    monkeypatch.setitem(KINDS, "worth", UnknownNote)  # its entry goes at the end of this test

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WorthNote(notes.ChargedNote, kind="worth"):
        account = "scoring"
        brier: float

    contents = contents_of(("stage_1", WorthNote(step=3, brier=0.1, cost=COST)))
    again = contents_from_json(through_a_file(contents.to_json()))
    assert again.note("stage_1", WorthNote).brier == 0.1
    assert again.ledger.entries["stage_1"]["scoring"] == COST
    assert contents.unknown_keys() == []


# ---- The whole file -------------------------------------------------------------------------------------------------


def contents_of(*noted):
    phase = Phase(index=0, name="stage_1", kind="stage", size=6, passes=1, start=0, steps=3)
    contents = RunContents(
        identity={"dataset": "0123", "success_reward": "accuracy_reward"},
        versions={"python": "3.12"},
        plan=Plan((phase,), Geometry(2, 4, 1, 1), dataset_size=12, epoch_steps=3),
        config={"selector": ["learnability", "learnalign"]},
        trainer=trainer_entry(),
    )
    for name, note in noted:
        contents.add(name, note)
    return contents


def trainer_entry():
    numbers = dict(
        seed=7, learning_rate=1e-3, beta=0.0, temperature=1.0, max_completion_length=6, processes=1
    )
    names = dict(
        model="tiny", reward_funcs=["accuracy_reward"], loss_type="dapo", distributed_type="NO"
    )
    return TrainerEntry(**numbers, **names)


def test_a_run_is_read_as_it_was_written():
    contents = contents_of(*NOTES[:-1])
    written = through_a_file(contents.to_json())
    assert contents_from_json(written) == contents
    assert list(written["ledger"]) == ["stage_1", "base", "scoring", "total"]
    assert contents.ledger == Ledger(
        {
            "stage_1": {"scoring": COST, "training": COST},
            "base": {"scoring": COST},
            "scoring": {"scoring": COST},
        }
    )
    assert contents.selector == "learnability, learnalign"
    assert contents.success_reward == "accuracy_reward"
    assert contents.subsets == {"mine:score": NOTES[8][1]}
    assert contents.last_step == 8
    assert contents.note("stage_9", SelectionNote) is None


def test_the_three_sizes_have_names_of_their_own():
    written = contents_of(*NOTES).to_json()
    assert written["plan"]["dataset_size"] == 12
    assert (written["phases"]["stage_1"]["selection"]["candidates"], 6) == (12, 6)
    assert written["phases"]["subsets"]["mine:score"]["selected"] == 6
    assert "pool_size" not in json.dumps(written)


def test_a_continued_run_keeps_what_was_noted_before_the_step(tmp_path):
    contents = contents_of()
    header = Header(plan=contents.plan, config=contents.config, trainer=contents.trainer)
    record = RunRecord.begin(tmp_path, True, header, contents.identity, "first")
    for phase, note in NOTES:
        record.note(phase, note)
    under_way = {phase.name for phase in contents.plan.phases if phase.end > 2}
    again = RunRecord.resume(
        tmp_path, True, header, contents.identity, record.contents, 2, under_way
    )
    assert again.contents.run == "first"
    assert {phase: list(kept) for phase, kept in again.contents.phases.items()} == {
        "stage_1": ["selection"],
        "stage_2": [],
        "warmup": ["training", "policy"],
        "base": ["metrics", "embeddings"],
        "scoring": ["measures"],
        "subsets": ["mine:score"],
    }
    anew = RunRecord.begin(tmp_path, True, header, contents.identity, "second")
    assert anew.contents.phases == {}
    with pytest.raises(StoreError, match=r"dataset was '0123' and is '4567'"):
        RunRecord.begin(tmp_path, True, header, {**contents.identity, "dataset": "4567"}, "third")


# ---- Later versions ------------------------------------------------------------------------------------------------


def test_what_a_later_version_adds_is_named_and_kept(tmp_path, caplog):
    written = contents_of(*NOTES[:1]).to_json()
    written["continual"] = {"pools": 3}
    written["phases"]["stage_1"]["worth"] = {"step": 2, "brier": 0.1}
    written["phases"]["stage_1"]["selection"]["tokens_saved"] = 17
    written["phases"]["stage_1"]["selection"]["scoring"]["coverage"]["frozen"] = ["embed"]
    (tmp_path / "run.json").write_text(json.dumps(written))
    run = read_run(tmp_path)
    places = (
        "continual, phases.stage_1.selection.scoring.coverage.frozen, phases.stage_1.selection.tokens_saved, "
        "phases.stage_1.worth"
    )
    assert (
        f"has entries that this version of trl_learnalign does not know. They are kept unchanged: {places}."
        in caplog.text
    )
    assert through_a_file(run.contents.to_json()) == written
    header = Header(plan=run.contents.plan, config={}, trainer=trainer_entry())
    RunRecord.resume(tmp_path, True, header, run.contents.identity, run.contents, 3, ())
    again = json.loads((tmp_path / "run.json").read_text())
    assert again["continual"] == {"pools": 3}
    assert again["phases"] == written["phases"]


# ---- Misspelt and missing keys --------------------------------------------------------------------------------------


def misspelt(contents):
    selection = contents["phases"]["stage_1"]["selection"]
    selection["sucess_rate"] = selection.pop("success_rate")


def test_a_misspelt_value_on_disk_is_told(tmp_path, caplog):
    written = contents_of(*NOTES[:1]).to_json()
    misspelt(written)
    (tmp_path / "run.json").write_text(json.dumps(written))
    with caplog.at_level(logging.WARNING):
        read_run(tmp_path)
    assert "phases.stage_1.selection.sucess_rate" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda data: data.update(format=3),
            "it has format 3, of a later version of trl_learnalign",
        ),
        (lambda data: data.pop("plan"), "it has no plan, so it was not written by trl_learnalign"),
        (lambda data: data.pop("trainer"), "it has no 'trainer'"),
        (lambda data: data["plan"].pop("dataset_size"), "plan has no 'dataset_size'"),
        (lambda data: data["plan"]["phases"][0].pop("steps"), r"plan\.phases\[0\] has no 'steps'"),
        (lambda data: data["trainer"].pop("seed"), "trainer has no 'seed'"),
        (
            lambda data: data["phases"]["stage_1"]["selection"].pop("step"),
            r"phases\.stage_1\.selection has no 'step'",
        ),
        (
            lambda data: data["phases"]["stage_1"].update(training=3),
            r"phases\.stage_1\.training is 3, which is not an object",
        ),
        (lambda data: data.pop("config"), "it has no 'config'"),
        (lambda data: data.update(phases=[1]), "a part of it has the wrong type"),
        (
            lambda data: data.update(format=1),
            "it has format 1, of an earlier version of trl_learnalign",
        ),
        (lambda data: data.update(format="new"), "a part of it has the wrong type"),
    ],
)
def test_what_cannot_be_read_says_which_key(tmp_path, spoil, message):
    written = contents_of(*NOTES[:1]).to_json()
    spoil(written)
    (tmp_path / "run.json").write_text(json.dumps(written))
    with pytest.raises(
        ValueError,
        match=rf"run\.json is damaged \({message}.*: move it away, or resume from the last checkpoint",
    ):
        read_run(tmp_path)
    with pytest.raises(
        StoreError, match=rf"run\.json cannot be read \({message}.*Resume from the last checkpoint"
    ):
        recorded(tmp_path)


def test_a_misspelt_name_in_code_is_an_error():
    with pytest.raises(TypeError, match="rewrad"):
        TrainingNote(step=1, steps=1, rewrad=0.5)
    with pytest.raises(AttributeError, match="sucess_rate"):
        NOTES[0][1].sucess_rate  # noqa: B018
    with pytest.raises(jinja2.UndefinedError, match="sucess_rate"):
        environment().from_string("{{ note.sucess_rate | num }}").render(note=NOTES[0][1])


def test_what_users_note_has_names_of_its_own():
    with pytest.raises(
        ValueError,
        match="'step' is a reserved key of MetricsNote: rename the other value",
    ):
        MetricsNote(step=3, others={"step": 4})


def code_texts(path):
    """Texts in a module's code, without docstrings."""
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in documentation
        ):
            yield node.value


def test_names_on_disk_are_spelt_once():
    names = {
        value
        for value in vars(layout).values()
        if isinstance(value, str) and re.search(r"\w\.\w+$", value)
    }
    assert {"run.json", "log_history.json", "learnalign_complete.json", "report.html"} <= names
    package = Path(trl_learnalign.__file__).parent
    modules = [path for path in package.rglob("*.py") if path.name != "layout.py"]
    again = {(path.name, text) for path in modules for text in code_texts(path) if text in names}
    assert again == {("page.py", "report.html")}  # its template, which lies in the package


# ---- Summaries ------------------------------------------------------------------------------------------------------


def test_a_phase_in_one_row():
    contents = contents_of(("base", NOTES[4][1]))
    base, planned = phase_summaries(contents)
    assert (base.name, base.selected, base.accuracy.value, base.accuracy.count) == (
        "base",
        None,
        0.25,
        8,
    )
    assert (planned.name, planned.selected, planned.planned_steps, planned.steps) == (
        "stage_1",
        6,
        3,
        None,
    )
    contents.add(
        "stage_1",
        SelectionNote(step=0, scored=True, candidates=12, selected=5, success_rate_selected=0.5),
    )
    contents.add("stage_1", TrainingNote(step=2, steps=2, reward=0.75))
    done = phase_summaries(contents)[1]
    assert (done.selected, done.candidates, done.success_rate_selected) == (5, 12, 0.5)
    assert (done.planned_steps, done.steps, done.reward, done.accuracy) == (3, 2, 0.75, None)


def test_an_entry_without_others_ignores_what_it_does_not_know():
    assert from_json(Cost, {**to_json(COST), "forward_equivalents": 18.0}, "cost") == COST
    assert from_json(Cost, {"tokens_generated": 5}, "cost") == Cost(
        tokens_generated=5
    )  # an older one knew less


def test_the_stored_run_is_shown_from_its_notes():
    run = read_run(STORED / "whole")
    page = render(run, {})
    for stage in run.stages:
        note = stage.note
        said = f"Selected {note.selected} of {note.candidates} candidates at step {note.step}."
        if note.selected == note.candidates:
            said = f"Took all {note.selected} remaining candidates at step {note.step}, so "
        assert said in page
