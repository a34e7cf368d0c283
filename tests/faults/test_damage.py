"""A file of a record or a checkpoint goes bad: the run ends as it would have, or is refused in words.

One run, killed in its last stage, is gone on with again and again, each time with another file that is damaged in
another way. It had a warm-up, a stage that scores, and an adaptive one; its last checkpoint is in the middle of a
generation.
"""

import copy
import json
import shutil

import cases
import damages
import pandas as pd
import pytest
import torch
from interruptions import KillAt, Killed

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records import layout
from trl_learnalign.records.store import StoreError

PROMPTS = 10
INSIDE, BOUNDARY = "killed", "older"
KILLED = {INSIDE: 7, BOUNDARY: 4}
"""Runs by name, and the step that they were killed at: in the middle of a generation, and where a stage begins."""


def begun(folder, seed=42):
    trainer = cases.trainer(
        folder,
        data=cases.dataset(PROMPTS),
        save_strategy="steps",
        save_steps=1,
        num_iterations=2,
        steps_per_generation=1,
    )
    settings = LearnAlignConfig(
        warmup_samples=2,
        stages=[2, 4],
        order=["shuffled", "adaptive"],
        selector="learnability",
        feature_dim=64,
        shard_size=5,
        keep_rollout_texts=0,
        selection_seed=seed,
    )
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    return trainer, callback


def outcome(trainer, callback):
    """What must be the same, whatever happened; without what depends on the clock."""
    record = json.loads((callback.folder / "run.json").read_text())

    def timeless(value):
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if "seconds" not in k}
            return {k: timeless(v) for k, v in kept.items() if k not in ("run", "digest", "files")}
        return value

    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    history = pd.read_parquet(callback.folder / "reward_history.parquet")
    return weights, history, timeless(record)


def copied(source, target):
    return shutil.copytree(source, target, symlinks=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs that were killed, and how the run ends."""
    root = tmp_path_factory.mktemp("damage")
    trainer, callback = begun(root / "whole")
    trainer.train()
    assert callback.plan.total_steps == 8
    wanted = outcome(trainer, callback)
    for name, step, seed in ((INSIDE, 7, 42), (BOUNDARY, 4, 42), ("another", 7, 7)):
        trainer, _ = begun(root / name, seed)
        trainer.add_callback(KillAt(step))
        with pytest.raises(Killed):
            trainer.train()
    return root, wanted


def files_of(folder):
    last = folder / f"checkpoint-{KILLED[folder.name]}"
    found = [*(folder / "_learnalign").rglob("*"), *last.rglob("*")]
    return sorted(str(path.relative_to(folder)) for path in found if path.is_file())


def other_file(root, run, name, way):
    """An older copy, or one of another run; of a checkpoint that of the step before."""
    step = KILLED[run]
    if way == "older" and name.startswith("checkpoint-"):
        return root / run / name.replace(f"checkpoint-{step}", f"checkpoint-{step - 1}")
    return root / ("another" if way == "another run's" else BOUNDARY) / name


def without_overlaps(record):
    found = copy.deepcopy(record)
    for phase in found["phases"].values():
        phase.get("selection", {}).pop("overlap", None)
    return found


def judge(folder, step, wanted, name, caplog):
    """`"same"`, or what the run was refused with."""
    try:
        trainer, callback = begun(folder)
    except StoreError as error:  # settings are compared before anything is loaded
        return str(error)
    try:
        trainer.train(resume_from_checkpoint=True)
    except StoreError as error:
        assert trainer.state.global_step in (0, step), "it has trained before it was refused"
        return str(error)
    weights, history, record = outcome(trainer, callback)
    assert all(torch.equal(one, other) for one, other in zip(weights, wanted[0], strict=True))
    pd.testing.assert_frame_equal(history, wanted[1])
    if record != wanted[2]:  # a figure that is left out, in as many words
        assert name.rpartition("/")[2] in caplog.text
        assert without_overlaps(record) == without_overlaps(wanted[2])
    return "same"


def check(runs, tmp_path, caplog, run, name, way):
    root, wanted = runs
    folder = copied(root / run, tmp_path / "run")
    path, step = folder / name, KILLED[run]
    damages.WAYS[way](path, other_file(root, run, name, way))
    said = judge(folder, step, wanted, name, caplog)
    if said == "same":
        return said
    # A mark and a manifest are not wrong by themselves: what they are about is named.
    named = path.parent.name if path.name in (layout.COMPLETE, layout.MANIFEST) else path.name
    assert named in said
    if name.startswith("checkpoint-"):
        # The remedy, followed.
        whole = folder / f"checkpoint-{step - 1}"
        assert f"train(resume_from_checkpoint={str(whole)!r})" in said
    else:
        assert "move" in said or "Delete" in said or "restore" in said
    return said


SAMPLE = [
    (INSIDE, "_learnalign/reward_history.parquet", "older", "same"),
    (INSIDE, "_learnalign/run.json", "flipped", "same"),
    (INSIDE, "_learnalign/run.json", "another run's", "was written by another run"),
    (INSIDE, "_learnalign/prompt_features.safetensors", "missing", "same"),
    (BOUNDARY, "_learnalign/stage_1.parquet", "truncated", "same"),
    (INSIDE, "checkpoint-7/learnalign_complete.json", "missing", "saving was interrupted"),
    (INSIDE, "checkpoint-7/learnalign_history.parquet", "older", "learnalign_history.parquet"),
    (INSIDE, "checkpoint-7/learnalign_generation_0.safetensors", "missing", "is missing"),
    (INSIDE, "checkpoint-7/learnalign_features.safetensors", "flipped", "same"),
    (INSIDE, "checkpoint-7/optimizer.pt", "zeroed", "optimizer.pt is damaged"),
    (INSIDE, "checkpoint-7/model.safetensors", "flipped", "model.safetensors is damaged"),
    (BOUNDARY, "checkpoint-4/trainer_state.json", "a folder", "trainer_state.json is not a file"),
]
"""Some that differ in kind."""


@pytest.mark.parametrize(("run", "name", "way", "verdict"), SAMPLE)
def test_a_damaged_file_changes_nothing_or_is_named(
    runs, tmp_path, caplog, run, name, way, verdict
):
    assert verdict in check(runs, tmp_path, caplog, run, name, way)


@pytest.mark.slow
@pytest.mark.parametrize("run", KILLED)
@pytest.mark.parametrize("way", damages.WAYS)
def test_whatever_file_is_damaged(runs, tmp_path, caplog, way, run):
    names = files_of(runs[0] / run)
    assert len(names) > 20
    problems = []
    for number, name in enumerate(names):
        caplog.clear()
        try:
            check(runs, tmp_path / str(number), caplog, run, name, way)
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(tmp_path / str(number))
    assert not problems, "\n".join(problems)
