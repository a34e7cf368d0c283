"""Rollouts by need, gain for cost, graded rewards and a large pool: rules that benchmarks add, and tiny runs."""

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("reasoning_gym")

from loading import benchmark_modules

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.toy.model import TINY
from trl_learnalign.toy.tasks import FAMILIES, REGIMES

MODULES = (
    "continual.by_need",
    "continual.gain_for_cost",
    "continual.graded",
    "continual.large_pool",
    "continual.pools",
    "continual.loop",
)
SMALL = {"pool": 40, "held_out": 20, "prompts_per_step": 4}
BUDGETS = {1: 8_000.0, 3: 10_000.0}


@pytest.fixture(scope="module")
def bench():
    with benchmark_modules(*MODULES, "selection.cells") as modules:
        yield modules


def test_units_go_where_they_raise_the_worth_most(bench):
    rates, most, count = np.array([0.02, 0.1, 0.3, 0.5, 0.9]), 4, 9
    gains = bench["continual.by_need"].marginal_gains(rates, most, 1.0)

    def worth(rate, rollouts):
        return (1 - rate**rollouts - (1 - rate) ** rollouts) * rate * (1 - rate) ** 2

    left, wanted = {}, np.zeros(len(rates), dtype=int)
    for _ in range(count):  # one after the other
        for place, (rate, units) in enumerate(zip(rates, wanted, strict=True)):
            before = worth(rate, 2 * units) if units else 0.0
            left[place] = worth(rate, 2 * units + 2) - before if units < most else -1
        wanted[max(left, key=left.get)] += 1
    assert (
        bench["continual.by_need"].most_worthwhile_units(gains, count).tolist() == wanted.tolist()
    )
    assert wanted.max() > 1


def test_a_generation_has_all_its_units_and_explored_prompts_one_at_least(bench):
    config = LearnAlignConfig.adaptive(adaptive_exploration=0.25, adaptive_cool_down=0)
    belief = bench["continual.by_need"].Belief(np.empty((200, 0)), config)
    rows = np.arange(200)
    right = np.where(rows < 10, 24, 0)  # a twentieth of the prompts is in reach
    belief.record(Outcomes.at(0, rows, right, 64 - right), 0)
    order = bench["continual.by_need"].UnitsByNeed(8, rows, 32, config, 0, "stage_1")
    drawn = order.draw(belief, 1)
    prompts, units = np.unique(drawn, return_counts=True)
    assert len(drawn) == 32
    assert set(order.explored(1)) <= set(prompts)
    assert units[prompts < 10].sum() > 16
    assert 1 < units.max() <= 8


def test_units_of_a_prompt_share_mean_and_deviation(bench):
    rows = np.array([3, 3, 5, 5, 5, 1])
    rewards = torch.tensor([[0.0, 1], [0, 0], [1, 1], [1, 1], [1, 1], [1, 0]])
    found = bench["continual.by_need"].shared_advantages(rows, rewards)
    groups = bench["continual.loop"].group_advantages
    torch.testing.assert_close(found[:2].reshape(1, 4), groups(rewards[:2].reshape(1, 4)))
    torch.testing.assert_close(found[5:], groups(rewards[5:]))
    assert not found[2:5].any()


def test_the_pools_are_there_only_while_they_are_needed(bench):
    pools = bench["continual.pools"]
    before = list(FAMILIES), list(REGIMES)
    with pools.toy_tasks(pools.LENGTHS):
        assert set(FAMILIES) == {*pools.SHORT, *pools.LONG}
        pool = bench["selection.cells"].tasks(pools.LENGTHS, 80, 0, "dev")
    answers = pd.Series(pool["answer"]).str.len()
    assert answers.value_counts().to_dict() == {1: 40, 9: 40}
    with pools.toy_tasks(pools.RARE), pytest.raises(KeyError):
        FAMILIES["thrice"]
    assert (list(FAMILIES), list(REGIMES)) == before


def test_runs_by_need_have_as_many_rollouts_a_step(bench):
    by_need, pools = bench["continual.by_need"], bench["continual.pools"]
    driver = by_need.ByNeedDriver(bench["selection.cells"].Settings(**SMALL))
    line = by_need.BY_NEED[by_need.named(8, 0.25)]
    curve = driver(pools.RARE, 100, line, BUDGETS, "dev")
    counts = np.array(curve.notes["prompts_with_units"])
    # Four groups of eight a step, as of the settings.
    assert counts @ np.arange(9) * 2 == 4 * 8 * curve.points[-1]["step"]
    assert counts[2:].any()
    assert counts.sum() == curve.groups
    assert 0 < curve.useful < curve.groups
    assert curve.points[-1]["trained"] < curve.points[-1]["generated"] + curve.points[-1]["read"]


def test_runs_for_cost_know_what_they_rolled_out(bench, monkeypatch, tmp_path):
    pools, costs = bench["continual.pools"], bench["continual.gain_for_cost"]
    base = pools.base_model(pools.LENGTHS, tmp_path, **TINY)
    monkeypatch.setattr(pools, "base_model", lambda regime: base)
    driver = costs.GainForCostDriver(bench["selection.cells"].Settings(**SMALL))
    line = costs.COMPARED["gain per cost, price 8"]
    curve = driver(pools.LENGTHS, 100, line, BUDGETS, "dev")
    plain = driver(pools.LENGTHS, 100, costs.COMPARED[costs.PLAIN], BUDGETS, "dev")
    assert curve.notes["rollouts"] != plain.notes["rollouts"]
    assert sum(curve.notes["rollouts"].values()) == 4 * 8 * curve.points[-1]["step"]
    assert set(curve.notes["rollouts"]) == {*pools.SHORT, *pools.LONG}


@pytest.mark.parametrize(
    ("text", "share"), [("123", 1), ("132", 1 / 3), ("12", 2 / 3), (" 123456", 0.5), ("", 0)]
)
def test_a_graded_reward_is_the_share_of_digits_in_place(bench, text, share):
    assert bench["continual.graded"].digits_in_place(text, "123") == pytest.approx(share)


def test_the_belief_sees_fractions_or_what_is_above_a_threshold(bench):
    graded, runs = bench["continual.graded"], []

    class Kept(graded.GradedDriver):
        def begun(self, *given):
            runs.append(super().begun(*given))
            return runs[-1]

    driver = Kept(bench["selection.cells"].Settings(**SMALL))
    lines = [graded.COMPARED[name] for name in (graded.FRACTIONS, graded.HALF, graded.WHOLE)]
    useful = [driver("longtail", 100, line, BUDGETS, "dev").useful for line in lines]
    fractions, half, whole = (run.seen for run in runs)
    assert all(useful)
    assert (np.concatenate(fractions) % 1).any()
    assert not (np.concatenate(half + whole) % 1).any()
    # The first generation is the same: nothing had been seen.
    assert (whole[0] <= fractions[0]).all()
    assert (half[0] < whole[0]).sum() == 0
    assert whole[0].sum() < half[0].sum()


@pytest.mark.parametrize("way", ["first", "lazy", "given", "posterior"])
def test_what_a_belief_reads_of_a_large_pool_is_paid_for(bench, way):
    large, pools = bench["continual.large_pool"], bench["continual.pools"]
    size = 400
    driver = large.LargePoolDriver(bench["selection.cells"].Settings(**SMALL), size)
    # Eight hundredths of a budget that is as many times as large.
    budgets = {price: budget / large.SHARE for price, budget in BUDGETS.items()}
    curve = driver(pools.LARGE, 100, large.line(way, 2, 1.0), budgets, "dev")
    forward = {point["forward"] for point in curve.points}
    with pools.toy_tasks(pools.LARGE):
        pool = bench["selection.cells"].tasks(pools.LARGE, size, 100, "train")
    prompts = bench["continual.loop"].Policy(driver.model, 0.0, 0).tokens_of(pool)
    whole = sum(map(len, prompts))
    if way in ("posterior", "given"):
        assert (curve.notes["read"], forward) == (way == "given", {0})
    elif way == "first":
        assert (curve.notes["read"], forward) == (1, {whole})
    else:
        shares = np.array(sorted(forward)) / whole
        assert curve.notes["seen"] < curve.notes["read"] <= 1
        assert shares[-1] == pytest.approx(curve.notes["read"], rel=0.02)


def test_a_prompt_is_read_before_it_may_be_drawn(bench, monkeypatch):
    large, pools = bench["continual.large_pool"], bench["continual.pools"]
    drawn = []

    class Checked(large.ReadingRun):
        def _roll_out(self, rows, number):
            drawn.append(self.is_read[rows].all() and self.features[rows].any(axis=1).all())
            return super()._roll_out(rows, number)

    monkeypatch.setattr(large, "ReadingRun", Checked)
    monkeypatch.setattr(large, "SAMPLE", 32)
    driver = large.LargePoolDriver(bench["selection.cells"].Settings(**SMALL), 2_000)
    budgets = {price: budget / large.SHARE for price, budget in BUDGETS.items()}
    curve = driver(pools.LARGE, 100, large.line("lazy", 2, 1.0), budgets, "dev")
    assert len(drawn) > 1
    assert all(drawn)
    assert curve.notes["read"] < 1


def test_differences_are_paired_by_seed(bench):
    rows = [
        {"regime": "rare", "price": 1, "selector": name, "seed": seed, "mark": mark}
        | {"accuracy": 0.1 * seed + 0.01 * (name == "ours") * (seed + 1) * (1 + (mark > 0.8))}
        for name in ("ours", "theirs")
        for seed in (1, 2, 3)
        for mark in (0.5, 1.0)
    ]
    found = bench["continual.by_need"].paired(pd.DataFrame(rows), "ours", "theirs")
    # 3, 4.5, 6 on the curve, and 4, 6, 8 at its end; a deviation of 1 makes ± 2.48 with three seeds.
    assert found.loc[("rare", 1), "curve"] == "+4.50 [+0.77, +8.23]"
    assert found.loc[("rare", 1), "end"] == "+6.00 [+1.03, +10.97]"
