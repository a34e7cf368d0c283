"""A run that scores nothing says early, and once, that its rewards cannot tell prompts apart."""

import math
import re

import cases
import pytest
import torch

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.success import SuccessRule
from trl_learnalign.training.counters import GROUPS, ROLLOUTS, GroupLook, RewardSanityCheck

RULE = SuccessRule(index=0, name="grade", threshold=0.5)


def looked_at(values, wanted=True, cut_share=0.0):
    look = RewardSanityCheck(RULE, wanted, limit=100)
    for value in values:
        look.add(torch.full((4, 4), value), cut_share)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.1, 0.4], "no rollout of 128 succeeded.*grade above success_threshold=0.5.*was 0.4"),
        ([0.0], "all 128 graded rollouts earned grade 0"),
        ([1.0, 0.6], "every rollout of 128 succeeded"),
        ([math.nan, 0.2, 0.3, 0.1], "no rollout of 96 succeeded"),
    ],
)
def test_what_cannot_be_learned_from_is_said_once(caplog, values, said):
    looked_at(values * ROLLOUTS)
    (message,) = caplog.messages
    assert message.startswith(f"The first {ROLLOUTS} rollouts of training: ")
    assert re.search(said, message)


def test_answers_that_are_cut_off_are_the_cause_that_is_named(caplog):
    looked_at([0.0] * 8, cut_share=0.75)
    looked_at([0.0] * 8, cut_share=0.25)
    looked_at([1.0] * 8, cut_share=1.0)
    looked_at([0.1, 0.4] * 4, cut_share=1.0)  # a reward that tells them apart has seen answers
    first, *others = caplog.messages
    assert "75% of them were cut off at max_completion_length=100, probably before" in first
    assert "too easy or too hard" not in first
    assert len(others) == 3
    assert not any("max_completion_length" in message for message in others)


def test_too_few_rollouts_say_nothing_and_both_outcomes_neither(caplog):
    looked_at([0.0] * 7)  # 112 of 128
    looked_at([0.0] * 7 + [1.0] + [0.0] * 20)
    looked_at([math.nan] * 20)
    looked_at([0.0] * 20, wanted=False)
    assert caplog.messages == []


def half_right(groups):
    """Of 8 rollouts each; the first group is not judged whole."""
    successes = torch.tensor([[1.0, 0.0] * 4] * groups)
    successes[0, 0] = math.nan
    return successes


def test_what_smaller_groups_would_give_is_said_once(caplog):
    caplog.set_level("INFO")
    look = GroupLook(wanted=True)
    look.add(half_right(GROUPS - 1))
    assert caplog.messages == []
    for _ in range(100):
        look.add(half_right(1))
    line, advice = caplog.messages
    # Of 28 pairs of 4 right and 4 wrong rollouts 16 are mixed.
    assert "57% at 2, 97% at 4, 100% at 8, 100% at 16 by a fit" in line
    assert f"(estimated from {GROUPS - 2} groups of 8)" in line
    assert advice.startswith("num_generations=2 instead of 8 would give 2.3 times")


def test_nothing_is_said_of_groups_that_are_all_alike_or_to_whom_it_is_nothing(caplog):
    caplog.set_level("INFO")
    look = GroupLook(wanted=True)
    look.add(torch.ones(GROUPS, 4))
    look.add(half_right(GROUPS))
    GroupLook(wanted=False).add(half_right(GROUPS))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (LearnAlignConfig.adaptive(adaptive_embeddings="none"), True),
        (LearnAlignConfig.skipping(), True),
        (LearnAlignConfig.control(), False),
    ],
)
def test_runs_in_adaptive_order_or_with_skipping_say_what_group_sizes_do(
    tmp_path, caplog, settings, wanted
):
    caplog.set_level("INFO")
    trainer = cases.trainer(
        tmp_path, data=cases.dataset(64), per_device_train_batch_size=32, max_steps=9
    )
    trainer.add_callback(LearnAlignCallback(trainer, settings))
    trainer.train()
    said = [
        text
        for text in caplog.messages
        if "with both correct and wrong rollouts, by num_generations" in text
    ]
    assert len(said) == wanted
    if wanted:
        assert f"(estimated from {GROUPS} groups of 4)" in said[0]
    assert trainer.num_generations == trainer.args.num_generations == 4


def test_a_run_that_goes_on_says_nothing_of_group_sizes(tmp_path, caplog):
    caplog.set_level("INFO")

    def train(checkpoint):
        trainer = cases.trainer(
            tmp_path,
            data=cases.dataset(64),
            per_device_train_batch_size=32,
            max_steps=10 if checkpoint else 1,
            save_strategy="steps",
            save_steps=1,
        )
        trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig.skipping()))
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.state.global_step

    train(None)
    assert train(str(tmp_path / "checkpoint-1")) == 10
    assert not [
        text
        for text in caplog.messages
        if "with both correct and wrong rollouts, by num_generations" in text
    ]


def graded(completions, **_):
    return [0.4 if "a" in cases.text(completion) else 0.1 for completion in completions]


@pytest.mark.parametrize("rewards", [graded, cases.accuracy_reward])
@pytest.mark.parametrize("oversample", [1.0, 2.0])
def test_an_adaptive_run_says_why_its_belief_has_nothing_to_go_by(
    tmp_path, caplog, rewards, oversample
):
    trainer = cases.trainer(tmp_path, rewards=rewards, data=cases.dataset(24))
    settings = LearnAlignConfig.adaptive(
        warmup_samples=0,
        stages=[1.0],
        order="adaptive",
        oversample=oversample,
        stage_steps=18,
        feature_dim=64,
    )
    trainer.add_callback(LearnAlignCallback(trainer, settings))
    trainer.train()
    said = [text for text in caplog.messages if "rollouts of training" in text]
    assert len(said) == (rewards is graded)
    if said:
        assert "graded above success_threshold=0.5; the largest was 0.4" in said[0]


def never_right(completions, **_):
    return [0.0] * len(completions)


def test_a_run_whose_completions_are_all_cut_off_says_so_once(tmp_path, caplog):
    trainer = cases.trainer(
        tmp_path, rewards=never_right, data=cases.dataset(24), max_completion_length=1, max_steps=18
    )
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig.adaptive()))
    trainer.train()
    said = [text for text in caplog.messages if "no prompt is learnable" in text]
    assert len(said) == 1
    assert "were cut off at max_completion_length=1" in said[0]


def spread(few, rest):
    """128 rewards: so many of `few`, among rewards that `rest` repeats."""
    values = [few[0]] * few[1] + [rest[place % len(rest)] for place in range(128 - few[1])]
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("few", "rest", "said"),
    [
        ((0.51, 5), [0.1, 0.2, 0.3, 0.4, 0.49], "only 5 of 128 rollouts succeeded.*lower success_"),
        ((0.49, 5), [0.6, 0.7, 0.8, 0.9], "all but 5 of 128 rollouts succeeded.*raise success_th"),
        ((1.0, 5), [0.0], None),  # a hard pool
        ((1.0, 5), [0.0, 0.1], None),  # with a little for the form
        ((0.0, 5), [1.0, 0.9], None),
        ((0.51, 30), [0.1, 0.2, 0.3, 0.4, 0.49], None),  # enough to learn from
    ],
)
def test_a_threshold_that_hides_most_of_a_graded_reward_is_said(few, rest, said):
    problem = RULE.problem_of(spread(few, rest))
    assert (problem is None) == (said is None)
    if said:
        assert re.search(said, problem)
        assert "grade above success_threshold=0.5" in problem
        assert "hardly any prompt is learnable" in problem


def test_one_reward_for_all_names_the_rule():
    problem = RULE.problem_of(torch.zeros(8))
    assert "(Correct means grade above success_threshold=0.5.)" in problem


def finely_graded(completions, **_):
    """From 0 to 0.52, so that about one in twenty-five is above 0.5."""
    codes = [sum(ord(c) * (k + 7) for k, c in enumerate(cases.text(text))) for text in completions]
    return [0.52 * (code % 101) / 100 for code in codes]


MODES = [
    dict(stages=[1.0]),
    dict(stages=[1.0], order="shuffled", oversample=2),
    dict(stages=[1.0], order="trainer", max_generation_batches=2),
    dict(stages=[0.5], selector="learnability"),
    dict(stages=[0.5], selector="learnability", rollout_budget=0.6),
    dict(stages=[0.5, 0.5], selector="random", order=["shuffled", "adaptive"]),
]


@pytest.mark.parametrize("mode", MODES)
def test_every_order_by_success_says_that_its_threshold_hides_the_reward(tmp_path, caplog, mode):
    data = cases.dataset(60)
    trainer = cases.trainer(
        tmp_path, rewards=finely_graded, data=data, per_device_train_batch_size=32
    )
    settings = LearnAlignConfig.adaptive(adaptive_embeddings="none", **mode)
    trainer.add_callback(LearnAlignCallback(trainer, settings))
    trainer.train()
    said = [text for text in caplog.messages if "The rewards range from 0" in text]
    assert said
    assert all("Correct means finely_graded above success_threshold=0.5" in text for text in said)
