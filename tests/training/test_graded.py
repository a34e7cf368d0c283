"""Graded rewards: what a run records and believes of them, held against the stock trainer's own reward table."""

import logging

import numpy as np
import pandas as pd
import pytest
import sampling_cases
import torch
from adaptive_cases import go, history, settings, weights
from interruptions import Killed
from sampling_cases import GRADES, graded_reward
from skipping_cases import number_of

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import Belief
from trl_learnalign.adaptive.order import group_sizes
from trl_learnalign.records.history import first_groups
from trl_learnalign.records.notes import RolloutsNote
from trl_learnalign.success import SuccessRule

PROMPTS = 24
GRADED = dict(success_range=GRADES, adaptive_embeddings="none")
COLUMNS = ["index", "step", "right", "wrong", "success_rate", "useful", "predicted"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Row → the fractions of its rollouts, and whether they have advantages: from a stock trainer's log."""
    folder = tmp_path_factory.mktemp("stock")
    rows = list(range(PROMPTS))
    options = dict(max_steps=-1, num_train_epochs=1, rewards=graded_reward)
    options |= dict(log_completions=True, logging_steps=1)
    trainer = sampling_cases.trainer(folder, rows=rows, **options)
    trainer.train()
    files = sorted(folder.rglob("*.parquet"))
    table = pd.concat([pd.read_parquet(file) for file in files])
    table["row"] = table["prompt"].map(number_of)
    low, high = GRADES
    table["fraction"] = (table["graded_reward"] - low) / (high - low)
    groups = table.groupby("row")
    assert len(groups) == PROMPTS
    assert (groups.size() == sampling_cases.ROLLOUTS).all()
    return groups["fraction"].agg(list), groups["advantage"].agg(lambda values: bool(values.any()))


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graded")
    return go(folder, settings(**GRADED, stage_epochs=4), rewards=graded_reward)


def test_outcomes_are_those_of_the_stock_trainers_table(stock, graded):
    fractions, useful = stock
    assert useful.any()
    assert not useful.all()
    table = history(graded[1])
    assert len(table) == 4 * PROMPTS
    for line in table.rename(columns={"index": "row"}).itertuples():
        outcomes = np.array(fractions[line.row])
        assert line.right == pytest.approx(outcomes.sum(), abs=1e-4)
        assert line.right + line.wrong == len(outcomes)
        assert line.partial == pytest.approx((outcomes * (1 - outcomes)).sum(), abs=1e-4)
        assert line.useful == useful[line.row]


def test_groups_without_a_right_rollout_are_useful_if_their_rewards_differ(stock, graded):
    fractions, useful = stock
    hopeless = [row for row, outcomes in fractions.items() if max(outcomes) < 1]
    assert useful[hopeless].any()
    note = graded[1].record.get("stage_1", RolloutsNote)
    assert note.mixed == note.useful == history(graded[1])["useful"].sum()


def test_the_belief_is_that_of_the_table(stock, graded):
    fractions, useful = stock
    callback = graded[1]
    table, geometry = history(callback), callback.plan.geometry
    expected = Belief(np.empty((PROMPTS, 0)), callback.config)
    size = geometry.prompts_per_generation * geometry.unit_generations
    for generation in range(1, len(table) // size + 1):
        rows = table["index"].to_numpy()[(generation - 1) * size : generation * size]
        seen = np.array([fractions[row] for row in rows])
        right, partial = seen.sum(axis=1), (seen * (1 - seen)).sum(axis=1)
        outcomes = Outcomes.at(0, rows, right, seen.shape[1] - right, partial=partial)
        expected.record(outcomes, generation)
    found = callback.run.order.adaptive.before(callback.plan.total_steps)
    rows = np.arange(PROMPTS)
    ours, wanted = (each.posterior(rows, generation + 1) for each in (found, expected))
    np.testing.assert_allclose(ours.success_rate, wanted.success_rate, atol=1e-4)
    np.testing.assert_allclose(ours.learnability, wanted.learnability, atol=1e-4)
    means = np.array([np.mean(fractions[row]) for row in rows])
    assert np.corrcoef(ours.success_rate, means)[0, 1] > 0.8
    assert ours.share[~useful[rows]].max() < np.median(ours.share[useful[rows]])


def test_plan_reads_the_share_of_groups_that_differ(stock, graded):
    outcomes = first_groups(graded[1].folder / "reward_history.parquet")
    assert outcomes.rows.tolist() == list(dict.fromkeys(history(graded[1])["index"]))
    wanted = stock[1][outcomes.rows].mean()
    assert group_sizes(outcomes, own=4).shares == {4: pytest.approx(wanted)}


@pytest.mark.parametrize("options", [{}, {"oversample": 1.5}])
def test_right_and_wrong_rewards_with_their_range_change_no_bit(tmp_path, options):
    common = dict(stage_epochs=2, **options)
    plain, callback = go(tmp_path / "plain", settings(**common))
    ranged, other = go(tmp_path / "ranged", settings(**common, success_range=[0, 1]))
    assert all(map(torch.equal, weights(plain), weights(ranged)))
    found = history(other)
    assert not found["partial"].any()
    pd.testing.assert_frame_equal(found[COLUMNS], history(callback)[COLUMNS], check_dtype=False)


STAGES = dict(stages=[0.5, 0.5], warmup_samples=4, selector="learnability")


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"max_generation_batches": 3}, marks=pytest.mark.slow), STAGES]
)
def test_a_killed_run_goes_on_bit_by_bit(tmp_path, options):
    config = settings(**GRADED, **options)
    trainer, callback = go(tmp_path / "whole", config, rewards=graded_reward)
    with pytest.raises(Killed):
        go(tmp_path / "killed", settings(**GRADED, **options), kill_at=5, rewards=graded_reward)
    config = settings(**GRADED, **options)
    again, resumed = go(tmp_path / "killed", config, resume=True, rewards=graded_reward)
    assert all(map(torch.equal, weights(trainer), weights(again)))
    pd.testing.assert_frame_equal(history(resumed), history(callback))
    if options is STAGES:
        table = callback.table("stage_1")
        assert (table["learnability"] > 0).sum() > ((table["right"] % 4) > 0).sum() / 2
        assert set(table["partial"] > 0) == {True, False}


def test_rewards_outside_of_the_range_count_as_its_ends_and_are_named_once(caplog):
    rule = SuccessRule(0, "grade", 0.5, bounds=(0.0, 10.0))
    with caplog.at_level(logging.WARNING):
        found = rule.of_its_rewards(torch.tensor([5.0, 12.0, -1.0, float("nan"), torch.inf]))
        rule.of_its_rewards(torch.tensor([20.0]))
        single = SuccessRule(0, "grade", 0.5, bounds=(-0.1, 0.1))
        assert single.of_its_rewards(torch.tensor([-0.1, 0.1])).tolist() == [0.0, 1.0]
    assert found[:3].tolist() == [0.5, 1.0, 0.0]
    assert found[3:].isnan().all()
    (message,) = caplog.messages
    assert "grade returned 12, which is outside of success_range=[0, 10]" in message


def test_a_graded_reward_is_refused_only_if_it_is_always_the_same():
    rule = SuccessRule(0, "grade", 0.5, bounds=(0.0, 1.0))
    assert rule.problem_of(torch.tensor([0.1, 0.11, 0.12])) is None
    assert "(Correct means grade in success_range=[0, 1].)" in rule.problem_of(
        torch.tensor([0.1, 0.1])
    )
    plain = SuccessRule(0, "grade", 0.5).problem_of(torch.tensor([0.1, 0.11, 0.12]))
    assert "give the range of the reward with success_range" in plain
