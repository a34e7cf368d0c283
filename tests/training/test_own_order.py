"""The trainer's own order: the stock run to the bit, with a record that says what it was, what it spent and saved."""

import json
import logging

import cases
import pytest
import sampling_cases
import torch
from adaptive_cases import go, weights
from interruptions import KillAt, Killed
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, cli
from trl_learnalign.records.notes import MetricsNote, RolloutsNote, TrainingNote
from trl_learnalign.report import compare
from trl_learnalign.report.run_data import read_run

LOGGERS = "trl_learnalign.training.run", "trl_learnalign.training.callback"


def own_order(**options):
    return LearnAlignConfig.adaptive(order="trainer", **options)


def said(caplog):
    """Lines of the callback: what a run is, and what it has spent."""
    return [record.getMessage() for record in caplog.records if record.name in LOGGERS]


class Stop(TrainerCallback):
    """Somebody who ends training after its second step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 2


def test_a_run_in_the_trainers_own_order_keeps_a_record_with_its_ledger(tmp_path):
    _, callback = go(tmp_path, own_order(), num_train_epochs=1, max_steps=-1, save_strategy="no")
    run = read_run(tmp_path)
    assert run.finished
    rollouts = run.contents.note("stage_1", RolloutsNote)
    useful = sum(sampling_cases.successes(row) in (1, 2, 3) for row in range(24))
    assert (rollouts.groups, rollouts.useful, rollouts.groups_trained) == (24, useful, 24)
    lengths = [
        len(sampling_cases.completion(row, rollout)) + 1
        for row in range(24)
        for rollout in range(4)
    ]
    cost = run.ledger.entries["stage_1"]["training"]
    assert cost.tokens_generated == sum(lengths)
    assert cost.tokens_trained == callback.additions.skipper.counts.tokens_trained
    assert cost.tokens_prompt == 4 * sum(map(len, cases.dataset(24)["prompt"]))
    assert len(run.log) == len(callback.trainer.state.log_history)


def test_its_ledger_is_that_of_the_shuffled_order_over_one_pass(tmp_path):
    """A second source: the ledger of a run whose prompts are all known."""
    costs = []
    for order in ("trainer", "shuffled"):
        config = LearnAlignConfig.adaptive(order=order, skip_forced_scoring=True)
        go(tmp_path / order, config, num_train_epochs=1, save_strategy="no")
        costs.append(read_run(tmp_path / order).ledger.entries["stage_1"]["training"])
    for name in ("tokens_generated", "tokens_prompt", "tokens_forward"):
        assert getattr(costs[0], name) == getattr(costs[1], name), name


def test_report_and_compare_read_it(tmp_path, capsys):
    for order in ("trainer", "shuffled"):
        config = LearnAlignConfig.adaptive(order=order, skip_forced_scoring=True)
        go(tmp_path / order, config, max_steps=2, save_strategy="no")
    rows = dict(
        zip(
            ("own", "shuffled"),
            compare([tmp_path / "trainer", tmp_path / "shuffled"]).rows,
            strict=True,
        )
    )
    assert rows["own"]["order"] == "trainer"
    cli.main(["report", str(tmp_path / "trainer")])
    assert (tmp_path / "trainer" / "report.html").exists()


def test_the_hook_is_called_and_changes_nothing(tmp_path):
    called = []

    def hook(name, step):
        called.append((name, step, torch.rand(3)))  # draws from the global generator
        return {"accuracy": 0.5}

    def trained(folder, with_callback):
        trainer = cases.trainer(folder, num_train_epochs=2)
        if with_callback:
            config = own_order(skip_zero_advantages=False)
            trainer.add_callback(LearnAlignCallback(trainer, config, on_phase_end=hook))
        trainer.train()
        return trainer

    plain, beside = trained(tmp_path / "plain", False), trained(tmp_path / "beside", True)
    steps = plain.state.global_step
    assert [(name, step) for name, step, _ in called] == [("base", 0), ("stage_1", steps)]
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(beside), strict=True))
    contents = read_run(tmp_path / "beside").contents
    assert contents.note("stage_1", MetricsNote).accuracy == 0.5


def test_no_step_depends_on_the_size_of_the_pool(tmp_path):
    """From outside: rows of the dataset that are read after training has begun are those that are trained on."""
    trainer = cases.trainer(tmp_path, data=cases.dataset(200), max_steps=3)
    callback = LearnAlignCallback(trainer, own_order())
    trainer.add_callback(callback)
    trainer.train()
    kept = json.dumps(callback.run.checkpoints.state_dict())
    assert len(kept) < 1000
    assert callback.state.pools == {}
    assert not (callback.folder / "reward_history.parquet").exists()


def test_the_sampler_is_the_trainers_own(tmp_path):
    trainer = cases.trainer(tmp_path)
    before = type(trainer._get_train_sampler())
    LearnAlignCallback(trainer, own_order())
    assert type(trainer._get_train_sampler()) is before


@pytest.mark.parametrize("early", [True, False])
def test_its_length_is_the_trainers_also_where_it_is_stopped(tmp_path, caplog, early):
    caplog.set_level(logging.INFO, "trl_learnalign")
    trainer = cases.trainer(tmp_path, num_train_epochs=2, data=cases.dataset(8))
    callback = LearnAlignCallback(
        trainer, own_order(), on_phase_end=lambda name, step: {"at": step}
    )
    trainer.add_callback(callback)
    if early:
        trainer.add_callback(Stop())
    trainer.train()
    steps = 2 if early else 8
    assert ("stage_1: training was stopped at step 2 of 8." in caplog.text) == early
    run = read_run(tmp_path)
    assert run.contents.note("stage_1", TrainingNote).steps == steps
    assert run.contents.note("stage_1", MetricsNote).others == {"at": steps}
    assert run.ledger.total.tokens_trained > 0


def test_a_second_training_is_the_trainers_to_make(tmp_path):
    """As of a stock trainer: its weights go on, its order begins anew."""

    def twice(folder, ours):
        trainer = cases.trainer(folder, max_steps=2)
        if ours:
            callback = LearnAlignCallback(trainer, own_order(skip_zero_advantages=False))
            assert "(12 prompts, planned)" in repr(callback)
            trainer.add_callback(callback)
        trainer.train()
        trainer.train()
        return weights(trainer)

    stock, ours = twice(tmp_path / "stock", False), twice(tmp_path / "ours", True)
    assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))
    assert read_run(tmp_path / "ours").contents.note("stage_1", TrainingNote).steps == 2


def test_a_checkpoint_of_a_stock_run_is_gone_on_with(tmp_path, caplog):
    options = dict(save_strategy="steps", save_steps=2)
    stock = cases.trainer(tmp_path, max_steps=2, **options)
    stock.train()
    trainer = cases.trainer(tmp_path, max_steps=4, **options)
    trainer.add_callback(LearnAlignCallback(trainer, own_order()))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "the record does not include what was spent before it" in caplog.text
    assert read_run(tmp_path).contents.note("stage_1", TrainingNote).steps == 4


def test_a_resumed_run_has_the_whole_ledger(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=1)
    costs = []
    for name, kill_at in (("whole", None), ("killed", 2)):
        folder = tmp_path / name
        if kill_at is not None:
            with pytest.raises(Killed):
                go(folder, own_order(), kill_at=kill_at, **options)
        go(folder, own_order(), resume=True, **options)
        costs.append(read_run(folder).ledger.entries["stage_1"]["training"])
    for name in ("tokens_generated", "tokens_prompt", "tokens_trained"):
        assert getattr(costs[0], name) == getattr(costs[1], name) > 0, name


@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations", "step"),
    [(1, 4, 2, 3), (1, 4, 2, 13), (4, 2, 1, 3), (2, 1, 1, 5)],
)
def test_a_resumed_run_ends_with_the_weights_of_a_stock_run_that_was_never_interrupted(
    tmp_path, accumulation, per_generation, iterations, step
):
    """Inside a generation, inside an accumulation that an epoch cuts, and in the second epoch."""
    options = dict(
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        num_train_epochs=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
    )

    def trained(folder, callbacks=(), ours=True, resume=None):
        trainer = cases.trainer(folder, data=cases.dataset(14), **options)
        if ours:
            config = own_order(skip_zero_advantages=False)
            trainer.add_callback(LearnAlignCallback(trainer, config))
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    stock = trained(tmp_path / "stock", ours=False)
    assert stock.state.global_step > step
    with pytest.raises(Killed):
        trained(tmp_path / "ours", callbacks=[KillAt(step)])
    resumed = trained(tmp_path / "ours", resume=str(tmp_path / "ours" / f"checkpoint-{step}"))
    assert all(torch.equal(a, b) for a, b in zip(weights(stock), weights(resumed), strict=True))


# ---- The first and the last line ------------------------------------------------------------------------------------


SKIPS = "rollouts without an advantage are not trained on"


@pytest.mark.parametrize(
    ("config", "options", "method", "skipping"),
    [
        (dict(order="trainer"), {}, "trains on 24 prompts in the trainer's own order", SKIPS),
        (dict(), {}, "trains on 24 prompts in adaptive order", SKIPS),
        (
            dict(order="shuffled", skip_forced_scoring=True, skip_zero_advantages=False),
            {},
            "trains on 24 prompts in shuffled order",
            "every rollout is trained on (skip_zero_advantages=False)",
        ),
        (
            dict(order="trainer"),
            dict(entropy_coef=0.1),
            "in the trainer's own order",
            "every rollout is trained on (entropy_coef",
        ),
        (
            dict(stages=[6, 4], warmup_samples=2, selector="random"),
            {},
            "selects 6 and 4 of 24 prompts by random, in shuffled order, after a warm-up on 2",
            SKIPS,
        ),
    ],
)
def test_every_run_says_what_it_is_and_what_it_spent(
    tmp_path, caplog, config, options, method, skipping
):
    caplog.set_level(logging.INFO, "trl_learnalign")
    if "stages" not in config:
        options = {**options, "max_steps": 2}
    _, callback = go(tmp_path, LearnAlignConfig.adaptive(**config), save_strategy="no", **options)
    first, last = said(caplog)
    assert first.startswith("This run ")
    assert method in first
    assert "a rollout is right if right_reward is above 0.5" in first
    assert skipping in first
    total = callback.record.contents.ledger.total
    assert last.startswith(f"The run has spent {total.tokens_generated:,} tokens generated, ")
    skipper = callback.additions.skipper
    if skipper is None:
        assert last.endswith("; nothing was skipped.")
        return
    counts = skipper.counts
    tokens = counts.tokens_given - counts.tokens_trained
    rows = counts.rows_given - counts.rows_trained
    assert f"has saved {tokens:,} of {counts.tokens_given:,} tokens" in last
    assert f"{rows:,} of {counts.rows_given:,} rows" in last


def test_a_run_that_somebody_stops_is_noted_in_another_order_too(tmp_path):
    trainer = sampling_cases.trainer(tmp_path, rows=list(range(24)), max_steps=8)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig.adaptive()))
    trainer.add_callback(Stop())
    trainer.train()
    run = read_run(tmp_path)
    assert run.contents.note("stage_1", TrainingNote).steps == 2
    assert set(run.outcomes.steps.tolist()) == {0, 1}
    assert run.ledger.entries["stage_1"]["training"].tokens_generated > 0


# ---- What the hook returns ------------------------------------------------------------------------------------------


def hooked(folder, returns, **options):
    trainer = cases.trainer(folder, max_steps=1, **options)
    callback = LearnAlignCallback(
        trainer, own_order(), on_phase_end=lambda name, step: returns(name)
    )
    trainer.add_callback(callback)
    trainer.train()
    return read_run(folder).contents


def test_a_hook_that_returns_a_number_is_named_before_the_first_step(tmp_path):
    expected = r"on_phase_end\('base', 0\) returned 0.25, a float: .* Return such a dictionary"
    with pytest.raises(TypeError, match=expected):
        hooked(tmp_path, lambda name: 0.25)


def test_a_hook_that_returns_a_number_later_loses_no_run(tmp_path, caplog):
    contents = hooked(tmp_path, lambda name: None if name == "base" else 0.25)
    assert "on_phase_end('stage_1', 1) returned 0.25" in caplog.text
    assert contents.note("stage_1", MetricsNote).others == {}
    assert contents.note("stage_1", TrainingNote) is not None


def test_numbers_of_torch_are_numbers_and_what_json_cannot_hold_is_left_out(tmp_path, caplog):
    def returns(name):
        values = {"accuracy": torch.tensor(0.5)}
        return values if name == "base" else {**values, "model": torch.nn.Linear(1, 1)}

    contents = hooked(tmp_path, returns)
    for phase in ("base", "stage_1"):
        assert contents.note(phase, MetricsNote).others == {"accuracy": 0.5}
    assert "whose 'model' is a Linear" in caplog.text
