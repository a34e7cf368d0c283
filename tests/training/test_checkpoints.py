"""However a checkpoint comes about, and whatever was there before."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sampling_cases
import torch
from interruptions import KillAt, Killed
from safetensors.numpy import load_file
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import random_states, restore_random_states
from trl_learnalign.data import prompts
from trl_learnalign.measuring import generation
from trl_learnalign.preflight import environment
from trl_learnalign.records import lock, store
from trl_learnalign.records.lock import run_lock
from trl_learnalign.records.store import CheckpointError, StoreError
from trl_learnalign.training.checkpoints import last_complete_checkpoint


def begun(folder, prompts=12, config=None, **options):
    options = {"max_steps": -1, "save_strategy": "steps", "save_steps": 1, **options}
    trainer = sampling_cases.trainer(folder, rows=list(range(prompts)), **options)
    callback = LearnAlignCallback(trainer, config or LearnAlignConfig.adaptive())
    trainer.add_callback(callback)
    return trainer, callback


def outcome(trainer, callback):
    ledger = callback.record.contents.ledger.total
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    return weights, callback.run.steps.history.table(), dataclasses.replace(ledger, seconds=0)


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1].equals(other[1])
    assert one[2] == other[2]


# ---- Pre-emption ----------------------------------------------------------------------------------------------------


class Preempted(TrainerCallback):
    """SIGTERM while a moment of a step is under way, and the grace period is over by the next one."""

    def __init__(self, step, moment):
        self.step, self.moment = step, moment

    def _at(self, moment, state):
        if (moment, state.global_step) == (self.moment, self.step):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_epoch_begin(self, args, state, control, **_):
        self._at("between", state)

    def on_substep_end(self, args, state, control, **_):
        self._at("within", state)

    def on_step_end(self, args, state, control, **_):
        self._at("end", state)


class Now:
    """A timer that does not wait."""

    def __init__(self, _, function):
        self.start = function


JIT = dict(
    enable_jit_checkpoint=True,
    save_strategy="no",
    gradient_accumulation_steps=2,
    num_iterations=2,
    steps_per_generation=2,
)


@pytest.mark.parametrize(
    ("moment", "step", "saved"),
    [("within", 3, 4), ("between", 6, 6), ("end", 3, 3)],
)
def test_a_preempted_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, moment, step, saved):
    jit = pytest.importorskip("transformers.trainer_jit_checkpoint")
    monkeypatch.setattr(jit.threading, "Timer", Now)
    trainer, callback = begun(tmp_path / "whole", **JIT)
    trainer.train()
    steps, wanted = trainer.state.global_step, outcome(trainer, callback)
    assert steps > 5
    trainer, _ = begun(tmp_path / "killed", **JIT)
    # In front of transformers' own, as a signal would be.
    trainer.callback_handler.callbacks.insert(0, Preempted(step, moment))
    trainer.train()
    assert trainer.state.global_step < steps
    assert [path.name for path in store.checkpoints_in(tmp_path / "killed")] == [
        f"checkpoint-{saved}"
    ]
    trainer, callback = begun(tmp_path / "killed", **JIT)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == steps
    assert_same(outcome(trainer, callback), wanted)


class SavesItself(TrainerCallback):
    """A script of one's own that saves when it likes."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


def test_a_checkpoint_of_ones_own_is_as_good_as_any(tmp_path):
    options = dict(save_strategy="no", gradient_accumulation_steps=2)
    trainer, callback = begun(tmp_path / "whole", **options)
    trainer.train()
    wanted = outcome(trainer, callback)
    trainer, _ = begun(tmp_path / "killed", **options)
    for extra in (SavesItself(trainer, 1), KillAt(3)):
        trainer.add_callback(extra)
    with pytest.raises(Killed):
        trainer.train()
    assert [path.name for path in store.checkpoints_in(tmp_path / "killed")] == ["checkpoint-2"]
    trainer, callback = begun(tmp_path / "killed", **options)
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer, callback), wanted)


# ---- Before older ones are deleted ----------------------------------------------------------------------------------


def test_an_older_checkpoint_is_deleted_when_the_new_one_is_whole(tmp_path, monkeypatch):
    """Killed just before the mark: what was saved before is still there."""
    trainer, _ = begun(tmp_path, save_total_limit=1)
    write = store.write_mark

    def dies(folder, mark):
        if mark.step == 3:
            raise Killed
        write(folder, mark)

    monkeypatch.setattr(store, "write_mark", dies)
    with pytest.raises(Killed):
        trainer.train()
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-2"
    monkeypatch.undo()
    trainer, _ = begun(tmp_path, save_total_limit=1)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-3 cannot .*newest complete .*checkpoint-2:"
    ):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    last = trainer.state.global_step
    assert [path.name for path in store.checkpoints_in(tmp_path)] == [f"checkpoint-{last}"]
    assert store.problem_of(tmp_path / f"checkpoint-{last}") is None


def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path):
    trainer, _ = begun(tmp_path, save_only_model=True)
    trainer.add_callback(KillAt(2))
    with pytest.raises(Killed):
        trainer.train()
    trainer, _ = begun(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 cannot .*save_only_model=True"):
        trainer.train(resume_from_checkpoint=True)


# ---- A folder that was used before ----------------------------------------------------------------------------------


def killed_at(folder, step, **options):
    trainer, _ = begun(folder, **options)
    trainer.add_callback(KillAt(step))
    with pytest.raises(Killed):
        trainer.train()


def test_a_second_run_in_the_folder_of_a_first_one_is_refused(tmp_path):
    killed_at(tmp_path, 3)
    trainer, _ = begun(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint-3 belongs to an earlier run.*resume_from_checkpoint=True.*another output_dir",
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tmp_path):
    """And pays for reading the prompts, although the features are there."""
    trainer, callback = begun(tmp_path / "whole")
    trainer.train()
    wanted = outcome(trainer, callback)
    assert wanted[2].tokens_forward > 0
    killed_at(tmp_path / "killed", 1, save_steps=2)
    trainer, callback = begun(tmp_path / "killed")
    trainer.train()
    assert_same(outcome(trainer, callback), wanted)


def test_a_checkpoint_goes_on_in_another_place(tmp_path):
    """Everything is inside: the record folder is made anew from it."""
    trainer, callback = begun(tmp_path / "whole")
    trainer.train()
    wanted = outcome(trainer, callback)
    killed_at(tmp_path / "killed", 3)
    moved = tmp_path / "checkpoint-3"
    (tmp_path / "killed" / "checkpoint-3").rename(moved)
    trainer, callback = begun(tmp_path / "elsewhere")
    trainer.train(resume_from_checkpoint=str(moved))
    assert_same(outcome(trainer, callback), wanted)
    run = json.loads((tmp_path / "elsewhere" / "_learnalign" / "run.json").read_text())
    assert run["run"] == store.read_mark(moved).run


@pytest.mark.parametrize("order", ["adaptive", "trainer"])
def test_a_run_that_has_ended_is_made_longer(tmp_path, order):
    config = LearnAlignConfig.adaptive(order=order)
    hooked = []
    options = dict(lr_scheduler_type="constant")
    trainer, callback = begun(tmp_path / "long", config=config, max_steps=6, **options)
    trainer.train()
    wanted = outcome(trainer, callback)
    trainer, _ = begun(tmp_path / "short", config=config, max_steps=4, **options)
    trainer.train()
    trainer, callback = begun(tmp_path / "short", config=config, max_steps=6, **options)
    callback.on_phase_end = lambda name, step: hooked.append((name, step))
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer, callback), wanted)
    assert hooked == [("stage_1", 6)]
    trained = callback.record.contents.phases["stage_1"]["training"]
    assert (trained.step, trained.steps) == (6, 6)


# ---- A million prompts ----------------------------------------------------------------------------------------------


def test_pools_are_kept_as_bits_and_not_as_text(tmp_path):
    killed_at(tmp_path, 2, prompts=96, max_steps=3)
    folder = tmp_path / "checkpoint-2"
    state = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]
    assert len(json.dumps(state["learnalign"])) < 2000
    arrays = load_file(folder / "learnalign_state.safetensors")
    assert arrays["pool/stage_1"].nbytes == 96 // 8
    trainer, callback = begun(tmp_path, prompts=96, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert callback.selected("stage_1").tolist() == list(range(96))


@pytest.mark.parametrize("order", ["adaptive", "trainer"])
def test_the_trainers_own_order_reads_no_prompt_when_it_is_made(tmp_path, monkeypatch, order):
    class Read(Exception):
        pass

    def read(*_):
        raise Read

    for module in (prompts, environment, generation):
        monkeypatch.setattr(module, "prompts_of", read)
    trainer = sampling_cases.trainer(tmp_path, rows=list(range(12)))
    if order == "trainer":
        LearnAlignCallback(trainer, LearnAlignConfig.adaptive(order=order))
        return
    with pytest.raises(Read):
        LearnAlignCallback(trainer, LearnAlignConfig.adaptive(order=order))


# ---- One run at a time ----------------------------------------------------------------------------------------------


class Second(TrainerCallback):
    """A job that was started twice: the second one begins while the first one trains."""

    def __init__(self, folder):
        self.folder, self.said = folder, None

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            random = random_states()  # a trainer that is made seeds everything
            trainer, _ = begun(self.folder)
            try:
                trainer.train()
            except StoreError as error:
                self.said = str(error)
            restore_random_states(random)


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    trainer, callback = begun(tmp_path / "alone")
    trainer.train()
    wanted = outcome(trainer, callback)
    trainer, callback = begun(tmp_path / "twice")
    second = Second(tmp_path / "twice")
    trainer.add_callback(second)
    trainer.train()
    assert "Another run is using" in second.said
    assert f"process {os.getpid()} on" in second.said
    assert_same(outcome(trainer, callback), wanted)
    assert not (tmp_path / "twice" / "_learnalign" / "run.lock").exists()


HOLDS = """
import sys, time
from pathlib import Path
from trl_learnalign.records.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_a_dead_owner_does_not_keep_the_lock(tmp_path):
    root = Path(lock.__file__).parents[2]
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(StoreError, match=rf"process {owner.pid} on "), run_lock(tmp_path):
        pass
    owner.kill()
    owner.wait()
    with run_lock(tmp_path):
        assert (tmp_path / "run.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_is_watched(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "LEASE", 0.3)
    ours = f"host={socket.gethostname()}"
    with run_lock(tmp_path):
        left = (tmp_path / "run.lock").read_text().replace(ours, "host=elsewhere")
    (tmp_path / "run.lock").write_text(left)  # of a machine that lost its power
    with run_lock(tmp_path):
        assert ours in (tmp_path / "run.lock").read_text()
    assert "on elsewhere: waiting at most" in caplog.text


def test_a_lock_that_a_killed_run_left_empty_is_taken_over(tmp_path):
    (tmp_path / "run.lock").touch()  # created, and not written yet
    with run_lock(tmp_path):
        assert f"pid={os.getpid()}" in (tmp_path / "run.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_what_marks_an_empty_lock_does_no_harm_to_an_owner_that_writes_meanwhile(tmp_path):
    path = tmp_path / "run.lock"
    path.touch()
    with path.open("r+") as owner:
        lock._fill_if_empty(path)
        owner.write("pid=1\nhost=here\n")
    lock._fill_if_empty(path)
    assert path.read_text() == "pid=1\nhost=here\n"
    lock._fill_if_empty(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_lock_that_its_owner_keeps_touching_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 1.0)
    with run_lock(tmp_path):  # touched every third of a lease
        monkeypatch.setattr(lock.socket, "gethostname", lambda: "another machine")
        with pytest.raises(StoreError, match=r"delete .*run\.lock"), run_lock(tmp_path):
            pass


# ---- The mark -------------------------------------------------------------------------------------------------------


def test_every_file_of_a_checkpoint_is_in_its_mark(tmp_path):
    killed_at(tmp_path, 2)
    folder = tmp_path / "checkpoint-2"
    mark = store.read_mark(folder)
    assert set(mark.files) == {
        path.name for path in folder.iterdir() if path.name != "learnalign_complete.json"
    }
    assert {"model.safetensors", "optimizer.pt", "learnalign_history.parquet"} <= set(mark.files)
    assert mark.step == 2
    assert mark.run == json.loads((tmp_path / "_learnalign" / "run.json").read_text())["run"]


def test_a_power_loss_is_seen(tmp_path):
    """The mark is there and every size is right, but what was written last is zeros."""
    killed_at(tmp_path, 3)
    for name in store.read_mark(tmp_path / "checkpoint-3").files:
        path = tmp_path / "checkpoint-3" / name
        if path.stat().st_nlink == 1:  # what was there before had reached the disk
            path.write_bytes(bytes(path.stat().st_size))
    trainer, _ = begun(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 cannot .* is damaged.*checkpoint-2:"):
        trainer.train(resume_from_checkpoint=True)
