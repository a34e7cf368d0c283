import json

import cases
import pandas as pd
import pytest
import torch
from interruptions import KillAt, Killed
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.layout import COMPLETE
from trl_learnalign.records.store import CheckpointError
from trl_learnalign.training.checkpoints import last_complete_checkpoint


def settings(**options):
    return LearnAlignConfig(**{"warmup_samples": 4, "shard_size": 4, "feature_dim": 128, **options})


def go(folder, config, kill_at=None, resume=False, **options):
    trainer = cases.trainer(
        folder,
        data=cases.dataset(14),
        save_strategy="steps",
        save_steps=1,
        save_total_limit=None,
        **options,
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
    tables = [
        pd.read_parquet(folder / "_learnalign" / f"{phase.name}.parquet")
        for phase in callback.plan.stages
    ]
    record = json.loads((folder / "_learnalign" / "run.json").read_text())
    rates = [
        entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry
    ]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    notes = {name: note["metrics"] for name, note in record["phases"].items()}
    return (
        weights,
        tables,
        (rates, norms, notes, record["plan"], cases.pools_of(callback)),
    )


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    for a, b in zip(one[1], other[1], strict=True):
        pd.testing.assert_frame_equal(a, b)
    assert one[2] == other[2]


BUDGET = 2600
"""Tokens of a forward pass: enough for warm-up, scoring and some steps of the last stage."""

VARIANTS = {
    "plain": ({}, {}),
    "accumulation": ({}, dict(gradient_accumulation_steps=2)),
    "iterations": ({}, dict(num_iterations=2, steps_per_generation=2)),
    "restart": (dict(after_warmup="restart"), dict(lr_scheduler_type="cosine")),
    "plateau": (dict(plateau_patience=2, stage_epochs=2), {}),
    "budget": (dict(compute_budget=BUDGET, stage_steps=20), {}),
    "reselect": (
        dict(reselect="all", stages=[4, 4]),
        dict(gradient_accumulation_steps=2, num_iterations=2),
    ),
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
    resume_at(
        tmp_path,
        variant,
        lambda plan: (plan.stages[0].start or plan.stages[0].end, plan.stages[-1].end - 1),
    )


@pytest.mark.parametrize("variant", ["plateau", "budget"])
def test_a_run_that_has_ended_early_makes_no_step_more(tmp_path, variant):
    """Killed after its last checkpoint, before the end of `train()`."""
    config_options, options = VARIANTS[variant]
    trainer, callback = go(tmp_path, settings(**config_options), **options)
    whole, steps = outcome(tmp_path, trainer, callback), trainer.state.global_step
    planned = callback.setup.plan.total_steps
    assert steps < planned
    trainer, callback = go(tmp_path, settings(**config_options), resume=True, **options)
    assert trainer.state.global_step == steps
    assert trainer.args.max_steps == planned
    assert_same(outcome(tmp_path, trainer, callback), whole)


def test_an_interrupted_scoring_goes_on_where_it_stood(tmp_path, monkeypatch):
    """Killed between shards, in the first scoring and in the second: finished shards are not measured again."""
    from trl_learnalign.records.store import ShardStore

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
    with pytest.raises(
        CheckpointError, match=r"no learnalign_complete\.json.*LearnAlignCallback was not active"
    ):
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
    trainer = cases.trainer(
        tmp_path, data=cases.dataset(14).map(lambda row: {"solution": row["solution"] + "0"})
    )
    with pytest.raises(RuntimeError, match=r"dataset was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        LearnAlignCallback(trainer, settings())


@pytest.mark.parametrize("damage", ["no mark", "half state", "half weights"])
def test_an_interrupted_save_is_passed_over(tmp_path, caplog, damage):
    trainer, _ = go(tmp_path, settings())
    last = tmp_path / f"checkpoint-{trainer.state.global_step}"
    names = {
        "no mark": COMPLETE,
        "half state": "trainer_state.json",
        "half weights": "model.safetensors",
    }
    path = last / names[damage]
    if damage == "no mark":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert last_complete_checkpoint(tmp_path).name == f"checkpoint-{trainer.state.global_step - 1}"
    said = {
        "no mark": "saving was interrupted",
        "half state": "trainer_state.json has",
        "half weights": "model.safetensors has",
    }
    assert f"{last} is not used: " in caplog.text
    assert said[damage] in caplog.text


# ---- What TRL does not save -----------------------------------------------------------------------------------------


@pytest.fixture
def policy(tmp_path):
    """Loads a policy that has a name, by which TRL makes a reference model."""
    cases.model().save_pretrained(tmp_path / "policy")
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "policy")


MOVING = dict(sync_ref_model=True, ref_model_sync_steps=1, beta=0.5)


def test_a_reference_that_follows_the_policy_is_resumed(tmp_path, policy):
    trainer, callback = go(tmp_path / "whole", settings(), policy=policy(), **MOVING)
    whole = outcome(tmp_path / "whole", trainer, callback)
    with pytest.raises(Killed):
        go(tmp_path / "killed", settings(), kill_at=4, policy=policy(), **MOVING)
    trainer, callback = go(tmp_path / "killed", settings(), resume=True, policy=policy(), **MOVING)
    assert_same(outcome(tmp_path / "killed", trainer, callback), whole)


def test_a_reference_that_was_not_kept_is_told_in_words(tmp_path, policy):
    """Of a checkpoint of the trainer alone, which may be gone on with in the trainer's own order."""
    stock = cases.trainer(
        tmp_path, policy(), max_steps=2, save_strategy="steps", save_steps=2, **MOVING
    )
    stock.train()
    trainer = cases.trainer(tmp_path, policy(), max_steps=3, **MOVING)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig.adaptive(order="trainer")))
    with pytest.raises(
        ValueError, match=r"step 2 cannot be resumed with sync_ref_model=True.*TRL does not save it"
    ):
        trainer.train(resume_from_checkpoint=True)


class AtStep(TrainerCallback):
    def __init__(self, step, look):
        self.step, self.look = step, look
        self.seen = None

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.seen = self.look()


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_restart_takes_back_what_moved_with_the_weights(tmp_path, policy):
    """The reference that followed the policy, and the entropy coefficient."""
    entropy = dict(use_adaptive_entropy=True, entropy_coef=0.1, entropy_coef_delta=0.05)
    trainer = cases.trainer(tmp_path, policy(), data=cases.dataset(14), **MOVING, **entropy)
    callback = LearnAlignCallback(trainer, settings(after_warmup="restart"))
    boundary = callback.plan.phases[0].end
    initial = weights_of(trainer.ref_model)
    last = AtStep(boundary - 1, lambda: (weights_of(trainer.ref_model), trainer.entropy_coef))
    first = AtStep(boundary, lambda: (weights_of(trainer.ref_model), trainer.entropy_coef))
    for extra in (callback, last, first):
        trainer.add_callback(extra)
    trainer.train()
    assert not all(torch.equal(a, b) for a, b in zip(last.seen[0], initial, strict=True))
    assert last.seen[1] != 0.1
    assert all(torch.equal(a, b) for a, b in zip(first.seen[0], initial, strict=True))
    assert first.seen[1] == 0.1


# ---- train() once more ----------------------------------------------------------------------------------------------


class InterruptIn(TrainerCallback):
    """Ctrl-C between the micro-steps of a step: gradients, metrics and half a generation are left behind."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_trainer_that_was_interrupted_goes_on(tmp_path, step):
    options = dict(gradient_accumulation_steps=2, num_iterations=2)
    trainer, callback = go(tmp_path / "whole", settings(), **options)
    whole = outcome(tmp_path / "whole", trainer, callback)
    entropies = logged(trainer, "entropy")
    trainer = cases.trainer(
        tmp_path / "killed", data=cases.dataset(14), save_strategy="steps", save_steps=1, **options
    )
    callback = LearnAlignCallback(trainer, settings(), lambda name, step: {"seen": step})
    interrupt = InterruptIn(step)
    for extra in (callback, interrupt):
        trainer.add_callback(extra)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(tmp_path / "killed", trainer, callback), whole)
    assert logged(trainer, "entropy") == entropies  # the interrupted step counts once


def test_a_trainer_that_has_trained_does_not_begin_anew(tmp_path):
    trainer, callback = go(tmp_path, settings())
    run = callback.run
    steps, before = trainer.state.global_step, (tmp_path / "_learnalign" / "run.json").read_text()
    with pytest.raises(
        ValueError, match=r"has already trained.*resume_from_checkpoint=True.*another output_dir"
    ):
        trainer.train()
    assert (tmp_path / "_learnalign" / "run.json").read_text() == before
    assert callback.run is run
    trainer.train(resume_from_checkpoint=True)  # of a run that has ended: nothing is left to do
    assert trainer.state.global_step == steps
    assert callback.run is not run  # each train() makes one
    assert callback.run.record.contents.run == run.record.contents.run
    assert callback.state.arrays().keys() == run.state.arrays().keys()


def test_a_trainer_that_was_interrupted_in_its_first_scoring_begins_anew(tmp_path, monkeypatch):
    from trl_learnalign.records.store import ShardStore

    trainer, callback = go(tmp_path / "whole", settings(warmup_samples=0))
    whole = outcome(tmp_path / "whole", trainer, callback)
    write, written = ShardStore.write, []

    def interrupted(self, number, tensors):
        if len(written) == 2:
            written.append(None)
            raise KeyboardInterrupt
        write(self, number, tensors)
        written.append(number)

    monkeypatch.setattr(ShardStore, "write", interrupted)
    trainer = cases.trainer(tmp_path / "killed", data=cases.dataset(14))
    callback = LearnAlignCallback(
        trainer, settings(warmup_samples=0), lambda name, step: {"seen": step}
    )
    trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert_same(outcome(tmp_path / "killed", trainer, callback), whole)
