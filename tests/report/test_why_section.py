"""The report's answer to "why these prompts", against the records themselves."""

import re

import cases
import numpy as np
import pandas as pd
import pytest
from reports import HOSTILE, change

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.diversity import read_categories
from trl_learnalign.records.notes import CategoryCount, GroupDistribution
from trl_learnalign.report import read_run
from trl_learnalign.report.page import render
from trl_learnalign.report.sections import SelectionExplanation, categories_of

FAMILIES = ["arithmetic", "bases", "counting", HOSTILE]


def dates_first(pool):
    return -(pool.prompts % 4 != 3).astype(float)


def train(folder, size=32, **options):
    families = [FAMILIES[row % 4] for row in range(size)]
    data = cases.dataset(size).add_column("family", families)
    trainer = cases.trainer(folder, data=data)
    settings = {"warmup_samples": 0, "feature_dim": 64, "adaptive_feature_dim": 4, **options}
    callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(**settings))
    trainer.add_callback(callback)
    trainer.train()
    return callback


def cells(page, heading):
    """Rows of the table after a heading, without markup."""
    table = page.split(heading, 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    rows = []
    for row in table.split("</tr>")[:-1]:
        texts = re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL)
        rows.append([re.sub(r"<[^>]*>", " ", text).strip() for text in texts])
    return rows


def test_a_choice_of_one_family_is_shown_and_warned_of(tmp_path):
    train(tmp_path, stages=[8], selector=f"{__name__}:dates_first")
    page = render(read_run(tmp_path), {})
    assert "<script" not in page
    assert (
        "By family, the selection covers an effective 1.0 of 4 categories, a random selection of this size"
        in page
    )
    first, *others = cells(page, "<h4>By family</h4>")
    assert first[0].startswith("&lt;script&gt;")
    assert first[2:] == ["25%", "100%", "4.0"]
    assert [row[2:] for row in others] == [["25%", "0%", "0.0"]] * 3


def test_both_ends_have_p_v_alignment_and_score(tmp_path):
    callback = train(tmp_path, stages=[8], selector="learnalign")
    page = render(read_run(tmp_path), {})
    rows = [row for row in cells(page, '<table class="ends stack">') if len(row) > 1]
    table = callback.table("stage_1")
    learnable = table[table["learnability"] > 0]
    expected = pd.concat([learnable.head(10), learnable.iloc[10:].tail(10)])
    assert len(rows) == len(expected) > 10
    for row, (_, prompt) in zip(rows, expected.iterrows(), strict=True):
        assert row[0].split()[0] == prompt["prompt"]
        assert row[1:4] == [
            str(prompt["rank"]),
            f"{prompt['success_rate']:.2f}",
            f"{prompt['learnability']:.3f}",
        ]
        assert row[4] == f"{prompt['alignment']:.3g}"
        assert row[5] == f"{prompt['score']:.3g}"
        assert row[6] == ("yes" if prompt["selected"] else "no")
    # The telling prompts with their rollouts say the same.
    best = expected.iloc[0]
    assert (
        f"learnability {best['learnability']:.3f} · alignment {best['alignment']:.3g} · score"
        in page
    )


def test_the_ends_of_a_random_draw_are_not_shown(tmp_path):
    train(tmp_path, stages=[8], selector="random")
    page = render(read_run(tmp_path), {})
    assert "<h4>By family</h4>" in page
    assert '<table class="ends stack">' not in page


def test_a_stage_that_took_all_has_nothing_to_explain(tmp_path):
    train(tmp_path, stages=[0.5, 0.5], selector="learnability", order="shuffled")
    run = read_run(tmp_path)
    assert [SelectionExplanation(run).chose(stage) for stage in run.stages] == [True, False]


def test_an_adaptive_order_shows_what_it_has_trained_on_also_under_way(tmp_path):
    train(tmp_path)
    history = pd.read_parquet(tmp_path / "_learnalign" / "reward_history.parquet")
    counts = (history["index"] % 4).value_counts()
    whole = read_run(tmp_path)
    ((name, (categories, clusters)),) = SelectionExplanation(whole).trained()
    assert name == "stage_1"
    for category in categories.shares.categories:
        assert category.chosen == counts[FAMILIES.index(category.name)]
    page = render(whole, {})
    assert "The rolled-out prompts: effectively" in page

    def cut(data):
        for kind in ("rollouts", "training", "belief"):
            del data["phases"]["stage_1"][kind]

    change(tmp_path / "_learnalign" / "run.json", cut)
    under_way = read_run(tmp_path)
    assert not under_way.finished
    assert SelectionExplanation(under_way).trained() == [(name, [categories, clusters])]
    page = render(under_way, {})
    assert '<a href="#order">' in page
    assert "The rolled-out prompts: effectively" in page


def test_many_categories_are_folded_and_small_ones_counted():
    counts = tuple(CategoryCount(name=str(n), pool=4, chosen=1) for n in range(50))
    shares = GroupDistribution(
        by="topic",
        pool=280,
        chosen=50,
        distinct=70,
        categories=counts,
        effective=50.0,
        effective_pool=70.0,
        effective_random=40.0,
        effective_random_low=35.0,
    )
    (categories,) = categories_of((shares,))
    assert (len(categories.first), len(categories.others), categories.not_noted) == (12, 38, 20)
    assert categories.first[0].chosen_width == 100
    assert categories.first[0].pool_width == round(100 * (4 / 280) / (1 / 50))
    assert categories.warning is None


def test_categories_are_read_back_as_they_were_written(tmp_path):
    callback = train(tmp_path, stages=[8], selector="random")
    (read,) = read_categories(tmp_path / "_learnalign")
    (written,) = callback.setup.groupings
    assert read.by == written.by
    assert read.labels == written.labels
    assert np.array_equal(read.codes, written.codes)


def test_damaged_categories_are_named(tmp_path):
    (tmp_path / "categories.parquet").write_text("nothing")
    with pytest.raises(ValueError, match=r"categories.parquet is damaged .*move it away"):
        read_categories(tmp_path)
