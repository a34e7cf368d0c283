"""The probe: Bayesian logistic regression that goes on learning, and forgets."""

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import expit, log_expit

from trl_learnalign.adaptive.belief import INTERCEPT_SPREAD, SuccessRateModel

SPREAD = 3.0


def outcomes(rows=40, dimensions=3, seed=0, rollouts=8):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, dimensions)) / np.sqrt(dimensions)
    right = rng.binomial(rollouts, expit(features @ np.array([2.0, -1.0, 0.5])[:dimensions] - 0.5))
    return features, right, rollouts - right


def log_prior(weights):
    spreads = np.append(np.full(len(weights) - 1, SPREAD), INTERCEPT_SPREAD)
    return stats.norm.logpdf(weights, scale=spreads).sum()


def log_likelihood(weights, features, right, wrong):
    logits = features @ weights[:-1] + weights[-1]
    return (right * log_expit(logits) + wrong * log_expit(-logits)).sum()


def test_one_update_finds_the_peak_of_the_posterior_and_its_curvature():
    features, right, wrong = outcomes()
    probe = SuccessRateModel(3, SPREAD, 0.97)
    probe.update(features, right, wrong)
    peak = optimize.minimize(
        lambda w: -log_prior(w) - log_likelihood(w, features, right, wrong), np.zeros(4), tol=1e-10
    )
    np.testing.assert_allclose(probe.mean, peak.x, atol=1e-4)

    def slope(weights):
        return optimize.approx_fprime(
            weights, lambda w: -log_prior(w) - log_likelihood(w, features, right, wrong), 1e-5
        )

    curvature = [
        (slope(probe.mean + step) - slope(probe.mean - step)) / 2e-3 for step in 1e-3 * np.eye(4)
    ]
    np.testing.assert_allclose(probe.precision, curvature, atol=0.05)


def test_outcomes_one_after_the_other_tell_nearly_what_they_tell_together():
    features, right, wrong = outcomes(rows=200)
    together, apart = SuccessRateModel(3, SPREAD, 1.0), SuccessRateModel(3, SPREAD, 1.0)
    together.update(features, right, wrong)
    for start in range(0, 200, 20):
        part = slice(start, start + 20)
        apart.update(features[part], right[part], wrong[part])
    deviations = 1 / np.sqrt(np.diag(together.precision))
    assert (np.abs(together.mean - apart.mean) < deviations).all()
    np.testing.assert_allclose(
        apart.success_rates(features), together.success_rates(features), atol=0.05
    )


def test_rates_are_learned():
    features, right, wrong = outcomes(rows=2000)
    probe = SuccessRateModel(3, SPREAD, 1.0)
    probe.update(features[:1000], right[:1000], wrong[:1000])
    truth = expit(features @ [2.0, -1.0, 0.5] - 0.5)
    np.testing.assert_allclose(probe.success_rates(features[1000:]), truth[1000:], atol=0.05)


def test_what_is_forgotten_goes_back_to_the_prior():
    features, right, wrong = outcomes()
    probe = SuccessRateModel(3, SPREAD, 0.9)
    fresh = probe.precision.copy()
    probe.update(features, right, wrong)
    known = probe.precision.copy()
    np.testing.assert_allclose(probe.faded(1).precision, 0.9 * known + 0.1 * fresh)
    np.testing.assert_array_equal(probe.precision, known)
    empty = probe.faded(500)
    np.testing.assert_allclose(empty.precision, fresh, atol=1e-12)
    np.testing.assert_allclose(empty.mean, 0, atol=1e-8)
    np.testing.assert_allclose(empty.success_rates(features), 0.5, atol=1e-8)


def test_fading_over_two_generations_is_fading_twice():
    probe = SuccessRateModel(3, SPREAD, 0.8)
    probe.update(*outcomes())
    once, twice = probe.faded(2), probe.faded(1).faded(1)
    np.testing.assert_allclose(once.precision, twice.precision)
    np.testing.assert_allclose(once.mean, twice.mean)
    np.testing.assert_array_equal(probe.faded(0).mean, probe.mean)


def test_drift_widens_what_the_intercept_may_be_and_nothing_else():
    still, drifting = SuccessRateModel(3, SPREAD, 0.9), SuccessRateModel(3, SPREAD, 0.9, 0.2)
    for probe in (still, drifting):
        probe.update(*outcomes())
    before, after = (np.linalg.inv(probe.faded(4).precision) for probe in (still, drifting))
    added = np.zeros((4, 4))
    added[-1, -1] = 4 * 0.2**2
    np.testing.assert_allclose(after, before + added, atol=1e-10)
    np.testing.assert_allclose(still.faded(4).mean, drifting.faded(4).mean)


def test_a_memory_of_one_forgets_nothing():
    probe = SuccessRateModel(3, SPREAD, 1.0)
    probe.update(*outcomes())
    np.testing.assert_array_equal(probe.faded(1000).mean, probe.mean)
    np.testing.assert_array_equal(probe.faded(1000).precision, probe.precision)


def test_predictions_are_means_over_what_the_weights_may_be():
    probe = SuccessRateModel(3, SPREAD, 1.0)
    features, right, wrong = outcomes(rows=6)
    probe.update(features, right, wrong)
    drawn = np.random.default_rng(0).multivariate_normal(
        probe.mean, np.linalg.inv(probe.precision), 100_000
    )
    means = expit(features @ drawn[:, :-1].T + drawn[:, -1]).mean(axis=1)
    np.testing.assert_allclose(probe.success_rates(features), means, atol=0.015)


def test_without_features_there_is_one_rate_for_all():
    probe = SuccessRateModel(0, SPREAD, 1.0)
    probe.update(np.empty((50, 0)), np.full(50, 2), np.full(50, 6))
    np.testing.assert_allclose(probe.success_rates(np.empty((3, 0))), 0.25, atol=0.01)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_extreme_outcomes_are_survived(scale):
    features = scale * np.linspace(-1, 1, 100)[:, None]
    probe = SuccessRateModel(1, 10.0, 0.97)
    for _ in range(20):
        probe.update(
            features, np.where(features[:, 0] > 0, 1000, 0), np.where(features[:, 0] > 0, 0, 1000)
        )
        probe = probe.faded(1)
    rates = probe.success_rates(features)
    assert np.isfinite(rates).all()
    assert (np.diff(rates) >= -1e-9).all()
    assert ((rates >= 0) & (rates <= 1)).all()
