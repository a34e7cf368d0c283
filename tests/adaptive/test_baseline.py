"""Advantages against the belief: by a second implementation, in the limits, and without bias where it is promised."""

import math

import baselines
import numpy as np
import pytest

from trl_learnalign.adaptive.baseline import BeliefBaseline, beyond_others
from trl_learnalign.adaptive.belief import Posterior

SHAPES = {"pairs": (6, 2, 1), "several rewards": (5, 4, 3), "one prompt": (1, 3, 2)}


def estimator(count, **options):
    given = dict(
        success=count - 1,
        weights=np.linspace(1, 0.3, count),
        scaled=True,
        scaled_each=False,
        share=0.25,
        roulette=False,
    )
    return BeliefBaseline(**{**given, **options})


def case(shape, seed, missing=0.2):
    """Rewards of all kinds, the last function's 0 or 1 but for some, and a belief."""
    generator = np.random.default_rng(seed)
    rewards = generator.normal(size=shape).round(1)
    rewards[..., -1] = generator.integers(0, 2, shape[:2])
    rewards[0, :, -1] = [0.2, 0.9, 0.2, 0.7][: shape[1]]
    rewards[generator.random(shape) < missing] = np.nan
    belief = Posterior(*generator.uniform(0.01, 9, (2, shape[0])))
    return rewards, outcomes(rewards), belief


def outcomes(rewards):
    decides = rewards[..., -1]
    return np.where(np.isnan(decides), np.nan, (decides > 0.5).astype(float))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 1e-12])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", [(True, False), (False, False), (True, True)])
def test_advantages_are_those_of_plain_loops(shape, scales, share):
    scaled, each = scales
    for seed in range(5):
        rewards, successes, belief = case(SHAPES[shape], seed)
        own = estimator(rewards.shape[2], scaled=scaled, scaled_each=each, share=share)
        expected = baselines.advantages(
            rewards.tolist(),
            own.success,
            belief.right.tolist(),
            belief.wrong.tolist(),
            own.weights.tolist(),
            scaled=scaled,
            scaled_each=each,
            share=share,
        )
        found = own.advantages(rewards, successes, belief, 0)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_without_a_belief_advantages_are_trls_up_to_one_factor():
    rewards, successes, belief = case((7, 4, 2), 1, missing=0.0)
    nothing = Posterior(np.full(7, 1e-12), np.full(7, 1e-12))
    own = estimator(2, scaled=False, share=1.0)
    total = rewards @ own.weights
    expected = total - total.mean(axis=1, keepdims=True)
    found = own.advantages(rewards, successes, nothing, 0)
    np.testing.assert_allclose(found, expected * 4 / 3, atol=1e-9)
    assert np.abs(own.advantages(rewards, successes, belief, 0) - expected * 4 / 3).max() > 0.05


def test_a_certain_belief_is_the_baseline_of_every_group():
    rewards = np.array([[[1.0], [1.0]], [[0.0], [0.0]], [[1.0], [0.0]]])
    certain = Posterior(np.array([0.9e9, 0.25e9, 0.5e9]), np.array([0.1e9, 0.75e9, 0.5e9]))
    own = estimator(1, scaled=False, share=1.0)
    found = own.advantages(rewards, rewards[..., 0], certain, 0)
    np.testing.assert_allclose(found, [[0.1, 0.1], [-0.25, -0.25], [0.5, -0.5]], atol=1e-6)


def test_equal_rewards_that_nobody_predicts_have_no_advantage():
    values = np.full((3, 8, 1), 0.1) * np.array([1.0, 3.0, 7.0]).reshape(3, 1, 1)
    assert (beyond_others(values) == 0).all()
    unknown = np.full((3, 8), np.nan)
    flat = Posterior(np.ones(3), np.ones(3))
    both = np.concatenate([values, unknown[..., None]], axis=2)
    assert (estimator(2, share=1.0).advantages(both, unknown, flat, 0) == 0).all()


def test_roulette_has_the_mean_of_what_it_prunes_and_dropping_has_not():
    rewards, successes, belief = case((6, 2, 1), 3)
    whole, dropped, drawn = (
        estimator(1, share=share, roulette=roulette)
        for share, roulette in ((1.0, False), (0.4, False), (0.4, True))
    )
    expected = whole.advantages(rewards, successes, belief, 0)
    streams = [drawn.advantages(rewards, successes, belief, stream) for stream in range(1, 4001)]
    draws = np.array(streams)
    judged = np.isfinite(rewards).any(axis=2)
    least = np.sort(np.abs(expected[judged]))[-math.ceil(0.4 * judged.sum())]
    small = (np.abs(expected) < least) & (expected != 0)
    assert 3 <= small.sum() < expected.size
    errors = draws.std(axis=0)[small] / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - expected)[small] < 4 * errors).all()
    assert (draws[:, ~small] == expected[~small]).all()
    assert set(np.abs(draws[:, small]).round(12).flatten()) == {0.0, least.round(12)}
    bias = np.abs(dropped.advantages(rewards, successes, belief, 0) - expected)[small]
    assert (bias > 4 * errors).all()


def test_where_all_rollouts_surprise_equally_none_is_pruned():
    """Whatever the share: a multiple of the root mean square above 1 would leave nothing to train on."""
    rewards = np.array([[[1.0], [0.0]]] * 8)
    even = Posterior(np.full(8, 2.0), np.full(8, 2.0))
    found = estimator(1, share=0.1).advantages(rewards, rewards[..., 0], even, 0)
    np.testing.assert_allclose(np.abs(found), np.ones((8, 2)))


def test_the_most_surprising_rollouts_are_kept():
    """Sixteen prompts believed to be solved, one of which fails."""
    rewards = np.ones((16, 2, 1))
    rewards[3] = 0
    sure = Posterior(np.full(16, 9.0), np.full(16, 1.0))
    found = estimator(1, share=1 / 16).advantages(rewards, rewards[..., 0], sure, 0)
    assert np.flatnonzero(found.any(axis=1)).tolist() == [3]


def test_the_gradient_has_no_bias_whatever_is_believed():
    """Coins of known chance: the mean of advantage times score is the gradient of the success rate, p(1 - p)."""
    generator = np.random.default_rng(0)
    chance, prompts = 0.3, 40_000
    wins = (generator.random((prompts, 2)) < chance).astype(float)
    score = wins - chance  # derivative of a coin's log-probability by its logit
    for right, wrong in ((8.0, 1.0), (0.1, 0.1), (3.0, 7.0)):
        belief = Posterior(np.full(prompts, right), np.full(prompts, wrong))
        own = estimator(1, scaled=False, share=1.0)
        values = own.advantages(wins[..., None], wins, belief, 0) * score
        error = values.mean(axis=1).std() / np.sqrt(prompts)
        assert abs(values.mean() - chance * (1 - chance)) < 4 * error


def test_a_right_belief_explains_what_the_group_cannot():
    generator = np.random.default_rng(1)
    chances = generator.choice([0.1, 0.9], 20_000)
    wins = (generator.random((20_000, 2)) < chances[:, None]).astype(float)
    right = Posterior(chances * 1e6, (1 - chances) * 1e6)
    by_belief, by_group = estimator(1).explained(wins[..., None], wins, right)
    # Variances: 0.25 in all, 0.09 around the chances, and twice that between two rollouts of a prompt.
    assert by_belief == pytest.approx(1 - 0.09 / 0.25, abs=0.02)
    assert by_group == pytest.approx(1 - 0.18 / 0.25, abs=0.03)


def test_equal_rewards_have_no_variance_to_explain():
    ones = np.ones((3, 2, 1))
    flat = Posterior(np.ones(3), np.ones(3))
    assert estimator(1).explained(ones, ones[..., 0], flat) is None
    nothing = np.full((3, 2, 1), np.nan)
    assert estimator(1).explained(nothing, nothing[..., 0], flat) is None
