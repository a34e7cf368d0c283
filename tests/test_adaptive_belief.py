"""The belief: counts that fade and are shared, and nothing but a function of what came out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats

from trl_learnalign.adaptive.belief import Belief, Outcomes, Posterior
from trl_learnalign.adaptive.neighbours import Neighbours, nearest_neighbours
from trl_learnalign.adaptive.settings import AdaptiveSettings

PROMPTS = 30
GRID = AdaptiveSettings(sharing=(0.0, 0.125, 1.0), memory=(0.5, 0.9, 1.0))


def alike(prompts=PROMPTS, count=4, seed=0):
    return nearest_neighbours(np.random.default_rng(seed).normal(size=(prompts, 6)), count)


def history(generations=12, prompts=PROMPTS, per_generation=5, seed=0):
    rng = np.random.default_rng(seed)
    rates = rng.random(prompts)
    outcomes = []
    for generation in range(0, 2 * generations, 2):  # numbers may be left out
        rows = rng.choice(prompts, per_generation, replace=False)
        right = rng.binomial(8, rates[rows])
        outcomes.append(Outcomes(generation, rows, right, 8 - right))
    return outcomes


def obvious_counts(past, neighbours, row, generation, memory, sharing):
    """Right and wrong of one prompt: a sum over everything that ever came out."""
    counts = np.zeros(2)
    for outcomes in past:
        fading = memory ** (generation - outcomes.generation)
        for other, right, wrong in zip(outcomes.rows, outcomes.right, outcomes.wrong, strict=True):
            weight = float(other == row)
            for place in np.flatnonzero(neighbours.rows[row] == other):
                weight += sharing * float(neighbours.weights[row, place])
            counts += weight * fading * np.array([right, wrong])
    return counts


def obvious_choice(past, neighbours, settings):
    """The pair of values with the largest likelihood of what came out, each time before it was counted."""
    scores = {}
    for memory in settings.memory:
        for sharing in settings.sharing:
            score = 0.0
            for number, outcomes in enumerate(past):
                score *= settings.score_memory
                for row, right, wrong in zip(outcomes.rows, outcomes.right, outcomes.wrong, strict=True):
                    a, b = settings.prior + obvious_counts(
                        past[:number], neighbours, row, outcomes.generation, memory, sharing
                    )
                    chance = stats.betabinom.logpmf(right, right + wrong, a, b)
                    score += chance - math.log(math.comb(right + wrong, right))
            scores[memory, sharing] = score
    return max(scores, key=scores.get)


@pytest.mark.parametrize("memory", [0.8, 1.0])
@pytest.mark.parametrize("sharing", [0.0, 0.3])
def test_the_posterior_is_the_prior_and_all_counts_faded_and_shared(memory, sharing):
    settings = AdaptiveSettings(sharing=(sharing,), memory=(memory,), prior=0.7)
    neighbours, past = alike(), history()
    belief = Belief.replay(neighbours, settings, past)
    found = belief.posterior(np.arange(PROMPTS), 25)
    for row in range(PROMPTS):
        right, wrong = obvious_counts(past, neighbours, row, 25, memory, sharing)
        assert found.right[row] == pytest.approx(0.7 + right, rel=1e-9)
        assert found.wrong[row] == pytest.approx(0.7 + wrong, rel=1e-9)


def test_the_values_that_predicted_best_are_used():
    neighbours, past = alike(), history()
    belief = Belief.replay(neighbours, GRID, past)
    memory, sharing = obvious_choice(past, neighbours, GRID)
    assert (belief.memory, belief.sharing) == (memory, sharing)
    found = belief.posterior(np.arange(PROMPTS), 25)
    wanted = obvious_counts(past, neighbours, 3, 25, memory, sharing)
    np.testing.assert_allclose([found.right[3], found.wrong[3]], GRID.prior + wanted, rtol=1e-9)


def test_sharing_is_learned_where_neighbours_tell_and_given_up_where_they_do_not():
    rng = np.random.default_rng(0)
    groups = np.arange(200) % 5
    own_group = [np.flatnonzero((groups == group) & (np.arange(200) != row))[:20] for row, group in enumerate(groups)]
    anyone = [rng.choice(np.delete(np.arange(200), row), 20, replace=False) for row in range(200)]
    rates = np.array([0.02, 0.98, 0.1, 0.9, 0.5])[groups]
    settings = AdaptiveSettings(sharing=(0.0, 0.25), memory=(1.0,))
    for rows, wanted in ((own_group, 0.25), (anyone, 0.0)):
        neighbours = Neighbours(np.array(rows, dtype=np.int32), np.ones((200, 20), dtype=np.float32))
        belief = Belief(neighbours, settings)
        for generation in range(20):
            chosen = rng.choice(200, 16, replace=False)
            right = rng.binomial(8, rates[chosen])
            belief.record(Outcomes(generation, chosen, right, 8 - right))
        assert belief.sharing == wanted


def test_before_anything_is_known_the_first_values_hold():
    belief = Belief(alike(), GRID)
    assert (belief.memory, belief.sharing) == (0.5, 0.0)
    untouched = belief.posterior(np.arange(PROMPTS), 0)
    np.testing.assert_array_equal(untouched.right, 0.5)
    np.testing.assert_array_equal(untouched.wrong, 0.5)


def test_recording_says_what_was_believed_before():
    neighbours, past = alike(), history()
    belief = Belief.replay(neighbours, GRID, past[:-1])
    rows = np.sort(past[-1].rows)
    wanted = belief.posterior(rows, past[-1].generation)
    found = belief.record(past[-1])
    np.testing.assert_array_equal(found.right, wanted.right)
    np.testing.assert_array_equal(found.wrong, wanted.wrong)


def assert_equal_beliefs(one, other, generation=99):
    assert one.generation == other.generation
    assert one.best == other.best
    np.testing.assert_array_equal(one.last_rolled_out, other.last_rolled_out)
    rows = np.arange(len(one))
    mine, theirs = one.posterior(rows, generation), other.posterior(rows, generation)
    np.testing.assert_array_equal(mine.right, theirs.right)
    np.testing.assert_array_equal(mine.wrong, theirs.wrong)


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_a_replayed_belief_goes_on_as_if_it_had_never_stopped(stop):
    neighbours, past = alike(), history()
    whole = Belief.replay(neighbours, GRID, past)
    resumed = Belief.replay(neighbours, GRID, past[:stop])
    for outcomes in past[stop:]:
        resumed.posterior(np.arange(PROMPTS), outcomes.generation)  # asking changes nothing
        resumed.record(outcomes)
    assert_equal_beliefs(whole, resumed)


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_neither_the_order_of_outcomes_nor_their_split_over_processes_counts(random, parts):
    neighbours, past = alike(), history()
    shuffled = []
    for outcomes in past:
        # A process may have some of a prompt's rollouts, and another the rest.
        pieces = []
        for row, right, wrong in zip(outcomes.rows, outcomes.right, outcomes.wrong, strict=True):
            cuts = sorted(random.randint(0, int(right)) for _ in range(parts - 1))
            shares = np.diff([0, *cuts, right])
            pieces += [(row, share, 0) for share in shares] + [(row, 0, wrong)]
        random.shuffle(pieces)
        rows, right, wrong = np.array(pieces).T
        shuffled.append(Outcomes(outcomes.generation, rows, right, wrong))
    assert_equal_beliefs(Belief.replay(neighbours, GRID, past), Belief.replay(neighbours, GRID, shuffled))


def test_renamed_rows_have_renamed_beliefs():
    vectors = np.random.default_rng(0).normal(size=(PROMPTS, 6))
    order = np.random.default_rng(1).permutation(PROMPTS)
    place = np.argsort(order)  # prompt i of the first dataset is row place[i] of the second
    past = history()
    renamed = [Outcomes(o.generation, place[o.rows], o.right, o.wrong) for o in past]
    one = Belief.replay(nearest_neighbours(vectors, 4), GRID, past).posterior(order, 30)
    other = Belief.replay(nearest_neighbours(vectors[order], 4), GRID, renamed).posterior(np.arange(PROMPTS), 30)
    np.testing.assert_array_equal(one.right, other.right)
    np.testing.assert_array_equal(one.wrong, other.wrong)


def test_rollouts_that_could_not_be_judged_leave_the_posterior_and_count_as_rolled_out():
    belief = Belief(alike(), GRID)
    nothing = np.zeros(2, dtype=int)
    belief.record(Outcomes(0, np.array([4, 9]), nothing, nothing))
    np.testing.assert_array_equal(belief.posterior(np.arange(PROMPTS), 1).right, 0.5)
    assert belief.last_rolled_out[4] == 0
    assert belief.last_rolled_out[5] == -1


def test_old_outcomes_fade_away():
    belief = Belief(Neighbours.none(3), AdaptiveSettings(memory=(0.9,)))
    belief.record(Outcomes(0, np.array([1]), np.array([8]), np.array([0])))
    rates = [belief.posterior(np.array([1]), generation).success_rate[0] for generation in (1, 10, 100, 10**6)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx((0.5 + 7.2) / (1 + 7.2))
    assert rates[-1] == pytest.approx(0.5, abs=1e-6)


def test_moments_and_draws_are_those_of_the_beta_distribution():
    posterior = Posterior(np.array([0.5, 3.0, 40.0]), np.array([0.5, 9.0, 2.0]))
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    for place in range(3):
        one = Posterior(np.full(20_000, posterior.right[place]), np.full(20_000, posterior.wrong[place]))
        rates = one.sample(uniforms)
        assert posterior.success_rate[place] == pytest.approx(rates.mean(), abs=1e-3)
        assert posterior.learnability[place] == pytest.approx((rates * (1 - rates)).mean(), abs=1e-3)


def test_outcomes_that_are_none_are_refused():
    one = np.array([1])
    with pytest.raises(ValueError, match="generation=-1: generations are counted from 0"):
        Outcomes(-1, one, one, one)
    with pytest.raises(ValueError, match="one row and two counts for each prompt"):
        Outcomes(0, np.array([1, 2]), one, one)
    with pytest.raises(ValueError, match=r"wrong of generation 3.*whole numbers of at least 0"):
        Outcomes(3, one, one, np.array([-2]))
    with pytest.raises(ValueError, match=r"right of generation 3.*values like 0\.5"):
        Outcomes(3, one, np.array([0.5]), one)


def test_generations_out_of_order_and_strange_rows_are_refused():
    one = np.array([1])
    belief = Belief(alike(), GRID)
    belief.record(Outcomes(4, one, one, one))
    with pytest.raises(ValueError, match="Generation 4 was to be recorded after generation 4"):
        belief.record(Outcomes(4, one, one, one))
    with pytest.raises(ValueError, match="Row 30 is not in the dataset of 30 prompts"):
        belief.record(Outcomes(5, np.array([30]), one, one))
    with pytest.raises(ValueError, match=r"before generation 4 was asked after generation 4.*replay"):
        belief.posterior(one, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(neighbour_count=-1), "neighbour_count=-1: give a number of at least 0"),
        (dict(neighbour_count=2.5), "neighbour_count=2.5: give a whole number"),
        (dict(candidates=0), "candidates=0: give a number of at least 1"),
        (dict(prior=0.0), "prior=0.0: give a number above 0"),
        (dict(sharpness=0.0), "sharpness=0.0: give a number above 0, or math.inf"),
        (dict(exploration=1.5), "exploration=1.5: give a share from 0 to 1"),
        (dict(score_memory=0.0), "score_memory=0.0: give a number above 0 and at most 1"),
        (dict(sharing=()), r"sharing=\(\): give one or several numbers from 0 to 1"),
        (dict(sharing=(0.5, 2.0)), "give one or several numbers from 0 to 1"),
        (dict(memory=(0.0,)), "give one or several numbers above 0 and at most 1"),
        (dict(memory=(0.9, 0.9)), "give numbers that differ"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSettings(**wrong)
