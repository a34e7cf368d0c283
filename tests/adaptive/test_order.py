"""The order: which prompts come next, as a function of belief, pool, seed and generation."""

import math
from collections import Counter

import numpy as np
import pytest

from trl_learnalign.adaptive.belief import Belief, Outcomes
from trl_learnalign.adaptive.order import AdaptiveOrder, most_worthwhile, winning
from trl_learnalign.adaptive.settings import AdaptiveSettings

PROMPTS = 200
RATES = np.repeat([0.0, 1.0, 0.5, 0.1], 50)  # hopeless, solved, learnable, rare


def order_of(settings=None, pool=None, count=8, seed=3, name="stage_1"):
    pool = np.arange(PROMPTS) if pool is None else pool
    return AdaptiveOrder(pool, count, settings or AdaptiveSettings(candidates=10), seed, name)


def train(order, generations, rates=RATES, settings=None, seed=0, oracle=False):
    """Draw, roll out, record: what was drawn, and the belief."""
    rng = np.random.default_rng(seed)
    belief = Belief(np.empty((len(rates), 0)), settings or order.settings)
    drawn = []
    for generation in range(generations):
        rows = order.draw(belief, generation)
        right = rng.binomial(8, rates[rows])
        belief.record(Outcomes(generation, rows, right, 8 - right))
        drawn.append(rows)
    return drawn, belief


def test_a_generation_has_different_prompts_of_the_pool():
    pool = np.arange(5, PROMPTS, 3)
    drawn, _ = train(order_of(pool=pool), 30)
    for rows in drawn:
        assert len(set(rows.tolist())) == 8
        assert np.isin(rows, pool).all()


def test_learnable_prompts_are_preferred_and_every_prompt_has_its_turn():
    drawn, _ = train(order_of(), 150)
    late = Counter(int(row) // 50 for rows in drawn[75:] for row in rows)
    assert late[2] > 0.5 * 75 * 8  # a quarter of the pool
    assert late[2] > 2 * late[3] > 2 * max(late[0], late[1])
    # Candidates come by until all of them have been looked at: nothing is forgotten.
    passed = set()
    for generation in range(3):
        passed |= set(order_of().candidates(generation).tolist())
    assert passed == set(range(PROMPTS))


def test_one_candidate_for_each_place_is_the_shuffled_pool():
    drawn, _ = train(order_of(AdaptiveSettings(candidates=1, cool_down=0)), 50)
    passes = np.concatenate(drawn).reshape(2, PROMPTS)
    for own in passes:
        np.testing.assert_array_equal(np.sort(own), np.arange(PROMPTS))
    assert (passes[0] != passes[1]).any()


def test_prompts_rest_after_they_were_rolled_out():
    settings = AdaptiveSettings(candidates=50, cool_down=5)
    drawn, _ = train(order_of(settings), 40)
    for generation, rows in enumerate(drawn):
        recent = np.concatenate(
            [np.empty(0, dtype=int), *drawn[max(0, generation - 5) : generation]]
        )
        assert not np.isin(rows, recent).any()
    again = [
        np.isin(rows, drawn[generation - 6]).any()
        for generation, rows in enumerate(drawn)
        if generation > 5
    ]
    assert any(again)


@pytest.mark.parametrize("prompts", [8, 9, 15, 16, 40])
@pytest.mark.parametrize("candidates", [1, 3, 100])
def test_pools_too_small_to_rest_still_have_their_generations(prompts, candidates):
    settings = AdaptiveSettings(candidates=candidates, cool_down=20)
    drawn, _ = train(order_of(settings, pool=np.arange(prompts)), 60)
    assert all(len(set(rows.tolist())) == 8 for rows in drawn)
    assert set(np.concatenate(drawn).tolist()) == set(range(prompts))


def test_of_a_small_pool_learnable_prompts_are_preferred_too():
    rates = np.repeat([0.0, 0.5], 20)
    settings = AdaptiveSettings(candidates=100, cool_down=20)
    drawn, _ = train(order_of(settings, pool=np.arange(40)), 60, rates)
    late = np.concatenate(drawn[30:])
    assert (late >= 20).mean() > 0.65


def test_the_first_share_of_exploration_falls_to_the_last():
    settings = AdaptiveSettings(
        candidates=10, first_exploration=1.0, exploration=0.25, exploration_generations=40
    )
    order = order_of(settings)
    free = [order._free_places(generation) for generation in range(2000)]
    assert free[0] == 8
    assert np.mean(free[18:23]) == pytest.approx(8 * 0.625, abs=0.5)
    assert np.mean(free[40:]) == pytest.approx(2, abs=0.05)
    # What is explored is what comes by first.
    drawn = order.draw(Belief(np.empty((PROMPTS, 0)), settings), 0)
    np.testing.assert_array_equal(drawn, order.candidates(0)[:8])


def test_a_rounded_share_is_right_on_average():
    order = order_of(AdaptiveSettings(exploration=0.3), count=1)
    assert np.mean([order._free_places(generation) for generation in range(4000)]) == pytest.approx(
        0.3, abs=0.03
    )


def test_the_draw_is_a_function_of_belief_pool_seed_and_generation():
    features = np.random.default_rng(0).normal(size=(PROMPTS, 5))
    settings = AdaptiveSettings(candidates=6)
    rng = np.random.default_rng(1)
    past = []
    for generation in range(10):
        right = rng.integers(0, 9, 8)
        past.append(Outcomes(generation, rng.choice(PROMPTS, 8, replace=False), right, 8 - right))
    belief, again = Belief.replay(features, settings, past), Belief.replay(features, settings, past)
    order, shuffled = order_of(settings), order_of(settings, pool=rng.permutation(PROMPTS))
    for generation in (30, 11, 12, 10):  # asked in any order
        rows = order.draw(belief, generation)
        np.testing.assert_array_equal(shuffled.draw(again, generation), rows)
        np.testing.assert_array_equal(order_of(settings).draw(belief, generation), rows)
    others = [order_of(settings, seed=4), order_of(settings, name="stage_2")]
    for other in others:
        assert (other.draw(belief, 10) != order.draw(belief, 10)).any()
    assert (order.draw(belief, 13) != order.draw(belief, 10)).any()


def test_an_interrupted_run_draws_what_it_would_have_drawn():
    settings = AdaptiveSettings(candidates=6)
    drawn, _ = train(order_of(settings), 25)
    rng = np.random.default_rng(0)  # the same rollouts again
    past = []
    for generation, rows in enumerate(drawn):
        belief = Belief.replay(np.empty((PROMPTS, 0)), settings, past)
        np.testing.assert_array_equal(order_of(settings).draw(belief, generation), rows)
        right = rng.binomial(8, RATES[rows])
        past.append(Outcomes(generation, rows, right, 8 - right))


def test_the_largest_values_win_if_sharpness_is_infinite():
    values = np.array([0.1, 0.25, 0.0, 0.25, 0.2])
    np.testing.assert_array_equal(winning(values, np.full(5, 0.5), 3, math.inf), [1, 3, 4])
    np.testing.assert_array_equal(
        winning(values, np.array([0.5, 0.9, 0.5, 0.1, 0.5]), 2, math.inf), [3, 1]
    )


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_finite_sharpness_draws_in_proportion_to_its_power(sharpness):
    values = np.array([0.05, 0.1, 0.25, 0.0])
    rng = np.random.default_rng(0)
    wins = Counter(int(winning(values, rng.random(4), 1, sharpness)[0]) for _ in range(8000))
    wanted = values**sharpness / (values**sharpness).sum()
    for place in range(4):
        assert wins[place] / 8000 == pytest.approx(wanted[place], abs=0.02)


def test_renamed_candidates_have_renamed_winners():
    rng = np.random.default_rng(0)
    values, noise, order = rng.random(40), rng.random(40), rng.permutation(40)
    for sharpness in (2.0, math.inf):
        plain = winning(values, noise, 9, sharpness)
        renamed = winning(values[order], noise[order], 9, sharpness)
        np.testing.assert_array_equal(order[renamed], plain)


def test_after_oversampling_the_groups_worth_most_are_kept_in_their_order():
    right = np.array([8, 4, 0, 1, 5, 3])
    np.testing.assert_array_equal(most_worthwhile(right, 8 - right, 3, 0.0), [1, 4, 5])
    np.testing.assert_array_equal(most_worthwhile(right, 8 - right, 5, 0.0), [0, 1, 3, 4, 5])
    # With headroom, one right of eight is worth more than five.
    np.testing.assert_array_equal(most_worthwhile(right, 8 - right, 3, 2.0), [1, 3, 5])
    unjudged = np.zeros(3, dtype=int)
    np.testing.assert_array_equal(most_worthwhile(unjudged, unjudged, 2, 1.0), [0, 1])


def test_pools_that_cannot_fill_a_generation_are_refused():
    with pytest.raises(
        ValueError, match="generation of 8 prompts was asked of a pool of 7: enlarge the pool"
    ):
        order_of(pool=np.arange(7))
    with pytest.raises(ValueError, match="pool lists 2 prompts twice"):
        order_of(pool=np.array([*range(20), 3, 4]))
