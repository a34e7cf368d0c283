"""What a notebook shows of a run."""

import cases
import pandas as pd
import pytest

from trl_learnalign import LearnAlignCallback, LearnAlignConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A callback, how it showed itself before training, and its folder."""
    folder = tmp_path_factory.mktemp("run") / "a<b"
    trainer = cases.trainer(folder, data=cases.dataset(14))
    config = LearnAlignConfig(
        warmup_samples=4, stages=[6, 4], shard_size=4, feature_dim=64, skip_forced_scoring=True
    )
    callback = LearnAlignCallback(trainer, config)
    before = repr(callback)
    trainer.add_callback(callback)
    trainer.train()
    return callback, before, folder


def test_a_callback_says_how_far_its_run_is(run):
    callback, before, folder = run
    steps = callback.plan.total_steps
    assert before == (
        "<LearnAlignCallback: warmup (4 prompts, planned) → stage_1 (6 prompts, selects later) → "
        f"stage_2 (4 prompts, selects later); learnalign; step 0 of {steps}; "
        f"records in {folder}/_learnalign>"
    )
    after = repr(callback)
    assert "warmup (4 prompts, trained, reward 0." in after
    assert "stage_1 (6 of 14 prompts, trained, reward 0." in after
    assert f"step {steps} of {steps}" in after


@pytest.mark.parametrize(
    ("settings", "said"), [({}, "adaptive order"), ({"order": "shuffled"}, "shuffled order")]
)
def test_a_run_that_scores_nothing_names_its_order_and_no_selector(tmp_path, settings, said):
    callback = LearnAlignCallback(cases.trainer(tmp_path), LearnAlignConfig.adaptive(**settings))
    assert f"; {said}; step 0 of " in repr(callback)
    assert "learnalign_coverage" not in repr(callback)


def test_the_table_of_a_stage_has_its_prompts_best_first(run):
    callback, _, folder = run
    table = callback.table("stage_1")
    assert table.columns[:7].tolist() == [
        *("rank", "selected", "prompt", "success_rate", "learnability", "alignment", "score")
    ]
    assert table["rank"].tolist() == list(range(1, 15))
    assert sorted(table.index[table["selected"]]) == callback.selected("stage_1").tolist()
    prompts = callback.trainer.train_dataset["prompt"]
    assert all(prompts[row] == table["prompt"][row] for row in table.index)
    stored = pd.read_parquet(folder / "_learnalign" / "stage_1.parquet").set_index("index")
    assert set(stored.columns) == set(table.columns)
    pd.testing.assert_series_equal(table["score"].sort_index(), stored["score"].sort_index())


def test_a_stage_that_is_not_there_is_told_with_those_that_are(run, tmp_path):
    callback, _, _ = run
    for look in (callback.table, callback.selected):
        with pytest.raises(KeyError, match=r"'stage_9' has no selection.*: stage_1, stage_2; "):
            look("stage_9")
    trainer = cases.trainer(tmp_path)
    waiting = LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=0, stages=[4]))
    with pytest.raises(KeyError, match="with a selection so far: none"):
        waiting.table("stage_1")


def test_a_stage_that_took_all_without_scoring_has_no_table(tmp_path):
    trainer = cases.trainer(tmp_path, data=cases.dataset(8))
    config = LearnAlignConfig(warmup_samples=0, stages=[8], skip_forced_scoring=True)
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    trainer.train()
    with pytest.raises(KeyError, match="stage_1 took its prompts without scoring them"):
        callback.table("stage_1")
