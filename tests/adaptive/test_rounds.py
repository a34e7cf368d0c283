"""Whom a round of scoring rolls out: pure functions of the belief, the candidates and a key."""

import numpy as np
import pytest
from scipy import stats

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import Belief
from trl_learnalign.adaptive.order import (
    after_rounds,
    budget_size,
    round_sizes,
    sample_by_learnability,
)
from trl_learnalign.config import LearnAlignConfig

ROLLOUTS = 8
RATES = np.repeat([0.0, 0.1, 0.5, 0.9, 1.0], 80)
"""True success rates of a pool, kind by kind."""


def belief_of(rates, seen, seed=0):
    """What is believed of prompts of a few kinds, told apart by their features, once some were rolled out."""
    kinds = np.unique(rates, return_inverse=True)[1]
    features = np.eye(kinds.max() + 1, dtype=np.float32)[kinds]
    belief = Belief(features, LearnAlignConfig.adaptive())
    rows = np.asarray(seen)
    right = np.random.default_rng(seed).binomial(ROLLOUTS, rates[rows])
    belief.record(Outcomes.at(0, rows, right, ROLLOUTS - right), 0)
    return belief


@pytest.mark.parametrize("count", [1, 2, 7, 100, 2001])
@pytest.mark.parametrize("share", [1e-4, 0.1, 0.3, 0.4, 0.999, 1.0])
@pytest.mark.parametrize("rounds", [1, 2, 4, 9])
def test_the_rounds_add_up_to_the_budget_and_never_beyond(count, share, rounds):
    sizes = round_sizes(count, share, rounds)
    total = budget_size(count, share)
    assert sum(sizes) == total <= max(1, share * count + 1e-6)
    assert total > share * count - 1
    assert len(sizes) == min(rounds, total)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_a_share_is_what_it_says_in_floating_point():
    assert [budget_size(10 * number, number / 10) for number in range(1, 11)] == [
        number**2 for number in range(1, 11)
    ]


@pytest.mark.parametrize(("focus", "least"), [(0.0, 0.4), (2.0, 0.85), (100.0, 1.0)])
def test_what_is_solved_or_hopeless_is_left_alone(focus, least):
    belief = belief_of(RATES, np.arange(0, 400, 10))
    candidates = np.setdiff1d(np.arange(400), np.arange(0, 400, 10))
    rows = sample_by_learnability(belief, candidates, 60, focus, stream=3)
    assert len(set(rows.tolist())) == 60
    assert set(rows.tolist()) <= set(candidates.tolist())
    assert rows.tolist() == sorted(rows.tolist())
    useful = (RATES[rows] > 0) & (RATES[rows] < 1)
    assert useful.mean() >= least  # 0.6 of the pool
    assert (RATES[rows] == 0.5).all() == (focus == 100)


def test_prompts_are_drawn_in_proportion_to_what_is_expected_of_them():
    """Of two thousand draws of one prompt each: chi-squared against the probabilities that are promised."""
    rates = RATES[::20]
    belief = belief_of(rates, [4, 8])
    everybody = np.arange(len(rates))
    drawn = [
        int(sample_by_learnability(belief, everybody, 1, 2.0, stream)[0]) for stream in range(2000)
    ]
    weights = belief.posterior(everybody, 1).learnability ** 2
    expected = 2000 * weights / weights.sum()
    seen = np.bincount(drawn, minlength=len(rates))
    assert stats.chisquare(seen, expected).pvalue > 1e-3


def test_the_more_focus_the_fewer_kinds():
    belief = belief_of(RATES, np.arange(0, 400, 40))
    everybody = np.arange(400)
    kinds = [
        len(set(RATES[sample_by_learnability(belief, everybody, 60, focus, stream=5)]))
        for focus in (100.0, 1.0)
    ]
    assert kinds[0] < kinds[1]


def test_everybody_who_is_left_can_be_wanted():
    belief = belief_of(RATES, [0])
    assert sample_by_learnability(belief, np.arange(5, 9), 4, 2.0, stream=1).tolist() == [
        5,
        6,
        7,
        8,
    ]


def test_the_order_of_the_candidates_does_not_count():
    belief = belief_of(RATES, np.arange(0, 400, 10))
    candidates = np.arange(1, 400, 2)
    shuffled = np.random.default_rng(0).permutation(candidates)
    first, second = (
        sample_by_learnability(belief, rows, 30, 2.0, stream=9) for rows in (candidates, shuffled)
    )
    assert first.tolist() == second.tolist()
    other = sample_by_learnability(belief, candidates, 30, 2.0, stream=10)
    assert first.tolist() != other.tolist()


def test_how_prompts_are_numbered_decides_no_more_than_ties():
    """The same pool in another order: by expectation alone, the same prompts are wanted."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, 6)).astype(np.float32) / np.sqrt(6)
    rates = 1 / (1 + np.exp(-4 * features[:, 0]))
    seen = rng.permutation(200)[:60]
    right = rng.binomial(ROLLOUTS, rates[seen])
    order = rng.permutation(200)  # row in the other pool → row here
    wanted = []
    for place_of in (np.arange(200), np.argsort(order)):
        belief = Belief(features[np.argsort(place_of)], LearnAlignConfig.adaptive())
        belief.record(Outcomes.at(0, place_of[seen], right, ROLLOUTS - right), 0)
        free = np.setdiff1d(np.arange(200), place_of[seen])
        rows = sample_by_learnability(belief, free, 40, 1e9, stream=2)
        wanted.append(set(np.argsort(place_of)[rows].tolist()))
    assert wanted[0] == wanted[1]


def test_rounds_are_of_one_policy_and_the_belief_before_them_stays():
    """Told at once or one after the other: the order of the rounds does not count, and nothing fades in between."""
    belief = belief_of(RATES, np.arange(0, 400, 10))
    before = belief.posterior(np.arange(400), 5)
    rounds = [
        Outcomes.at(1, np.array([1, 2, 3]), np.array([8, 4, 0]), np.array([0, 4, 8])),
        Outcomes.at(1, np.array([150, 250]), np.array([1, 5]), np.array([7, 3])),
    ]
    later = after_rounds(belief, rounds, 1)
    other = after_rounds(belief, rounds[::-1], 1)
    for name in ("right", "wrong"):
        found = [getattr(each.posterior(np.arange(400), 2), name) for each in (later, other)]
        np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
        np.testing.assert_array_equal(
            getattr(before, name), getattr(belief.posterior(np.arange(400), 5), name)
        )
    assert belief.generation == 0
    assert later.last_rolled_out[150] == 1 != belief.last_rolled_out[150]
