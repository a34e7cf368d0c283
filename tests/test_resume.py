import json

import cases
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.checkpoints import MARK, last_complete_checkpoint


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


def settings(**options):
    return LearnAlignConfig(**{"warmup_samples": 4, "shard_prompts": 4, "feature_dim": 128, **options})


def go(folder, config, kill_at=None, resume=False, **options):
    trainer = cases.trainer(
        folder, data=cases.dataset(14), save_strategy="steps", save_steps=1, save_total_limit=None, **options
    )
    callback = LearnAlignCallback(trainer, config, lambda name, step: {"seen": step})
    trainer.add_callback(callback)
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    found = last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    return trainer, callback


def outcome(folder, trainer, callback):
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    tables = [pd.read_parquet(folder / "learnalign" / f"{phase.name}.parquet") for phase in callback.plan.stages]
    metrics = json.loads((folder / "learnalign" / "run.json").read_text())["phases"]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    notes = {name: note["metrics"] for name, note in metrics.items()}
    return weights, tables, (rates, norms, notes, callback._state["pools"])


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    for a, b in zip(one[1], other[1], strict=True):
        pd.testing.assert_frame_equal(a, b)
    assert one[2] == other[2]


VARIANTS = {
    "plain": ({}, {}),
    "accumulation": ({}, dict(gradient_accumulation_steps=2)),
    "iterations": ({}, dict(num_iterations=2, steps_per_generation=2)),
    "restart": (dict(after_warmup="restart"), dict(lr_scheduler_type="cosine")),
    "plateau": (dict(plateau_patience=2, stage_passes=2), {}),
    "reselect": (dict(reselect="all", stages=[4, 4]), dict(gradient_accumulation_steps=2, num_iterations=2)),
}


def resume_at(tmp_path, variant, choose):
    config_options, options = VARIANTS[variant]
    trainer, callback = go(tmp_path / "whole", settings(**config_options), **options)
    whole = outcome(tmp_path / "whole", trainer, callback)
    steps = trainer.state.global_step
    for step in choose(callback.plan):
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            go(folder, settings(**config_options), kill_at=step, **options)
        trainer, callback = go(folder, settings(**config_options), resume=True, **options)
        assert trainer.state.global_step == steps
        assert_same(outcome(folder, trainer, callback), whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_at_every_step_gives_the_same_run(tmp_path, variant):
    resume_at(tmp_path, variant, lambda plan: range(1, plan.total_steps))


@pytest.mark.parametrize("variant", ["iterations", "restart"])
def test_resume_at_a_boundary_and_inside_a_stage_gives_the_same_run(tmp_path, variant):
    resume_at(tmp_path, variant, lambda plan: (plan.stages[0].start or plan.stages[0].end, plan.stages[-1].end - 1))


def test_an_interrupted_scoring_goes_on_where_it_stood(tmp_path, monkeypatch):
    """Killed between shards, in the first scoring and in the second: finished shards are not measured again."""
    from trl_learnalign.store import ShardStore

    trainer, callback = go(tmp_path / "whole", settings())
    whole = outcome(tmp_path / "whole", trainer, callback)
    write, written = ShardStore.write, []

    def counting(self, number, tensors):
        if len(written) == kill_at:
            raise Killed
        write(self, number, tensors)
        written.append((self.folder.parent.name, number))

    monkeypatch.setattr(ShardStore, "write", counting)
    for first in (0, 2, 5):
        written.clear()
        kill_at, folder = first, tmp_path / f"killed-{first}"
        with pytest.raises(Killed):
            go(folder, settings())
        kill_at = None
        trainer, callback = go(folder, settings(), resume=True)
        assert len(written) == len(set(written)) == 4 + 2 + 1
        assert_same(outcome(folder, trainer, callback), whole)


def test_a_checkpoint_without_the_callback_is_refused(tmp_path):
    trainer = cases.trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    trainer = cases.trainer(tmp_path, data=cases.dataset(14))
    trainer.add_callback(LearnAlignCallback(trainer, settings()))
    with pytest.raises(ValueError, match="step 2 was written without LearnAlignCallback"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(selection_seed=1), r"selection_seed was 42 and is 1"),
        (dict(stages=[6]), r"stages was .*0\.5.* and is .*6"),
        (dict(selector="learnability"), "selector was 'learnalign' and is 'learnability'"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, change, message):
    go(tmp_path, settings())
    with pytest.raises(RuntimeError, match=message + r".*another output_dir"):
        go(tmp_path, settings(**change), resume="stages" not in change)


def test_a_changed_dataset_is_refused(tmp_path):
    go(tmp_path, settings())
    trainer = cases.trainer(tmp_path, data=cases.dataset(14).map(lambda row: {"solution": row["solution"] + "0"}))
    trainer.add_callback(LearnAlignCallback(trainer, settings()))
    with pytest.raises(RuntimeError, match=r"dataset was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        trainer.train()


@pytest.mark.parametrize("damage", ["no mark", "half state", "half weights"])
def test_an_interrupted_save_is_passed_over(tmp_path, caplog, damage):
    trainer, _ = go(tmp_path, settings())
    last = tmp_path / f"checkpoint-{trainer.state.global_step}"
    path = last / {"no mark": MARK, "half state": "trainer_state.json", "half weights": "model.safetensors"}[damage]
    if damage == "no mark":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert last_complete_checkpoint(tmp_path).name == f"checkpoint-{trainer.state.global_step - 1}"
    assert "its save was interrupted" in caplog.text
