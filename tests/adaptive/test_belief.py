"""The belief: counts that fade and are shared, and nothing but a function of what came out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, logit

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import LEAST, Belief, Posterior, SuccessRateModel
from trl_learnalign.config import LearnAlignConfig

PROMPTS = 30
GRID = LearnAlignConfig.adaptive(
    adaptive_concentration=(2.0, 0.5, 30.0), adaptive_decay=0.9, adaptive_prompt_decay=0.8
)


def some_features(prompts=PROMPTS, dimensions=4, seed=0):
    return np.random.default_rng(seed).normal(size=(prompts, dimensions)) / np.sqrt(dimensions)


def history(generations=12, prompts=PROMPTS, per_generation=5, seed=0):
    rng = np.random.default_rng(seed)
    rates = rng.random(prompts)
    outcomes = []
    for generation in range(0, 2 * generations, 2):  # numbers may be left out
        rows = rng.choice(prompts, per_generation, replace=False)
        right = rng.binomial(8, rates[rows])
        outcomes.append(Outcomes.at(generation, rows, right, 8 - right))
    return outcomes


def replay(features, settings, past):
    """The belief that these outcomes lead to."""
    belief = Belief(features, settings)
    for outcomes in past:
        belief.record(outcomes, outcomes.step)
    return belief


def obvious_predictions(past, features, settings):
    """Predicted rates of all prompts before each generation, and a function for any later one."""
    probe, last, before = (
        SuccessRateModel(
            features.shape[1],
            settings.adaptive_prior_std,
            settings.adaptive_decay,
            settings.adaptive_drift_std,
        ),
        None,
        [],
    )

    def at(generation):
        return probe.faded(0 if last is None else generation - last)

    for outcomes in past:
        probe = at(outcomes.step)
        before.append(probe.success_rates(features))
        order = np.argsort(outcomes.rows)
        probe.update(features[outcomes.rows[order]], outcomes.right[order], outcomes.wrong[order])
        last = outcomes.step
    return before, lambda generation: at(generation).success_rates(features)


def obvious_posterior(past, features, row, generation, concentration, settings):
    """One prompt's outcomes, from the first to the last: faded, and moved along with the prediction."""
    before, later = obvious_predictions(past, features, settings)
    right = wrong = 0.0
    last = then = None

    def moved(now, rate):
        total = right + wrong
        own = expit(logit((right + 0.5) / (total + 1)) + logit(rate) - logit(then))
        left = total * settings.adaptive_prompt_decay ** (now - last)
        return left * own, left * (1 - own)

    for outcomes, rates in zip(past, before, strict=True):
        if row in outcomes.rows:
            if last is not None:
                right, wrong = moved(outcomes.step, rates[row])
            place = outcomes.rows.tolist().index(row)
            right, wrong = right + outcomes.right[place], wrong + outcomes.wrong[place]
            last, then = outcomes.step, rates[row]
    rate = later(generation)[row]
    own = (0, 0) if last is None else moved(generation, rate)
    return concentration * rate + own[0] + LEAST, concentration * (1 - rate) + own[1] + LEAST


def obvious_choice(past, features, settings):
    """The concentration with the largest likelihood of what came out, each time before it was counted."""
    scores = {}
    for concentration in settings.adaptive_concentration:
        score = 0.0
        for number, outcomes in enumerate(past):
            score *= settings.adaptive_concentration_decay
            for row, right, wrong in zip(
                outcomes.rows, outcomes.right, outcomes.wrong, strict=True
            ):
                a, b = obvious_posterior(
                    past[:number], features, row, outcomes.step, concentration, settings
                )
                chance = stats.betabinom.logpmf(right, right + wrong, a, b)
                score += chance - math.log(math.comb(right + wrong, right))
        scores[concentration] = score
    return max(scores, key=scores.get)


@pytest.mark.parametrize(("memory", "own_memory"), [(0.8, 0.95), (1.0, 1.0)])
@pytest.mark.parametrize("concentration", [0.5, 6.0])
def test_the_posterior_is_the_prediction_and_the_prompts_own_counts(
    memory, own_memory, concentration
):
    settings = LearnAlignConfig.adaptive(
        adaptive_concentration=(concentration,),
        adaptive_decay=memory,
        adaptive_prompt_decay=own_memory,
    )
    features, past = some_features(), history()
    found = replay(features, settings, past).posterior(np.arange(PROMPTS), 25)
    for row in range(PROMPTS):
        right, wrong = obvious_posterior(past, features, row, 25, concentration, settings)
        assert found.right[row] == pytest.approx(right, rel=1e-4)
        assert found.wrong[row] == pytest.approx(wrong, rel=1e-4)


def test_the_concentration_that_predicted_best_is_used():
    features, past = some_features(), history(generations=6)
    assert replay(features, GRID, past).concentration == obvious_choice(past, features, GRID)


def test_a_prompt_harder_than_others_stays_so_while_all_get_easier():
    settings = LearnAlignConfig.adaptive(
        adaptive_decay=0.8, adaptive_prompt_decay=1.0, adaptive_concentration=(2.0,)
    )
    belief = Belief(np.empty((2000, 0)), settings)
    rng = np.random.default_rng(0)
    hard, last = 0, []
    for generation in range(80):
        rows = 1 + np.arange(16) + 16 * generation
        right = rng.binomial(8, np.full(16, 0.3 if generation < 40 else 0.8))
        if generation == 35:
            rows, right = np.append(rows, hard), np.append(right, 0)
        belief.record(Outcomes.at(generation, rows, right, 8 - right), generation)
        last.append(belief.posterior(np.array([hard, 1999]), generation + 1).success_rate)
    assert last[38][0] < 0.15  # others 0.3
    assert 0.7 < last[-1][1] < 0.9
    assert (
        0.15 < last[-1][0] < 0.6
    )  # neither as hard as it was, nor as easy as the others are by now


@pytest.mark.parametrize(("own_spread", "least", "most"), [(0.0, 16.0, 32.0), (2.0, 0.5, 2.0)])
def test_the_concentration_tells_how_far_prompts_are_from_what_their_features_say(
    own_spread, least, most
):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 2))
    rates = expit(features @ [1.5, -1.0] + own_spread * rng.normal(size=400))
    settings = LearnAlignConfig.adaptive(
        adaptive_concentration=(4.0, 0.5, 1.0, 2.0, 8.0, 16.0, 32.0), adaptive_decay=1.0
    )
    belief = Belief(features, settings)
    for generation in range(25):
        chosen = np.arange(16 * generation, 16 * generation + 16)
        right = rng.binomial(8, rates[chosen])
        belief.record(Outcomes.at(generation, chosen, right, 8 - right), generation)
    assert least <= belief.concentration <= most


def test_before_anything_is_known_the_first_values_hold_and_all_prompts_are_alike():
    belief = Belief(some_features(), GRID)
    assert belief.concentration == 2.0
    untouched = belief.posterior(np.arange(PROMPTS), 0)
    np.testing.assert_allclose(untouched.right, 1 + LEAST)
    np.testing.assert_allclose(untouched.wrong, 1 + LEAST)


def test_recording_says_what_was_believed_before():
    features, past = some_features(), history()
    belief = replay(features, GRID, past[:-1])
    rows = np.sort(past[-1].rows)
    wanted = belief.posterior(rows, past[-1].step)
    found = belief.record(past[-1], past[-1].step)
    np.testing.assert_array_equal(found.right, wanted.right)
    np.testing.assert_array_equal(found.wrong, wanted.wrong)


def assert_equal_beliefs(one, other, generation=99):
    assert one.generation == other.generation
    assert one.concentration == other.concentration
    np.testing.assert_array_equal(one.last_rolled_out, other.last_rolled_out)
    rows = np.arange(len(one))
    mine, theirs = one.posterior(rows, generation), other.posterior(rows, generation)
    np.testing.assert_array_equal(mine.right, theirs.right)
    np.testing.assert_array_equal(mine.wrong, theirs.wrong)


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_a_replayed_belief_goes_on_as_if_it_had_never_stopped(stop):
    features, past = some_features(), history()
    whole = replay(features, GRID, past)
    resumed = replay(features, GRID, past[:stop])
    for outcomes in past[stop:]:
        resumed.posterior(np.arange(PROMPTS), outcomes.step)  # asking changes nothing
        resumed.record(outcomes, outcomes.step)
    assert_equal_beliefs(whole, resumed)


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_neither_the_order_of_outcomes_nor_their_split_over_processes_counts(random, parts):
    features, past = some_features(), history()
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
        shuffled.append(Outcomes.at(outcomes.step, rows, right, wrong))
    assert_equal_beliefs(replay(features, GRID, past), replay(features, GRID, shuffled))


def test_renamed_rows_have_renamed_beliefs():
    features, past = some_features(), history()
    order = np.random.default_rng(1).permutation(PROMPTS)
    place = np.argsort(order)  # prompt i of the first dataset is row place[i] of the second
    renamed = [Outcomes.at(o.step, place[o.rows], o.right, o.wrong) for o in past]
    one = replay(features, GRID, past).posterior(order, 30)
    other = replay(features[order], GRID, renamed).posterior(np.arange(PROMPTS), 30)
    np.testing.assert_allclose(one.right, other.right, rtol=1e-5)
    np.testing.assert_allclose(one.wrong, other.wrong, rtol=1e-5)


def test_rollouts_that_could_not_be_judged_leave_the_posterior_and_count_as_rolled_out():
    belief = Belief(some_features(), GRID)
    nothing = np.zeros(2, dtype=int)
    belief.record(Outcomes.at(0, np.array([4, 9]), nothing, nothing), 0)
    np.testing.assert_allclose(belief.posterior(np.arange(PROMPTS), 1).success_rate, 0.5)
    assert belief.last_rolled_out[4] == 0
    assert belief.last_rolled_out[5] == -1


def test_asking_about_later_generations_changes_nothing():
    features, past = some_features(), history()
    belief, quiet = replay(features, GRID, past[:6]), replay(features, GRID, past[:6])
    for generation in (11, 500, 12):
        belief.posterior(np.arange(PROMPTS), generation)
    for outcomes in past[6:]:
        belief.record(outcomes, outcomes.step)
        quiet.record(outcomes, outcomes.step)
    assert_equal_beliefs(belief, quiet)


def test_old_outcomes_fade_away():
    belief = Belief(
        np.empty((3, 0)), LearnAlignConfig.adaptive(adaptive_decay=0.9, adaptive_prompt_decay=0.9)
    )
    belief.record(Outcomes.at(0, np.array([1]), np.array([8]), np.array([0])), 0)
    rates = [
        belief.posterior(np.array([1]), generation).success_rate[0]
        for generation in (1, 10, 100, 10**6)
    ]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.8
    assert rates[-1] == pytest.approx(0.5, abs=1e-6)


def test_moments_and_draws_are_those_of_the_beta_distribution():
    posterior = Posterior(np.array([0.5, 3.0, 40.0]), np.array([0.5, 9.0, 2.0]))
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    for place in range(3):
        one = Posterior(
            np.full(20_000, posterior.right[place]), np.full(20_000, posterior.wrong[place])
        )
        rates = one.sample(uniforms)
        assert posterior.success_rate[place] == pytest.approx(rates.mean(), abs=1e-3)
        assert posterior.learnability[place] == pytest.approx(
            (rates * (1 - rates)).mean(), abs=1e-3
        )


def test_the_share_of_variance_is_that_of_written_out_sums():
    settings = LearnAlignConfig.adaptive(
        adaptive_concentration=(4.0,), adaptive_decay=0.9, adaptive_prompt_decay=0.8
    )
    rng = np.random.default_rng(5)
    belief, seen = Belief(np.empty((12, 0)), settings), []
    for generation in (0, 1, 2, 4, 7):
        rows = rng.choice(10, 4, replace=False)
        outcomes = rng.integers(0, 5, (4, 6)) / 4
        right, partial = outcomes.sum(axis=1), (outcomes * (1 - outcomes)).sum(axis=1)
        belief.record(Outcomes.at(0, rows, right, 6 - right, partial=partial), generation)
        seen += [(generation, row, group) for row, group in zip(rows, outcomes, strict=True)]
    share = belief.posterior(np.arange(12), 9).share
    sums = np.zeros((12, 2))
    everything = np.zeros(3)
    for generation, row, group in seen:
        varied, partial = len(group) * group.var(ddof=1), (group * (1 - group)).sum()
        sums[row] += 0.8 ** (9 - generation) * np.array([varied, partial])
        everything += 0.9 ** (7 - generation) * np.array([varied, partial, len(group)])
    sums += 4.0 * everything[:2] / everything[2]
    np.testing.assert_allclose(share, sums[:, 0] / sums.sum(axis=1))
    assert share[10] == share[11]  # never rolled out
    assert len(set(share[:10])) > 5


def test_outcomes_that_are_none_are_refused():
    one = np.array([1])
    with pytest.raises(ValueError, match=r"steps of the outcomes.*values like -1"):
        Outcomes.at(-1, one, one, one)
    with pytest.raises(ValueError, match="one row and two counts for each prompt"):
        Outcomes.at(0, np.array([1, 2]), one, one)
    with pytest.raises(ValueError, match=r"wrong of the outcomes.*numbers of at least 0"):
        Outcomes.at(3, one, one, np.array([-2]))
    with pytest.raises(ValueError, match=r"right of the outcomes.*values like nan"):
        Outcomes.at(3, one, np.array([np.nan]), one)
    with pytest.raises(ValueError, match=r"rows of the outcomes.*whole numbers"):
        Outcomes.at(3, np.array([0.5]), one, one)


def test_generations_out_of_order_and_strange_rows_are_refused():
    one = np.array([1])
    belief = Belief(some_features(), GRID)
    belief.record(Outcomes.at(4, one, one, one), 4)
    with pytest.raises(ValueError, match="Generation 4 was recorded after generation 4 had been"):
        belief.record(Outcomes.at(4, one, one, one), 4)
    with pytest.raises(ValueError, match="Row 30 is outside the dataset of 30 prompts"):
        belief.record(Outcomes.at(5, np.array([30]), one, one), 5)
    with pytest.raises(ValueError, match=r"Features have the shape \(30,\).*as prompt_features"):
        Belief(np.ones(30), GRID)
    with pytest.raises(ValueError, match="give finite numbers"):
        Belief(np.full((30, 1), np.nan), GRID)
    with pytest.raises(ValueError, match="Generation 4 was queried after generation 4"):
        belief.posterior(one, 4)
