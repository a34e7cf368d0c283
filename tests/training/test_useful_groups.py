"""One meaning of "useful" in log, metrics, record, history and report: the group has a gradient."""

import logging
import re

import cases
import numpy as np
import pandas as pd
import pytest

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.dynamic_sampling import install_dynamic_sampling
from trl_learnalign.records.notes import RolloutsNote
from trl_learnalign.report.run_data import read_run
from trl_learnalign.report.sections import order_sentence


def never_accuracy(completions, **_):
    return [0.0] * len(completions)


def graded(completions, **_):
    return [0.01 * sum(map(ord, cases.text(text))) % 0.3 for text in completions]


def coin_accuracy(completions, **_):
    return cases.accuracy_reward(completions)


def against_it(completions, **_):
    return [-coin for coin in cases.accuracy_reward(completions)]


RIGHT_AND_WRONG, EVERY, NONE = "right and wrong", "every", "none"
KINDS = {
    # Rewards, options of the trainer, which groups have a gradient, and which both correct and wrong rollouts.
    "another reward": (dict(rewards=[never_accuracy, graded]), EVERY, NONE),
    "graded": (dict(rewards=graded), EVERY, NONE),
    "one against the other": (dict(rewards=[coin_accuracy, against_it]), NONE, RIGHT_AND_WRONG),
    "all masked": (
        dict(rewards=graded, max_completion_length=1, mask_truncated_completions=True),
        NONE,
        NONE,
    ),
    "right or wrong": (dict(rewards=coin_accuracy), RIGHT_AND_WRONG, RIGHT_AND_WRONG),
}
WAYS = {
    "adaptive": {},
    "adaptive, all trained on": dict(skip_zero_advantages=False),
    "oversampled": dict(oversample=1.5),
    "own": dict(order="trainer"),
    "own, oversampled": dict(order="trainer", oversample=1.5, skip_zero_advantages=False),
}
CASES = [(kind, list(WAYS)[i % 5]) for i, kind in enumerate(KINDS)]
CASES += [("another reward", way) for way in WAYS if way != "adaptive"]


def trained(folder, kind, way, **options):
    trainer = cases.trainer(
        folder,
        max_steps=3,
        data=cases.dataset(16),
        log_completions=True,
        **KINDS[kind][0],
        **options,
    )
    callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(**WAYS[way]))
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def advantages(folder, step):
    """From outside: TRL's own table of what is trained on, as groups."""
    table = pd.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
    return table["advantage"].to_numpy().reshape(-1, 4)


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_a_useful_group_has_a_gradient_wherever_it_is_told(tmp_path, caplog, kind, way):
    caplog.set_level(logging.INFO, "trl_learnalign")
    trainer, callback = trained(tmp_path, kind, way)
    _, useful, mixed = KINDS[kind]
    note = callback.record.get("stage_1", RolloutsNote)
    assert note.groups == (6 if "oversampled" not in way else 9)
    counts = {EVERY: note.groups, NONE: 0, RIGHT_AND_WRONG: note.mixed}
    if kind == "all masked":  # but for those that end at once
        assert note.useful <= note.groups / 2
        return
    assert note.useful == counts[useful]
    assert (note.mixed > 0) == (mixed == RIGHT_AND_WRONG)
    assert f"{note.useful_share:.0%} of {note.groups} groups had a gradient" in caplog.text
    assert ("both correct and wrong rollouts" in caplog.text) == (note.mixed != note.useful)
    if callback.config.is_adaptive:
        assert f"{note.useful_share:.0%} of the {note.groups} groups" in order_sentence(
            callback.record.contents
        )
        assert read_run(tmp_path).outcomes.useful.sum() == note.useful
    for entry in trainer.state.log_history:
        if "loss" in entry:
            expected = (np.abs(advantages(tmp_path, entry["step"])) > 1e-5).any(axis=1).mean()
            assert entry["learnalign/useful_groups"] == pytest.approx(expected)


def test_a_callback_that_was_made_and_not_added_says_nothing(tmp_path):
    config = LearnAlignConfig.adaptive(order="trainer", skip_zero_advantages=False)
    trainer = cases.trainer(tmp_path, max_steps=1)
    LearnAlignCallback(trainer, config)
    trainer.train()
    assert "learnalign/useful_groups" not in str(trainer.state.log_history)


def test_what_something_else_puts_together_is_not_noted_and_that_is_said_once(tmp_path, caplog):
    trainer = cases.trainer(tmp_path, max_steps=3)
    install_dynamic_sampling(trainer, lambda step, start, count: range(count), 2.0)
    config = LearnAlignConfig.adaptive(order="trainer", skip_zero_advantages=False)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    trainer.train()
    assert (
        sum("The outcomes of generations are not recorded" in text for text in caplog.messages) == 1
    )
    assert callback.record.get("stage_1", RolloutsNote).groups == 0


def test_a_phase_without_a_gradient_says_what_was_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO, "trl_learnalign")
    trainer = cases.trainer(tmp_path, max_steps=3, rewards=never_accuracy)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig.adaptive()))
    trainer.train()
    assert sum("0% of 6 groups had a gradient" in text for text in caplog.messages) == 1
    (line,) = [text for text in caplog.messages if "tokens were not trained on" in text]
    left_out, kept = (int(part) for part in re.findall(r"(\d+)% (?:of the tokens|without)", line))
    assert left_out + kept in (99, 100, 101)
    assert "without a gradient were, since a step needs a row" in line
