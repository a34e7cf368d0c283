"""Runs side by side: grouped by configuration, paired by seed or problem, and what it shows in a sentence."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from reports import change, train

from trl_learnalign import cli
from trl_learnalign.intervals import wilson
from trl_learnalign.records.summary import accuracies
from trl_learnalign.report import compare, read_run, write_comparison
from trl_learnalign.report.comparison import comparison_figure, compute_at
from trl_learnalign.report.contrast import contrast, variants_of

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's t by the number of seeds, from a table."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(folder)
    return folder


@pytest.fixture
def made(finished, tmp_path):
    """A run like the finished one, but for its seed, its settings and its last accuracy."""

    def make(seed, final, right=None, problems="p", compute=1.0, **config):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(finished, folder)

        def edit(data):
            data["trainer"]["seed"] = seed
            data["config"].update({"selection_seed": seed, **config})
            metrics = data["phases"]["stage_3"]["metrics"]
            metrics.update({"accuracy": final, "n_eval": 100})
            if right is not None:
                metrics.update({"right": right, "n_eval": len(right), "problems": problems})
            for phase, notes in data["phases"].items():
                if "metrics" in notes and phase != "stage_3":
                    notes["metrics"]["n_eval"] = metrics["n_eval"]

        change(folder / "_learnalign" / "run.json", edit)
        return folder

    return make


def interval(values):
    half = STUDENT[len(values)] * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def test_runs_that_differ_in_their_seeds_alone_are_one_column(made, capsys):
    ours, theirs = [0.50, 0.54, 0.58], [0.55, 0.61, 0.60]
    folders = [made(seed, value) for seed, value in enumerate(ours)]
    folders += [made(seed, value, selector="random") for seed, value in enumerate(theirs)]
    found = compare(folders)
    assert [variant.name for variant in found.variants] == [
        "LearnAlign, the paper's stages (run0 … run2)",
        "random, the paper's stages (run3 … run5)",
    ]
    assert [row["final accuracy"] for row in found.rows] == ["0.540", "0.587"]
    assert [row["interval over"] for row in found.rows] == ["3 runs", "3 runs"]
    low, high = interval(ours)
    assert found.rows[0]["95 % interval"] == f"{low:.3f} – {high:.3f}"
    cli.main(["compare", *map(str, folders)])
    said = capsys.readouterr().out
    assert re.search(r"seeds +0, 1, 2 +0, 1, 2", said)
    assert said.rstrip().endswith(found.conclusion)


def test_runs_that_may_spend_what_another_seed_has_spent_are_one_column(made):
    folders = [made(seed, 0.5, compute_budget=1000.0 + seed) for seed in range(3)]
    found = compare(folders)
    assert len(found.variants) == 1
    assert not found.differences


def test_several_seeds_are_paired_by_seed(made):
    ours, theirs = [0.50, 0.54, 0.58], [0.55, 0.61, 0.60]
    # In another order, and with a seed that has no partner.
    folders = [made(seed, ours[seed]) for seed in (2, 0, 1)] + [made(9, 0.9)]
    folders += [made(seed, theirs[seed], selector="random") for seed in (0, 1, 2)]
    low, high = interval([0.05, 0.07, 0.02])
    assert compare(folders).conclusion == (
        "random, the paper's stages (run4 … run6) shows no difference "
        f"(+4.7 points [{100 * low:+.1f}, {100 * high:+.1f}]) from LearnAlign, the paper's stages (run0 … run3) "
        "(paired over 3 seeds), at 1.00 times the compute and 1.00 times the time."
    )


def test_a_difference_that_is_beyond_its_interval_is_stated(made):
    folders = [made(seed, value) for seed, value in enumerate([0.50, 0.54, 0.58])]
    folders += [
        made(seed, value, selector="random") for seed, value in enumerate([0.40, 0.45, 0.48])
    ]
    low, high = interval([-0.10, -0.09, -0.10])
    assert compare(folders).conclusion.startswith(
        "random, the paper's stages (run3 … run5) is 9.7 points "
        f"[{100 * low:+.1f}, {100 * high:+.1f}] behind LearnAlign, the paper's stages (run0"
    )
    turned = compare(folders[3:] + folders[:3]).conclusion
    assert turned.startswith("LearnAlign, the paper's stages (run0 … run2) is 9.7 points")
    assert "ahead of random, the paper's stages (run3" in turned


def test_seeds_that_have_no_partners_are_not_paired(made):
    folders = [made(seed, value) for seed, value in ((0, 0.50), (1, 0.54))]
    folders += [made(seed, value, selector="random") for seed, value in ((2, 0.6), (3, 0.7))]
    assert "(over 2 and 2 seeds, not paired)" in compare(folders).conclusion


def test_one_seed_each_is_paired_by_problem(made):
    ours = "1" * 10 + "0" * 10 + "1" * 20
    theirs = "1" * 10 + "1" * 8 + "0" * 2 + "1" * 19 + "0"
    folders = [made(0, 0.75, ours), made(5, 0.925, theirs, selector="random")]
    sentence = compare(folders).conclusion
    # 8 problems for the second, 1 for the first: 2 * (1 + 9) / 2^9 of McNemar's exact test.
    assert f"(40 paired problems, McNemar p = {20 / 512:.2g}; the spread over seeds" in sentence
    assert "is 17.5 points" in sentence
    others = made(5, 0.925, theirs, problems="others", selector="random")
    assert (
        "(not paired; the spread over seeds is unknown)" in compare([folders[0], others]).conclusion
    )


def test_shares_without_pairs_have_newcombes_interval(made):
    # Newcombe (1998), table II, case (a), method 10: 56/70 against 48/80 is 0.2 [0.0524, 0.3339].
    folders = [made(0, 48 / 80, "1" * 48 + "0" * 32, "a")]
    folders += [made(1, 56 / 70, "1" * 56 + "0" * 14, "b", selector="random")]
    ours, theirs = (variants_of([read_run(folder)])[0][0] for folder in folders)
    found = contrast(ours, theirs).difference
    assert (round(found.low, 4), round(found.value, 4), round(found.high, 4)) == (
        0.0524,
        0.2,
        0.3339,
    )
    assert "different numbers of problems" in compare(folders).conclusion


def test_each_is_compared_with_the_first(made):
    folders = [made(0, 0.5), made(0, 0.6, selector="random"), made(0, 0.7, stages=[6, 4, 2])]
    found = compare(folders)
    assert len(found.variants) == 3
    assert found.conclusion.count(" from ") + found.conclusion.count(" of ") == 2
    reserve = "the spread over seeds is unknown"
    assert found.conclusion.lower().count(reserve) == 1  # it holds for both
    assert found.conclusion.endswith(f". T{reserve[1:]}.")
    assert found.conclusion.count(";") >= 1


def names_of(folders):
    return [variant.name for variant in compare(folders).variants]


def test_names_are_method_and_folder_and_the_fewest_settings_that_differ_within_a_method(made):
    folders = [
        made(0, 0.5, stages=[6, 4, 2], exclude_self=True),
        made(0, 0.5, stages=[4, 4, 4], exclude_self=False),
    ]
    found = compare(folders)
    assert [name for name, _ in found.differences] == ["stages", "exclude_self"]
    assert names_of(folders) == [
        "LearnAlign (run0; stages [6, 4, 2])",
        "LearnAlign (run1; stages [4, 4, 4])",
    ]
    folders.append(made(0, 0.5, stages=[6, 4, 2], exclude_self=True, order=["adaptive"]))
    assert names_of(folders) == [
        "LearnAlign (run0; stages [6, 4, 2])",
        "LearnAlign (run1; stages [4, 4, 4])",
        "LearnAlign, adaptive order (run2)",
    ]
    assert [row["folder"] for row in compare(folders).rows] == [folder.name for folder in folders]


def test_the_whole_pool_is_named_by_its_order_and_by_what_is_skipped(made):
    folders = [
        made(0, 0.5, order="shuffled"),
        made(0, 0.5, order="adaptive", skip_zero_advantages=True),
        made(0, 0.5, order="trainer", skip_zero_advantages=True),
    ]
    for folder in folders[:2]:
        # Nothing is scored: a stage takes all there are. In the trainer's order that is known without a note.
        for phase in ("stage_1", "stage_2", "stage_3"):
            change(
                folder / "_learnalign" / "run.json",
                lambda data, phase=phase: data["phases"][phase]["selection"].update(scored=False),
            )
    assert names_of(folders) == [
        "the whole pool, shuffled (run0)",
        "adaptive order, skipping (run1)",
        "the trainer's own order, skipping (run2)",
    ]


def test_folders_of_one_name_are_told_apart_by_those_they_lie_in(made, tmp_path):
    folders = [made(0, 0.5), made(0, 0.6, selector="random")]
    moved = []
    for folder, name in zip(folders, ("first", "second"), strict=True):
        place = tmp_path / "at" / name / "out"
        shutil.copytree(folder, place)
        moved.append(place)
    assert names_of(moved) == [
        "LearnAlign, the paper's stages (first/out)",
        "random, the paper's stages (second/out)",
    ]


def test_one_configuration_alone_is_said_to_be(made):
    found = compare([made(0, 0.5), made(1, 0.6)])
    assert found.conclusion.startswith("Only the seeds differ: the 2 runs reach 55.00 %")
    assert len(found.rows) == 1


def test_a_seed_may_draw_its_own_pool_but_not_the_variant(made):
    folders = [
        made(0, 0.5),
        made(1, 0.6),
        made(0, 0.5, selector="random"),
        made(1, 0.6, selector="random"),
    ]

    def use(folder, dataset):
        change(
            folder / "_learnalign" / "run.json",
            lambda data: data["identity"].update(dataset=dataset),
        )

    for folder in folders[1::2]:
        use(folder, "of seed 1")
    assert compare(folders).notes == []
    use(folders[3], "another")
    found = compare(folders)
    assert found.notes == [
        "These runs were trained on different datasets: their accuracies cannot be compared."
    ]
    assert found.conclusion == (
        "No conclusion: these runs were trained on different datasets: their accuracies cannot be compared."
    )


def test_eight_runs_are_two_lines_of_the_figure_and_two_columns_of_the_page(made, tmp_path):
    folders = [made(seed, 0.5 + seed / 100) for seed in range(4)]
    folders += [made(seed, 0.6 + seed / 90, selector="random") for seed in range(4)]
    found = compare(folders)
    figure = comparison_figure(found.variants, compute_at, "compute")
    (axes,) = figure.axes
    assert len(axes.containers) == 2
    line = axes.containers[0].lines[0]
    assert line.get_ydata()[-1] == pytest.approx(0.515)
    page = write_comparison(found, tmp_path / "c.html").read_text()
    header, *_ = re.findall(r"<thead><tr>(.*?)</tr>", page)
    assert header.count("<th>") == 1 + 2
    assert "paired over 4 seeds" in page
    assert "<h1>Comparison of 8 runs</h1>" in page


@pytest.fixture
def eight(made):
    """Runs of eight configurations; the third is far ahead of the first, the fifth far behind."""
    finals = [0.5, 0.52, 0.9, 0.5, 0.1, 0.49, 0.5, 0.5]
    names = ["learnalign", "random", "alignment", "learnability"]
    names += ["learnalign_coverage", "learnalign_logdet", "gradient_dot", "token_length"]
    folders = []
    for name, final in zip(names, finals, strict=True):
        folders.append(made(0, final, selector=name))
    return folders


def test_eight_configurations_have_a_line_each_that_is_unlike_the_others(eight, tmp_path):
    found = compare(eight)
    (axes,) = comparison_figure(found.variants, compute_at, "compute").axes
    drawn = [container.lines[0] for container in axes.containers]
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn}
    assert len(looks) == len({line.get_marker() for line in drawn}) == 8
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[0] == "A: LearnAlign, the paper's stages (run0)"
    (axes,) = comparison_figure(found.variants * 3, compute_at, "compute").axes
    drawn = [container.lines[0] for container in axes.containers]
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 24
    # As points alone, too.
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 24


def test_points_are_joined_only_where_all_runs_were_measured_after_the_same_steps(made, tmp_path):
    folders = [made(0, 0.5), made(0, 0.6, selector="random")]

    def looks():
        found = compare(folders)
        (axes,) = comparison_figure(found.variants, compute_at, "compute").axes
        page = write_comparison(found, tmp_path / "c.html").read_text()
        styles = {container.lines[0].get_linestyle() for container in axes.containers}
        return styles, "nothing is known of what lies between" in page

    assert looks() == ({":"}, False)
    # The second run's accuracy was measured at its ends alone.
    for phase in ("warmup", "stage_1", "stage_2"):
        change(
            folders[1] / "_learnalign" / "run.json",
            lambda data, phase=phase: data["phases"][phase].pop("metrics"),
        )
    assert looks() == ({"None"}, True)


def test_settings_that_had_no_effect_are_no_difference(made, capsys):
    """A run that selects nothing has no selector, and one without an adaptive order no belief."""
    options = {"stages": [1.0], "order": ["shuffled"]}
    folders = [
        made(0, 0.5, selector="learnalign", adaptive_decay=0.5, **options),
        made(0, 0.6, selector="learnalign_coverage", skip_zero_advantages=True, **options),
        made(0, 0.7, selector="learnalign", warmup_samples=2),
    ]
    for folder in folders[:2]:
        for phase in ("stage_1", "stage_2", "stage_3"):
            change(
                folder / "_learnalign" / "run.json",
                lambda data, phase=phase: data["phases"][phase]["selection"].update(scored=False),
            )
    assert compare(folders[:2]).differences == [("skip_zero_advantages", [False, True])]
    assert dict(compare(folders).differences)["selector"] == [None, None, "learnalign"]
    cli.main(["compare", *map(str, folders)])
    said = capsys.readouterr().out
    assert "selector: – (A, B), learnalign (C)" in said
    assert "skip_zero_advantages: false (A, C), true (B)" in said


def test_compute_has_a_unit_everywhere(made, tmp_path):
    found = compare([made(0, 0.5), made(0, 0.6, selector="random")])
    unit = "compute (tokens of a forward pass)"
    spent = found.variants[0].runs[0].ledger.total.forward_equivalents
    assert found.rows[0][unit] == f"{spent:,.0f}"
    page = write_comparison(found, tmp_path / "c.html").read_text()
    assert page.count(unit) >= 2  # table and figure
    assert "or read counts once, one that is trained on three times" in page
    assert "Equal compute is not equal time." in page


def test_runs_are_compared_at_one_price_of_a_generated_token(made, tmp_path, capsys):
    folders = [made(0, 0.5), made(0, 0.6, selector="random", generation_price=8)]
    with pytest.raises(ValueError, match=r"generation_price 1 and 8.*--generation_price 1"):
        compare(folders)
    with pytest.raises(ValueError, match="generation_price=-1"):
        compare(folders, generation_price=-1)
    dear, cheap = compare(folders, generation_price=8), compare(folders, generation_price=1)
    cost = read_run(folders[0]).ledger.total
    for found, price in ((dear, 8), (cheap, 1)):
        for row in found.rows:
            assert row["compute (tokens of a forward pass)"] == f"{cost.compute(price):,.0f}"
        assert [name for name, _ in found.differences] == ["selector"]
    scoring = dear.variants[0].runs[0].ledger.sum("scoring")
    assert dear.rows[0]["to choose prompts"] == f"{scoring.compute(8) / cost.compute(8):.0%}"
    page = write_comparison(dear, tmp_path / "c.html").read_text()
    assert "one that is generated 8 times" in page
    cli.main(["compare", *map(str, folders), "--generation_price", "3"])
    assert f"{cost.compute(3):,.0f}" in capsys.readouterr().out


def test_eight_configurations_are_told_in_a_sentence_and_a_row_each(
    eight, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")
    cli.main(["compare", *map(str, eight), "--html", str(tmp_path / "c.html")])
    said = capsys.readouterr().out
    table, _, rest = said.partition("All figures")
    for name in ("learnalign_coverage", "gradient_dot", "token_length"):
        assert len(re.findall(rf"^[A-H]: {name}, the paper's", table, re.MULTILINE)) == 1
    assert max(map(len, table.splitlines())) <= 100
    (behind,) = re.findall(r"^ +E +0.100 .*?(-40.0 \[-\d.+, -\d.+?\])", table, re.MULTILINE)
    sentence = rest.strip().splitlines()[-1]
    assert re.fullmatch(
        r"Ahead of LearnAlign, the paper's stages \(run0\): alignment, the paper's stages \(run2\) "
        r"\(\+40.0 \[.*\] points\); behind it: learnalign_coverage, the paper's stages \(run4\) "
        rf"\({re.escape(behind)} points\); no difference shown: 5 of 7; one interval in twenty misses by chance\.",
        sentence,
    )
    page = (tmp_path / "c.html").read_text()
    main, *_ = re.findall(r"<tbody>(.*?)</tbody>", page, re.DOTALL)
    assert '<td data-label="run">A: LearnAlign, the paper&#39;s stages (run0)</td>' in main
    assert main.count("<tr>") == 8


def test_eight_that_show_no_difference_are_said_to(made):
    folders = [made(0, 0.5, feature_dim=2**power) for power in range(8)]
    assert compare(folders).conclusion == (
        "None of the 7 others shows a difference from LearnAlign, the paper's stages (run0; feature_dim 1)."
    )


def test_every_problem_of_a_run_is_kept(finished, made):
    folder = made(0, 0.75, "1101")
    run = read_run(folder)
    assert run.accuracies[-1].right == (True, True, False, True)
    assert run.accuracies[-1].problem_set == "p"
    assert accuracies(run.contents)[0].right == ()
    assert json.loads((finished / "_learnalign" / "run.json").read_text())


def test_evaluations_are_compared_two_at_a_time(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").touch()
    folders = [str(tmp_path / name) for name in ("a", "b", "c")]
    with pytest.raises(SystemExit, match="3 evaluations given: exactly two can be compared"):
        cli.main(["compare", *folders])
    with pytest.raises(SystemExit, match="2 evaluations given with --html"):
        cli.main(["compare", *folders[:2], "--html", str(Path(tmp_path) / "c.html")])


def test_a_run_that_is_not_finished_leaves_no_conclusion(made):
    folders = [made(0, 0.5), made(0, 0.6, selector="random")]
    change(
        folders[1] / "_learnalign" / "run.json",
        lambda data: data["phases"]["stage_3"].pop("training"),
    )
    found = compare(folders)
    assert found.rows[1]["seeds"] == "0 (1 not finished)"
    assert found.conclusion == (
        "No conclusion: these runs are not all finished: their accuracies cannot be compared."
    )


def test_seeds_that_agree_by_chance_are_no_certainty(made):
    ours, theirs = "1" * 10 + "0" * 10, "1" * 11 + "0" * 9
    folders = [made(seed, 0.5, ours) for seed in range(3)]
    folders += [made(seed, 0.55, theirs, selector="random") for seed in range(3)]
    found = compare(folders)
    assert "shows no difference (+5.0 points" in found.conclusion
    assert "(20 paired problems, McNemar p = 1; the spread over seeds" in found.conclusion
    share = wilson(10, 20)
    assert found.rows[0]["95 % interval"] == f"{share.low:.3f} – {share.high:.3f}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "it is not a list of entries"),
        ("[1]", "it is not a list of entries"),
        ('[{"step": 1}, {"step": "a", "reward": 1.0}]', "it is not a list of entries"),
        ('[{"step": 1, "reward": {}}]', "it is not a list of entries"),
        ('[{"reward": 0.5}]', "it is not a list of entries"),
        ("[" * 100_000, "recursion"),
        (None, "directory"),
    ],
)
def test_a_log_of_another_form_is_told_in_a_sentence(made, content, says):
    folders = [made(0, 0.5), made(1, 0.6)]
    path = folders[1] / "_learnalign" / "log_history.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(SystemExit, match=f"log_history.json is damaged .*{says}") as left:
        cli.main(["compare", *map(str, folders)])
    assert str(left.value).startswith("trl-learnalign compare: ")


@pytest.mark.parametrize(
    "name", ["stage_1.parquet", "stage_1_examples.json", "reward_history.parquet"]
)
def test_a_folder_in_place_of_a_file_is_told_in_a_sentence(made, name):
    folder = made(0, 0.5)
    path = folder / "_learnalign" / name
    path.unlink()
    path.mkdir()
    with pytest.raises(SystemExit, match=f"{name} is damaged "):
        cli.main(["report", str(folder)])
