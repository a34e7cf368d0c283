"""The order: which prompts come next, as a function of belief, pool, seed and generation."""

from collections import Counter

import numpy as np
import pytest

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import Belief
from trl_learnalign.adaptive.order import AdaptiveOrder, expected_gain
from trl_learnalign.config import LearnAlignConfig

PROMPTS = 200
RATES = np.repeat([0.0, 1.0, 0.5, 0.1], 50)  # hopeless, solved, learnable, rare


def order_of(settings=None, pool=None, count=8, seed=3, name="stage_1"):
    pool = np.arange(PROMPTS) if pool is None else pool
    return AdaptiveOrder(
        pool,
        count,
        settings or LearnAlignConfig.adaptive(adaptive_candidates_per_slot=10),
        seed,
        name,
    )


def train(order, generations, rates=RATES, settings=None, seed=0, oracle=False):
    """Draw, roll out, record: what was drawn, and the belief."""
    rng = np.random.default_rng(seed)
    belief = Belief(np.empty((len(rates), 0)), settings or order.config)
    drawn = []
    for generation in range(generations):
        rows = order.draw(belief, generation)
        right = rng.binomial(8, rates[rows])
        belief.record(Outcomes.at(generation, rows, right, 8 - right), generation)
        drawn.append(rows)
    return drawn, belief


def replay(features, settings, past):
    """The belief that these outcomes lead to."""
    belief = Belief(features, settings)
    for outcomes in past:
        belief.record(outcomes, outcomes.step)
    return belief


def test_prompts_with_the_same_mean_are_drawn_by_their_variance():
    settings = LearnAlignConfig.adaptive(adaptive_exploration=0.0, adaptive_cool_down=0)
    belief = Belief(np.empty((PROMPTS, 0)), settings)
    rows, half = np.arange(PROMPTS), np.full(PROMPTS, 4.0)
    # Of 8 rollouts: all earn one half, or half of them all and half of them nothing.
    partial = np.where(rows % 2, 2.0, 0.0)
    belief.record(Outcomes.at(0, rows, half, half, partial=partial), 0)
    order = order_of(settings)
    drawn = np.concatenate([order.draw(belief, generation) for generation in range(1, 21)])
    assert np.mean(drawn % 2) < 0.1


@pytest.mark.parametrize("exploration", [0.0, 0.5, 1.0])
def test_a_generation_has_different_prompts_of_the_pool(exploration):
    pool = np.arange(5, PROMPTS, 3)
    drawn, _ = train(
        order_of(LearnAlignConfig.adaptive(adaptive_exploration=exploration), pool=pool), 30
    )
    for rows in drawn:
        assert len(set(rows.tolist())) == 8
        assert np.isin(rows, pool).all()


def test_learnable_prompts_are_preferred():
    drawn, _ = train(order_of(), 150)
    late = Counter(int(row) // 50 for rows in drawn[75:] for row in rows)
    assert late[2] > 0.35 * 75 * 8  # a quarter of the pool, and half of the places is competed for
    assert min(late[2], late[3]) > max(late[0], late[1])


def test_without_headroom_rates_of_one_half_are_preferred_and_with_it_lower_ones():
    rates = np.repeat([0.25, 0.6], 100)
    shares = []
    for headroom in (0.0, 4.0):
        drawn, _ = train(
            order_of(
                LearnAlignConfig.adaptive(adaptive_gain_exponent=headroom, adaptive_exploration=0.0)
            ),
            100,
            rates,
        )
        shares.append((np.concatenate(drawn[50:]) < 100).mean())
    assert shares[0] < 0.5 < shares[1]


def test_the_explored_share_goes_through_the_whole_pool_pass_after_pass():
    order = order_of(LearnAlignConfig.adaptive(adaptive_exploration=0.5))
    explored = np.concatenate([order.explored(generation) for generation in range(100)]).reshape(
        2, PROMPTS
    )
    for own in explored:
        np.testing.assert_array_equal(np.sort(own), np.arange(PROMPTS))
    assert (explored[0] != explored[1]).any()
    drawn, _ = train(order, 20)
    for generation, rows in enumerate(drawn):
        np.testing.assert_array_equal(rows[:4], order.explored(generation))


def test_everything_explored_is_the_shuffled_pool():
    drawn, _ = train(order_of(LearnAlignConfig.adaptive(adaptive_exploration=1.0)), 50)
    for own in np.concatenate(drawn).reshape(2, PROMPTS):
        np.testing.assert_array_equal(np.sort(own), np.arange(PROMPTS))


@pytest.mark.parametrize("share", [0.3, 0.55])
def test_a_share_that_is_no_whole_number_is_right_on_average(share):
    order = order_of(LearnAlignConfig.adaptive(adaptive_exploration=share), count=5)
    counts = [len(order.explored(generation)) for generation in range(400)]
    assert sum(counts) == pytest.approx(
        400 * 5 * share, abs=400 * 5 / PROMPTS
    )  # but for seams of two passes
    assert max(counts) - min(counts) <= 2


def test_every_prompt_has_its_turn_as_a_candidate():
    order = order_of(LearnAlignConfig.adaptive(adaptive_candidates_per_slot=10))
    passed = set()
    for generation in range(PROMPTS // (4 * 10)):
        passed |= set(order.candidates(generation).tolist())
    assert passed == set(range(PROMPTS))


def test_prompts_do_not_compete_while_they_rest():
    drawn, _ = train(
        order_of(LearnAlignConfig.adaptive(adaptive_candidates_per_slot=50, adaptive_cool_down=5)),
        40,
    )
    for generation, rows in enumerate(drawn):
        recent = np.concatenate(
            [np.empty(0, dtype=int), *drawn[max(0, generation - 5) : generation]]
        )
        assert not np.isin(rows[4:], recent).any()
    again = [
        np.isin(rows[4:], drawn[generation - 6]).any()
        for generation, rows in enumerate(drawn)
        if generation > 5
    ]
    assert any(again)


@pytest.mark.parametrize("prompts", [8, 9, 15, 16, 40])
@pytest.mark.parametrize("exploration", [0.0, 0.5])
@pytest.mark.parametrize("candidates", [1, 3, 100])
def test_pools_too_small_to_rest_still_have_their_generations(prompts, candidates, exploration):
    settings = LearnAlignConfig.adaptive(
        adaptive_candidates_per_slot=candidates,
        adaptive_cool_down=20,
        adaptive_exploration=exploration,
    )
    drawn, _ = train(order_of(settings, pool=np.arange(prompts)), 60)
    assert all(len(set(rows.tolist())) == 8 for rows in drawn)
    assert set(np.concatenate(drawn).tolist()) == set(range(prompts))


def test_of_a_small_pool_learnable_prompts_are_preferred_too():
    rates = np.repeat([0.0, 0.5], 20)
    settings = LearnAlignConfig.adaptive(
        adaptive_candidates_per_slot=100, adaptive_cool_down=20, adaptive_exploration=0.25
    )
    drawn, _ = train(order_of(settings, pool=np.arange(40)), 60, rates)
    late = np.concatenate(drawn[30:])
    assert (late >= 20).mean() > 0.6


def test_the_draw_is_a_function_of_belief_pool_seed_and_generation():
    features = np.random.default_rng(0).normal(size=(PROMPTS, 5))
    settings = LearnAlignConfig.adaptive(adaptive_candidates_per_slot=6)
    rng = np.random.default_rng(1)
    past = []
    for generation in range(10):
        right = rng.integers(0, 9, 8)
        past.append(
            Outcomes.at(generation, rng.choice(PROMPTS, 8, replace=False), right, 8 - right)
        )
    belief, again = replay(features, settings, past), replay(features, settings, past)
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
    settings = LearnAlignConfig.adaptive(adaptive_candidates_per_slot=6)
    drawn, _ = train(order_of(settings), 25)
    rng = np.random.default_rng(0)  # the same rollouts again
    past = []
    for generation, rows in enumerate(drawn):
        belief = replay(np.empty((PROMPTS, 0)), settings, past)
        np.testing.assert_array_equal(order_of(settings).draw(belief, generation), rows)
        right = rng.binomial(8, RATES[rows])
        past.append(Outcomes.at(generation, rows, right, 8 - right))


def test_worth_is_learnability_times_what_is_left_to_gain():
    rates = np.linspace(0, 1, 301)
    np.testing.assert_allclose(expected_gain(rates, 0.0), rates * (1 - rates))
    assert rates[np.argmax(expected_gain(rates, 1.0))] == pytest.approx(1 / 3)
    assert expected_gain(np.array([0.0, 1.0]), 1.0).tolist() == [0, 0]
