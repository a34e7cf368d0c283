"""Prompts that are not rows of a dataset: of a stream of unknown length, of an environment, of a rollout function.

They are trained on in the trainer's own order, as a stock trainer does, with zero-advantage rollouts skipped.
"""

import contextlib
import itertools
import logging

import cases
import environments
import pytest
import sampling_cases
import torch
from datasets import Dataset, IterableDataset
from interruptions import KillAt, Killed
from stock_cases import stream

from trl_learnalign import (
    AdaptiveOrderCallback,
    LearnAlignCallback,
    LearnAlignConfig,
    cli,
    plan_run,
)
from trl_learnalign.bridge import requires
from trl_learnalign.records.notes import RolloutsNote, TrainingNote
from trl_learnalign.records.store import StoreError
from trl_learnalign.records.summary import section
from trl_learnalign.report.run_data import read_run

pytestmark = pytest.mark.skipif(
    requires.is_before("1.9"), reason="trl trains on streams and without a dataset since 1.9"
)

OF_WHAT_IS_TRAINED = ("loss", "entropy", "clip_ratio/", "learnalign/", "step_time", "train_")
"""In names of the log: means over the rows that are trained on, times, and ours."""


def options_of(accumulation=1, per_generation=1, iterations=1, **others):
    return dict(
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        optim="sgd",
        learning_rate=0.5,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        **others,
    )


def trained(folder, config=None, resume=None, kill_at=None, make=sampling_cases.trainer, **options):
    trainer = make(folder, **options)
    if config is not None:
        trainer.add_callback(LearnAlignCallback(trainer, config))
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    with contextlib.suppress(Killed):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def rows_of(trainer):
    """Rows of the log without what skipping changes."""
    return [
        {name: row[name] for name in row if not name.startswith(OF_WHAT_IS_TRAINED)}
        for row in trainer.state.log_history
    ]


def state_of(trainer):
    names = ("global_step", "epoch", "max_steps", "num_train_epochs", "num_input_tokens_seen")
    return {name: getattr(trainer.state, name) for name in names}


def assert_equal(stock, ours, since=0):
    """Weights up to rounding, rows of the log after a step, and the trainer's state."""
    for theirs, own in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(theirs, own, rtol=1e-4, atol=1e-6)
    their_rows, own_rows = (
        [row for row in rows_of(trainer) if row["step"] > since] for trainer in (stock, ours)
    )
    assert their_rows == [pytest.approx(row, rel=1e-3) for row in own_rows]
    assert state_of(stock) == state_of(ours)


# ---- Streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "shuffled", "steps"),
    [((1, 1, 1), False, 5), ((2, 4, 1), True, 4), ((3, 2, 1), True, 5), ((1, 1, 2), False, 14)],
    ids=["plain", "inside a generation", "a pass is no whole step", "two passes"],
)
def test_a_run_on_a_stream_is_that_of_a_stock_trainer(tmp_path, geometry, shuffled, steps):
    options = options_of(*geometry, shuffle_dataset=shuffled, max_steps=steps)
    stock = trained(tmp_path / "stock", data=stream(), **options)
    ours = trained(tmp_path / "ours", LearnAlignConfig.skipping(), data=stream(), **options)
    assert_equal(stock, ours)
    note = read_run(tmp_path / "ours").contents.note("stage_1", RolloutsNote)
    assert note.not_skipped is None
    assert 0 < note.tokens_trained < note.tokens_given


def test_without_skipping_its_weights_are_the_stock_trainers_bit_by_bit(tmp_path):
    options = options_of(2, 4, 1, shuffle_dataset=True, max_steps=4)
    stock = trained(tmp_path / "stock", data=stream(), **options)
    config = LearnAlignConfig.skipping(skip_zero_advantages=False)
    ours = trained(tmp_path / "ours", config, data=stream(), **options)
    pairs = zip(stock.model.parameters(), ours.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("geometry", [(1, 1, 1), (1, 4, 1)], ids=["between", "inside"])
def test_a_resumed_run_on_a_stream_comes_to_the_same(tmp_path, geometry):
    """Killed between generations, and inside one, which a stock trainer would roll out anew."""
    options = options_of(*geometry, shuffle_dataset=True, max_steps=5)
    config = LearnAlignConfig.skipping()
    stock = trained(tmp_path / "stock", data=stream(24), **options)
    trained(tmp_path / "ours", config, kill_at=3, data=stream(24), **options)
    checkpoint = tmp_path / "ours" / "checkpoint-3"
    ours = trained(tmp_path / "ours", config, checkpoint, data=stream(24), **options)
    assert_equal(stock, ours, since=3)
    ledger = read_run(tmp_path / "ours").ledger.entries["stage_1"]["training"]
    whole = trained(tmp_path / "whole", config, data=stream(24), **options)
    assert whole.state.global_step == 5
    entry = read_run(tmp_path / "whole").ledger.entries["stage_1"]["training"]
    assert ledger.tokens_generated == entry.tokens_generated > 0
    assert ledger.tokens_trained == entry.tokens_trained > 0


def test_another_stream_is_another_run(tmp_path):
    options = options_of(max_steps=2)
    config = LearnAlignConfig.skipping()
    trained(tmp_path, config, data=stream(), **options)
    named = cases.dataset(12).to_iterable_dataset()
    trainer = sampling_cases.trainer(tmp_path, data=named, **options)
    with pytest.raises(StoreError, match=r"the digest of train_dataset was"):
        LearnAlignCallback(trainer, config)


def test_a_stream_that_ends_early_ends_the_run(tmp_path):
    """A generator that can be read once."""
    rows = list(cases.dataset(8))

    def read_once():
        while rows:
            yield rows.pop(0)

    data = IterableDataset.from_generator(read_once)
    trained(tmp_path, LearnAlignConfig.skipping(), data=data, **options_of(max_steps=9))
    run = read_run(tmp_path)
    assert run.contents.note("stage_1", TrainingNote).steps == 4


def test_a_run_on_a_stream_is_planned_without_a_trainer(tmp_path):
    args = cases.grpo_config(tmp_path, max_steps=5)
    plan = plan_run(LearnAlignConfig.skipping(), args, stream(), sampling_cases.right_reward)
    assert (plan.total_steps, plan.dataset_size) == (5, 0)
    endless = cases.grpo_config(tmp_path)
    with pytest.raises(ValueError, match=r"max_steps=-1 with a stream.*set max_steps"):
        plan_run(LearnAlignConfig.skipping(), endless, stream(), sampling_cases.right_reward)
    with pytest.raises(TypeError, match=r"stream .*by row numbers"):
        plan_run(LearnAlignConfig.control(), args, stream(), sampling_cases.right_reward)


def test_its_record_counts_no_prompts(tmp_path, caplog):
    caplog.set_level(logging.INFO, "trl_learnalign")
    trainer = sampling_cases.trainer(tmp_path, data=stream(), **options_of(max_steps=2))
    callback = LearnAlignCallback(trainer, LearnAlignConfig.skipping())
    trainer.add_callback(callback)
    trainer.train()
    assert "This run trains on a stream of prompts in the trainer's own order" in caplog.text
    assert "stage_1: a stream of prompts, in the trainer's own order" in caplog.text
    assert "stage_1 (a stream of prompts, trained" in repr(callback)
    run = read_run(tmp_path)
    assert run.contents.plan.dataset_size == 0
    assert "Trained on a stream of prompts with" in section(run.contents)
    cli.main(["report", str(tmp_path)])
    assert "0 prompts" not in (tmp_path / "report.html").read_text()


REFUSED = [
    LearnAlignConfig(warmup_samples=0, stages=[4]),
    LearnAlignConfig.adaptive(),
    LearnAlignConfig.adaptive(stages=[4]),
    LearnAlignConfig.control(),
    LearnAlignConfig.adaptive(order="package.module:Sampler"),
]
NAMES = ["selector", "adaptive", "coverage", "shuffled", "own sampler"]


@pytest.mark.parametrize("config", REFUSED, ids=NAMES)
def test_what_goes_by_rows_is_refused_on_a_stream(tmp_path, config):
    trainer = sampling_cases.trainer(tmp_path, data=stream())
    with pytest.raises(TypeError, match=r"stream .*by row numbers.*skipping.*Dataset.from_list"):
        LearnAlignCallback(trainer, config)


def test_dynamic_sampling_and_category_columns_are_refused_on_a_stream(tmp_path):
    trainer = sampling_cases.trainer(tmp_path, data=stream())
    with pytest.raises(ValueError, match=r"Dynamic sampling .* is a stream.*Dataset.from_list"):
        LearnAlignCallback(trainer, LearnAlignConfig.skipping(max_generation_batches=2))
    with pytest.raises(ValueError, match=r"category_columns=.*is a stream.*unset"):
        LearnAlignCallback(trainer, LearnAlignConfig.skipping(category_columns=["topic"]))


# ---- Environments and rollout functions that own their data ---------------------------------------------------------


class Tasks:
    """An environment that asks: each group of four rollouts gets a task of its own, another one each time."""

    def __init__(self, number):
        self.group, self.resets = number // sampling_cases.ROLLOUTS, 0

    def reset(self, **_):
        self.resets += 1
        return f"abc{2 * self.resets + self.group}?"

    def look(self) -> str:
        """Look around."""
        return "a door"


def coin_of_task(prompts, completions, **_):
    """A coin for every other task, and nothing to be had for the rest."""
    coins = cases.accuracy_reward(completions)
    numbers = [int(cases.text(prompt).strip("abc?")) for prompt in prompts]
    return [coin * (number % 2) for coin, number in zip(coins, numbers, strict=True)]


def trainer_of_environment(folder, data=None, **options):
    numbers = itertools.count()
    return cases.trainer(
        folder,
        cases.model().double(),
        rewards=coin_of_task,
        data=data,
        environment_factory=lambda: Tasks(next(numbers)),
        max_grad_norm=0.0,
        **options,
    )


def trainer_of_rollout_func(folder, **options):
    """A rollout function that asks: whatever the rows say, prompts are numbered as they are rolled out."""
    count = itertools.count()

    def roll_out(prompts, trainer):
        groups = [next(count) for _ in range(len(prompts) // sampling_cases.ROLLOUTS)]
        asked = [f"a{group}?" for group in groups for _ in range(sampling_cases.ROLLOUTS)]
        return sampling_cases.roll_out(asked, trainer)

    data = Dataset.from_dict({"prompt": ["play"] * 12})
    return sampling_cases.trainer(folder, data=data, rollout_func=roll_out, **options)


@pytest.fixture(params=[trainer_of_environment, trainer_of_rollout_func])
def make(request, monkeypatch):
    if request.param is trainer_of_environment:
        environments.pretend_to_call_tools(monkeypatch)
    return request.param


@pytest.mark.parametrize("geometry", [(1, 1, 1), (2, 4, 1)])
def test_what_an_environment_asks_is_trained_on_as_by_a_stock_trainer(tmp_path, make, geometry):
    options = options_of(*geometry, max_steps=4)
    stock = trained(tmp_path / "stock", make=make, **options)
    ours = trained(tmp_path / "ours", LearnAlignConfig.skipping(), make=make, **options)
    assert_equal(stock, ours)
    run = read_run(tmp_path / "ours")
    note = run.contents.note("stage_1", RolloutsNote)
    assert note.not_skipped is None
    assert 0 < note.tokens_trained < note.tokens_given
    assert run.contents.plan.dataset_size == 0


@pytest.mark.parametrize("config", REFUSED[:4], ids=NAMES[:4])
def test_what_goes_by_rows_is_refused_where_an_environment_asks(tmp_path, make, config):
    trainer = make(tmp_path, max_steps=2)
    name = "environment_factory" if make is trainer_of_environment else "rollout_func"
    match = rf"rows of the training dataset are identical because {name} supplies the task.*skipping.*row of its own"
    with pytest.raises(ValueError, match=match):
        LearnAlignCallback(trainer, config)


def test_rows_that_name_an_environment_and_no_prompt_are_trained_on_and_not_ordered(
    tmp_path, monkeypatch
):
    environments.pretend_to_call_tools(monkeypatch)
    data = Dataset.from_dict({"environment": ["one", "other"] * 4})
    trainer = cases.trainer(
        tmp_path,
        data=data,
        environment_factory={"one": lambda: Tasks(0), "other": lambda: Tasks(4)},
        max_steps=2,
    )
    with pytest.raises(ValueError, match=r"no 'prompt' column.*skipping"):
        AdaptiveOrderCallback(trainer)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig.skipping()))
    trainer.train()
    assert read_run(tmp_path).contents.note("stage_1", TrainingNote).steps == 2


def test_tasks_that_rows_tell_apart_are_ordered(tmp_path, monkeypatch):
    """An environment beside rows that differ: each row leads to the same task each time."""
    environments.pretend_to_call_tools(monkeypatch)
    data = cases.dataset(8, conversational=True)
    trainer = cases.trainer(tmp_path, data=data, environment_factory=environments.Room, max_steps=2)
    trainer.add_callback(AdaptiveOrderCallback(trainer))
    trainer.train()
    assert read_run(tmp_path).contents.plan.dataset_size == 8
