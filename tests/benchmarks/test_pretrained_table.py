"""The pretrained table: what a cell charges and measures, how curves are kept, how lines are compared."""

import dataclasses
import math

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from loading import benchmark_modules

pytest.importorskip("reasoning_gym")

from trl_learnalign.toy.short_tasks import build_short_pool

MODULES = ("pretrained.table", "pretrained.cells", "common")


@pytest.fixture(scope="module")
def bench():
    with benchmark_modules(*MODULES) as modules:
        yield modules


@pytest.fixture(scope="module")
def table(bench):
    return bench["pretrained.table"]


@pytest.fixture(scope="module")
def cells(bench):
    return bench["pretrained.cells"]


@pytest.fixture(scope="module")
def model(bench, tmp_path_factory):
    """A tiny model that knows nothing, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    bench["common"].make_model("tiny", 0).save_pretrained(folder)
    bench["common"].tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def settings(cells):
    return cells.Settings(
        pool=40, held_out=20, prompts_per_step=2, rollouts=2, learning_rate=1e-3, budget=8000
    )


@pytest.fixture(scope="module")
def run(cells, model, settings, tmp_path_factory):
    """One cell of the stock trainer: its rows and its trainer."""
    trainers, rows = [], []
    attach = cells.attach
    cells.attach = lambda trainer, cell: (trainers.append(trainer), attach(trainer, cell))
    try:
        cells.run_cell(
            cells.Cell("full", 0),
            settings,
            model,
            "dev",
            tmp_path_factory.mktemp("scratch"),
            rows.append,
        )
    finally:
        cells.attach = attach
    return rows, trainers[0]


def test_a_stock_run_is_charged_what_the_trainer_itself_has_counted(run):
    rows, trainer = run
    last = rows[-1]
    seen = trainer.state.num_input_tokens_seen
    assert last["tokens_generated"] + last["tokens_prompt"] == seen == last["tokens_trained"]
    assert last["tokens_forward"] == 0, "an evaluation was charged"
    assert last["compute"] == 4 * seen


def test_a_curve_has_a_point_for_every_part_of_the_budget_and_ends_with_it(run, cells, settings):
    rows, trainer = run
    assert [row["mark"] for row in rows] == [0.0, *cells.MARKS]
    assert all(row["compute"] >= row["mark"] * settings.budget for row in rows)
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] == trainer.state.global_step < cells.MOST_STEPS
    before_last = rows[-1]["compute"] * (steps[-1] - 1) / steps[-1]
    assert before_last < 1.1 * settings.budget, "training went on after the budget was spent"
    assert rows[0]["compute"] == 0


@pytest.fixture(scope="module", params=["skip", "adaptive"])
def learnalign_run(request, cells, model, settings, tmp_path_factory):
    rows = []
    cell = cells.Cell(request.param, 0)
    cells.run_cell(cell, settings, model, "dev", tmp_path_factory.mktemp("scratch"), rows.append)
    return rows


def test_lines_of_the_product_run_to_the_end_of_the_budget_and_skip_rows(learnalign_run, cells):
    """The model knows nothing, so no rollout is right: one row of a step's four is all that is trained on."""
    last = learnalign_run[-1]
    assert last["mark"] == cells.MARKS[-1]
    assert last["useful_groups"] == 0
    assert last["groups"] == 2 * last["step"]
    rolled_out = last["tokens_generated"] + last["tokens_prompt"]
    assert last["tokens_trained"] < 0.4 * rolled_out


def test_the_skipping_line_rolls_out_what_the_stock_trainer_does(run, cells, model, tmp_path):
    """As long as nothing is right, both have the same weights: prompts and completions are the same ones."""
    rows, _ = run
    skipped = []
    settings = cells.Settings(pool=40, held_out=20, prompts_per_step=2, rollouts=2, budget=8000)
    cells.run_cell(cells.Cell("skip", 0), settings, model, "dev", tmp_path, skipped.append)
    lengths = {row["groups"]: (row["tokens_prompt"], row["tokens_generated"]) for row in skipped}
    shared = [row for row in rows if row["groups"] in lengths]
    assert len(shared) > 1
    for row in shared:
        assert lengths[row["groups"]] == (row["tokens_prompt"], row["tokens_generated"])


def test_forward_passes_without_a_gradient_are_charged_and_those_of_decoding_are_not(cells, run):
    _, trainer = run
    meter = cells.Meter(rollouts=2)
    meter.watch(trainer.model)
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        trainer.model(input_ids=ids, attention_mask=mask)
        assert (meter.forward, meter.trained) == (9, 0)
        trainer.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3)
        meter.paused(lambda: trainer.model(input_ids=ids, attention_mask=mask))
    assert (meter.forward, meter.trained) == (9, 0)
    trainer.model(input_ids=ids, attention_mask=mask)
    assert (meter.forward, meter.trained) == (9, 9)


def test_groups_with_right_and_wrong_rollouts_are_counted_as_useful(cells):
    meter = cells.Meter(rollouts=2)
    rewards = meter.accuracy_reward(
        [" 1", " 2", " 3", " 3"], ["1", "1", "3", "3"], [[5, 1], [6]] * 2, [7, 7, 4, 4]
    )
    assert rewards == [1, 0, 1, 1]
    assert (meter.groups, meter.useful_groups) == (2, 1)
    assert (meter.generated, meter.prompt) == (6, 22)


def test_the_probability_of_an_answer_is_that_of_its_tokens_one_after_the_other(cells, run):
    _, trainer = run
    rows = list(build_short_pool(20, 3, "dev", trainer.processing_class.eos_token))
    found = cells.answer_probabilities(trainer, rows)
    for row, probability in zip(rows, found, strict=True):
        ids = trainer.processing_class(row["prompt"]).input_ids
        expected, answer = 0.0, f" {row['answer']}{trainer.processing_class.eos_token}"
        for token in trainer.processing_class(answer).input_ids:
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            expected += logits.log_softmax(dim=-1)[token].item()
            ids.append(token)
        # The model computes in bfloat16; a token at the wrong place would change the logarithm by whole numbers.
        assert math.log(probability) == pytest.approx(expected, abs=0.3)


def test_an_unknown_line_is_refused(cells, run):
    with pytest.raises(
        ValueError, match=r"unknown line 'best': choose one of full, skip, adaptive"
    ):
        cells.attach(run[1], cells.Cell("best", 0))


# ---- files ----------------------------------------------------------------------------------------------------------


def curve(selector, seed, values, marks):
    rows = []
    for mark, value in zip(marks, values, strict=True):
        row = {
            "selector": selector,
            "seed": seed,
            "mark": mark,
            "accuracy": value,
            "probability": value,
        }
        row |= {"compute": 100 * mark, "cpu_seconds": 60 * mark, "step": int(10 * mark)}
        rows.append(row | {"groups": 80, "useful_groups": 20})
    return rows


@pytest.fixture
def files(table, tmp_path):
    return table.CellFiles(tmp_path / "work", tmp_path / "table.parquet", {"budget": 100})


def test_an_interrupted_cell_begins_anew_and_a_finished_one_stays(
    table, cells, files, settings, monkeypatch
):
    marks = [0.0, *cells.MARKS]
    first, second = cells.Cell("full", 0), cells.Cell("full", 1)
    files.write(first, curve("full", 0, [0.5] * len(marks), marks))
    files.write(second, curve("full", 1, [0.4] * 3, marks[:3]))
    assert (files.is_done(first), files.is_done(second)) == (True, False)
    began = []

    def run_cell(cell, settings, model, split, scratch, write):
        began.append(cell)
        for row in curve("full", cell.seed, [0.6] * len(marks), marks):
            write(row)

    monkeypatch.setattr(table, "run_cell", run_cell)
    table.run([first, second], files, settings, "model", "dev")
    assert began == [second]
    written = pq.read_table(files.output).to_pandas()
    assert written.groupby("seed")["accuracy"].agg(["count", "mean"]).to_dict() == {
        "count": {0: len(marks), 1: len(marks)},
        "mean": {0: 0.5, 1: pytest.approx(0.6)},
    }


def test_a_curve_of_other_settings_is_refused(table, cells, files):
    cell = cells.Cell("full", 0)
    files.write(cell, curve("full", 0, [0.5], [0.0]))
    other = table.CellFiles(files.folder, files.output, {"budget": 200})
    with pytest.raises(
        ValueError,
        match=r"was made with \{'budget': 100\} and this run has \{'budget': 200\}.*--work",
    ):
        other.is_done(cell)


def test_the_command_line_has_every_setting_and_asks_for_a_model(table, cells, capsys):
    with pytest.raises(SystemExit):
        table.main(["--lines", "full"])
    assert "name the pretrained model: --model FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(cells.Settings))


# ---- report ---------------------------------------------------------------------------------------------------------


def test_the_report_pairs_seeds_and_says_what_it_takes_to_reach_the_shuffled_pool(
    table, cells, capsys
):
    marks = [0.0, *cells.MARKS]
    rows = []
    for seed in range(3):
        rows += curve("full", seed, [0.2 + 0.4 * mark + 0.1 * seed for mark in marks], marks)
        rows += curve("skip", seed, [0.2 + 0.8 * mark + 0.1 * seed for mark in marks], marks)
    rows += curve("adaptive", 0, [0.9] * 3, marks[:3])  # under way
    table.report(pd.DataFrame(rows))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| skip")]
    cells_of_ending = [text.strip() for text in lines[-1].split("|")[1:-1]]
    assert cells_of_ending[:5] == ["skip", "3", "10", "0.25", "1"]
    assert [float(text) for text in cells_of_ending[5:]] == pytest.approx([0.5, 0.5, *[0.4] * 6])
