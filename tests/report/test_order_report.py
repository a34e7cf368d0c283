"""What report, model card, tables and comparison show of continual selection."""

import json
import logging
import re
import shutil
from pathlib import Path

import cases
import numpy as np
import pytest
from adaptive_cases import LEAVES, go, history, settings

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, cli
from trl_learnalign.cli import recipe
from trl_learnalign.records.history import read_outcomes
from trl_learnalign.records.notes import BeliefNote, RolloutsNote
from trl_learnalign.records.summary import section
from trl_learnalign.report import compare, read_run, write_report
from trl_learnalign.report.comparison import GROUPS
from trl_learnalign.report.figures import figures_of, means_by_step, repeats
from trl_learnalign.report.page import render


def plain_run(folder):
    """An ordinary staged run."""
    trainer = cases.trainer(folder)
    callback = LearnAlignCallback(trainer, LearnAlignConfig(warmup_samples=4, feature_dim=64))
    trainer.add_callback(callback)
    trainer.train()
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "adaptive"
    _, callback = go(folder, settings(stage_steps=12), save_strategy="no")
    return folder, callback


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return plain_run(tmp_path_factory.mktemp("runs") / "plain")


def page_of(folder):
    return render(read_run(folder), {})


def test_the_page_says_what_the_notes_say(finished):
    folder, callback = finished
    page = page_of(folder)
    rollouts, belief = (callback.record.get("stage_1", kind) for kind in (RolloutsNote, BeliefNote))
    assert '<section id="order">' in page
    assert '<a href="#order">' in page
    assert (
        f"{rollouts.useful_share:.0%} of the 24 groups that were rolled out had a gradient" in page
    )
    assert f"{rollouts.skipped_share:.0%} of the tokens were left out of training" in page
    assert (
        f"The predicted mean success rate was {belief.predicted:.0%}, and the observed one {belief.seen:.0%}"
        in page
    )
    for value in (belief.predicted, belief.seen, belief.brier, belief.auc):
        assert f">{value:.3f}</td>" in page
    for prompt in rollouts.repeated:
        assert f"{prompt.times} times" in page
    assert "adaptive order, skipping" in page
    assert "success rate, selected" not in page  # nothing was scored
    assert 'id="stage_1"' not in page  # it would have nothing to show
    assert "No rollouts were left out of training" not in page


def test_an_ordinary_page_has_no_such_section(plain):
    page = page_of(plain)
    assert 'id="order"' not in page
    assert "LearnAlign, the paper&#39;s stages" in page
    assert "success rate, selected" in page
    assert "useful groups" not in page
    assert not {"order", "reliability", "repeats"} & set(figures_of(read_run(plain)))


def test_why_nothing_was_skipped_is_shown(finished, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    path = folder / "_learnalign" / "run.json"
    data = json.loads(path.read_text())
    data["phases"]["stage_1"]["rollouts"].update(
        tokens_given=None, tokens_trained=None, not_skipped="beta=0.04: <b>every row</b>"
    )
    path.write_text(json.dumps(data))
    page = page_of(folder)
    assert "in spite of skip_zero_advantages: beta=0.04: &lt;b&gt;every row" in page
    assert "tokens skipped" not in page


def test_a_run_that_only_skips_has_no_belief_to_show(tmp_path):
    config = settings(order="shuffled", selector="random", stage_steps=4)
    go(tmp_path, config, save_strategy="no")
    page = page_of(tmp_path)
    assert "tokens skipped" in page
    assert "AUC" not in page
    assert "Rolled out most often" not in page
    names = set(figures_of(read_run(tmp_path)))
    assert "order" in names
    assert not {"reliability", "repeats"} & names


def test_a_run_under_way_shows_what_there_is(finished, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    path = folder / "_learnalign" / "run.json"
    data = json.loads(path.read_text())
    for kind in ("rollouts", "belief", "training"):
        del data["phases"]["stage_1"][kind]
    path.write_text(json.dumps(data))
    assert "has not finished" in page_of(folder)
    (folder / "_learnalign" / "reward_history.parquet").unlink()
    assert "order" not in figures_of(read_run(folder))


# ---- Figures --------------------------------------------------------------------------------------------------------


def test_curves_are_means_of_each_step(finished):
    _, callback = finished
    table = history(callback)
    outcomes = read_outcomes(callback.folder / "reward_history.parquet")
    steps, means = means_by_step(outcomes.steps, outcomes.success_rates)
    expected = table.groupby("step")["success_rate"].mean()
    assert steps.tolist() == expected.index.tolist()
    np.testing.assert_allclose(means, expected)
    steps, means = means_by_step(np.array([0, 0, 1]), np.array([1.0, np.nan, np.nan]))
    assert (steps.tolist(), means.tolist()) == ([0], [1.0])


def test_the_reliability_diagram_shows_the_bins_of_the_note(finished):
    folder, callback = finished
    belief = callback.record.get("stage_1", BeliefNote)
    axes = figures_of(read_run(folder))["reliability"].axes[0]
    points = axes.collections[0].get_offsets().tolist()
    bins = [[one.predicted, one.seen] for one in belief.bins if one.rollouts]
    np.testing.assert_allclose(points, bins)


def test_bars_count_how_often_prompts_came(finished):
    folder, callback = finished
    table = history(callback)
    bars = figures_of(read_run(folder))["repeats"].axes[0].patches
    heights = [int(bar.get_height()) for bar in bars]
    counts = table["index"].value_counts()
    assert sum(heights) == 24
    assert heights[0] == 24 - len(counts)
    assert heights[1:] == [(counts == times).sum() for times in range(1, len(heights))]
    outcomes = read_outcomes(callback.folder / "reward_history.parquet")
    again = outcomes.where(np.zeros(30, dtype=int))  # one prompt, thirty times
    assert repeats(again, 24)[8] == 1


def test_the_report_is_written_with_these_figures(finished):
    folder, _ = finished
    page = write_report(folder).read_text()
    for name in ("order", "reliability", "repeats"):
        assert f'aria-label="{name}"' in page
        assert (folder / "_learnalign" / "figures" / f"{name}.png").exists()


# ---- Tables and texts -----------------------------------------------------------------------------------------------


def test_the_table_at_the_end_has_only_columns_with_something_in_them(finished, plain, capsys):
    _, callback = finished
    summary = recipe.summarise(callback, 1.0)
    rollouts = callback.record.get("stage_1", RolloutsNote)
    assert summary["phases"][0]["useful"] == rollouts.useful_share
    assert summary["phases"][0]["tokens_skipped"] == rollouts.skipped_share
    recipe.print_table(summary)
    said = capsys.readouterr().out
    assert re.search(r"phase +┃ prompts ┃ useful groups ┃ tokens skipped ┃ steps ┃", said)
    assert f"{rollouts.skipped_share:.0%}" in said


def test_the_model_card_tells_how_prompts_were_chosen(finished, plain):
    folder, _ = finished
    card = section(read_run(folder).contents)
    assert "Trained on all of a pool of 24 prompts" in card
    assert "The order of the prompts was adaptive" in card
    assert "were left out of the loss" in card
    assert "selector `learnalign`" not in card
    assert "success rate, selected" not in card
    assert "| phase | prompts | useful groups | tokens not trained on | steps |" in card
    staged = section(read_run(plain).contents)
    assert "selector `learnalign`" in staged
    assert "adaptive" not in staged
    assert "tokens not trained on" not in staged


def test_a_card_tells_of_dynamic_sampling(tmp_path):
    go(tmp_path, settings(stage_steps=4, oversample=2.0), save_strategy="no")
    card = section(read_run(tmp_path).contents)
    assert "Of 16 groups of rollouts, 8 were selected for training" in card
    assert "<th>trained on</th>" in page_of(tmp_path)


def test_a_page_says_whether_settings_of_scoring_have_an_effect(finished, plain):
    said = "This run scores nothing, so settings of scoring"
    assert said in page_of(finished[0])
    assert said not in page_of(plain)


def test_a_comparison_shows_the_columns_that_a_run_has(finished, plain, capsys):
    folder, callback = finished
    found = compare([folder, plain])
    rows = dict(zip(("adaptive", "plain"), found.rows, strict=True))
    rollouts, belief = (callback.record.get("stage_1", kind) for kind in (RolloutsNote, BeliefNote))
    assert rows["adaptive"]["order"] == "adaptive"
    assert rows["adaptive"]["selector"] == "none"
    assert rows["plain"]["selector"] == "learnalign"
    assert rows["adaptive"]["tokens skipped"] == f"{rollouts.skipped_share:.0%}"
    assert rows["adaptive"]["Brier score"] == f"{belief.brier:.3f}"
    assert rows["plain"]["Brier score"] == rows["plain"]["tokens skipped"] == ""
    assert rows["plain"]["useful groups"] != ""
    assert GROUPS not in found.headings
    two = compare([plain, plain])
    assert not {"order", "Brier score", "tokens skipped"} & set(two.headings)
    cli.main(["compare", str(folder), str(plain)])
    assert re.search(r"order +adaptive +shuffled", capsys.readouterr().out)


def test_a_recipe_in_the_trainers_own_order_ends_well(tmp_path, capsys, caplog):
    config = LearnAlignConfig(**LEAVES, order="trainer", skip_zero_advantages=True)
    with caplog.at_level(logging.WARNING):
        trainer, callback = go(tmp_path, config, save_strategy="no", max_steps=2)
        recipe.finish(trainer, callback, 1.0)
    assert "Summary: " in capsys.readouterr().out
    (phase,) = json.loads((tmp_path / "summary.json").read_text())["phases"]
    assert (phase["name"], phase["selected"], phase["steps"]) == ("stage_1", 24, 2)
    assert (tmp_path / "report.html").exists()
