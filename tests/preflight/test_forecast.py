import cases
import pytest
from adaptive_cases import go, history, settings
from sampling_cases import right_reward

from trl_learnalign import LearnAlignConfig
from trl_learnalign.plan import Geometry, make_plan
from trl_learnalign.preflight import checks
from trl_learnalign.preflight.forecast import make_forecast
from trl_learnalign.selectors import find_selector


def forecast(pool_size=100, selector="learnalign", geometry=None, **options):
    counts = {
        name: options.pop(name) for name in ("iterations", "beta", "held_out") if name in options
    }
    config = LearnAlignConfig(**{"warmup_samples": 10, "selector": selector, **options})
    plan = make_plan(config, pool_size, geometry or Geometry(10, 8, 1, 1))
    return counted(plan, config, max_completion_length=5, **counts)


def counted(plan, config, **options):
    selectors = [find_selector(name) for name in config.selectors]
    return make_forecast(plan, config, selectors, **options)


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


ALL_MAY_GO = dict(stages=[1.0], warmup_samples=0, on_shortfall="shrink")
"""Scored although it takes the whole pool: it may turn out shorter."""


def test_shares_of_compute():
    found = forecast(**ALL_MAY_GO)  # as many rollouts to score as to train
    assert found.scoring_share(0.0) == pytest.approx(1 / (1 + 4))
    assert found.scoring_share(1.0) == pytest.approx(0.5)
    assert forecast(**ALL_MAY_GO, beta=0.1).scoring_share(1.0) == pytest.approx(0.5)
    twice = forecast(**ALL_MAY_GO, iterations=2)
    assert twice.scoring_share(1.0) == pytest.approx(4 / (4 + 7))
    dear = forecast(**ALL_MAY_GO, generation_price=8)
    assert dear.scoring_share(0.0) == pytest.approx(8 / (8 + 11))
    assert dear.as_dict()["totals"]["generation_price"] == 8
    eighth = forecast(**ALL_MAY_GO, gradient_rollouts="one_correct")
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
    # A budget counts of each stage's candidates.
    budget = forecast(rollout_budget=0.25, skip_forced_scoring=True)
    assert [phase.measured for phase in budget.phases] == [0, 25, 12, 0]
    assert [phase.scoring_rollouts for phase in budget.phases] == [0, 200, 96, 0]
    assert forecast(rollout_budget=0.25).phases[-1].measured == 5
    assert budget.prompts_read == 100
    assert forecast(selector="random", rollout_budget=0.25).scoring_rollouts == 0
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


# ---- Continual selection --------------------------------------------------------------------------------------------

CONTINUAL = dict(stages=[1.0], warmup_samples=0, order="adaptive")


def test_an_adaptive_order_of_the_whole_pool_scores_nothing_and_reads_each_prompt_once():
    found = forecast(**CONTINUAL)
    assert found.scoring_rollouts == found.scoring_share(1.0) == found.feature_bytes == 0
    assert found.prompts_read == 100
    assert forecast(**CONTINUAL, adaptive_embeddings="none").prompts_read == 0
    assert forecast().prompts_read == 0


@pytest.mark.parametrize("order", ["adaptive", "shuffled", ["adaptive", "shuffled"]])
def test_only_the_paper_scores_a_stage_that_takes_all_that_is_left(order):
    options = dict(stages=[0.5, 0.5], order=order, selector="learnability")
    found = forecast(**options)
    assert [phase.measured for phase in found.phases] == [0, 100, 50]
    plain = LearnAlignConfig.adaptive(**options)
    found = counted(make_plan(plain, 100, Geometry(10, 8, 1, 1)), plain, max_completion_length=5)
    assert [phase.measured for phase in found.phases] == [100, 0]


def test_dynamic_sampling_has_two_bounds():
    found = forecast(**CONTINUAL, oversample=1.25, max_generation_batches=3)
    assert found.training_rollouts == 100 * 8
    assert found.least_rolled_out == 10 * 13 * 8  # 2.5 prompts besides, rounded up
    assert found.most_rolled_out == 10 * (13 + 2 * 10) * 8
    assert found.max_completion_tokens == found.most_rolled_out * 5
    plain = forecast(**CONTINUAL)
    assert plain.least_rolled_out == plain.most_rolled_out == plain.training_rollouts


def test_scoring_weighs_less_where_more_is_rolled_out_for_training():
    low, high = forecast(**ALL_MAY_GO, max_generation_batches=3).scoring_share_bounds
    assert high == forecast(**ALL_MAY_GO).scoring_share(1.0)
    assert low == pytest.approx(
        1 / (1 + 3 + 3)
    )  # three rollouts and an update for each that is scored


@pytest.mark.parametrize("options", [{"oversample": 1.25}, {"max_generation_batches": 3}])
def test_real_runs_keep_within_the_bounds(tmp_path, options):
    config = settings(stage_steps=4, adaptive_embeddings="none", **options)
    _, callback = go(tmp_path, config, save_strategy="no")
    found = counted(callback.plan, config, max_completion_length=1)
    rollouts = 4 * len(history(callback))
    assert found.least_rolled_out <= rollouts <= found.most_rolled_out
    if "oversample" in options:
        assert found.least_rolled_out == rollouts == found.most_rolled_out


def test_the_worst_pool_takes_the_most(tmp_path):
    config = settings(stage_steps=4, adaptive_embeddings="none", max_generation_batches=3)
    _, callback = go(tmp_path, config, save_strategy="no", rewards=nothing_right)
    found = counted(callback.plan, config, max_completion_length=1)
    assert 4 * len(history(callback)) == found.most_rolled_out == 3 * found.training_rollouts


def nothing_right(completions, **_):
    return [0.0] * len(completions)


def test_processes_fill_a_batch_up_to_share_it_evenly():
    config = LearnAlignConfig(**CONTINUAL, oversample=1.1)
    plan = make_plan(config, 100, Geometry(10, 4, 1, 1))
    made = [
        counted(plan, config, max_completion_length=1, processes=processes).least_rolled_out
        for processes in (1, 8, 24)
    ]
    # 11 prompts of 4 rollouts; for 8 processes 12 prompts; for 24, 6 processes share 4 prompts evenly: 16.
    assert made == [10 * 11 * 4, 10 * 12 * 4, 10 * 16 * 4]


def test_the_trainers_own_order_has_the_trainers_own_length(tmp_path):
    def steps(**options):
        args = cases.grpo_config(tmp_path, **options)
        config = LearnAlignConfig(stages=[1.0], warmup_samples=0, order="trainer")
        return checks.plan_run(config, args, cases.dataset(25), right_reward).total_steps

    def trained(**options):
        trainer = cases.trainer(tmp_path, data=cases.dataset(25), **options)
        trainer.train()
        return trainer.state.global_step

    for options in ({"max_steps": 3}, {"num_train_epochs": 2, "max_steps": -1}):
        assert steps(**options) == trained(**options)
