"""What a run finds out before it waits."""

import os
import re
import time
import types
import warnings

import cases
import pytest
from launches import launch

from trl_learnalign import bridge
from trl_learnalign.planning.preflight import check_extension_locks

NOW = time.time()


def left_behind(folder, age):
    lock = folder / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (NOW - age, NOW - age))
    return lock


@pytest.fixture
def still(monkeypatch):
    """A clock that stands still."""
    monkeypatch.setattr(
        "trl_learnalign.planning.preflight.time", types.SimpleNamespace(time=lambda: NOW)
    )


@pytest.mark.parametrize("default_folder", [False, True])
def test_an_abandoned_lock_is_refused_by_name(tmp_path, monkeypatch, still, default_folder):
    if default_folder:
        from torch.utils import cpp_extension

        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
        lock = left_behind(
            cpp_extension._get_build_directory("x", False) and next(tmp_path.iterdir()), age=3600
        )
    else:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        lock = left_behind(tmp_path, age=3600)
    with pytest.raises(RuntimeError, match=r"60 minutes old.*Remove the file") as refused:
        check_extension_locks()
    assert str(lock) in str(refused.value)


def test_a_young_lock_is_warned_of_and_that_of_another_rank_is_not(tmp_path, monkeypatch, still):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = left_behind(tmp_path, age=120)
    with pytest.warns(UserWarning, match=r"120 seconds old.*remove the file"):
        check_extension_locks()
    os.utime(lock, (NOW, NOW))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_extension_locks()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_launch_that_would_wait_for_a_killed_build_says_so(tmp_path):
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    lock = left_behind(extensions, age=3600)
    environment = {"TORCH_EXTENSIONS_DIR": str(extensions)}
    said = launch("zero2", tmp_path / "run", {"run": {}}, expect_failure=True, **environment)
    assert re.search(re.escape(str(lock)) + r" is \d+ minutes old", said)


# ---- Routed experts -------------------------------------------------------------------------------------------------


def test_modules_that_only_some_tokens_reach_are_found(tmp_path):
    trainer = cases.trainer(tmp_path, cases.model("routed"))
    found = bridge.unevenly_called(trainer)
    assert found
    assert all(name.startswith("model.layers.0.mlp.experts.") for name in found)
    assert bridge.list_holder(trainer, found[0]) is trainer.model.model.layers[0].mlp
    trainer.model.model.layers[0].mlp._z3_leaf = True  # as DeepSpeed marks it
    assert bridge.unevenly_called(trainer) == []


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3", "mixtral"])
def test_no_module_of_the_usual_models_is_reached_by_some_tokens_only(tmp_path, family):
    assert bridge.unevenly_called(cases.trainer(tmp_path, cases.model(family))) == []
