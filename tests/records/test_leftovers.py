"""What killed runs leave half-written goes at the next start, and nothing else does."""

import os
import subprocess
import sys
import time

import cases
import pytest

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.lock import AGE, sweep
from trl_learnalign.records.store import write_atomically


def number_of_a_dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(scope="module")
def dead():
    return number_of_a_dead_process()


def left(place, age=0.0):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"half")
    then = time.time() - age
    os.utime(place, (then, then))
    return place


def test_a_killed_writer_leaves_a_file_that_the_sweep_knows(tmp_path):
    """The names are those that are written: a process that dies between writing and renaming."""
    script = (
        "import os, signal, pathlib, sys; from trl_learnalign.records import store\n"
        "store.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.write_atomically(pathlib.Path(sys.argv[1]) / 'stage_1' / 'shard-00000', b'x')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, cwd=cases.ROOT)
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    assert sweep(records=tmp_path) == 1
    assert list(tmp_path.rglob("*.tmp")) == []


def test_files_of_dead_processes_go_wherever_they_are_in_the_records(tmp_path, dead):
    places = [
        left(tmp_path / f".run.json.{dead}.tmp"),
        left(tmp_path / "stage_1" / "round_1" / f".shard-00000-ab.safetensors.{dead}.tmp"),
        left(
            tmp_path / f".groups.parquet.{os.getpid()}.tmp"
        ),  # containers give the same number again
        left(tmp_path / f".run.json.{os.getppid()}.tmp", age=AGE + 1),
    ]
    assert sweep(records=tmp_path) == len(places)
    assert [place for place in places if place.exists()] == []


def test_files_of_the_living_and_of_others_stay(tmp_path, dead):
    kept = [
        left(tmp_path / f".run.json.{os.getppid()}.tmp"),  # a process at work
        left(tmp_path / "notes.tmp"),
        left(tmp_path / ".notes.tmp"),
        left(tmp_path / f"run.json.{dead}.tmp"),
        left(tmp_path / "run.json"),
    ]
    assert sweep(records=tmp_path) == 0
    assert all(place.exists() for place in kept)


def test_where_others_write_the_names_of_our_files_alone_go(tmp_path, dead):
    ours = [
        left(tmp_path / f".{name}.{dead}.tmp")
        for name in ("report.html", "summary.json", "learnalign_history.parquet")
    ]
    theirs = [
        left(tmp_path / f".mine.{dead}.tmp"),
        left(tmp_path / "sub" / f".report.html.{dead}.tmp"),
    ]
    assert sweep(tmp_path) == len(ours)
    assert all(place.exists() for place in theirs)


def test_training_begins_with_the_sweep(tmp_path, dead):
    trainer = cases.trainer(tmp_path, max_steps=1)
    trainer.add_callback(
        LearnAlignCallback(trainer, LearnAlignConfig.adaptive(adaptive_embeddings="none"))
    )
    gone = [
        left(tmp_path / f".report.html.{dead}.tmp"),
        left(tmp_path / "checkpoint-9" / f".learnalign_record.json.{dead}.tmp"),
        left(tmp_path / "_learnalign" / "stage_1" / f".manifest.json.{dead}.tmp"),
    ]
    trainer.train()
    assert [place for place in gone if place.exists()] == []


def test_a_read_only_disk_is_not_the_sweeps_to_tell(tmp_path, dead, monkeypatch):
    place = left(tmp_path / f".run.json.{dead}.tmp")

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(type(place), "unlink", refuse)
    assert sweep(records=tmp_path) == 0


def test_a_file_that_was_written_leaves_nothing(tmp_path):
    write_atomically(tmp_path / "run.json", b"{}")
    assert [place.name for place in tmp_path.iterdir()] == ["run.json"]
