"""Why these prompts: in the record, the log and the trackers of a run, against independent counts."""

import html
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pandas as pd
import pytest
from adaptive_cases import go, history, settings
from subsets import select

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, markup
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.cli.select import show
from trl_learnalign.records.notes import RolloutsNote, SelectionNote, SubsetNote
from trl_learnalign.report import read_run
from trl_learnalign.report.page import render
from trl_learnalign.training.metrics import outcome_table

FAMILIES = ["arithmetic", "bases", "counting", "dates"]
HOSTILE = "<script>alert(1)</script> | `code` *bold*"


def data(size=32):
    """Every fourth prompt is of one family; in pool order."""
    made = cases.dataset(size)
    return made.add_column("family", [FAMILIES[row % 4] for row in range(size)])


def one_family(pool):
    """A selector that wants the dates."""
    families = np.array(pool.dataset["family"][:])[pool.prompts]
    return (families == "dates") - pool.prompts / 1000


def run(folder, selector, report_to="none", config=None, **options):
    trainer = cases.trainer(folder, data=data(), report_to=report_to, run_name="run", **options)
    settings = LearnAlignConfig.adaptive(
        **{
            "warmup_samples": 0,
            "stages": [8],
            "feature_dim": 64,
            "selector": selector,
            **(config or {}),
        }
    )
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def independent(callback, stage="stage_1"):
    """Categories of the chosen rows, and their effective number, from the dataset itself."""
    families = pd.Series(callback.trainer.train_dataset["family"][:])
    chosen = families[callback.selected(stage)]
    shares = chosen.value_counts(normalize=True)
    return chosen.value_counts().to_dict(), float(np.exp(-(shares * np.log(shares)).sum()))


def test_a_choice_of_one_family_is_counted_and_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trl_learnalign"):
        trainer, callback = run(tmp_path, f"{__name__}:one_family")
    note = callback.record.get("stage_1", SelectionNote)
    (shares,) = note.shares
    counts, effective = independent(callback)
    assert counts == {"dates": 8}
    assert {
        category.name: category.chosen for category in shares.categories if category.chosen
    } == counts
    assert {category.name: category.pool for category in shares.categories} == dict.fromkeys(
        FAMILIES, 8
    )
    assert shares.effective == pytest.approx(effective)
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    said = [record.getMessage() for record in warned if "by family" in record.getMessage()]
    assert len(said) == 1
    assert (
        "by family, the selection covers an effective 1.0 of 4 categories, a random selection of this size"
        in said[0]
    )
    assert "'dates', has 100% of the selection and 25% of the pool" in said[0]
    assert (
        f"variety by family: about 1.0 of 4 categories (a random choice: {shares.effective_random:.1f})"
        in caplog.text
    )
    (logged,) = [entry for entry in trainer.state.log_history if "learnalign/stage" in entry]
    assert logged["learnalign/effective_categories/family"] == shares.effective
    assert logged["learnalign/effective_categories_random/family"] == shares.effective_random


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_random_choice_is_not_warned_of(tmp_path, caplog, seed):
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        _, callback = run(tmp_path, "random", config={"selection_seed": seed})
    (shares,) = callback.record.get("stage_1", SelectionNote).shares
    counts, effective = independent(callback)
    assert {
        category.name: category.chosen for category in shares.categories if category.chosen
    } == counts
    assert shares.effective == pytest.approx(effective)
    assert "by family" not in caplog.text


def test_columns_can_be_switched_off(tmp_path):
    _, callback = run(tmp_path, "random", config={"category_columns": []})
    assert callback.record.get("stage_1", SelectionNote).shares == ()
    assert not (tmp_path / "_learnalign" / "categories.parquet").exists()


def test_an_adaptive_order_tells_what_it_has_trained_on(tmp_path, caplog):
    options = {"stages": [1.0], "order": "adaptive", "adaptive_feature_dim": 4}
    with caplog.at_level(logging.INFO, "trl_learnalign"):
        trainer, callback = run(tmp_path, "random", config=options)
    shares, clusters = callback.record.get("stage_1", RolloutsNote).shares
    history = pd.read_parquet(tmp_path / "_learnalign" / "reward_history.parquet")
    families = np.array(trainer.train_dataset["family"][:])[history["index"]]
    counts = pd.Series(families).value_counts().to_dict()
    assert {
        category.name: category.chosen for category in shares.categories if category.chosen
    } == counts
    assert shares.chosen == len(history)
    assert f"variety by family: about {shares.effective:.1f} of 4 categories" in caplog.text
    name = "learnalign/effective_categories_trained/family"
    (logged,) = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert logged == shares.effective
    # What the order tells prompts apart by makes categories too, of all prompts.
    assert clusters.by == "prompt_cluster"
    assert (clusters.pool, clusters.chosen) == (32, len(history))
    categories = pd.read_parquet(tmp_path / "_learnalign" / "categories.parquet")
    rolled_out = categories["prompt_cluster"][history["index"]].value_counts().to_dict()
    assert {each.name: each.chosen for each in clusters.categories if each.chosen} == rolled_out


def test_a_subset_is_told_too(tmp_path, caplog, capsys):
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        selection, _ = select(
            tmp_path, top=(8,), pool=data(), selector=f"{__name__}:one_family", warmup_samples=0
        )
    note = selection.record.contents.phases["subsets"][f"{__name__}:one_family"]
    assert isinstance(note, SubsetNote)
    assert note.shares[0].effective == pytest.approx(1)
    assert (
        f"{__name__}:one_family: by family, the selection covers an effective 1.0 of 4"
        in caplog.text
    )
    capsys.readouterr()
    show(selection, seconds=1.0)
    random = note.shares[0].effective_random
    line = f"{__name__}:one_family, the largest: variety by family: about 1.0 of 4 categories "
    line += f"(a random choice: {random:.1f})"
    assert line in capsys.readouterr().out
    page = render(read_run(tmp_path), {})
    assert f"<h3>Why these prompts: {__name__}:one_family</h3>" in page
    assert "The largest subset: effectively 1.0 of 4 categories" in page


# ---- Trackers -------------------------------------------------------------------------------------------------------


def tensorboard_texts(folder):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = folder.rglob("events.out.tfevents.*")
    events = accumulators.EventAccumulator(str(file))
    events.Reload()
    texts = {}
    for tag in events.Tags()["tensors"]:
        if tag.startswith("learnalign/"):
            (event,) = events.Tensors(tag)
            text = event.tensor_proto.string_val[0].decode()
            texts[tag.removesuffix("/text_summary")] = (event.step, text)
    return texts


def test_tensorboard_gets_both_tables(tmp_path):
    _, callback = run(
        tmp_path, "learnability", "tensorboard", config={"log_prompt_table": 3, "stages": [8, 4]}
    )
    texts = tensorboard_texts(tmp_path)
    expected = {
        f"learnalign/{kind}/stage_{k}" for kind in ("prompts", "categories") for k in (1, 2)
    }
    assert set(texts) == expected
    table = callback.table("stage_1")
    step, text = texts["learnalign/prompts/stage_1"]
    assert step == 0
    assert texts["learnalign/prompts/stage_2"][0] == callback.plan.stages[1].start
    heading, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    shown = pd.DataFrame(rows, columns=heading)
    assert shown["end"].tolist() == ["top"] * 3 + ["bottom"] * 3
    top = table.head(3)
    assert shown["index"].astype(int).tolist()[:3] == top.index.tolist()
    assert shown["prompt"].tolist()[:3] == top["prompt"].tolist()
    for name in ("success_rate", "learnability"):
        assert shown[name].astype(float).tolist()[:3] == pytest.approx(top[name].tolist(), rel=1e-3)
    learnable = table[table["learnability"] > 0]
    assert shown["rank"].astype(int).tolist()[3:] == learnable["rank"].tolist()[-3:]
    assert shown["categories"][0] == f"family: {FAMILIES[int(shown['index'][0]) % 4]}"
    _, text = texts["learnalign/categories/stage_1"]
    assert text.count("| family | ") == 4


def test_adaptive_runs_send_the_prompts_that_they_have_rolled_out(tmp_path):
    _, callback = go(
        tmp_path,
        settings(stage_steps=30, log_prompt_table=3),
        prompts=8,
        report_to="tensorboard",
        save_strategy="no",
    )
    _, text = tensorboard_texts(tmp_path)["learnalign/prompts_trained/stage_1"]
    heading, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    shown = pd.DataFrame(rows, columns=heading)
    table = history(callback)
    counts = table["index"].value_counts()
    often = shown[shown["kind"] == "most often"]
    assert often["groups"].astype(int).tolist() == counts.tolist()[:3]
    assert often["groups"].astype(int).tolist() == counts[often["index"].astype(int)].tolist()
    for row in shown.itertuples():
        its = table[table["index"] == int(row.index)]
        rates = (its["right"] / (its["right"] + its["wrong"])).tolist()
        assert float(row.first_success_rate) == pytest.approx(rates[0], rel=1e-3)
        assert float(row.last_success_rate) == pytest.approx(rates[-1], rel=1e-3)
        assert row.kind != "never right" or max(rates) == 0
    # The rollouts of this trainer are a function of the prompt: none is newly solved, and 0 and 5 are never right.
    never = shown[shown["kind"] == "never right"]["index"].astype(int)
    assert set(never) == {row for row in (0, 5) if counts.get(row, 0) > 1}


def test_a_prompt_that_is_solved_in_the_end_is_newly_solved():
    outcomes = Outcomes(
        phases=np.array(["stage_1"] * 6, dtype=object),
        steps=np.arange(6),
        rows=np.array([3, 1, 3, 1, 2, 3]),
        right=np.array([1, 0, 2, 0, 4, 4]),
        wrong=np.array([3, 4, 2, 4, 0, 0]),
        partial=np.zeros(6),
        useful=np.ones(6, dtype=bool),
        predicted=np.full(6, np.nan),
        prompt_tokens=np.full(6, np.nan),
        completion_tokens=np.full(6, np.nan),
    )
    table = outcome_table(outcomes, cases.dataset(4), 5)
    rows = table[["kind", "index", "groups", "first_success_rate", "last_success_rate"]]
    assert rows.to_numpy().tolist() == [
        ["most often", 3, 3, 0.25, 1.0],
        ["most often", 1, 2, 0.0, 0.0],
        ["newly solved", 3, 3, 0.25, 1.0],
        ["never right", 1, 2, 0.0, 0.0],
    ]
    assert outcome_table(outcomes.where(outcomes.rows == 2), cases.dataset(4), 5).empty


def test_without_tables_nothing_is_shown(tmp_path):
    run(tmp_path, "random", "tensorboard", config={"log_prompt_table": 0})
    assert tensorboard_texts(tmp_path) == {}


def test_texts_of_a_dataset_make_no_table_and_no_html():
    text = markup.table(["prompt", "score"], [(HOSTILE, 0.5), ("two\nlines", None)])
    lines = text.splitlines()
    assert len(lines) == 4
    assert "<script>" not in text
    assert r"\| \`code\` \*bold\*" in lines[2]
    assert html.unescape(lines[2]).count("<script>") == 1
    assert lines[3] == "| two lines |  |"
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [3] * 4


def test_a_tracker_that_fails_is_said_once_and_stops_nothing(tmp_path, caplog, monkeypatch):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def fail(self, tag, *_, **__):
        if tag.startswith("learnalign/"):
            raise OSError("the disk is full")

    monkeypatch.setattr(SummaryWriter, "add_text", fail)
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        trainer, callback = run(tmp_path, "random", "tensorboard", config={"stages": [8, 4]})
    assert trainer.state.global_step == callback.plan.total_steps
    assert (
        caplog.text.count("tensorboard did not get the tables of the selection: the disk is full")
        == 1
    )


def test_trackers_that_have_not_begun_are_said(tmp_path, caplog):
    pytest.importorskip("trackio")
    from trl_learnalign.bridge.logs import TrackerTables

    trainer = cases.trainer(tmp_path)
    trainer.args.report_to = ["trackio", "tensorboard", "mlflow"]
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        TrackerTables(trainer).show("learnalign/prompts/stage_1", pd.DataFrame({"rank": [1]}))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "trackio did not get the tables of the selection: Call trackio.init()" in said[0]
    assert (
        "tensorboard did not get the tables of the selection: the trainer has no Tensor" in said[1]
    )


TRACKIO = """
import sys
from pathlib import Path

sys.path += sys.argv[2:]
import test_reasons

if __name__ == "__main__":
    test_reasons.run(
        Path(sys.argv[1]), "learnability", "trackio", {"log_prompt_table": 3}, project="learnalign-tables"
    )
"""

READ = """
import json
from trackio.sqlite_storage import SQLiteStorage

print(json.dumps(SQLiteStorage.get_logs("learnalign-tables", "run"), default=str))
"""


@pytest.mark.slow
def test_trackio_keeps_both_tables(tmp_path):
    pytest.importorskip("trackio")
    script = tmp_path / "run.py"
    script.write_text(TRACKIO)
    paths = (Path(__file__).parent, cases.ROOT / "tests" / "helpers", cases.ROOT)
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    commands = (
        [sys.executable, str(script), str(tmp_path / "out"), *map(str, paths)],
        [sys.executable, "-c", READ],
    )
    for command in commands:
        done = subprocess.run(
            command,
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=cases.HANGS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    logs = json.loads(done.stdout.splitlines()[-1])
    (prompts,) = [entry for entry in logs if "learnalign/prompts/stage_1" in entry]
    (categories,) = [entry for entry in logs if "learnalign/categories/stage_1" in entry]
    rows = prompts["learnalign/prompts/stage_1"]["_value"]
    assert prompts["train/global_step"] == 0
    assert [row["end"] for row in rows] == ["top"] * 3 + ["bottom"] * 3
    stage = pd.read_parquet(tmp_path / "out" / "_learnalign" / "stage_1.parquet")
    best = stage.sort_values("rank").head(3)
    assert [row["prompt"] for row in rows[:3]] == best["prompt"].tolist()
    assert [row["learnability"] for row in rows[:3]] == best["learnability"].tolist()
    assert rows[0]["alignment"] is None  # the selector compares no gradients
    rows = categories["learnalign/categories/stage_1"]["_value"]
    assert sum(row["chosen"] for row in rows) == 8
