"""Calibration: predicted against seen, rollout by rollout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_learnalign.adaptive.belief import (
    area_under_curve,
    brier_score,
    calibration_error,
    reliability_bins,
)

CASES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.99, 1.0]), st.integers(0, 4), st.integers(0, 4)
    ),
    max_size=12,
)


def arrays(cases):
    columns = np.array(cases, dtype=float).reshape(-1, 3).T
    return columns[0], columns[1].astype(int), columns[2].astype(int)


def events(predicted, right, wrong):
    """Each rollout by itself: its prediction and whether it was right."""
    return [
        (p, kind)
        for p, r, w in zip(predicted, right, wrong, strict=True)
        for kind in [1] * r + [0] * w
    ]


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_scores_are_those_of_single_rollouts(cases):
    predicted, right, wrong = arrays(cases)
    rollouts = events(predicted, right, wrong)
    if rollouts:
        assert brier_score(predicted, right, wrong) == pytest.approx(
            np.mean([(p - y) ** 2 for p, y in rollouts])
        )
    else:
        assert np.isnan(brier_score(predicted, right, wrong))
    pairs = [(p > q) + (p == q) / 2 for p, y in rollouts for q, z in rollouts if y > z]
    found = area_under_curve(predicted, right, wrong)
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_every_rollout_is_in_one_bin(cases):
    predicted, right, wrong = arrays(cases)
    bins = reliability_bins(predicted, right, wrong, count=4)
    assert sum(b.prompts for b in bins) == len(cases)
    for number, b in enumerate(bins):
        inside = [
            (p, y) for p, y in events(predicted, right, wrong) if min(int(p * 4), 3) == number
        ]
        assert b.rollouts == len(inside)
        if inside:
            assert b.predicted == pytest.approx(np.mean([p for p, _ in inside]))
            assert b.seen == pytest.approx(np.mean([y for _, y in inside]))
            assert b.low - 1e-12 <= b.predicted <= b.high + 1e-12


def test_a_calibrated_forecast_has_no_error_and_a_shifted_one_its_shift():
    predicted = np.array([0.25, 0.75])
    right, wrong = np.array([25, 75]), np.array([75, 25])
    assert calibration_error(reliability_bins(predicted, right, wrong)) == pytest.approx(0)
    assert calibration_error(reliability_bins(predicted - 0.2, right, wrong)) == pytest.approx(0.2)
    assert np.isnan(calibration_error([]))


def test_predictions_that_are_none_are_refused():
    one = np.array([1])
    with pytest.raises(ValueError, match=r"predicted success rate is 1\.2: give probabilities"):
        brier_score(np.array([1.2]), one, one)
    with pytest.raises(ValueError, match="is nan: give probabilities"):
        reliability_bins(np.array([np.nan]), one, one)
    with pytest.raises(ValueError, match="need the same shape"):
        area_under_curve(np.array([0.1, 0.2]), one, one)
