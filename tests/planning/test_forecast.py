import pytest

from trl_learnalign import LearnAlignConfig
from trl_learnalign.curriculum import Geometry, make_plan
from trl_learnalign.planning.forecast import make_forecast
from trl_learnalign.selectors import find_selector


def forecast(pool_size=100, selector="learnalign", geometry=None, **options):
    counts = {
        name: options.pop(name) for name in ("iterations", "beta", "held_out") if name in options
    }
    config = LearnAlignConfig(**{"warmup_samples": 10, "selector": selector, **options})
    plan = make_plan(config, pool_size, geometry or Geometry(10, 8, 1, 1))
    return make_forecast(
        plan,
        config,
        [find_selector(name) for name in config.selectors],
        max_completion_length=5,
        **counts,
    )


def test_the_papers_stages_score_the_pool_one_point_seven_times():
    found = forecast()
    assert [phase.measured for phase in found.phases] == [0, 100, 50, 20]
    assert found.scoring_rollouts == 170 * 8
    assert found.training_rollouts == 110 * 8
    assert found.steps == 11
    assert found.feature_bytes == 170 * 8192 * 4


def test_rollouts_count_the_wrap_around_of_the_last_generation():
    found = forecast(pool_size=95, stages=[1.0], warmup_samples=0)
    assert found.training_rollouts == 100 * 8


def test_steps_that_share_a_generation_do_not_count_its_rollouts_again():
    # One generation feeds four optimizer steps.
    found = forecast(geometry=Geometry(10, 8, 4, 1), stages=[1.0], warmup_samples=0, iterations=2)
    assert found.steps == 40
    assert found.training_rollouts == 100 * 8


def test_shares_of_compute():
    found = forecast(stages=[1.0], warmup_samples=0)  # as many rollouts to score as to train
    assert found.scoring_share(0.0) == pytest.approx(1 / (1 + 4))
    assert found.scoring_share(1.0) == pytest.approx(0.5)
    assert forecast(stages=[1.0], warmup_samples=0, beta=0.1).scoring_share(1.0) == pytest.approx(
        0.5
    )
    twice = forecast(stages=[1.0], warmup_samples=0, iterations=2)
    assert twice.scoring_share(1.0) == pytest.approx(4 / (4 + 7))
    eighth = forecast(stages=[1.0], warmup_samples=0, gradient_rollouts="one_correct")
    assert eighth.scoring_share(1.0) == pytest.approx((1 + 3 / 8) / (1 + 3 / 8 + 4))


def test_what_is_not_measured_costs_nothing():
    assert forecast(selector="random").scoring_rollouts == 0
    assert forecast(selector="random").scoring_share(1.0) == 0
    assert forecast(selector="learnability").feature_bytes == 0
    assert forecast(selector="learnability").scoring_share(1.0) == forecast(
        selector="learnability"
    ).scoring_share(0.0)
    assert [phase.measured for phase in forecast(pool_sample=30).phases] == [0, 30, 30, 20]
    assert [phase.measured for phase in forecast(skip_forced_scoring=True).phases] == [
        0,
        100,
        50,
        0,
    ]
    mixed = forecast(selector=["learnalign", "random", "learnability"])
    assert [phase.scoring_rollouts for phase in mixed.phases] == [0, 800, 0, 160]
    assert [phase.captured_rollouts for phase in mixed.phases] == [0, 800, 0, 0]
    assert [phase.candidates for phase in forecast(reselect="all").phases] == [0, 100, 100, 100]


def test_the_unprojected_gradient_has_a_size_that_the_plan_does_not_know():
    assert forecast(projection="none").feature_bytes is None


def test_evaluation_before_the_first_phase_and_after_each():
    assert forecast(held_out=7).evaluation_rollouts == 5 * 7
    assert forecast(held_out=7).max_completion_tokens == (110 * 8 + 170 * 8 + 35) * 5
    assert forecast().evaluation_rollouts == 0
