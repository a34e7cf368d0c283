"""Skipping beside a stock trainer under settings drawn at random: losses, masks, rewards that are None, scalings."""

import random

import cases
import pytest
from skipping_cases import ROUNDING, distances, number_of, trained

from trl_learnalign.bridge.objective import DENOMINATORS

GATED, ALL = 8, 60
ROUNDING_ALONE = {12}
"""Draws with a step in which no row teaches, where TRL's arithmetic leaves advantages a little off 0."""

SEEDS = [
    seed if seed < GATED else pytest.param(seed, marks=pytest.mark.slow) for seed in range(ALL)
]


def coin(completions, prompts, **_):
    """Nothing to be had of every other prompt."""
    coins = cases.accuracy_reward(completions)
    return [coin * (number_of(prompt) % 2) for coin, prompt in zip(coins, prompts, strict=True)]


def now_and_then(completions, prompts, **_):
    """No word on every third prompt, nor on some completions of the others; eighths, whose means do not round."""
    texts = [cases.text(completion) for completion in completions]
    judged = [
        number_of(prompt) % 3 > 0 and len(text) % 4 > 0
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    return [
        len(text) / 8 if is_judged else None for text, is_judged in zip(texts, judged, strict=True)
    ]


REWARDS = {
    "coin": dict(rewards=coin),
    "None": dict(rewards=now_and_then),
    "both": dict(rewards=[coin, now_and_then], reward_weights=[1.0, 0.5]),
    "one against the other": dict(rewards=[coin, now_and_then], reward_weights=[1.0, -0.25]),
}


def drawn(seed):
    """Settings of a run, a function of the seed."""
    draw = random.Random(seed)
    loss = draw.choice(list(DENOMINATORS))
    by_sequence = loss in ("grpo", "bnpo", "dapo") and draw.random() < 0.4
    masked = draw.random() < 0.5
    return dict(
        loss_type=loss,
        scale_rewards=draw.choice(["group", "batch", "none"]),
        multi_objective_aggregation=draw.choice(["sum_then_normalize", "normalize_then_sum"]),
        importance_sampling_level="sequence" if by_sequence else "token",
        mask_truncated_completions=masked,
        max_completion_length=14 if masked else draw.choice([4, 6]),
        gradient_accumulation_steps=draw.choice([1, 2]),
        steps_per_generation=draw.choice([1, 2, 3]),
        num_iterations=draw.choice([1, 2]),
        num_generations=draw.choice([2, 4]),
        max_grad_norm=draw.choice([0.0, 0.1]),
        weight_decay=draw.choice([0.0, 0.1]),
        max_steps=4,
        **REWARDS[draw.choice(list(REWARDS))],
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_are_those_of_all_rows(tmp_path, seed):
    options = drawn(seed)
    plain, stock, _ = trained(tmp_path / "stock", False, **options)
    trainer, ours, skipper = trained(tmp_path / "ours", True, **options)
    noise = ROUNDING * max(float(gradient.norm()) for gradient in stock.gradients)
    if any(0 < float(gradient.norm()) < noise for gradient in stock.gradients):
        assert seed in ROUNDING_ALONE, options
        # Rounding alone, which AdamW scales up to a whole step: from there on the weights are others.
        first = next(i for i, gradient in enumerate(stock.gradients) if gradient.norm() < noise)
        assert float(ours.gradients[first].norm()) < noise, options
        assert (
            max(distances(stock.gradients[:first], ours.gradients[:first]), default=0.0) < ROUNDING
        )
        return
    assert max(distances(stock.gradients, ours.gradients)) < ROUNDING, options
    assert skipper.counts.rows_given == sum(stock.rows)
    assert skipper.counts.rows_trained == sum(ours.rows) <= sum(stock.rows)
    for theirs, entry in zip(plain.state.log_history, trainer.state.log_history, strict=True):
        for name in ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length"):
            assert entry.get(name) == pytest.approx(theirs.get(name), nan_ok=True), (name, options)


def test_the_settings_that_are_drawn_are_many():
    """Of every loss, scaling and reward some, masked and not, within the gate and beyond."""
    some = [drawn(seed) for seed in range(ALL)]
    for name, least in (("loss_type", 8), ("scale_rewards", 3), ("mask_truncated_completions", 2)):
        assert len({options[name] for options in some}) == least
    assert len({str(options["rewards"]) for options in some}) == 3
    first = some[:GATED]
    assert len({options["loss_type"] for options in first}) >= 4
    assert any(options["mask_truncated_completions"] for options in first)
