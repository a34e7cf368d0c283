"""`push_to_hub=True` uploads the model; prompts, rollouts and features stay at home."""

from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
from huggingface_hub.utils import filter_repo_objects

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records import layout

OF_A_CHECKPOINT = (layout.COMPLETE, layout.CHECKPOINT_RECORD, layout.CHECKPOINT_HISTORY)


class Hub:
    """What the trainer asks of a hub; remembers what an upload would hold, by the hub's own filter."""

    def __init__(self):
        self.uploaded = set()

    def create_repo(self, name, **_):
        return SimpleNamespace(repo_id=f"me/{name}", url="")

    def upload_folder(self, *, folder_path, ignore_patterns=None, path_in_repo="", **_):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        names = [path.relative_to(folder_path).as_posix() for path in files]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            self.uploaded.add(f"{path_in_repo}/{name}".lstrip("/"))
        return SimpleNamespace(
            is_done=lambda: True, done=lambda: True, wait_until_done=lambda: None
        )


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: made)
    return made


def go(folder, hub_strategy="every_save", **options):
    trainer = cases.trainer(
        folder,
        data=cases.dataset(14),
        push_to_hub=True,
        hub_strategy=hub_strategy,
        hub_model_id="me/model",
        save_strategy="steps",
        save_steps=1,
    )
    config = LearnAlignConfig(
        **{
            "warmup_samples": 4,
            "stages": [6],
            "shard_size": 4,
            "feature_dim": 64,
            "after_warmup": "restart",
            **options,
        }
    )
    trainer.add_callback(LearnAlignCallback(trainer, config))
    trainer.train()
    trainer.save_model(folder)  # which pushes too
    return trainer


def test_no_record_is_uploaded_neither_under_way_nor_at_the_end(tmp_path, hub, caplog):
    go(tmp_path)
    records = [path for path in (tmp_path / layout.RECORDS).rglob("*") if path.is_file()]
    assert {"run.json", "stage_1.parquet", "initial_weights.safetensors"} <= {
        path.name for path in records
    }
    assert {"model.safetensors", "config.json"} <= hub.uploaded
    own = {path.relative_to(tmp_path).as_posix() for path in records}
    assert not own & hub.uploaded
    assert not [name for name in hub.uploaded if "learnalign" in name]
    assert "uploads" not in caplog.text


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        (
            "records",
            "choose a record_dir outside of that folder, or inside it with a name that begins with '_'",
        ),
        ("_records", None),
        ("../elsewhere", None),
    ],
)
def test_a_record_dir_that_would_be_uploaded_is_warned_of(tmp_path, hub, caplog, place, remedy):
    folder = tmp_path / "out"
    go(
        folder,
        record_dir=str(folder / place),
        stages=[4],
        warmup_samples=0,
        after_warmup="continue",
    )
    is_uploaded = any(name.endswith("run.json") for name in hub.uploaded)
    assert is_uploaded == (remedy is not None)
    assert (f"also uploads the records in {folder / place}:" in caplog.text) == is_uploaded
    assert is_uploaded == (str(remedy) in caplog.text)


def test_a_checkpoint_that_is_uploaded_takes_our_files_along(tmp_path, hub):
    """As docs/report.md says, by name."""
    go(tmp_path, "checkpoint", stages=[4], warmup_samples=0, after_warmup="continue")
    ours = {name for name in hub.uploaded if "learnalign" in name}
    assert {f"last-checkpoint/{name}" for name in OF_A_CHECKPOINT} <= ours
    assert {name.split("/")[0] for name in ours} == {"last-checkpoint"}
