"""What is noted and said of a phase's rollouts when it ends."""

import json
import logging
from dataclasses import replace

import cases
import numpy as np
import pandas as pd
import pytest
import sampling_cases
import torch
from adaptive_cases import go, history, settings
from interruptions import Killed
from transformers import AutoModelForCausalLM

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.records.history import read_outcomes
from trl_learnalign.records.notes import BeliefNote, RolloutsNote
from trl_learnalign.training.metrics import belief_note


def notes_of(callback, phase="stage_1"):
    return callback.record.get(phase, RolloutsNote), callback.record.get(phase, BeliefNote)


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(each) for key, each in value.items() if "seconds" not in key}
    return [without_seconds(each) for each in value] if isinstance(value, list) else value


def noted(callback):
    """`phases` of `run.json`, without times."""
    return without_seconds(json.loads((callback.folder / "run.json").read_text())["phases"])


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory):
    return go(tmp_path_factory.mktemp("runs"), settings(stage_steps=10))


def test_groups_are_counted_as_the_history_has_them(adaptive):
    _, callback = adaptive
    rollouts, _ = notes_of(callback)
    table = history(callback)
    assert rollouts.groups == len(table) == rollouts.groups_trained == 20
    assert rollouts.mixed == ((table["right"] > 0) & (table["wrong"] > 0)).sum()
    assert rollouts.useful == table["useful"].sum() == rollouts.mixed  # the only reward is 0 or 1
    assert rollouts.prompts == table["index"].nunique()
    assert rollouts.step == 10


def test_tokens_that_were_skipped_are_those_that_the_ledger_lacks(adaptive, tmp_path):
    _, callback = adaptive
    rollouts, _ = notes_of(callback)
    cost = callback.record.contents.ledger.entries["stage_1"]["training"]
    assert rollouts.tokens_trained == cost.tokens_trained
    assert rollouts.tokens_given == cost.tokens_generated + cost.tokens_prompt
    assert 0 < rollouts.skipped_share < 1
    _, callback = go(tmp_path, settings(stage_steps=2, skip_zero_advantages=False))
    assert notes_of(callback)[0].skipped_share is None


class TrainedTokens:
    """Tokens that go forward with a gradient, counted at the model's door; padding left out."""

    def __init__(self, trainer):
        self.count = 0
        trainer.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, arguments, inputs):
        if torch.is_grad_enabled():
            self.count += int(inputs["attention_mask"].sum())


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"oversample": 2.0}, {"max_generation_batches": 3}])
def test_the_ledger_counts_what_went_through_the_model(tmp_path, skips, sampling):
    config = settings(
        stage_steps=4, skip_zero_advantages=skips, adaptive_embeddings="none", **sampling
    )
    trainer = sampling_cases.trainer(tmp_path, max_steps=-1, num_iterations=2)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    seen = TrainedTokens(trainer)
    trainer.train()
    cost = callback.record.contents.ledger.entries["stage_1"]["training"]
    assert cost.tokens_trained == seen.count
    table = history(callback)
    texts = cases.dataset(100)["prompt"]
    assert cost.tokens_prompt == 4 * sum(len(texts[row]) for row in table["index"])


def test_calibration_by_hand(adaptive):
    _, callback = adaptive
    _, belief = notes_of(callback)
    table = history(callback)
    # One row for each rollout: what was believed, and whether it was right.
    chance = np.repeat(table["predicted"].to_numpy(), 4)
    right = np.concatenate(
        [[1] * r + [0] * w for r, w in zip(table["right"], table["wrong"], strict=True)]
    )
    assert belief.rollouts == len(right) == 80
    assert belief.predicted == pytest.approx(chance.mean())
    assert belief.seen == pytest.approx(right.mean())
    assert belief.brier == pytest.approx(((chance - right) ** 2).mean())
    pairs = chance[right == 1][:, None] - chance[right == 0]
    assert belief.auc == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert sum(one.rollouts for one in belief.bins) == 80
    for one in belief.bins:
        inside = (chance >= one.low) & (chance < one.high)
        assert one.rollouts == inside.sum()
        if one.rollouts:
            assert one.seen == pytest.approx(right[inside].mean())
    kept = callback.run.order.adaptive.belief
    assert belief.concentration == kept.concentration


def test_prompts_that_came_most_often_are_named(adaptive):
    _, callback = adaptive
    rollouts, _ = notes_of(callback)
    table = history(callback)
    counts = table["index"].value_counts()
    texts = cases.dataset(24)["prompt"]
    assert [prompt.times for prompt in rollouts.repeated] == counts[counts > 1].head(5).tolist()
    for prompt in rollouts.repeated:
        assert counts[prompt.index] == prompt.times
        assert prompt.prompt == texts[prompt.index]
        rates = table.loc[table["index"] == prompt.index, "success_rate"]
        assert (prompt.first, prompt.last) == (rates.iloc[0], rates.iloc[-1])


def test_nothing_is_said_of_a_belief_that_there_was_not(tmp_path):
    trainer = cases.trainer(tmp_path)
    callback = LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=4, feature_dim=64))
    trainer.add_callback(callback)
    trainer.train()
    for phase in ("warmup", "stage_1", "stage_2", "stage_3"):
        rollouts, belief = notes_of(callback, phase)
        assert belief is None
        assert rollouts.groups == rollouts.groups_trained > 0
        assert rollouts.repeated == ()
        assert rollouts.tokens_given is rollouts.not_skipped is None


def test_no_outcome_leaves_what_it_would_tell_unknown():
    nothing = np.array([], dtype=np.int64)
    outcomes = Outcomes.at(0, nothing, nothing, nothing)
    note = belief_note(3, outcomes, 4.0)
    assert note.rollouts == 0
    assert {note.predicted, note.seen, note.brier, note.auc, note.calibration_error} == {None}
    alike = Outcomes.at(1, *np.array([[1], [4], [0]]))
    alike = replace(alike, predicted=np.array([0.25]))
    note = belief_note(3, alike, 4.0)
    assert (note.auc, note.brier, note.seen) == (None, 0.75**2, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"oversample": 1.5}, marks=pytest.mark.slow),
        {"max_generation_batches": 3},
    ],
)
def test_a_run_that_was_killed_notes_what_one_that_was_not_does(tmp_path, options):
    config = settings(stages=[0.5, 0.5], warmup_samples=4, selector="learnability", **options)
    _, callback = go(tmp_path / "whole", config)
    expected = noted(callback)
    assert {"rollouts", "belief"} <= set(expected["stage_2"])
    for step in (1, callback.plan.phases[1].end, callback.plan.total_steps - 1):
        with pytest.raises(Killed):
            go(tmp_path / str(step), config, kill_at=step)
        _, callback = go(tmp_path / str(step), config, resume=True)
        assert noted(callback) == expected


# ---- In words -------------------------------------------------------------------------------------------------------


def said(caplog, *arguments, **options):
    caplog.clear()
    with caplog.at_level(logging.INFO, "trl_learnalign"):
        _, callback = go(*arguments, **options)
    return callback, caplog.text


def test_one_line_tells_what_a_phase_came_to(tmp_path, caplog):
    callback, text = said(caplog, tmp_path, settings(stage_steps=10))
    rollouts, belief = notes_of(callback)
    line = (
        f"stage_1: {rollouts.useful_share:.0%} of 20 groups had a gradient (success rate: predicted "
        f"{belief.predicted:.2f}, observed {belief.seen:.2f})"
    )
    assert text.count(line) == text.count("had a gradient") == 1
    assert f"stage_1: {rollouts.skipped_share:.0%} of the tokens were not trained on" in text


def test_it_tells_what_was_rolled_out_besides(tmp_path, caplog):
    callback, text = said(caplog, tmp_path, settings(stage_steps=6, oversample=2.0))
    rollouts, _ = notes_of(callback)
    assert (rollouts.groups, rollouts.groups_trained) == (24, 12)
    assert "24 groups had a gradient" in text
    assert "stage_1: 12 groups were chosen to be trained on" in text


def test_it_tells_no_share_where_nothing_is_skipped(tmp_path, caplog):
    cases.model().save_pretrained(tmp_path / "policy")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    config = settings(stage_steps=2)
    callback, text = said(caplog, tmp_path / "run", config, policy=policy, beta=0.1)
    assert "had a gradient" in text
    assert "not trained on" not in text
    assert "beta=0.1" in notes_of(callback)[0].not_skipped


def test_an_ordinary_run_says_nothing_of_it(tmp_path, caplog):
    config = LearnAlignConfig(warmup_samples=0, stages=[1.0], stage_steps=2, selector="random")
    _, text = said(caplog, tmp_path, config)
    assert "had a gradient" not in text


# ---- Read back ------------------------------------------------------------------------------------------------------


def test_outcomes_are_read_as_they_were_recorded(adaptive, tmp_path):
    _, callback = adaptive
    found = read_outcomes(callback.folder / "reward_history.parquet")
    table = history(callback)
    assert found.rows.tolist() == table["index"].tolist()
    np.testing.assert_array_equal(found.success_rates, table["success_rate"])
    assert len(found.of_phase("warmup")) == 0
    assert read_outcomes(tmp_path / "absent.parquet") is None


def test_a_history_of_version_0_1_counted_nothing(tmp_path):
    pd.DataFrame({"index": [0], "pass": [0], "success_rate": [0.5]}).to_parquet(tmp_path / "a")
    assert read_outcomes(tmp_path / "a") is None


def test_a_damaged_history_is_named(tmp_path):
    (tmp_path / "history.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"history\.parquet is damaged .*: move it away"):
        read_outcomes(tmp_path / "history.parquet")
