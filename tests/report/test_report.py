import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reports import HOSTILE, change, train
from rich.console import Console
from subsets import select

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, cli
from trl_learnalign.cli import recipe as cli_run
from trl_learnalign.cli.recipe import add_to_model_card
from trl_learnalign.cli.report import prompt_table
from trl_learnalign.intervals import spearman
from trl_learnalign.markup import headline, visible
from trl_learnalign.records.summary import BEGIN, Accuracy, section, with_section
from trl_learnalign.report import compare, read_run, write_comparison, write_report
from trl_learnalign.report.comparison import compute_at
from trl_learnalign.report.drawing import smoothed
from trl_learnalign.report.figures import (
    _rate_edges,
    agreement_figure,
    figures_of,
    score_figure,
    training_figure,
)
from trl_learnalign.report.page import render


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def page_of(run):
    """The page without its figures, which take the time."""
    return render(read_run(run), {})


def test_the_report_is_one_file_without_script_or_network(run):
    page = write_report(run).read_text()
    assert page.count("<html") == 1
    assert "<script" not in page
    assert "default-src 'none'" in page
    # Nothing is fetched: references inside the page and data alone (namespaces are names, not places).
    references = re.findall(r"(?:\b(?:src|href)\s*=|\burl\()\s*[\"']?([^\"')>\s]+)", page)
    assert references
    assert [found for found in references if not found.startswith(("#", "data:"))] == []
    assert (run / "_learnalign" / "figures" / "stage_1_success_rate.png").read_bytes()[
        :4
    ] == b"\x89PNG"


def test_the_report_says_what_the_records_say(run):
    page = page_of(run)
    data = json.loads((run / "_learnalign" / "run.json").read_text())
    for stage in ("stage_1", "stage_2"):
        note = data["phases"][stage]["selection"]
        assert (
            f"Selected {note['selected']} of {note['candidates']} candidates at step {note['step']}."
            in page
        )
    note = data["phases"]["stage_3"]["selection"]
    assert note["selected"] == note["candidates"]
    assert f"Took all {note['selected']} remaining candidates at step {note['step']}" in page
    assert ">0.750</td>" in page  # accuracy after stage 1
    assert "+37.5 points" in page
    low, high = Accuracy("stage_3", 8, 0.625, 8).interval
    assert f"{low:.1%} to {high:.1%} on 8 problems" in page
    assert data["versions"]["trl"] in page
    example = json.loads((run / "_learnalign" / "stage_1_examples.json").read_text())["examples"][0]
    assert f'<p class="muted">Row {example["index"]} of the dataset' in page
    total = data["ledger"]["total"]
    assert f">{total['forward_equivalents']:,.0f}</td>" in page


def test_scorings_share_is_said_at_other_prices_of_a_generated_token(run):
    ledger = read_run(run).ledger
    shares = {}
    for price in (1, 3, 8):
        shares[price] = f"{ledger.sum('scoring').compute(price) / ledger.total.compute(price):.0%}"
    page = page_of(run)
    assert "A token that is generated or read counts once" in page
    assert f"Choosing prompts took {shares[1]} of the compute" in page
    assert f"{shares[3]} at 3, {shares[8]} at 8." in page
    change(run / "_learnalign" / "run.json", lambda data: data["config"].update(generation_price=8))
    page = page_of(run)
    assert "one that is generated 8 times" in page
    assert f"Choosing prompts took {shares[8]} of the compute" in page
    assert f"{shares[1]} at 1, {shares[3]} at 3." in page
    assert f">{ledger.total.compute(8):,.0f}</td>" in page


def test_figures_of_each_stage_and_between_stages(run):
    names = set(figures_of(read_run(run)))
    assert {"training", "cost", "stage_1_to_stage_2", "stage_2_to_stage_3"} <= names
    assert {
        f"stage_{k}_{kind}" for k in (1, 2, 3) for kind in ("success_rate", "score", "length")
    } <= names


def test_selectors_against_selectors_by_hand():
    nan = float("nan")
    names = ["up", "down", "flat"]
    table = pd.DataFrame([[1, -0.254, nan], [-0.254, 1, nan], [nan, nan, nan]], names, names)
    axes = agreement_figure(table, -1).axes[0]
    said = {(text.get_position()): text.get_text() for text in axes.texts}
    # Columns run to the right, rows downwards; what is not known stays empty.
    assert said == {(0.5, 0.5): "1", (1.5, 0.5): "-.25", (0.5, 1.5): "-.25", (1.5, 1.5): "1"}
    assert axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    mesh = axes.collections[0]
    assert mesh.get_clim() == (-1, 1)


def test_the_histogram_counts_selected_and_rest(run):
    stage = read_run(run).stages[0]
    figure = figures_of(read_run(run))["stage_1_success_rate"]
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    bins = len(heights) // 2
    assert sum(heights[:bins]) == stage.selected.sum()
    assert sum(heights[bins:]) == (~stage.selected).sum()


def test_texts_of_models_and_datasets_cannot_act(run):
    def poison(data):
        for example in data["examples"]:
            for rollout in example["rollouts"]:
                rollout["text"] = HOSTILE

    change(run / "_learnalign" / "stage_1_examples.json", poison)
    change(run / "_learnalign" / "run.json", lambda data: data["trainer"].update(model=HOSTILE))
    table = pq.read_table(run / "_learnalign" / "stage_1.parquet")
    table = table.set_column(
        table.column_names.index("prompt"), "prompt", pa.array([HOSTILE] * len(table))
    )
    pq.write_table(table, run / "_learnalign" / "stage_1.parquet")
    page = page_of(run)
    assert "<script" not in page
    assert "<img" not in page
    assert (
        page.count(
            "&lt;script&gt;alert(1)&lt;/script&gt; [bold red]not markup[/] {{ 7 * 7 }} ␛[31mred␛[0m"
        )
        > 10
    )
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)

    console = Console(record=True, width=200, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(prompt_table(read_run(run), 2))
    plain = console.export_text()
    assert "[bold red]not markup[/]" in plain
    assert "␛[31mred" in plain


def test_texts_that_are_no_valid_unicode(run):
    def poison(data):
        data["examples"][0]["rollouts"] = [
            {"text": "half a pair \ud83d", "right": None, "tokens": 1}
        ]

    change(run / "_learnalign" / "stage_1_examples.json", poison)
    page = page_of(run)
    page.encode()
    assert "half a pair \ufffd" in page
    assert "not graded" in page


def test_a_run_that_is_under_way(run):
    def cut(data):
        for name in ("stage_2", "stage_3"):
            del data["phases"][name]
        del data["phases"]["stage_1"]["training"], data["phases"]["stage_1"]["metrics"]
        for notes in data["phases"].values():  # as before there was a ledger
            for note in notes.values():
                note.pop("cost", None)
        del data["ledger"]

    change(run / "_learnalign" / "run.json", cut)
    (run / "_learnalign" / "log_history.json").unlink()
    page = page_of(run)
    assert "This run has not finished" in page
    assert 'id="stage_1"' in page
    assert 'id="stage_2"' not in page
    assert 'id="cost"' not in page


def test_reliability_is_told(tmp_path):
    train(tmp_path, accuracies=(), reliability=True, stages=[6])
    found = read_run(tmp_path).stages[0].note.reliability
    page = page_of(tmp_path)
    assert "The rankings by two halves of the 4 rollouts" in page
    assert f"agree on {found.overlap_halves:.0%} of the best 6 (50% by chance)" in page


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_selection_has_finished_when_it_has_chosen(tmp_path, warmup):
    select(tmp_path, selector=["token_length"], warmup_samples=warmup)
    assert "has not finished" not in page_of(tmp_path)

    change(tmp_path / "_learnalign" / "run.json", lambda data: data["phases"].pop("subsets"))
    assert "has not finished" in page_of(tmp_path)


def test_breadth_is_told_and_a_narrow_choice_warned_of(tmp_path):
    train(tmp_path, accuracies=(), stages=[6])
    found = read_run(tmp_path).stages[0].note.breadth
    page, label = page_of(tmp_path), '<td data-label="effective directions">'
    assert f"<tr><td>selected</td>{label}{found.directions:.1f}</td>" in page
    assert f"<tr><td>at random</td>{label}{found.directions_random:.1f}</td>" in page
    assert "selected prompts have about" not in page

    def narrow(data):
        data["phases"]["stage_1"]["selection"]["breadth"]["directions"] = 0.5

    change(tmp_path / "_learnalign" / "run.json", narrow)
    assert "The gradients of the 6 selected prompts have about 0.5 effective directions" in page_of(
        tmp_path
    )


@pytest.mark.parametrize(
    "options", [dict(selector="random"), dict(skip_forced_scoring=True, keep_rollout_texts=0)]
)
def test_runs_that_measured_less(tmp_path, options):
    train(tmp_path, accuracies=(), **options)
    page = page_of(tmp_path)
    assert "No rollout texts were kept" in page
    if "skip_forced_scoring" in options:
        assert "without scoring them" in page


def test_the_record_folder_may_be_named_instead(run):
    assert read_run(run / "_learnalign").output_dir == run


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run: shutil.rmtree(run / "_learnalign"),
            r"is not the folder of a run: it has neither run.json nor _learnalign/run.json",
        ),
        (
            lambda run: (run / "_learnalign" / "run.json").write_text("{"),
            r"run.json is damaged \(Expecting.*: move it away, or resume from the last checkpoint",
        ),
        (
            lambda run: (run / "_learnalign" / "run.json").write_text("{}"),
            r"run.json is damaged.*no plan",
        ),
    ],
)
def test_what_is_no_run_ends_with_one_line(run, spoil, message):
    spoil(run)
    with pytest.raises(SystemExit, match=rf"trl-learnalign report: .*{message}"):
        cli.main(["report", str(run)])


def test_the_command_shows_the_best_prompts(run, capsys):
    cli.main(["report", str(run), "--top", "1"])
    said = capsys.readouterr().out
    assert re.search(r"stage_1 +1 +0\.\d+", said)
    assert "report.html" in said


def test_without_matplotlib_the_remedy_is_named(run, caplog):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from trl_learnalign.cli import main\n"
        f"main(['report', {str(run)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "trl-learnalign report: The report needs matplotlib, which is not installed" in done.stderr
    )
    assert "pip install 'trl-learnalign[report]'" in done.stderr


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, caplog):
    assert cli_run.write_report(tmp_path / "nothing") is None
    assert (
        "The report could not be written; the records are complete. Try: trl-learnalign report"
        in caplog.text
    )


# ---- What is drawn, and what is not ---------------------------------------------------------------------------------


def log(run, entries):
    change(
        run / "_learnalign" / "log_history.json", lambda log: log.__setitem__(slice(None), entries)
    )


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_first_phase_without_a_logged_step_leaves_the_others_their_legend(run):
    log(run, [{"step": 4, "reward": 0.5}, {"step": 5, "reward": 0.25}, {"step": 7, "reward": 1.0}])
    (axes,) = training_figure(read_run(run)).axes
    assert labels(axes) == ["training reward", "smoothed", "held-out accuracy"]


def test_a_single_logged_step_is_a_point_that_can_be_seen(run):
    log(run, [{"step": 3, "reward": 0.5}, {"step": 6, "reward": 0.5}, {"step": 7, "reward": 0.5}])
    (axes,) = training_figure(read_run(run)).axes
    markers = {tuple(line.get_xdata()): line.get_marker() for line in axes.lines}
    assert markers[3,] == "o"  # the only one of its phase
    assert markers[6, 7] == ""


def test_marks_at_both_ends_lie_whole_within_the_axes(run):
    (axes,) = training_figure(read_run(run)).axes
    low, high = axes.get_xlim()
    assert low < 0 < 8 < high


def test_points_of_a_legend_can_be_seen(run):
    (axes,) = score_figure(read_run(run).stages[0]).axes
    handles = axes.get_legend().legend_handles
    assert len(handles) == 2
    for handle in handles:
        assert handle.get_sizes()[0] ** 0.5 >= 5  # points across
        assert handle.get_alpha() == 1


def test_a_stage_that_takes_everything_is_told_in_a_sentence(run):
    page = page_of(run)
    last = page[page.index('<section id="stage_3">') :]
    last = last[: last.index("</section>")]
    assert "scoring them selected nothing" in last
    for absent in ("Top of the ranking", "<td>rest</td>", "Breadth", "tag selected"):
        assert absent not in last
    assert "Top of the ranking" in page  # of the stages that chose


def test_a_random_draw_is_no_ranking(tmp_path):
    train(tmp_path, accuracies=(), selector="random", stages=[6])
    page = page_of(tmp_path)
    assert "Drew 6 of 12 candidates at random at step 2, without measuring them." in page
    assert "Some of the drawn prompts" in page
    for absent in ("of the ranking", "· rank", "score ", "success rate, selected"):
        assert absent not in page, absent


def graded(completions, **_):
    """A reward of which no threshold of a half can be met."""
    return [0.4 if "a" in cases.text(completion) else 0.1 for completion in completions]


def test_why_nothing_can_be_learned_is_recorded_and_shown(tmp_path):
    trainer = cases.trainer(tmp_path, rewards=graded)
    settings = LearnAlignConfig.adaptive(warmup_samples=0, stages=[6], feature_dim=64)
    trainer.add_callback(LearnAlignCallback(trainer, settings))
    trainer.train()
    note = read_run(tmp_path).stages[0].note
    cause = "Correct means graded above success_threshold=0.5; the largest was 0.4"
    assert cause in note.no_signal
    page = page_of(tmp_path)
    assert page.count(f"no prompt is learnable. {cause}") == 1
    assert "lower success_threshold, give the range of the reward" in page


def test_prompts_that_fill_a_stage_up_are_not_called_selected(run):
    def fill(data):
        data["phases"]["stage_1"]["selection"]["shortfall"] = "only 5 are learnable"

    table = pq.read_table(run / "_learnalign" / "stage_1.parquet").to_pandas()
    row = table.index[table["selected"]][0]
    table.loc[row, ["success_rate", "learnability", "score"]] = 0.0
    pq.write_table(pa.Table.from_pandas(table), run / "_learnalign" / "stage_1.parquet")
    change(
        run / "_learnalign" / "stage_1_examples.json",
        lambda data: data["examples"].append(
            {"group": "always wrong", "index": int(table.loc[row, "index"]), "rollouts": []}
        ),
    )
    assert "taken to complete the stage" not in page_of(run)
    change(run / "_learnalign" / "run.json", fill)
    assert page_of(run).count('<span class="tag filled">taken to complete the stage</span>') == 1


# ---- Comparison -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "second"
    train(folder, accuracies=(0.25, 0.5, 0.5, 0.5, 0.875), selector="random", stages=[6, 4, 2])
    return [finished, folder]


def test_runs_side_by_side(two, tmp_path, capsys):
    cli.main(["compare", *map(str, two), "--html", str(tmp_path / "compare.html")])
    said = capsys.readouterr().out
    assert re.search(r"final accuracy +0.625 +0.875", said)
    assert re.search(r"selector +learnalign +random", said)
    assert "stages: [0.5, 0.3, 0.2] (A), [6, 4, 2] (B)" in said
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "0.875" in page


def test_compute_counts_scoring(finished):
    run = read_run(finished)
    places = [compute_at(run, accuracy) for accuracy in run.accuracies]
    assert places[0] == 0
    assert places == sorted(places)
    total = json.loads((finished / "_learnalign" / "run.json").read_text())["ledger"]["total"]
    assert places[-1] == total["forward_equivalents"]


def test_runs_that_cannot_be_compared_are_said_to(run, finished):
    change(
        run / "_learnalign" / "run.json", lambda data: data["identity"].update(dataset="another")
    )
    found = compare([finished, run])
    assert found.notes == [
        "These runs were trained on different datasets: their accuracies cannot be compared."
    ]
    with pytest.raises(SystemExit, match="a comparison needs at least two output folders"):
        cli.main(["compare", str(finished)])


def test_a_comparison_escapes_names(run, finished, tmp_path):
    change(run / "_learnalign" / "run.json", lambda data: data["config"].update(selector=HOSTILE))
    page = write_comparison(compare([finished, run]), tmp_path / "c.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


# ---- Model card -----------------------------------------------------------------------------------------------------


def test_the_model_card_has_one_section_on_the_selection(finished, tmp_path):
    text = section(read_run(finished).contents)
    assert "| stage_1 | 6 | 12 |" in text
    assert "| base |  |  |  |  |  |  | 0.250 |" in text
    assert "@inproceedings{li2026learnalign" in text
    once = with_section("# A model\n", text)
    twice = with_section(once.replace("stage_1", "old"), text)
    assert once == twice
    assert twice.startswith("# A model\n\n" + BEGIN)


def test_the_model_card_bears_the_name_of_its_folder_or_of_the_hub(tmp_path):
    trainer, callback = train(tmp_path / "my_run", accuracies=(), stages=[6])
    for hub_name, title in ((None, "my_run"), ("somebody/my-model", "my-model")):
        trainer.args.hub_model_id = hub_name
        card = add_to_model_card(trainer, callback.record.contents).read_text()
        assert f"# Model Card for {title}\n" in card
        assert "None" not in card
        assert "fine-tuned version of an unnamed model" in card
        assert f'model="{tmp_path / "my_run"}"' in card


def test_the_card_of_a_checkpoint_has_the_section_and_is_otherwise_trls(tmp_path):
    accuracies = {"base": 0.25, "stage_1": 0.5}
    trainer = cases.trainer(tmp_path / "run", save_strategy="steps", save_steps=1)
    callback = LearnAlignCallback(
        trainer,
        LearnAlignConfig.control(stage_steps=2),
        on_phase_end=lambda name, step: {"accuracy": accuracies[name], "n_eval": 8},
    )
    trainer.add_callback(callback)
    trainer.train()
    path = tmp_path / "run" / "README.md"
    card = path.read_text()
    assert card.count(BEGIN) == 1
    assert "| stage_1 | 12 |" in card
    assert "| 0.500 |" in card  # measured after the last checkpoint
    stock = cases.trainer(tmp_path / "stock")
    stock.create_model_card(model_name="run")
    ours = card.split(BEGIN)[0].rstrip()
    assert ours == (tmp_path / "stock" / "README.md").read_text().rstrip()
    trainer.remove_callback(callback)
    trainer.create_model_card(model_name="run")
    assert BEGIN not in path.read_text()


# ---- Parts ----------------------------------------------------------------------------------------------------------


def test_intervals_of_accuracies():
    # R: prop.test(15, 20, correct = FALSE)
    assert Accuracy("base", 0, 0.75, 20).interval == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert Accuracy("base", 0, 0.75, 0).interval == (0, 1)  # from records without a count


def test_spearman_with_ties():
    a, b = np.array([1.0, 2, 2, 4, np.nan]), np.array([2.0, 1, 3, 4, 5])
    assert spearman(a, b) == pytest.approx(0.632456, abs=1e-6)  # scipy.stats.spearmanr
    assert spearman(np.ones(5), np.arange(5.0)) is None


@pytest.mark.parametrize("rollouts", [4, 8, 16])
def test_each_success_rate_has_a_bar_of_its_own(rollouts):
    rates = np.arange(rollouts + 1) / rollouts
    counts, _ = np.histogram(rates, _rate_edges(rates))
    assert counts.tolist() == [1] * (rollouts + 1)


def test_rates_of_partly_scorable_prompts_share_bars():
    rates = np.unique(np.concatenate([np.arange(n + 1) / n for n in range(5, 13)]))
    counts, _ = np.histogram(rates, _rate_edges(rates))
    assert counts.sum() == len(rates)


def test_smoothing_does_not_begin_at_zero():
    assert smoothed([0.5, 0.5]) == pytest.approx([0.5, 0.5])


def test_headline_and_visible():
    assert headline("system: be good\nuser: what is 1+1?\n") == "user: what is 1+1?"
    assert headline("x" * 200, 10) == "x" * 9 + "…"
    assert headline("") == ""
    assert visible("a\r\nb\tc\x00\x07") == "a\nb\tc␀␇"
