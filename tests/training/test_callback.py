import itertools
import json
import logging
import re

import cases
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from interruptions import Killed
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.notes import SelectionNote, TrainingNote
from trl_learnalign.records.run_record import RunRecord
from trl_learnalign.records.store import ShardStore
from trl_learnalign.training.phases import StageSelection


def config(**options):
    return LearnAlignConfig(**{"warmup_samples": 4, "shard_size": 8, "feature_dim": 256, **options})


class Watch:
    """A reward that notes which dataset rows are generated for training, and at which step."""

    def __init__(self):
        self.seen: list[tuple[int, int]] = []
        self.callback: LearnAlignCallback | None = None

    def reward(self):
        def accuracy_reward(completions, row, trainer_state, **_):
            if not self.callback.is_scoring:
                self.seen += [(trainer_state.global_step, r) for r in row]
            return cases.accuracy_reward(completions)

        return accuracy_reward


def rows(size=14):
    return cases.dataset(size).add_column("row", list(range(size)))


def run(tmp_path, settings=None, data=None, hook=None, callbacks=(), **options):
    watch = Watch()
    trainer = cases.trainer(
        tmp_path, rewards=watch.reward(), data=rows() if data is None else data, **options
    )
    callback = watch.callback = LearnAlignCallback(trainer, settings or config(), hook)
    trainer.add_callback(callback)
    for extra in callbacks:
        trainer.add_callback(extra)
    trainer.train()
    return trainer, callback, watch


COMBINATIONS = list(itertools.product((0, 2), (1, 2, 4), (None, 1, 2, 4), (1, 2)))
# Every value occurs in the gate; all combinations in the slow tests.
GATE = {17 * i % len(COMBINATIONS) for i in range(8)}
GATED = [
    combination if index in GATE else pytest.param(*combination, marks=pytest.mark.slow)
    for index, combination in enumerate(COMBINATIONS)
]


@pytest.mark.parametrize(("workers", "accumulation", "per_generation", "iterations"), GATED)
def test_no_stale_prompt_and_no_prompt_lost(
    tmp_path, workers, accumulation, per_generation, iterations
):
    trainer, callback, watch = run(
        tmp_path,
        dataloader_num_workers=workers,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        per_device_train_batch_size=4,
    )
    plan = callback.plan
    assert trainer.state.global_step == plan.total_steps
    logged = [
        entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry
    ]
    assert len(logged) == plan.total_steps
    np.testing.assert_allclose(
        logged, [1e-3 * (1 - i / plan.total_steps) for i in range(plan.total_steps)]
    )
    for phase in plan.phases:
        pool = callback.state.pool_of(phase)
        trained = [row for step, row in watch.seen if plan.phase_at(step) is phase]
        assert set(trained) == set(pool.tolist())
        assert np.bincount(trained)[pool].min() >= phase.passes * 4  # 4 rollouts each


def test_stages_are_disjoint_and_cover_the_pool(tmp_path):
    _, callback, _ = run(tmp_path)
    pools = [set(callback.selected(phase.name).tolist()) for phase in callback.plan.stages]
    assert [len(pool) for pool in pools] == [7, 4, 3]
    assert set().union(*pools) == set(range(14))


def test_reselecting_from_all_scores_the_whole_pool_each_time(tmp_path):
    _, _callback, _ = run(tmp_path, config(reselect="all", stages=[5, 5]))
    for stage in ("stage_1", "stage_2"):
        assert len(pd.read_parquet(tmp_path / "_learnalign" / f"{stage}.parquet")) == 14


def test_scoring_leaves_training_bit_identical(tmp_path, monkeypatch):
    settings = config(warmup_samples=4, stages=[6])
    with_scoring, callback, _ = run(tmp_path / "a", settings)
    pool = callback.selected("stage_1")
    monkeypatch.setattr(StageSelection, "select", lambda self, phase, *_: pool)
    without, _, _ = run(tmp_path / "b", settings)
    for key in ("grad_norm", "loss", "reward", "num_tokens", "learning_rate"):
        left, right = (
            [entry[key] for entry in trainer.state.log_history if key in entry]
            for trainer in (with_scoring, without)
        )
        assert left == right, key
    for a, b in zip(with_scoring.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options", [dict(beta=0.1), dict(loss_type="grpo", gradient_checkpointing=True)]
)
def test_scoring_leaves_training_bit_identical_with(tmp_path, monkeypatch, options):
    """A reference model, gradient checkpointing: more to disturb."""
    policy = tmp_path / "policy"
    cases.model().save_pretrained(policy)
    settings = config(stages=[4])

    def go(name):
        from transformers import AutoModelForCausalLM

        return run(
            tmp_path / name,
            settings,
            policy=AutoModelForCausalLM.from_pretrained(policy),
            **options,
        )

    one, callback, _ = go("a")
    pool = callback.selected("stage_1")
    monkeypatch.setattr(StageSelection, "select", lambda self, phase, *_: pool)
    other, _, _ = go("b")
    norms = [
        [e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (one, other)
    ]
    assert norms[0] == norms[1]


def test_the_trainer_is_as_found_after_an_exception_in_scoring(tmp_path):
    calls = []

    def accuracy_reward(completions, trainer_state, **_):
        calls.append(trainer_state.global_step)
        if len(calls) == 3:
            raise RuntimeError("the grader crashed")
        return cases.accuracy_reward(completions)

    trainer = cases.trainer(tmp_path, rewards=accuracy_reward)
    callback = LearnAlignCallback(
        trainer, config(warmup_samples=0, stages=[4], scoring_batch_prompts=2)
    )
    trainer.add_callback(callback)
    before = (trainer._metrics, trainer._logs, trainer._step, torch.get_rng_state())
    forward_hooks = [len(m._forward_hooks) for m in trainer.model.modules()]
    with pytest.raises(RuntimeError, match="the grader crashed"):
        trainer.train()
    assert trainer._metrics == before[0]
    assert trainer._logs == before[1]
    assert not trainer._metrics["train"]
    assert trainer._step == before[2]
    assert trainer.state.num_input_tokens_seen == 0
    assert "_calculate_rewards" not in vars(trainer)
    assert "_get_per_token_logps_and_entropies" not in vars(trainer)
    assert [len(m._forward_hooks) for m in trainer.model.modules()] == forward_hooks
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not callback.is_scoring


class Snapshots(TrainerCallback):
    """Weights, optimizer state and learning rate at the beginning of each step."""

    def __init__(self):
        self.taken = {}

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **_):
        weights = [p.detach().clone() for p in model.parameters()]
        self.taken[state.global_step] = (
            weights,
            len(optimizer.state),
            optimizer.param_groups[0]["lr"],
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "cosine_with_min_lr"])
def test_restart_goes_back_to_the_initial_state(tmp_path, schedule):
    snapshots = Snapshots()
    kwargs = {"min_lr": 1e-5} if schedule == "cosine_with_min_lr" else {}
    settings = config(warmup_samples=6, after_warmup="restart", stages=[4])
    trainer, callback, _ = run(
        tmp_path,
        settings,
        callbacks=[snapshots],
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=kwargs,
        warmup_steps=1,
    )
    first, second = callback.plan.phases[1].start, snapshots.taken
    weights, states, rate = second[first]
    assert states == 0
    assert (
        rate == second[0][2] == (1e-3 if schedule == "constant" else 0.0)
    )  # both begin with the warm-up
    assert all(torch.equal(a, b) for a, b in zip(weights, second[0][0], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(second[first - 1][0], weights, strict=True))
    # Each part has the schedule of a run of its own length.
    alone, _, _ = run(
        tmp_path / "alone",
        config(warmup_samples=0, stages=[4]),
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=kwargs,
        warmup_steps=1,
    )
    rates = [
        entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry
    ]
    own = [entry["learning_rate"] for entry in alone.state.log_history if "learning_rate" in entry]
    np.testing.assert_allclose(rates[first:], own)


def test_continue_keeps_the_warmed_up_policy(tmp_path):
    snapshots = Snapshots()
    _, callback, _ = run(tmp_path, config(stages=[4]), callbacks=[snapshots])
    start = callback.plan.phases[1].start
    assert any(
        not torch.equal(a, b)
        for a, b in zip(snapshots.taken[start][0], snapshots.taken[0][0], strict=True)
    )


def test_same_seed_same_selection_and_another_seed_another(tmp_path):
    chosen = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _, callback, _ = run(tmp_path / name, config(selection_seed=seed, stages=[5]))
        chosen.append(callback.selected("stage_1").tolist())
    assert chosen[0] == chosen[1] != chosen[2]


def test_records_say_what_happened(tmp_path):
    _, callback, _ = run(tmp_path, hook=lambda name, step: {"accuracy": step / 100})
    record = json.loads((tmp_path / "_learnalign" / "run.json").read_text())
    assert list(record["phases"]) == ["base", "warmup", "stage_1", "stage_2", "stage_3"]
    assert record["versions"]["trl"]
    assert record["config"]["stages"] == [0.5, 0.3, 0.2]
    assert [phase["name"] for phase in record["plan"]["phases"]] == [
        "warmup",
        "stage_1",
        "stage_2",
        "stage_3",
    ]
    for phase in callback.plan.phases:
        notes = record["phases"][phase.name]
        assert notes["training"]["steps"] == phase.steps
        assert notes["metrics"] == {"step": phase.end, "accuracy": phase.end / 100}
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet")
    assert sorted(table["rank"]) == list(range(1, 15))
    assert set(table.loc[table["selected"], "index"]) == set(callback.selected("stage_1").tolist())
    assert table.loc[table["selected"], "rank"].max() == 7
    p = table["success_rate"]
    np.testing.assert_allclose(table["learnability"], p * (1 - p))
    learnable = table["learnability"] > 0
    np.testing.assert_allclose(
        (table["alignment"] * table["learnability"])[learnable],
        table["score"][learnable],
        atol=1e-15,
    )
    assert (table["score"][~learnable] == 0).all()
    assert record["phases"]["stage_1"]["selection"]["success_rate"] == pytest.approx(p.mean())
    assert table["prompt"].tolist() == rows()["prompt"]


def test_metrics_are_logged_once_at_the_boundary(tmp_path):
    trainer, callback, _ = run(tmp_path)
    ours = [entry for entry in trainer.state.log_history if "learnalign/stage" in entry]
    assert [entry["step"] for entry in ours] == [phase.start for phase in callback.plan.stages]
    assert not any("loss" in entry or "reward" in entry for entry in ours)
    theirs = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert theirs == list(range(1, callback.plan.total_steps + 1))


def rewards_of(kind):
    """Rewards by position in the group of 4."""
    nan = float("nan")
    table = {
        "all right": [1.0, 1.0, 1.0, 1.0],
        "all wrong": [0.0, 0.0, 0.0, 0.0],
        "all none": [None, None, None, None],
        "mixed none": [1.0, None, 0.0, None],
        "nan": [1.0, nan, 0.0, 0.0],
        "infinite": [1.0, float("inf"), 0.0, 0.0],
        "half": [1.0, 1.0, 0.0, 0.0],
    }
    return table[kind]


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("all right", 1),
        ("all wrong", 0),
        ("all none", None),
        ("mixed none", 0.5),
        ("nan", 1 / 3),
        ("half", 0.5),
    ],
)
def test_odd_rewards_give_finite_scores(tmp_path, kind, rate):
    def accuracy_reward(completions, **_):
        return (rewards_of(kind) * len(completions))[: len(completions)]

    trainer = cases.trainer(tmp_path, rewards=accuracy_reward, data=cases.dataset(6))
    trainer.add_callback(LearnAlignCallback(trainer, config(warmup_samples=0, stages=[4])))
    trainer.train()
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet")
    assert np.isfinite(table["score"]).all()
    if rate is None:
        assert table["success_rate"].isna().all()
    else:
        np.testing.assert_allclose(table["success_rate"], rate)
    if rate in (0, 1, None):
        assert (table["score"] == 0).all()
    assert table["selected"].sum() == 4


def test_an_infinite_reward_says_nothing_of_right_and_wrong(tmp_path):
    def accuracy_reward(completions, prompts, **_):
        values = (rewards_of("half") * len(completions))[: len(completions)]
        return [
            float("inf") if p == "a0?" and v else v for p, v in zip(prompts, values, strict=True)
        ]

    trainer = cases.trainer(
        tmp_path, rewards=[accuracy_reward, cases.length_reward], data=cases.dataset(6)
    )
    trainer.add_callback(LearnAlignCallback(trainer, config(warmup_samples=0, stages=[2])))
    trainer.train()
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet").set_index("index")
    assert np.isfinite(table["score"]).all()
    # What is left of the first prompt's rollouts are two wrong ones: nothing can be learned from it.
    assert table["success_rate"].tolist() == [0.0, *[0.5] * 5]
    assert table["score"][0] == 0
    assert (table["score"][1:] != 0).all()
    assert not table["selected"][0]


def test_a_gradient_that_is_not_finite_is_named(tmp_path, caplog):
    def accuracy_reward(completions, **_):
        return (rewards_of("half") * len(completions))[: len(completions)]

    data = cases.dataset(6)
    trainer = cases.trainer(tmp_path, rewards=accuracy_reward, data=data)
    tokenizer = trainer.processing_class

    def poison(module, inputs, output):
        """The backward pass of the third prompt's rollouts ends in NaN."""
        texts = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in inputs[0].tolist()]
        factors = torch.ones(len(texts), 1, 1)
        factors[[data[2]["prompt"] in text for text in texts]] = torch.nan
        if output.requires_grad:
            output.register_hook(lambda grad: grad * factors)

    trainer.model.get_input_embeddings().register_forward_hook(poison)
    trainer.add_callback(LearnAlignCallback(trainer, config(warmup_samples=0, stages=[2])))
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        trainer.train()
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet").set_index("index")
    assert (table["success_rate"] == 0.5).all()  # learnable, as far as the accuracy reward tells
    assert table.index[~table["gradient_finite"]].tolist() == [2]
    assert table["score"][2] == 0
    assert np.isfinite(table["score"]).all()
    assert not table["selected"][2]
    (message,) = (line for line in caplog.messages if "not finite" in line)
    assert message.startswith("The gradients of prompts [2] (rows of the dataset)")
    record = json.loads((tmp_path / "_learnalign" / "run.json").read_text())
    assert record["phases"]["stage_1"]["selection"]["gradients_not_finite"] == 1


def test_success_comes_from_the_accuracy_reward_alone(tmp_path):
    def format_reward(completions, **_):
        return [5.0] * len(completions)

    def accuracy_reward(completions, **_):
        return ([2.0, 1.5, 0.0, 0.0] * len(completions))[: len(completions)]

    trainer = cases.trainer(
        tmp_path,
        rewards=[format_reward, accuracy_reward],
        reward_weights=[1.0, 2.0],
        data=cases.dataset(6),
    )
    trainer.add_callback(LearnAlignCallback(trainer, config(warmup_samples=0, stages=[2])))
    trainer.train()
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet")
    assert (table["success_rate"] == 0.5).all()


@pytest.mark.parametrize(("on_shortfall", "size"), [("fill", 5), ("shrink", 3)])
def test_a_short_pool(tmp_path, caplog, on_shortfall, size):
    def accuracy_reward(completions, row, **_):
        half = (rewards_of("half") * len(completions))[: len(completions)]
        return [v if r < 3 else 0.0 for v, r in zip(half, row, strict=True)]

    trainer = cases.trainer(tmp_path, rewards=accuracy_reward, data=rows(10))
    callback = LearnAlignCallback(
        trainer, config(warmup_samples=0, stages=[5], on_shortfall=on_shortfall)
    )
    trainer.add_callback(callback)
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        trainer.train()
    chosen = callback.selected("stage_1")
    assert len(chosen) == size
    assert {0, 1, 2} <= set(chosen.tolist())
    taken = "selected: 5, 2 with learnability 0" if on_shortfall == "fill" else "selected: 3"
    said = f"only 3 of 10 candidates are learnable, fewer than the requested 5; {taken}"
    done = {
        "fill": "unlearnable prompts complete the number",
        "shrink": "fewer prompts than requested are used",
    }
    assert f"stage_1: {said} (on_shortfall={on_shortfall!r}: {done[on_shortfall]})." in caplog.text
    assert callback.record.get("stage_1", SelectionNote).shortfall == said
    assert trainer.state.global_step == callback.plan.total_steps == -(-size // 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            [0.4, 0.1, 0.0, 0.2],
            "no rollout of 32 succeeded.*accuracy_reward above success_threshold=0.5; the largest "
            "was 0.4.*from 0 to 0.4 .*lower success_threshold",
        ),
        (
            [0.9, 0.6, 1.0, 0.7],
            "every rollout of 32 succeeded.*the smallest was 0.6.*raise success_threshold",
        ),
        (
            [0.0] * 4,
            "all 32 graded rollouts earned accuracy_reward 0, so no prompt is learnable",
        ),
        ([None] * 4, None),
        ([0.4, 0.6, None, 0.0], None),
    ],
)
def test_why_no_prompt_is_learnable_is_said_once_after_the_first_shard(
    tmp_path, caplog, values, said
):
    shards = []

    def accuracy_reward(completions, **_):
        shards.append("first 8 prompts" in caplog.text)
        return (values * len(completions))[: len(completions)]

    trainer = cases.trainer(tmp_path, rewards=accuracy_reward, data=rows(10))
    settings = config(warmup_samples=0, stages=[2], scoring_batch_prompts=2)
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        trainer.train()
    messages = [record.getMessage() for record in caplog.records]
    found = [text for text in messages if re.search(f"stage_1, the first 8 prompts: {said}", text)]
    assert len(found) == (said is not None)
    assert sum("no prompt is learnable" in text for text in messages) == len(found)
    note = callback.record.get("stage_1", SelectionNote)
    assert (note.no_signal is not None) == (said is not None)
    assert shards[4] == (
        said is not None
    )  # two prompts a call: the fifth call is of the second shard


@pytest.mark.parametrize(
    "settings",
    [
        dict(order="shuffled", max_steps=3),
        dict(order="shuffled", stage_epochs=1),
        dict(stages=[14], order="shuffled"),
        dict(warmup_samples=4, stages=[1.0]),
        dict(rollout_budget=0.5, order="shuffled"),
        dict(selector="learnalign", order="shuffled", skip_forced_scoring=False),
    ],
)
def test_a_run_on_the_whole_pool_is_an_honest_control(tmp_path, caplog, settings):
    """Nothing but training is rolled out, charged or told."""
    options = {"max_steps": settings["max_steps"]} if "max_steps" in settings else {}
    settings = {name: value for name, value in settings.items() if name != "max_steps"}
    calls = []

    def accuracy_reward(completions, **_):
        calls.append(len(completions))
        return cases.accuracy_reward(completions)

    trainer = cases.trainer(tmp_path, rewards=accuracy_reward, data=rows(), **options)
    callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(feature_dim=64, **settings))
    trainer.add_callback(callback)
    with caplog.at_level(logging.INFO, "trl_learnalign"):
        trainer.train()
    generated = callback.plan.total_steps * trainer.args.generation_batch_size
    assert sum(calls) == generated
    assert callback.record.contents.ledger.sum("scoring").tokens_generated == 0
    assert "scor" not in caplog.text
    assert "complete the number" not in caplog.text
    note = callback.record.get("stage_1", SelectionNote)
    assert (note.scored, note.selected) == (False, 14)


def test_the_paper_scores_the_stage_that_takes_what_is_left(tmp_path):
    _, callback, _ = run(tmp_path, config())
    assert callback.record.get("stage_3", SelectionNote).scored


def test_another_run_does_not(tmp_path):
    settings = LearnAlignConfig.adaptive(stages=[0.5, 0.3, 0.2], stage_epochs=1, feature_dim=64)
    _, callback, _ = run(tmp_path, settings)
    notes = [callback.record.get(f"stage_{number}", SelectionNote) for number in (1, 2, 3)]
    assert [note.scored for note in notes] == [True, True, False]


@pytest.mark.parametrize("masked", [False, True])
def test_completions_that_are_all_cut_off_are_named_as_the_cause(tmp_path, caplog, masked):
    def accuracy_reward(completions, **_):
        return [0.0] * len(completions)

    trainer = cases.trainer(
        tmp_path,
        rewards=accuracy_reward,
        data=rows(10),
        max_completion_length=1,
        mask_truncated_completions=masked,
    )
    callback = LearnAlignCallback(trainer, config(warmup_samples=0, stages=[2]))
    trainer.add_callback(callback)
    trainer.train()
    said = [text for text in caplog.messages if "no prompt is learnable" in text]
    assert len(said) == 1
    for text in (said[0], callback.record.get("stage_1", SelectionNote).no_signal):
        assert re.search(
            r"(9\d|100)% of them were cut off at max_completion_length=1, probably", text
        )


def test_a_forced_stage_can_go_unscored(tmp_path):
    _, callback, _ = run(tmp_path, config(skip_forced_scoring=True))
    assert len(callback.selected("stage_3")) == 3
    assert not (tmp_path / "_learnalign" / "stage_3.parquet").exists()
    assert (tmp_path / "_learnalign" / "stage_2.parquet").exists()


def test_a_plateau_ends_a_stage_early(tmp_path):
    settings = config(
        warmup_samples=0, stages=[6, 4], stage_epochs=4, plateau_patience=3, plateau_min_delta=10.0
    )
    trainer, callback, watch = run(tmp_path, settings)
    # The first reward is the best one; three steps without a rise end each stage.
    assert [phase.steps for phase in callback.plan.phases] == [4, 4]
    assert trainer.state.global_step == 8
    second = set(callback.selected("stage_2").tolist())
    assert {row for step, row in watch.seen if step >= 4} <= second


@pytest.mark.parametrize("price", [1.0, 8.0])
def test_runs_end_at_equal_compute(tmp_path, price):
    _, whole, _ = run(tmp_path / "whole", config(stages=[4]))
    spent = whole.record.contents.ledger.total.compute(price)
    settings = dict(warmup_samples=0, stages=[1.0], stage_steps=500, skip_forced_scoring=True)
    settings |= dict(compute_budget=spent, generation_price=price)
    trainer, callback, _ = run(tmp_path / "pool", config(**settings))
    costs = callback.record.contents.ledger
    # Not before it is spent, and not a step longer.
    total, steps = costs.total.compute(price), trainer.state.global_step
    written = json.loads((tmp_path / "pool" / "_learnalign" / "run.json").read_text())["ledger"]
    assert written["total"]["forward_equivalents"] == total
    assert total >= spent > total - total / steps * 1.5
    assert callback.plan.phases[-1].steps == steps < 500
    note = callback.record.get("stage_1", TrainingNote)
    assert note.steps == steps


def test_a_budget_that_scoring_has_spent_leaves_one_unit_of_the_last_stage(tmp_path):
    settings = config(stages=[6, 4], stage_steps=5, compute_budget=1)
    _, callback, _ = run(tmp_path, settings)
    assert [stage.steps for stage in callback.plan.stages] == [5, 1]


@pytest.mark.parametrize("size", [2, 6])
def test_equal_steps_after_a_restart_until_a_plateau(tmp_path, size):
    settings = dict(warmup_samples=4, stages=[size], stage_steps=9, after_warmup="restart")
    trainer, callback, watch = run(tmp_path / "all", config(**settings))
    assert [phase.steps for phase in callback.plan.phases] == [2, 9]
    assert trainer.state.global_step == 11
    trained = [row for step, row in watch.seen if step >= 2]
    assert len(trained) == 9 * 2 * 4  # rollouts of two prompts a step
    assert set(trained) == set(callback.selected("stage_1").tolist())
    history = pd.read_parquet(tmp_path / "all" / "_learnalign" / "reward_history.parquet")
    assert not history.duplicated(["index", "pass"]).any()
    assert history["pass"].max() == callback.plan.phases[1].passes == -(-18 // size)

    settings |= dict(plateau_patience=3, plateau_min_delta=10.0)
    trainer, callback, watch = run(tmp_path / "plateau", config(**settings))
    # The first reward is the best one; three steps without a rise end the stage.
    assert [phase.steps for phase in callback.plan.phases] == [2, 4]
    assert trainer.state.global_step == 6
    rates = [
        entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry
    ]
    assert rates[2] == rates[0]  # the schedule began anew


def test_conversational_prompts(tmp_path):
    trainer = cases.trainer(tmp_path, data=cases.dataset(6, conversational=True))
    callback = LearnAlignCallback(trainer, config(warmup_samples=2, stages=[4]))
    trainer.add_callback(callback)
    trainer.train()
    table = pd.read_parquet(tmp_path / "_learnalign" / "stage_1.parquet")
    assert table["prompt"][0] == "user: a0?"


def test_epoch_strategies_mean_phases(tmp_path):
    trainer, callback, _ = run(tmp_path, save_strategy="epoch", logging_strategy="epoch")
    ends = [phase.end for phase in callback.plan.phases]
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")) == ends
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == ends


def test_boundaries_are_checkpointed(tmp_path):
    _, callback, _ = run(tmp_path, save_strategy="steps", save_steps=1000)
    ends = [phase.end for phase in callback.plan.phases]
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")) == ends


def test_an_unscorable_pool_still_trains(tmp_path):
    data = Dataset.from_dict({"prompt": ["a?"] * 6, "row": list(range(6))})
    _, callback, _ = run(tmp_path, config(warmup_samples=2, stages=[4]), data=data)
    assert len(callback.selected("stage_1")) == 4


@pytest.mark.parametrize("keep", [True, False])
def test_measurements_go_once_a_checkpoint_knows_the_pool(tmp_path, keep):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append(
                sorted(
                    path.parent.parent.name
                    for path in tmp_path.glob("_learnalign/*/gradients/manifest.json")
                )
            )

    settings = config(warmup_samples=0, stages=[4, 4], keep_features=keep)
    run(tmp_path, settings, callbacks=[Look()], save_strategy="steps", save_steps=1)
    stages = ["stage_1", "stage_2"]
    assert seen == [
        ["stage_1"],
        ["stage_1"] if keep else [],
        stages if keep else ["stage_2"],
        stages if keep else [],
    ]
    assert (tmp_path / "_learnalign" / "stage_2.parquet").exists()
    assert bool(list(tmp_path.glob("_learnalign/*/gradients"))) == keep


def test_what_measuring_found_out_about_itself_outlives_the_process(tmp_path, monkeypatch):
    """Killed between the last shard and the stage's table: the record says the same of its gradients."""
    settings = config(warmup_samples=0, stages=[4])
    _, whole, _ = run(tmp_path / "whole", settings)
    with monkeypatch.context() as patched:
        patched.setattr(RunRecord, "write_stage", raise_killed)
        with pytest.raises(Killed):
            run(tmp_path / "killed", settings)
    _, callback, _ = run(tmp_path / "killed", settings)
    note, wanted = (each.record.get("stage_1", SelectionNote) for each in (callback, whole))
    assert wanted.scoring.coverage.share == 1
    assert "relative_error" in wanted.scoring.self_check
    assert note.scoring.coverage == wanted.scoring.coverage
    assert note.scoring.self_check == wanted.scoring.self_check


def test_checks_are_on_disk_before_the_shard_that_they_are_about(tmp_path, monkeypatch):
    """Killed right after the only shard: it is not measured again, and the record has what was checked."""
    settings = config(warmup_samples=0, stages=[4], shard_size=1000)
    _, whole, _ = run(tmp_path / "whole", settings)
    write = ShardStore.write

    def write_and_die(store, *shard):
        write(store, *shard)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(ShardStore, "write", write_and_die)
        with pytest.raises(Killed):
            run(tmp_path / "killed", settings)
    _, callback, _ = run(tmp_path / "killed", settings)
    note, wanted = (each.record.get("stage_1", SelectionNote) for each in (callback, whole))
    assert wanted.scoring.self_check["relative_error"] < 1e-5
    assert note.scoring.self_check == wanted.scoring.self_check
    assert note.scoring.coverage == wanted.scoring.coverage


def raise_killed(*_):
    raise Killed
