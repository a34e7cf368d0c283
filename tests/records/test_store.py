import errno
import os

import pytest
import torch

from trl_learnalign.records import store as store_module
from trl_learnalign.records.store import ShardStore, StoreError, write_atomically, write_json

FINGERPRINT = {"step": 3, "dataset": "abc", "stages": [0.5, 0.5]}


def new_store(folder, **changes):
    return ShardStore(folder, {**FINGERPRINT, **changes}, shards=3)


def written(folder):
    store = new_store(folder)
    store.create()
    for number in range(3):
        store.write(
            number, {"features": torch.full((2, 4), float(number)), "rows": torch.tensor([0, 1])}
        )
    return store


def test_shards_come_back_as_they_were(tmp_path):
    written(tmp_path)
    store = new_store(tmp_path)
    assert store.differences() == []
    assert sorted(store.finished()) == [0, 1, 2]
    for number, shard in store.read_all(range(3)):
        assert (shard["features"] == number).all()
        assert shard["rows"].dtype == torch.int64


def test_a_store_of_another_run_names_both_sides(tmp_path):
    written(tmp_path)
    differences = new_store(tmp_path, step=7, dataset="xyz").differences()
    assert differences == [
        "dataset: the folder has 'abc', this run 'xyz'",
        "step: the folder has 3, this run 7",
    ]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_shard_is_refused(tmp_path, damage):
    path = written(tmp_path).finished()[1]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"flip": content, "truncate": content[:-10], "empty": b""}[damage])
    store = new_store(tmp_path)
    store.read(0)
    with pytest.raises(
        StoreError,
        match=r"shard-00001.* is damaged.*Delete this file and run the same command again",
    ):
        store.read(1)


def test_a_missing_shard_is_named(tmp_path):
    store = written(tmp_path)
    store.finished()[2].unlink()
    assert sorted(store.finished()) == [0, 1]
    with pytest.raises(StoreError, match="Shard 2 is missing"):
        store.read(2)


def test_an_unreadable_manifest_is_a_difference(tmp_path):
    store = written(tmp_path)
    store.manifest_path.write_text("{")
    assert "cannot be read" in new_store(tmp_path).differences()[0]


def test_leftovers_of_an_interrupted_write_are_not_shards(tmp_path):
    store = written(tmp_path)
    (tmp_path / ".shard-00004-0123.safetensors.99.tmp").write_bytes(b"half")
    (tmp_path / "shard-00005-short.safetensors").write_bytes(b"half")
    assert sorted(store.finished()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EACCES, "grant write permission"),
        (errno.EIO, "fix that"),
    ],
)
def test_a_failed_write_says_what_to_do_and_keeps_what_was_there(
    tmp_path, monkeypatch, number, advice
):
    path = tmp_path / "run.json"
    write_json(path, {"kept": True})

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module.os, "fsync", fail)
    with pytest.raises(
        StoreError, match=rf"Cannot write .*run.json: .*{advice}.*run the same command again"
    ):
        write_json(path, {"kept": False})
    monkeypatch.undo()
    assert '"kept": true' in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_real_full_disk(tmp_path, monkeypatch):
    real_open = open
    monkeypatch.setattr(
        "builtins.open",
        lambda path, mode="r": real_open("/dev/full", mode) if "b" in mode else None,
    )
    with pytest.raises(StoreError, match="the disk is full"):
        write_atomically(tmp_path / "shard", b"x" * 100_000)
