"""A selection as a dataset with a card: loaded by `datasets`, true to the record, pushed to a hub on this machine."""

import io
import os
import re
import shutil
import subprocess
import sys

import cases
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from local_hub import local_hub
from reports import HOSTILE, change
from subsets import select

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.cli import main

FAMILIES = ["arithmetic", "bases", f"of another | kind {HOSTILE}", "dates"]
FIGURES = ("score", "success_rate", "learnability", "alignment")


def data(size=32):
    families = [FAMILIES[row % 4] for row in range(size)]
    made = cases.dataset(size, conversational=True).add_column("family", families)
    return made.add_column("tags", [["a", str(row)] for row in range(size)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    trainer = cases.trainer(folder, data=data())
    settings = LearnAlignConfig.adaptive(
        stages=[12, 6],
        selector=["learnalign", "random"],
        feature_dim=64,
        record_dir=None,
        reliability=True,
    )
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    trainer.train()
    return callback


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished.folder.parent, tmp_path / "run")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def loaded(folder):
    found = load_dataset(str(folder))
    assert list(found) == ["train"]
    return found["train"]


def check(rows, callback, stage):
    """Against the stage's table and the training dataset."""
    table = callback.table(stage)
    taken = table[table["selected"]]
    whole = callback.trainer.train_dataset
    assert rows["selection_index"][:] == taken.index.tolist()
    assert rows["selection_rank"][:] == list(range(1, len(taken) + 1))
    for name in whole.column_names:
        assert rows[name][:] == whole[taken.index.tolist()][name], name
    for name in FIGURES:
        found = np.array(rows[f"selection_{name}"][:], dtype=float)
        assert np.array_equal(found, taken[name].to_numpy(), equal_nan=True), name


def test_the_chosen_prompts_come_back_with_all_their_columns(finished, tmp_path):
    folder = finished.save_selection(tmp_path / "chosen", stage="stage_1")
    rows = loaded(folder)
    assert len(rows) == 12
    check(rows, finished, "stage_1")
    # The last stage that has chosen, unless one is named.
    check(loaded(finished.save_selection(tmp_path / "last")), finished, "stage_2")


def test_the_command_writes_the_same(finished, run, tmp_path, capsys):
    finished.save_selection(tmp_path / "ours", stage="stage_1")
    main(["export", str(run), str(tmp_path / "theirs"), "--stage", "1"])
    assert "12 prompts" in capsys.readouterr().out
    for name in ("README.md", "data/train.parquet"):
        ours, theirs = (tmp_path / who / name for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_card_says_what_the_record_says(finished, tmp_path):
    folder = finished.save_selection(tmp_path / "chosen", stage="stage_1")
    card = DatasetCard.load(folder / "README.md")
    assert card.data.size_categories == ["n<1K"]
    assert "learnalign" in card.data.tags
    note = finished.record.contents.phases["stage_1"]["selection"]
    text = card.text
    assert "12 of a dataset of 32 prompts, ranked by the selector `learnalign`" in text
    assert "before training." in text
    assert "Each of 32 candidates got 4 rollouts" in text
    assert "graded by the reward function `accuracy_reward`" in text
    assert f"| mean success rate | {note.success_rate_selected:.4g} |" in text
    (family, *_) = note.shares
    assert f"By family: an effective {family.effective:.1f} of 4 categories" in text
    for category in family.categories[:2]:
        assert f"{category.chosen / 12:.1%} |" in text
    assert "<script" not in text
    assert "standard error of up to 0.25" in text
    assert "reliability of the ranking with other rollouts was not measured" not in text
    assert "name and licence of the source dataset are not in the record" in text
    assert "@inproceedings{li2026learnalign" in text
    settings = text.split("```yaml\n")[1].split("```")[0]
    assert "feature_dim: 64" in settings
    assert "record_dir" not in settings


def test_no_place_on_this_machine_is_published(run, tmp_path):
    def rename(data):
        data["trainer"]["model"] = "/home/someone/secret/policy"
        data["config"]["reward_history"] = "/home/someone/secret/history.parquet"

    change(run / "_learnalign" / "run.json", rename)
    main(["export", str(run), str(tmp_path / "chosen")])
    text = (tmp_path / "chosen" / "README.md").read_text()
    assert "the policy `policy`, a local folder" in text
    assert "…/history.parquet" in text
    assert "someone" not in text


def test_a_selection_without_rollouts_says_so(finished, tmp_path):
    text = (finished.save_selection(tmp_path / "chosen") / "README.md").read_text()
    assert "6 of 20 candidates of a dataset of 32 prompts, ranked by the selector `random`" in text
    assert "after 6 optimizer steps of GRPO" in text
    assert "No success rates were measured" in text
    assert "rollouts (temperature" not in text
    assert "mean success rate" not in text


def test_a_record_without_the_file_of_the_chosen_gives_prompts_alone_and_the_card_says_so(tmp_path):
    record = tmp_path / "run"
    shutil.copytree(cases.STORED_RUN / "whole", record)
    (record / "_learnalign" / "stage_1_selected.parquet").unlink()
    main(["export", str(record), str(tmp_path / "chosen"), "--stage", "1"])
    rows = loaded(tmp_path / "chosen")
    table = pq.read_table(record / "_learnalign" / "stage_1.parquet").to_pandas()
    taken = table[table["selected"]].sort_values("rank")
    assert rows["prompt"][:] == taken["prompt"].tolist()
    assert rows["selection_score"][:] == taken["score"].tolist()
    assert "solution" not in rows.column_names
    text = (tmp_path / "chosen" / "README.md").read_text()
    assert "no other column of the dataset" in text
    assert "does not show which categories of prompts the selection favours" in text


def test_subsets_of_select_are_written_too(tmp_path):
    selection, _ = select(
        tmp_path / "run", top=(3, 6), pool=data(), selector=["random", "learnability"]
    )
    run = str(tmp_path / "run")
    main(["export", run, str(tmp_path / "chosen"), "--selector", "learnability", "--top", "3"])
    rows = loaded(tmp_path / "chosen")
    assert len(rows) == 3
    whole = selection.trainer.train_dataset
    assert rows["solution"][:] == whole[rows["selection_index"][:]]["solution"]
    for arguments, message in (
        (["--stage", "1"], "is a run of select, which has no stages"),
        ([], "subsets by random, learnability; name one of them"),
        (["--selector", "random", "--top", "4"], "top=4: random has subsets of 3, 6 prompts"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["export", run, str(tmp_path / "other"), *arguments])


def spoil(run):
    def took_all(data):
        data["phases"]["stage_2"]["selection"] = {"step": 3, "scored": False, "selected": 6}

    change(run / "_learnalign" / "run.json", took_all)


def unselect(run):
    change(run / "_learnalign" / "run.json", lambda data: data["phases"].pop("stage_2"))


BAD = [
    (
        None,
        ["--stage", "3"],
        r"no stage 'stage_3': the stages of this run are stage_1, stage_2; those with a selection",
    ),
    (
        spoil,
        ["--stage", "2"],
        r"stage_2 took all prompts without scoring them.*Stages with a selection: stage_1",
    ),
    (unselect, ["--stage", "2"], r"stage_2 has no selection yet. Stages with a selection: stage_1"),
    (None, ["--top", "3"], r"--selector and --top apply to runs of select"),
]


@pytest.mark.parametrize(("damage", "arguments", "message"), BAD)
def test_what_was_not_chosen_is_named(run, tmp_path, damage, arguments, message):
    if damage is not None:
        damage(run)
    with pytest.raises(SystemExit, match=message):
        main(["export", str(run), str(tmp_path / "chosen"), *arguments])
    assert not (tmp_path / "chosen").exists()


def test_before_training_there_is_nothing_to_save(tmp_path):
    trainer = cases.trainer(tmp_path / "run", data=data())
    callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(stages=[6]))
    with pytest.raises(RuntimeError, match=r"a run and its record begin with train\(\)"):
        callback.save_selection(tmp_path / "chosen")


def test_a_folder_with_other_files_is_not_published(run, tmp_path):
    folder = tmp_path / "chosen"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"contains other files \(notes.txt\)"):
        main(["export", str(run), str(folder)])
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


# ---- The hub --------------------------------------------------------------------------------------------------------


def push(hub, run, folder, *arguments):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": "hf_" + "x" * 34,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(cases.ROOT),
    }
    command = [sys.executable, "-m", "trl_learnalign", "export", str(run), str(folder)]
    return subprocess.run(
        [*command, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )


def test_it_is_pushed_to_a_dataset_repository(finished, run, tmp_path):
    folder = tmp_path / "chosen"
    with local_hub() as hub:
        done = push(hub, run, folder, "--push_to_hub", "me/chosen", "--stage", "1", "--private")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Pushed: {hub.address}/datasets/me/chosen" in done.stdout
    (created,) = hub.created
    assert (created["name"], created["type"]) == ("chosen", "dataset")
    assert created.get("private") or created.get("visibility") == "private"
    assert set(hub.files) == {"me/chosen/README.md", "me/chosen/data/train.parquet"}
    assert hub.files["me/chosen/README.md"] == (folder / "README.md").read_bytes()
    table = pq.read_table(io.BytesIO(hub.files["me/chosen/data/train.parquet"]))
    chosen = finished.table("stage_1")
    assert table["selection_index"].to_pylist() == chosen[chosen["selected"]].index.tolist()


def test_a_hub_that_refuses_is_said_and_the_dataset_stays(run, tmp_path):
    folder = tmp_path / "chosen"
    with local_hub() as hub:
        hub.refuses = True
        done = push(hub, run, folder, "--push_to_hub", "me/chosen")
    assert done.returncode != 0
    assert re.search(r"trl-learnalign export: pushing to me/chosen failed \(.*403", done.stderr)
    assert "run the same command again" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert (folder / "data" / "train.parquet").exists()
