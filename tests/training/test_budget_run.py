"""A rollout budget inside the trainer: what is rolled out, what is chosen, and what survives a kill."""

import itertools
import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import sampling_cases
import torch
from adaptive_cases import history, weights
from interruptions import Killed

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, plan
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.adaptive.belief import Belief
from trl_learnalign.adaptive.order import after_rounds, round_sizes, sample_by_learnability
from trl_learnalign.measuring.rollouts import GradientMeasure, RolloutMeasure
from trl_learnalign.preflight.forecast import make_forecast
from trl_learnalign.records.notes import SelectionNote
from trl_learnalign.records.run_record import check_recorded
from trl_learnalign.records.store import StoreError
from trl_learnalign.report import read_run
from trl_learnalign.report.page import render
from trl_learnalign.rng import key
from trl_learnalign.selectors import find_selector
from trl_learnalign.training.checkpoints import last_complete_checkpoint
from trl_learnalign.training.metrics import selection_lines, selection_metrics

POOL = 60


def settings(**options):
    defaults = dict(
        warmup_samples=4,
        stages=[6],
        selector="learnability",
        rollout_budget=0.4,
        budget_rounds=3,
        adaptive_embeddings="sampling_cases:embeddings",
        feature_dim=64,
        shard_size=4,
    )
    return LearnAlignConfig(**{**defaults, **options})


def begun(folder, config, **options):
    options = {"max_steps": -1, "save_strategy": "steps", "save_steps": 1, **options}
    trainer = sampling_cases.trainer(folder, rows=list(range(POOL)), **options)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    return trainer, callback


def go(folder, config, resume=False, **options):
    trainer, callback = begun(folder, config, **options)
    found = last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    return trainer, callback


def drawn(callback, stage="stage_1"):
    """Whom each round rolled out, as it lies on disk."""
    folders = sorted((callback.folder / stage).glob("round_*"))
    return [json.loads((folder / "prompts.json").read_text())["rows"] for folder in folders]


def table_of(callback, stage="stage_1"):
    return pd.read_parquet(callback.folder / f"{stage}.parquet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return go(tmp_path_factory.mktemp("whole"), settings())


# ---- What is rolled out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "rounds"), [(0.4, 3), (0.25, 1), (0.999, 4), (0.01, 4), (1, 2)])
def test_no_more_is_rolled_out_than_the_budget(tmp_path, monkeypatch, budget, rounds):
    """From outside: the calls of the measure that rolls out, and what the rollout function is given."""
    rolled_out, measured = [], []
    sample, measure = sampling_cases.roll_out, RolloutMeasure.measure

    def counting(prompts, trainer):
        rolled_out.extend(prompts)
        return sample(prompts, trainer)

    def noting(self, number, prompts, calls, keep):
        measured.extend(prompts.tolist())
        return measure(self, number, prompts, calls, keep)

    monkeypatch.setattr(sampling_cases, "roll_out", counting)
    monkeypatch.setattr(RolloutMeasure, "measure", noting)
    config = settings(
        warmup_samples=0, rollout_budget=budget, budget_rounds=rounds, scoring_batch_prompts=1
    )
    _, callback = go(tmp_path, config)
    allowed = max(1, int(budget * POOL))
    assert len(measured) == len(set(measured)) == allowed
    rows, note = drawn(callback), callback.record.get("stage_1", SelectionNote)
    assert (
        sorted(itertools.chain(*rows)) == sorted(measured) == table_of(callback)["index"].tolist()
    )
    assert len(rows) == min(rounds, allowed)
    trained = callback.plan.total_steps * callback.plan.geometry.prompts_per_generation
    assert len(rolled_out) == (allowed + trained) * sampling_cases.ROLLOUTS
    assert sum(part.rollouts for part in note.scoring.rounds) == allowed * sampling_cases.ROLLOUTS
    planned = make_forecast(
        callback.plan, config, [find_selector("learnability")], max_completion_length=8
    )
    assert planned.scoring_rollouts == allowed * sampling_cases.ROLLOUTS
    assert planned.phases[-1].measured == note.candidates == allowed


def test_what_scoring_cost_is_that_of_the_rounds(whole):
    _, callback = whole
    note = callback.record.get("stage_1", SelectionNote)
    lengths = table_of(callback)["mean_completion_length"]
    assert note.cost.tokens_generated == round(lengths.sum() * sampling_cases.ROLLOUTS)
    assert note.scoring.measures["rollouts"]["tokens_generated"] == note.cost.tokens_generated


def test_the_first_round_is_a_random_sample_whatever_is_believed(whole, tmp_path):
    _, callback = whole
    sample = plan.scored_sample(42, "stage_1", np.arange(POOL), 8)
    assert drawn(callback)[0] == sample.tolist()
    _, other = go(tmp_path, settings(warmup_samples=0, adaptive_embeddings="none"))
    assert drawn(other)[0] == sample.tolist()
    assert drawn(other)[1] != drawn(callback)[1]
    first, *later = callback.record.get("stage_1", SelectionNote).scoring.rounds
    rates = [sampling_cases.successes(row) / sampling_cases.ROLLOUTS for row in sample]
    assert first.success_rate == pytest.approx(np.mean(rates))
    assert first.believed is None
    assert all(part.believed is not None for part in later)


def test_later_rounds_go_to_prompts_that_can_be_learned(whole):
    """Three prompts of five can be learned, and the embeddings tell which."""
    _, callback = whole
    shares = [
        part.learnable_share
        for part in callback.record.get("stage_1", SelectionNote).scoring.rounds
    ]
    later = drawn(callback)[1:]
    learnable = [[0 < sampling_cases.successes(row) < 4 for row in rows] for rows in later]
    assert shares[1:] == [np.mean(rows) for rows in learnable]
    assert min(shares[1:]) > 0.8


def test_a_round_follows_from_the_outcomes_before_it(whole):
    """From outside: warm-up and rounds, told to a belief of our own, draw the same prompts."""
    _, callback = whole
    features = callback.run.order.belief_before(0).features
    belief = Belief(features, callback.config)
    warmup = history(callback).query("phase == 'warmup'")
    for step, group in warmup.groupby("step"):
        columns = [group[name].to_numpy() for name in ("index", "right", "wrong")]
        belief.record(Outcomes.at(step + 1, *columns), step + 1)
    rounds, told = drawn(callback), []
    assert [len(rows) for rows in rounds] == round_sizes(POOL, 0.4, 3)
    for number, rows in enumerate(rounds, start=1):
        if number > 1:
            now = after_rounds(belief, told, belief.generation + 1)
            free = np.setdiff1d(np.arange(POOL), np.concatenate([part.rows for part in told]))
            expected = sample_by_learnability(
                now, free, len(rows), 2.0, key(42, "round", "stage_1", number)
            )
            assert rows == expected.tolist()
        right = np.array([sampling_cases.successes(row) for row in rows])
        told.append(Outcomes.at(belief.generation + 1, np.array(rows), right, 4 - right))


def test_what_one_stage_has_scored_the_next_one_remembers(tmp_path):
    """Nothing is trained on that tells anything: what the second stage knows, the first has told it."""
    config = settings(warmup_samples=0, stages=[6, 6], budget_rounds=2, reselect="all")
    _, callback = go(tmp_path, config)
    first, second = drawn(callback), drawn(callback, "stage_2")
    assert first[0] != second[0]
    believed = [
        callback.record.get(stage, SelectionNote).scoring.rounds[1].believed
        for stage in ("stage_1", "stage_2")
    ]
    seen = [
        np.mean([sampling_cases.successes(row) / 4 for row in rows[1]]) for rows in (first, second)
    ]
    assert abs(believed[1] - seen[1]) < 0.2


def test_a_stage_larger_than_the_budget_is_filled(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        _, callback = go(tmp_path, settings(stages=[30], rollout_budget=0.2))
    note = callback.record.get("stage_1", SelectionNote)
    assert (note.candidates, note.unscored_selected) == (12, 18)
    assert len(callback.selected("stage_1")) == 30
    assert "18 unscored" in caplog.text


def test_record_log_and_report_say_what_was_not_scored(whole, caplog):
    _, callback = whole
    note = callback.record.get("stage_1", SelectionNote)
    assert (note.candidates, note.not_scored) == (24, 36)
    assert "24 candidates (36 others were not scored)" in selection_lines(note)[0]
    assert selection_metrics(note, 1)["learnalign/not_scored"] == 36
    page = render(read_run(callback.folder.parent), {})
    said = "Rolled out 24 of 60 candidates within the budget: a random sample of 8, "
    assert said in page
    share = note.scoring.rounds[2].learnable_share
    assert f"round 3: 8 prompts, {share:.0%} of them learnable." in page


def test_a_measurer_without_a_belief_is_told_so(whole, tmp_path):
    """For those who measure without the callback."""
    _, callback = whole
    measurer = replace(callback.run.measurer, folder=tmp_path, prior=None)
    with pytest.raises(
        ValueError,
        match=r"rollout_budget=0\.4 chooses prompts by a belief about their success rates",
    ):
        measurer.measure("stage_1", 0, np.arange(POOL), [find_selector("learnability")])
    assert len(list(tmp_path.glob("stage_1/round_*/prompts.json"))) == 1


def test_nothing_is_spent_on_a_stage_that_takes_everybody(tmp_path):
    _, callback = go(tmp_path, settings(stages=[0.5, 0.5], skip_forced_scoring=True))
    assert callback.record.get("stage_1", SelectionNote).scored
    assert not callback.record.get("stage_2", SelectionNote).scored


def test_a_selector_that_does_not_roll_out_ranks_all_candidates(tmp_path):
    _, callback = go(tmp_path, settings(selector="random"))
    assert callback.record.get("stage_1", SelectionNote).candidates == POOL
    assert not list((callback.folder / "stage_1").glob("round_*"))


# ---- One pool of several rounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["learnalign", "learnalign_coverage", "validation_alignment"])
def test_a_budget_of_everything_measures_what_no_budget_measures(tmp_path, selector):
    """Rollouts are a function of the prompt: the same gradients, whatever round they are of."""
    validation = sampling_cases.trainer(tmp_path / "validation", rows=[1, 2]).train_dataset
    tables = []
    for name, changes in (("plain", dict(rollout_budget=None)), ("rounds", dict(rollout_budget=1))):
        config = settings(selector=selector, reliability=True, **changes)
        options = {"max_steps": -1, "save_strategy": "no"}
        trainer = sampling_cases.trainer(tmp_path / name, rows=list(range(20)), **options)
        given = validation if selector == "validation_alignment" else None
        callback = LearnAlignCallback(trainer, config, validation_dataset=given)
        trainer.add_callback(callback)
        trainer.train()
        note = callback.record.get("stage_1", SelectionNote)
        tables.append((table_of(callback), note, callback.selected("stage_1")))
        examples = json.loads((callback.folder / "stage_1_examples.json").read_text())["examples"]
        for example in examples:
            right = {text["right"] for text in example["rollouts"]}
            count = sampling_cases.successes(example["index"])
            assert right == {kind for kind in (True, False) if (count > 0 if kind else count < 4)}
    (plain, note, chosen), (rounds, note_of_rounds, chosen_in_rounds) = tables
    pd.testing.assert_frame_equal(plain, rounds, rtol=1e-6, atol=1e-6)
    assert chosen.tolist() == chosen_in_rounds.tolist()
    assert note.reliability.spearman_halves == pytest.approx(
        note_of_rounds.reliability.spearman_halves
    )
    assert note.cost.tokens_trained == note_of_rounds.cost.tokens_trained
    assert note.breadth.directions == pytest.approx(note_of_rounds.breadth.directions)


# ---- Interrupted ----------------------------------------------------------------------------------------------------


class KillInShard:
    """Ends a run when a shard of scoring is to be measured, counted over all rounds."""

    def __init__(self, measure, at):
        self.measure, self.at, self.seen = measure, at, 0

    def __call__(self, measure, number, prompts, calls, keep):
        self.seen += 1
        if self.seen > self.at:
            raise Killed
        return self.measure(measure, number, prompts, calls, keep)


@pytest.mark.parametrize("selector", ["learnability", "learnalign_coverage"])
@pytest.mark.parametrize(
    "at",
    [pytest.param(at, marks=[pytest.mark.slow] * (at not in (1, 5))) for at in (0, 1, 2, 3, 5)],
)
def test_a_run_killed_in_any_round_goes_on_bit_by_bit(tmp_path, monkeypatch, selector, at):
    config = settings(selector=selector, stages=[6, 6])
    trainer, callback = go(tmp_path / "whole", config)
    kind = RolloutMeasure if selector == "learnability" else GradientMeasure
    with monkeypatch.context() as patched:
        kill = KillInShard(kind.measure, at)
        patched.setattr(kind, "measure", lambda *given: kill(*given))
        with pytest.raises(Killed):
            go(tmp_path / "killed", config)
    other, resumed = go(tmp_path / "killed", config, resume=True)
    for stage in ("stage_1", "stage_2"):
        assert drawn(resumed, stage) == drawn(callback, stage)
        pd.testing.assert_frame_equal(table_of(resumed, stage), table_of(callback, stage))
        assert resumed.selected(stage).tolist() == callback.selected(stage).tolist()
    pd.testing.assert_frame_equal(history(resumed), history(callback))
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(trainer), strict=True))


def test_rounds_of_another_policy_are_not_gone_on_with(tmp_path, monkeypatch):
    go(tmp_path, settings(), save_strategy="no")
    trainer, _ = begun(tmp_path, settings())
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.mul_(1.01)
    with pytest.raises(StoreError, match="measurements of another run"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(rollout_budget=0.5), "rollout_budget was 0.4 and is 0.5"),
        (dict(budget_rounds=2), "budget_rounds was 3 and is 2"),
        (dict(budget_exponent=0.1), "budget_exponent was 2.0 and is 0.1"),
        (dict(adaptive_prior_std=2.0), "adaptive_prior_std was .* and is 2.0"),
    ],
)
def test_a_run_with_another_budget_is_refused(tmp_path, changes, said):
    go(tmp_path, settings())
    with pytest.raises(StoreError, match=said):
        begun(tmp_path, settings(**changes))


def test_settings_that_only_an_order_reads_do_not_make_another_run(tmp_path):
    go(tmp_path, settings())
    _, callback = begun(tmp_path, settings(adaptive_exploration=0.1))
    assert check_recorded(callback.folder, callback.identify().entries) is not None
