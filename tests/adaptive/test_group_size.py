"""What G does to the share of mixed groups: exact expectations, simulated pools, and when a smaller G is named."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.order import fitted_share, group_sizes, mixed_share

GENERATOR = np.random.default_rng(0)
POOLS = {
    "even": np.full(4000, 0.5),
    "spread": GENERATOR.uniform(size=4000),
    "solved or hopeless": GENERATOR.choice([0.0, 0.4, 1.0], 4000, p=[0.5, 0.2, 0.3]),
    "hard": GENERATOR.beta(0.5, 8, 4000),
}


def truth(rates, size):
    return float((1 - rates**size - (1 - rates) ** size).mean())


def sizes_of(right, wrong, own, partial=None):
    return group_sizes(Outcomes.at(0, np.arange(len(right)), right, wrong, partial=partial), own)


def rolled_out(rates, count, seed=1):
    right = np.random.default_rng(seed).binomial(count, rates)
    return right, count - right


def test_the_estimate_is_the_share_of_all_choices_that_are_mixed():
    for right in range(7):
        outcomes = [1] * right + [0] * (6 - right)
        for size in (2, 4, 6):
            choices = list(itertools.combinations(outcomes, size))
            wanted = np.mean([0 < sum(choice) < size for choice in choices])
            found = mixed_share(np.array([right]), np.array([6 - right]), size)
            assert found == pytest.approx([wanted])


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.5, 0.9])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_it_is_unbiased_at_every_success_rate(rate, size):
    right = np.arange(9)
    estimates = mixed_share(right, 8 - right, size)
    expected = estimates @ binom.pmf(right, 8, rate)
    assert expected == pytest.approx(1 - rate**size - (1 - rate) ** size)


def test_a_group_of_fewer_rollouts_has_no_such_estimate():
    with pytest.raises(ValueError, match="size=4: a group has only 3 graded rollouts"):
        mixed_share(np.array([2, 1]), np.array([2, 2]), 4)


@pytest.mark.parametrize("rates", POOLS.values(), ids=POOLS)
def test_shares_of_a_pool_are_those_of_its_simulation(rates):
    found = sizes_of(*rolled_out(rates, 8), own=8)
    assert found.groups == 4000
    assert found.fitted == (16,)
    assert list(found.shares) == [2, 4, 8, 16]
    for size, share in found.shares.items():
        assert share == pytest.approx(truth(rates, size), abs=0.025)
        again, wrong = rolled_out(rates, size, seed=2)
        assert share == pytest.approx(((again > 0) & (wrong > 0)).mean(), abs=0.03)


def test_the_fit_is_of_counts_whose_order_does_not_matter():
    right, wrong = rolled_out(POOLS["spread"], 4)
    order = np.random.default_rng(3).permutation(len(right))
    assert fitted_share(right, wrong, 8) == fitted_share(right[order], wrong[order], 8)
    assert fitted_share(right, wrong, 8) == pytest.approx(fitted_share(wrong, right, 8), abs=0.01)


def test_a_smaller_size_is_named_where_it_gives_more_mixed_groups_beyond_chance():
    even = sizes_of(*rolled_out(np.full(64, 0.5), 8), own=8)
    assert even.smaller == 2
    gain = 8 * even.shares[2] / (2 * even.shares[8])
    assert f"num_generations=2 instead of 8 would give {gain:.1f} times as many" in even.advice
    assert even.lines == [even.line, even.advice]
    # All sizes give about as many for a rollout where hardly any is right.
    hard = sizes_of(*rolled_out(POOLS["hard"][:64], 8), own=8)
    assert hard.smaller is None
    assert hard.lines == [hard.line]
    # Two prompts are no evidence, and there is nothing below 2.
    assert sizes_of(np.array([4, 0]), np.array([4, 8]), own=8).smaller is None
    assert sizes_of(*rolled_out(np.full(64, 0.5), 2), own=2).smaller is None


def test_one_line_has_all_sizes():
    right = np.array([0, 1, 2, 3, 4, 2, 2, 1])
    found = sizes_of(right, 4 - right, own=4)
    share = mixed_share(right, 4 - right, 2).mean()
    assert found.line.startswith("Share of groups with both correct and wrong rollouts")
    assert f"{share:.0%} at 2, 75% at 4, " in found.line
    assert found.line.count(" by a fit") == 2
    assert found.line.endswith("(estimated from 8 groups of 4).")


def test_a_graded_reward_has_the_share_of_its_own_groups_alone():
    # Of 4 rollouts: all 1/2; half of them 1/4 and half of them 3/4; right and wrong ones.
    right, partial = np.array([2.0, 2.0, 2.0]), np.array([1.0, 0.75, 0.0])
    found = sizes_of(right, 4 - right, 4, partial)
    assert found.shares == {4: 2 / 3}
    assert found.lines == [found.line]
    assert found.line.startswith("Groups whose outcomes differ: 67% (from 3 groups of 4 rollouts")


def test_groups_without_a_judgement_are_left_out_and_nothing_is_said_of_one_outcome():
    right, wrong = np.array([1, 1, 0]), np.array([3, 0, 4])
    assert sizes_of(right, wrong, own=4).groups == 2
    assert sizes_of(np.array([0, 4]), np.array([4, 0]), own=4) is None
    assert sizes_of(np.array([1]), np.array([1]), own=4) is None
