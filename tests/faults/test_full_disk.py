"""A disk that is really full, in the middle of scoring and of saving; on a file system of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.store import StoreError
from trl_learnalign.training.checkpoints import last_complete_checkpoint


@pytest.fixture
def disk(tmp_path):
    """A folder on a small disk, and how to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def enlarge(size):
        done = mount(f"remount,size={size}")
        assert done.returncode == 0, done.stderr

    made = mount("size=300k")
    if made.returncode:
        pytest.skip(f"needs the right to mount a file system: {made.stderr.strip()}")
    try:
        again = mount("remount,size=300k")
        if again.returncode:
            pytest.skip(f"needs the right to remount a file system: {again.stderr.strip()}")
        yield folder, enlarge
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def go(folder, scored, extra=None, **options):
    def accuracy_reward(completions, prompts, **_):
        if callback.is_scoring:
            scored.append(prompts[0])
        return cases.accuracy_reward(completions)

    trainer = cases.trainer(
        folder, data=cases.dataset(16), rewards=accuracy_reward, save_steps=1, **options
    )
    settings = LearnAlignConfig(
        warmup_samples=0,
        stages=[4],
        shard_size=4,
        feature_dim=16384,
        scoring_batch_prompts=4,
        keep_rollout_texts=0,
    )
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    if extra is not None:
        trainer.add_callback(extra)
    found = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    table = pd.read_parquet(folder / "_learnalign" / "stage_1.parquet")
    return table, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_scoring_goes_on_when_space_is_made(tmp_path, disk):
    folder, enlarge = disk
    wanted, weights = go(tmp_path / "whole", [])
    scored = []
    with pytest.raises(
        StoreError,
        match=r"Cannot write .*shard-.*the disk is full: free some space, then run the same",
    ):
        go(folder, scored)
    shards = list(folder.glob("_learnalign/stage_1/gradients/shard-*.safetensors"))
    assert 0 < len(shards) < 4
    assert len(scored) == len(shards) + 1
    enlarge("50m")
    again = []
    found, trained = go(folder, again)
    assert len(again) == 4 - len(shards)  # the shards that were finished are not scored again
    pd.testing.assert_frame_equal(found, wanted)
    assert all(torch.equal(one, other) for one, other in zip(trained, weights, strict=True))


class Fill(TrainerCallback):
    """Something else takes the disk just before the first checkpoint is written."""

    def __init__(self, folder):
        self.filler = folder / "filler"

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            self.filler.write_bytes(b"x" * (shutil.disk_usage(self.filler.parent).free - 30_000))


def test_a_checkpoint_that_found_no_space_is_passed_over(tmp_path, disk):
    folder, enlarge = disk
    enlarge("50m")
    wanted, weights = go(tmp_path / "whole", [], save_strategy="steps")
    filler = Fill(folder)
    with pytest.raises(
        StoreError,
        match=r"Cannot write .*checkpoint-1.*: the disk is full: free some space, then run the same command again\. "
        r"Everything written before is intact\.",
    ):
        go(folder, [], filler, save_strategy="steps")
    filler.filler.unlink()
    again = []
    found, trained = go(folder, again, save_strategy="steps")
    assert again == []  # all shards were there
    pd.testing.assert_frame_equal(found, wanted)
    assert all(torch.equal(one, other) for one, other in zip(trained, weights, strict=True))


@pytest.mark.slow
def test_small_disks_and_full_ones_end_with_the_sentence_and_are_resumed_from(tmp_path, disk):
    script = Path(__file__).with_name("disk_faults.py")
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--json", str(tmp_path / "disks.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "disks.json").read_text())
    assert all(row["verdict"] == "equal" and row["said"] for row in rows)
    assert {row["share"] is None for row in rows} == {True, False}
