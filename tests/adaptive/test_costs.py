"""Costs of rollouts: what the belief expects of them, and what the order makes of it."""

import numpy as np
import pytest

from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import (
    BASE_SPREAD,
    COST_NOISE,
    COST_SPREAD,
    OWN_WEIGHT,
    Belief,
    CostModel,
)
from trl_learnalign.adaptive.order import AdaptiveOrder
from trl_learnalign.config import LearnAlignConfig

PRICE = 8
PROMPTS = 60


def settings(**given):
    return LearnAlignConfig.adaptive(
        **{"adaptive_gain_per_cost": True, "generation_price": PRICE, **given}
    )


def groups(generation, rows, prompt_tokens, completion_tokens):
    """Groups with these tokens; half of their rollouts are right."""
    half = np.full(len(rows), 1)
    tokens = np.stack([prompt_tokens, completion_tokens], axis=1).astype(float)
    return Outcomes.at(generation, np.asarray(rows), half, half, tokens=tokens)


def as_least_squares(features, config, past, now):
    """Expected costs of all prompts, by weighted least squares over all groups at once."""
    rows, logs, ages = [], [], []
    for generation, outcomes in enumerate(past):
        # A token of a prompt is read and trained on (1 + 3), one of a completion is generated and trained on (8 + 3).
        costs = 4 * outcomes.prompt_tokens + (PRICE + 3) * outcomes.completion_tokens
        for row, cost in zip(outcomes.rows, costs, strict=True):
            if np.isfinite(cost):
                rows.append(row)
                logs.append(np.log(cost))
                ages.append(generation)
    rows, logs, ages = np.array(rows), np.array(logs), np.array(ages)
    ones = np.ones((len(features), 1))
    inputs = np.concatenate([features, ones], axis=1)
    # An update decays what is older than it.
    weights = config.adaptive_decay ** (len(past) - 1 - ages)
    scale = np.sqrt(weights)[:, None]
    spreads = np.append(np.full(features.shape[1], COST_SPREAD), BASE_SPREAD)
    design = np.concatenate([scale * inputs[rows], np.diag(COST_NOISE / spreads)])
    target = np.concatenate([scale[:, 0] * logs, np.zeros(len(spreads))])
    predicted = inputs @ np.linalg.lstsq(design, target, rcond=None)[0]
    found = []
    for row in range(len(features)):
        own = config.adaptive_prompt_decay ** (now - ages[rows == row])
        total = own @ logs[rows == row] + OWN_WEIGHT * predicted[row]
        found.append(np.exp(total / (own.sum() + OWN_WEIGHT)))
    return np.array(found)


def test_expected_costs_are_those_of_weighted_least_squares():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(PROMPTS, 3)) / np.sqrt(3)
    config, past = settings(adaptive_decay=0.8, adaptive_prompt_decay=0.9), []
    model = CostModel(features, config)
    for generation in range(12):
        rows = rng.choice(40, 10, replace=generation % 2 == 0)  # a prompt may have several groups
        written = rng.integers(1, 200, 10).astype(float)
        if generation == 5:
            written[:4] = np.nan
        past.append(groups(generation, rows, 5 + rows, written))
        model.record(past[-1], generation)
    found = model.expected(np.arange(PROMPTS), 14)
    np.testing.assert_allclose(found, as_least_squares(features, config, past, 14), rtol=1e-5)


def test_prompts_like_long_ones_are_expected_to_be_long():
    """Twenty prompts of either kind are seen, of sixty."""
    rng = np.random.default_rng(1)
    is_long = np.arange(PROMPTS) % 2 == 1
    features = np.where(is_long, 1.0, -1.0)[:, None]
    model = CostModel(features, settings())
    for generation in range(8):
        rows = rng.choice(20, 8, replace=False)
        written = np.where(is_long[rows], 400, 100) * rng.lognormal(0, 0.3, 8)
        model.record(groups(generation, rows, np.full(8, 20), written), generation)
    unseen = np.arange(20, PROMPTS)
    ratio = model.expected(unseen, 8)[1::2].mean() / model.expected(unseen, 8)[::2].mean()
    assert ratio == pytest.approx((4 * 20 + 11 * 400) / (4 * 20 + 11 * 100), rel=0.25)


def test_all_prompts_cost_the_same_before_a_length_is_known():
    model = CostModel(np.ones((4, 1)), settings())
    unknown = Outcomes.at(0, np.arange(2), np.ones(2), np.ones(2))
    model.record(unknown, 0)
    model.record(unknown.where(slice(0, 0)), 1)
    np.testing.assert_array_equal(model.expected(np.arange(4), 2), np.ones(4))


def test_a_copy_is_independent():
    belief = Belief(np.ones((PROMPTS, 1)), settings())
    belief.record(groups(0, [0, 1], [5, 5], [10, 100]), 0)
    before = belief.cost.expected(np.arange(3), 2)
    belief.copy().record(groups(1, [0, 1], [5, 5], [1000, 1000]), 1)
    np.testing.assert_array_equal(belief.cost.expected(np.arange(3), 2), before)


def drawn(config, lengths, generations=60, tokens=True):
    """Rows drawn if every prompt is right half of the time."""
    belief = Belief(np.empty((PROMPTS, 0)), config)
    order, rng = (
        AdaptiveOrder(np.arange(PROMPTS), 4, config, 3, "stage_1"),
        np.random.default_rng(0),
    )
    found = []
    for generation in range(generations):
        rows = order.draw(belief, generation)
        right = rng.binomial(2, 0.5, 4)
        written = np.stack([np.full(4, 10.0), lengths[rows]], axis=1)
        belief.record(
            Outcomes.at(generation, rows, right, 2 - right, tokens=written if tokens else None),
            generation,
        )
        found.append(rows)
    return np.concatenate(found)


def test_of_equally_hard_prompts_the_cheaper_ones_are_preferred():
    lengths = np.where(np.arange(PROMPTS) % 2, 400.0, 100.0)
    given = dict(adaptive_exploration=0.0, adaptive_cool_down=1)
    plain = drawn(settings(adaptive_gain_per_cost=False, **given), lengths)
    ours = drawn(settings(**given), lengths)
    late = slice(len(plain) // 2, None)
    assert 0.35 < np.mean(plain[late] % 2) < 0.65
    assert np.mean(ours[late] % 2) < 0.25


def test_without_lengths_the_order_is_the_same():
    lengths = np.where(np.arange(PROMPTS) % 2, 400.0, 100.0)
    plain = drawn(settings(adaptive_gain_per_cost=False), lengths)
    np.testing.assert_array_equal(drawn(settings(), lengths, tokens=False), plain)
    assert (drawn(settings(), lengths) != plain).any()


def test_the_price_of_a_generated_token_counts():
    """A long prompt with a short answer is cheap if generation is expensive, and not if it is not."""
    ratio = {}
    for price in (1, 100):
        model = CostModel(np.empty((2, 0)), settings(generation_price=price))
        for generation in range(20):
            model.record(groups(generation, [0, 1], [100, 10], [10, 60]), generation)
        long_prompt, long_answer = model.expected(np.arange(2), 20)
        ratio[price] = long_prompt / long_answer
    assert ratio[1] > 1 > ratio[100]
