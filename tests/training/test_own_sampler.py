"""A sampler of the user's own decides which prompts come next: on one process and in stages, interrupted and not."""

import sys
from typing import ClassVar

import cases
import numpy as np
import pandas as pd
import pytest
import torch
from adaptive_cases import go, history, settings, weights
from interruptions import Killed

from trl_learnalign import LearnAlignConfig
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.cli import plan
from trl_learnalign.plan import Geometry, Plan, make_plan
from trl_learnalign.training.sampler import SamplerInputs, ShuffledSampler, find_sampler

OWN = "test_own_sampler:Fewest"
THOMPSON = "thompson_sampler:ThompsonSampler"


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(cases.ROOT / "recipes"))
    yield
    sys.modules.pop("thompson_sampler", None)


class Fewest:
    """Draws what was seen least, the last rows first, and writes down what it is told."""

    made: ClassVar = []

    def __init__(self, inputs):
        self.inputs = inputs
        self.told = []
        self.seen = np.zeros(len(inputs.dataset))
        self.made.append(self)

    def draw(self, step, count):
        rows = self.inputs.candidates[::-1]
        self.told.append(("draw", step, count))
        return rows[np.argsort(self.seen[rows], kind="stable")[:count]]

    def observe(self, outcomes):
        self.told.append((outcomes.step, *outcomes.rows.tolist()))
        np.add.at(self.seen, outcomes.rows, 1)
        return np.full(len(outcomes.rows), 0.25)

    def metrics(self):
        return {"sampler/seen": float(self.seen.sum())}


class Repeats(Fewest):
    def draw(self, step, count):
        return np.repeat(self.inputs.candidates[:1], count)


class Foreign(Fewest):
    def draw(self, step, count):
        return np.arange(count) + 1000


class TooFew(Fewest):
    def draw(self, step, count):
        return self.inputs.candidates[: count - 1]


class Floats(Fewest):
    def draw(self, step, count):
        return self.inputs.candidates[:count] + 0.5


class Predicts(Fewest):
    def observe(self, outcomes):
        return np.full(len(outcomes.rows), 1.5)


class Blind:
    def draw(self, step, count):
        return np.arange(count)


def test_its_prompts_are_trained_on(tmp_path):
    trainer, callback = go(tmp_path, settings(order=OWN, stage_steps=6), logging_steps=1)
    table = history(callback)
    assert table["index"].tolist() == list(range(23, 11, -1))
    assert (table["predicted"] == 0.25).all()
    log = [entry for entry in trainer.state.log_history if "sampler/seen" in entry]
    assert [entry["sampler/seen"] for entry in log] == [2, 4, 6, 8, 10, 12]
    assert all(entry["learnalign/predicted_success_rate"] == 0.25 for entry in log)


def test_it_observes_each_unit_before_it_draws_the_next(tmp_path):
    go(tmp_path, settings(order=OWN, stage_steps=3))
    draws = [one for one in Fewest.made[-1].told if one[0] == "draw"]
    assert draws == [("draw", 0, 2), ("draw", 1, 2), ("draw", 2, 2)]
    assert [one[0] for one in Fewest.made[-1].told] == ["draw", 0, "draw", 1, "draw", 2]


@pytest.mark.parametrize(
    ("order", "options"),
    [
        (OWN, {}),
        (THOMPSON, {}),
        (THOMPSON, {"oversample": 1.5, "max_generation_batches": 2}),
    ],
)
@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path, order, options, step):
    """With two steps to a generation, so that it is interrupted in the middle of one and at its end."""
    config = settings(order=order, stage_steps=6, **options)
    trainer, whole = go(tmp_path / "whole", config, steps_per_generation=2)
    with pytest.raises(Killed):
        go(tmp_path / "killed", config, kill_at=step, steps_per_generation=2)
    other, resumed = go(tmp_path / "killed", config, resume=True, steps_per_generation=2)
    pd.testing.assert_frame_equal(history(whole), history(resumed))
    for one, two in zip(weights(trainer), weights(other), strict=True):
        assert torch.equal(one, two)


def test_it_orders_one_stage_of_several_and_knows_what_came_before(tmp_path):
    config = settings(stages=[0.5, 0.5], order=["shuffled", OWN], selector="learnability")
    _, callback = go(tmp_path, config)
    sampler = Fewest.made[-1]
    assert sampler.inputs.stage == "stage_2"
    first, second = (history(callback).query(f"phase == 'stage_{n}'") for n in (1, 2))
    assert set(sampler.inputs.candidates) == set(second["index"])
    known = [told for told in sampler.told if told[0] != "draw"]
    scored = known[0]  # by the first stage, before its first step
    assert scored[0] == 0
    assert len(scored) == 1 + 24
    steps = [told[0] for told in known]
    assert steps == sorted(steps)
    rolled_out = [row for told in known[1:] for row in told[1:]]
    assert rolled_out[: len(first)] == first["index"].tolist()
    assert first["predicted"].isna().all()


def test_a_small_pool_is_drawn_again(tmp_path):
    _, callback = go(
        tmp_path, settings(order=OWN, stage_steps=2, max_generation_batches=4), prompts=3
    )
    assert Fewest.made[-1].told[0] == ("draw", 0, 3)
    assert len(history(callback)) >= 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Repeats", "draw returned row 0 2 times. Return each row once."),
        ("Foreign", "draw returned row 1000, which is not a candidate. Return rows of inputs"),
        ("TooFew", r"draw returned an array of shape \(1,\) and type int64. Return 2 whole"),
        (
            "Floats",
            r"draw returned an array of shape \(2,\) and type float64. Return 2 whole numbers",
        ),
        ("Predicts", "observe returned .1.5, 1.5. for 2 prompts. Return None, or one success rate"),
    ],
)
def test_what_it_may_not_return_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=f"order='test_own_sampler:{name}': {message}"):
        go(tmp_path, settings(order=f"test_own_sampler:{name}", stage_steps=2))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "absent.module:Sampler",
            "absent.module cannot be imported .*Install it or add its folder to PYTHONPATH",
        ),
        ("test_own_sampler:Absent", "test_own_sampler has no class 'Absent'. Name a class"),
        ("test_own_sampler:OWN", "test_own_sampler has no class 'OWN'"),
        ("test_own_sampler:Blind", "the class has no method observe, metrics. A sampler has draw"),
    ],
)
def test_a_path_to_no_sampler_is_refused_before_any_rollout(tmp_path, path, message):
    with pytest.raises(ValueError, match=f"order='{path}': {message}"):
        find_sampler(path)
    with pytest.raises(ValueError, match=message):
        go(tmp_path, settings(order=path))


@pytest.mark.parametrize("order", ["adaptiv", "module.Class", ":", "package.module:", 3])
def test_a_name_of_no_order_is_refused(order):
    with pytest.raises(ValueError, match=r"choose one of 'auto'.*or name a sampler of your own"):
        LearnAlignConfig.adaptive(order=order)


def test_the_plan_names_it(capsys):
    plan.main(["--pool_size", "100", "--order", THOMPSON])
    assert f"Order of {THOMPSON}: no additional rollouts" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.main(["--pool_size", "100", "--order", "absent:Sampler"])


def test_thompson_sampling_comes_to_prefer_mixed_prompts():
    inputs = SamplerInputs(
        cases.dataset(40),
        np.arange(40),
        "stage_1",
        4,
        10,
        0,
        LearnAlignConfig.adaptive(order=THOMPSON),
    )
    sampler = find_sampler(THOMPSON)(inputs)
    right = np.where(np.arange(40) % 2, 2, 4)  # odd rows teach
    for step in range(12):
        rows = sampler.draw(step, 10)
        sampler.observe(Outcomes.at(step, rows, right[rows], 4 - right[rows]))
    assert (sampler.draw(12, 10) % 2).mean() >= 0.8
    assert sampler.metrics() == {"sampler/tried": 0.9}


def test_the_shuffled_sampler_goes_pass_by_pass():
    config = LearnAlignConfig.control(stage_epochs=2)
    plan: Plan = make_plan(config, 12, Geometry(4, 4, 1, 1))
    (stage,) = plan.stages
    sampler = ShuffledSampler(plan, stage, np.arange(12), 0)
    drawn = [sampler.draw(step, 4) for step in range(6)]
    for number in (0, 1):
        assert sorted(np.concatenate(drawn[3 * number : 3 * number + 3])) == list(range(12))


@pytest.mark.parametrize("size", [12, 13, 15, 1001])
def test_spare_prompts_are_from_the_whole_pool_whatever_the_epoch_has_drawn(size):
    """A pass leaves out what does not fill a generation; it must not be all that dynamic sampling gets."""
    config = LearnAlignConfig.control(stage_epochs=1)
    plan: Plan = make_plan(config, size, Geometry(4, 4, 1, 1))
    (stage,) = plan.stages
    sampler = ShuffledSampler(plan, stage, np.arange(size), 0)
    generations = size // 4
    drawn = sampler.draw(0, 4 * generations).reshape(generations, 4)
    spare = sampler.spare(0, drawn, 8)
    assert spare.shape == (generations, 8)
    counts = np.bincount(spare.ravel(), minlength=size)
    assert counts.max() <= 3
    assert np.mean(counts > 0) > 0.7
    for own, more in zip(drawn, spare, strict=True):
        assert len(set(more.tolist())) == 8
        assert not np.isin(more, own).any()


def test_of_a_pool_without_other_prompts_spare_ones_repeat():
    config = LearnAlignConfig.control(stage_epochs=1)
    plan: Plan = make_plan(config, 4, Geometry(4, 4, 1, 1))
    sampler = ShuffledSampler(plan, plan.stages[0], np.arange(4), 0)
    (spare,) = sampler.spare(0, np.arange(4)[np.newaxis], 8)
    assert np.bincount(spare).tolist() == [2, 2, 2, 2]
