"""Whatever library fails to write says the same sentence."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from trl_learnalign.records import store as store_module
from trl_learnalign.records.store import StoreError, same_file, write_atomically, writing

FULL = "the disk is full: free some space, then run the same command again"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FULL),
        (OSError(errno.EROFS, "Read-only file system"), "grant write permission or choose another"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            "PytorchStreamWriter failed writing file",
        ),
    ],
)
def test_the_sentence(tmp_path, error, said):
    with (
        pytest.raises(StoreError, match=r"Cannot write .*checkpoint-2") as raised,
        writing(tmp_path / "checkpoint-2"),
    ):
        raise error
    assert said in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_torch_on_a_disk_that_is_really_full(tmp_path, monkeypatch):
    """It says at which byte it stopped; a trial says why."""
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(store_module, "_tried", lambda path: full)
    with pytest.raises(StoreError, match=FULL), writing(tmp_path):
        torch.save({"weights": torch.ones(1000)}, "/dev/full")


def test_what_is_not_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shape mismatch"), writing(tmp_path):
        raise RuntimeError("shape mismatch")
    with pytest.raises(StoreError, match=r"^told already$"), writing(tmp_path):
        raise StoreError("told already")


def copied(source, target):
    write_atomically(target, source.read_bytes())


@pytest.mark.parametrize("write", [copied, same_file])
def test_the_first_error_tells_when_nothing_can_be_deleted_either(tmp_path, monkeypatch, write):
    source = tmp_path / "source"
    source.write_bytes(b"x")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("replace", "link", "unlink", "fsync"):
        monkeypatch.setattr(store_module.os, name, refuse)
    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    with pytest.raises(StoreError, match=r"Cannot write .*target: the folder is not writable"):
        write(source, tmp_path / "target")
