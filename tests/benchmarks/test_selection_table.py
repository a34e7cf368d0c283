"""The selection table: which cells there are, what a cell measures and charges, how results are kept and reported."""

import dataclasses
import hashlib
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import cases
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from loading import benchmark_modules

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")

from trl_learnalign import plan
from trl_learnalign.toy.model import TINY

MODULES = ("selection.table", "selection.cells", "selection.report", "common")


@pytest.fixture(scope="module")
def bench():
    with benchmark_modules(*MODULES) as modules:
        yield modules


@pytest.fixture(scope="module")
def table(bench):
    return bench["selection.table"]


@pytest.fixture(scope="module")
def report(bench):
    return bench["selection.report"]


# ---- which cells there are ------------------------------------------------------------------------------------------

SELECTORS = {
    *(
        "random",
        "token_length",
        "ppl_top",
        "ppl_middle",
        "ifd",
        "selectit",
        "learnability",
        "alignment",
    ),
    *("feature_similarity", "limr", "learnalign", "learnalign_no_warmup"),
}


def test_every_selector_is_there_at_every_n_in_every_regime_with_every_seed(table):
    found = list(table.cells(table.Settings(), table.REGIMES, tuple(range(5))))
    assert len(found) == len({cell.key for cell in found})
    keys = {
        (cell.regime, cell.selector, cell.n, cell.seed) for cell in found if cell.budget == "steps"
    }
    for regime in ("balanced", "sparse", "graded", "longtail"):
        for seed in range(5):
            for n in (27, 134, 268, 535):  # 1.3 %, 6.7 %, 13 %, 27 %
                assert {
                    selector for selector in SELECTORS if (regime, selector, n, seed) in keys
                } == SELECTORS
                assert (regime, "random", n, seed, "compute") in {cell.key for cell in found}
            assert (regime, "full", 2000, seed) in keys
            for selector in ("staged", "full"):
                assert (regime, selector, 2000, seed, "pass") in {cell.key for cell in found}


def test_choices_that_cover_are_there_with_eight_seeds_and_what_they_are_compared_with(table):
    settings, seeds = table.Settings(), tuple(range(5))
    within = [
        cell
        for cell in table.covering_cells(settings, table.REGIMES, seeds)
        if "_budget" in cell.selector
    ]
    kinds = {(268, "steps"), (268, "compute"), (134, "steps")}
    assert len(within) == 2 * 4 * 8 * len(kinds)
    assert {(cell.n, cell.budget) for cell in within} == kinds
    both = (
        *table.cells(settings, table.REGIMES, seeds),
        *table.covering_cells(settings, table.REGIMES, seeds),
    )
    found = {cell.key for cell in both}
    assert len(found) == len(both)
    for regime in ("balanced", "sparse", "graded", "longtail"):
        for seed in range(8):
            for n in (134, 268):
                for selector in ("learnalign_coverage", "learnalign_logdet", "random"):
                    assert (regime, selector, n, seed, "steps") in found
                assert (regime, "learnability", n, seed, "steps") in found
                assert (regime, "learnalign", n, seed, "steps") in found


def test_the_most_informative_cells_come_first(table):
    found = [
        cell
        for cell in table.cells(table.Settings(), table.REGIMES, (0, 1))
        if cell.selector != "base"
    ]
    assert [cell.regime for cell in found[:8]] == ["sparse"] * 8
    assert {cell.n for cell in found[:32]} == {268}
    assert {cell.selector for cell in found[:32]} == {
        "random",
        "learnability",
        "learnalign",
        "alignment",
    }


def test_the_quick_part_is_a_part_of_the_whole(table):
    settings = table.Settings()
    whole = {cell.key for cell in table.cells(settings, table.REGIMES, (0, 1, 2, 3, 4))}
    assert {cell.key for cell in table.quick_cells(settings)} < whole


# ---- cells ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(bench, tmp_path_factory):
    cells = bench["selection.cells"]
    settings = cells.Settings(
        pool=48,
        held_out=20,
        warmup=8,
        prompts_per_step=4,
        rollouts=2,
        steps=3,
        history_passes=2,
        history_prompts=16,
        feature_dim=64,
    )
    return cells.Bench(settings, tmp_path_factory.mktemp("cells"), TINY)


def run(bench, tiny, selector, n=8, budget="steps"):
    return tiny.run(bench["selection.cells"].Cell("longtail", selector, n, 0, budget))


def test_cells_are_charged_for_what_their_selector_needs(bench, tiny):
    rows = {
        name: run(bench, tiny, name)
        for name in ("random", "token_length", "ppl_top", "learnability", "learnalign")
    }
    for row in rows.values():
        assert (row["steps"], row["n_eval"]) == (3, 20)
        assert sum(json.loads(row["families"]).values()) == 8
        assert row["tokens_trained"] == row["tokens_generated"] + row["tokens_prompt"] > 0
        selecting = (
            row["selecting_tokens_generated"]
            + row["selecting_tokens_prompt"]
            + row["selecting_tokens_forward"]
        )
        trained = row["tokens_trained"] + row["selecting_tokens_trained"]
        assert (
            row["compute"]
            == row["tokens_generated"] + row["tokens_prompt"] + selecting + 3 * trained
        )
    selecting = {name: row["selecting_tokens_generated"] for name, row in rows.items()}
    assert (
        selecting["random"] == selecting["token_length"] == 0 < selecting["ppl_top"]
    )  # its warm-up
    assert selecting["ppl_top"] < selecting["learnability"] == selecting["learnalign"]
    assert rows["ppl_top"]["selecting_tokens_forward"] > 0
    warmup = json.loads((tiny.folder / "longtail-0" / "warmed_up" / "cost.json").read_text())
    assert rows["ppl_top"]["selecting_tokens_generated"] == warmup["tokens_generated"] > 0


def test_within_a_budget_a_cell_is_charged_for_fewer_rollouts(bench, tiny):
    """Four tenths of the pool are rolled out, and the base model reads all of it once."""
    within = run(bench, tiny, "learnalign_coverage_budget")
    everybody = run(bench, tiny, "learnalign_coverage")
    warmup = json.loads((tiny.folder / "longtail-0" / "warmed_up" / "cost.json").read_text())
    scoring = [
        row["selecting_tokens_generated"] - warmup["tokens_generated"]
        for row in (within, everybody)
    ]
    assert 0.2 < scoring[0] / scoring[1] < 0.6  # lengths of completions vary
    assert within["selecting_tokens_forward"] > everybody["selecting_tokens_forward"] == 0
    chosen = pd.read_parquet(tiny.folder / "longtail-0" / "budget.parquet")
    assert len(chosen) == int(0.4 * 48)
    sample = plan.scored_sample(0, "stage_1", np.arange(48), 5)
    for name in (
        "learnalign_coverage",
        "learnalign_logdet",
    ):  # rows of the pool, not places among the rolled-out
        assert set(sample.tolist()) <= set(chosen[name].tolist())
    assert sum(json.loads(within["families"]).values()) == 8


def test_random_gets_the_steps_that_selecting_cost(bench, tiny):
    ours, theirs = run(bench, tiny, "learnalign"), run(bench, tiny, "random", budget="compute")
    assert theirs["steps"] > 3
    per_step = theirs["compute"] / theirs["steps"]
    assert abs(theirs["compute"] - ours["compute"]) < 4 * per_step  # lengths of completions vary


def test_what_is_shared_is_measured_once(bench, tiny, monkeypatch):
    first = run(bench, tiny, "learnalign")
    monkeypatch.setattr(
        bench["selection.cells"].StageMeasurer, "measure", lambda *_: pytest.fail("measured again")
    )
    again = run(bench, tiny, "learnalign")
    same = ("accuracy", "families", "family_accuracy", "tokens_generated", "compute")
    assert {name: first[name] for name in same} == {name: again[name] for name in same}


def test_limr_reads_the_rewards_of_a_run_over_the_pool(bench, tiny):
    row = run(bench, tiny, "limr")
    history = json.loads((tiny.folder / "longtail-0" / "reward_history.json").read_text())
    assert sorted(map(int, history)) == list(range(48))
    assert {len(rates) for rates in history.values()} == {2}
    assert {rate for rates in history.values() for rate in rates} <= {0.0, 0.5, 1.0}
    assert row["selecting_tokens_trained"] > row["tokens_trained"]


@pytest.mark.slow
def test_whole_pool_cells(bench, tiny):
    base, full = run(bench, tiny, "base", 0), run(bench, tiny, "full", 48)
    assert (base["steps"], base["compute"]) == (0, 0)
    assert full["steps"] == 3
    staged, shuffled = (run(bench, tiny, name, 48, "pass") for name in ("staged", "full"))
    assert staged["steps"] == shuffled["steps"] == 6 + 4 + 3  # 24, 14 and 10 prompts, four a step
    assert staged["selecting_tokens_generated"] > shuffled["selecting_tokens_generated"] > 0
    assert staged["n_eval"] == 20


# ---- results --------------------------------------------------------------------------------------------------------


def fake(cell):
    return {**dataclasses.asdict(cell), "accuracy": 0.5, "cell_seconds": 0.0}


def test_results_are_kept_after_each_cell_and_an_interrupted_run_goes_on(table, tmp_path):
    settings, path = table.Settings(), tmp_path / "results.parquet"
    cells = table.quick_cells(settings)

    def interrupted(cell):
        if cell == cells[5]:
            raise KeyboardInterrupt
        return fake(cell)

    with pytest.raises(KeyboardInterrupt):
        table.run_all(cells, table.Results(path, settings), ThreadPoolExecutor(1), 1, interrupted)
    assert len(pd.read_parquet(path)) == 5
    ran = []
    table.run_all(
        cells,
        table.Results(path, settings),
        ThreadPoolExecutor(2),
        2,
        lambda cell: ran.append(cell) or fake(cell),
    )
    found = pd.read_parquet(path)
    assert {
        tuple(row) for row in found[["regime", "selector", "n", "seed", "budget"]].to_numpy()
    } == {cell.key for cell in cells}
    assert len(found) == len(cells)
    assert set(ran) == set(cells[5:])
    assert json.loads(pq.read_schema(path).metadata[b"settings"]) == dataclasses.asdict(settings)


def test_two_cells_of_one_pool_never_run_at_the_same_time(table, tmp_path):
    running, overlaps = set(), []

    def watched(cell):
        pool = (cell.regime, cell.seed)
        overlaps.extend([pool] * (pool in running))
        running.add(pool)
        row = fake(cell)
        running.discard(pool)
        return row

    results = table.Results(tmp_path / "results.parquet", table.Settings())
    table.run_all(table.quick_cells(table.Settings()), results, ThreadPoolExecutor(4), 4, watched)
    assert overlaps == []


def test_results_of_other_settings_are_refused(table, tmp_path):
    path = tmp_path / "results.parquet"
    table.Results(path, table.Settings()).add(fake(table.Cell("sparse", "random", 268, 0)))
    with pytest.raises(ValueError, match=r"steps was 34 and is 99.*--output"):
        table.Results(path, table.Settings(steps=99))


def test_results_of_another_base_model_are_refused(table, tmp_path):
    path = tmp_path / "results.parquet"
    table.Results(path, table.Settings(), "ab").add(fake(table.Cell("sparse", "random", 268, 0)))
    assert json.loads(pq.read_schema(path).metadata[b"base_model"]) == "ab"
    assert len(table.Results(path, table.Settings(), "ab").rows) == 1
    with pytest.raises(ValueError, match=r"base_model was ab and is cd.*--output"):
        table.Results(path, table.Settings(), "cd")


# ---- the base model -------------------------------------------------------------------------------------------------


def test_benchmarks_begin_with_the_published_base_model(bench, tmp_path, monkeypatch):
    cells = bench["selection.cells"]
    monkeypatch.setattr("trl_learnalign.toy.model._build", lambda *_: pytest.fail("trained anew"))
    base = cells.Bench(cells.Settings(), tmp_path).base_model
    assert base == cases.ROOT / "docs" / "results" / "base_model"
    record = json.loads((cases.ROOT / "docs" / "results" / "base_model.json").read_text())
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    assert digest == record["sha256"] == (tmp_path / "base_model.sha256").read_text()


def test_the_published_base_model_scores_what_its_record_says(bench, tmp_path):
    cells = bench["selection.cells"]
    recorded = json.loads((cases.ROOT / "docs" / "results" / "base_model.json").read_text())[
        "accuracy"
    ]
    found = cells.Bench(cells.Settings(), tmp_path).run(cells.Cell("sparse", "base", 0, 0))
    assert found["accuracy"] == pytest.approx(
        recorded["sparse"], abs=bench["selection.report"].SAME_WEIGHTS
    )
    table = pd.read_parquet(cases.ROOT / "docs" / "results" / "selection_table.parquet")
    untrained = table[table["selector"] == "base"].set_index("regime")["accuracy"].to_dict()
    assert (
        untrained == recorded
    )  # the weights that the table's runs began with, as far as can be told


def test_damaged_weights_and_measurements_of_others_are_refused(bench, tmp_path):
    cells = bench["selection.cells"]
    copy = tmp_path / "base_model"
    shutil.copytree(cells.PUBLISHED_BASE, copy)
    shutil.copy(cells.PUBLISHED_BASE.with_suffix(".json"), tmp_path)
    assert cells.published_base_model(copy) == copy
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"has the digest .* restore both.*--train_base"):
        cells.published_base_model(copy)
    for place in (
        tmp_path,
        tmp_path / "marked",
    ):  # a folder of before the weights were published; one of another
        place.mkdir(exist_ok=True)
        if place != tmp_path:
            (place / "base_model.sha256").write_text("ab")
        with pytest.raises(
            ValueError, match=r"holds measurements of a base model with the digest .*--work"
        ):
            _ = cells.Bench(cells.Settings(), place).base_model


# ---- the quick part -------------------------------------------------------------------------------------------------


def test_expected_ranges_are_prediction_intervals_of_the_tables_seeds(report):
    cell = {"regime": "sparse", "selector": "random", "n": 268, "budget": "steps", "seed": 3}

    def expected(values, cells=1):
        rows = pd.DataFrame(
            [{**cell, "accuracy": value, "seed": seed} for seed, value in enumerate(values)]
        )
        return report.expected(rows, [cell] * cells, None)

    values = [0.40, 0.44, 0.41, 0.47, 0.43]
    ((low, high),) = expected(values)
    half = (
        2.7764451051977987 * np.std(values, ddof=1) * math.sqrt(1 + 1 / 5)
    )  # 95 % for the only cell
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    assert all(one[0] < low and one[1] > high for one in expected(values, 16))
    assert expected([0.2, 0.9, 0.1, 0.5, 0.8]) == [
        pytest.approx((0.35, 0.65))
    ]  # seeds that say nothing


def test_quick_cells_are_compared_with_the_published_table(table, capsys):
    published = pd.read_parquet(table.RESULTS)
    names = ["regime", "selector", "n", "seed", "budget"]
    quick = {cell.key for cell in table.quick_cells(table.Settings())}
    rows = [
        row for row in published.to_dict("records") if tuple(row[name] for name in names) in quick
    ]
    assert len(rows) == 18
    table.check_quick(rows, table.PUBLISHED_BASE)
    assert "all 18 cells lie within" in "".join(capsys.readouterr())
    for selector, shift in (("base", 0.02), ("random", 0.12)):
        number = next(i for i, row in enumerate(rows) if row["selector"] == selector)
        moved = [
            {**row, "accuracy": row["accuracy"] + shift * (i == number)}
            for i, row in enumerate(rows)
        ]
        with pytest.raises(SystemExit, match="1 of 18 cells lie outside"):
            table.check_quick(moved, table.PUBLISHED_BASE)


# ---- report ---------------------------------------------------------------------------------------------------------


def test_an_interval_is_students(report):
    values = np.array([0.40, 0.44, 0.41, 0.47, 0.43])
    mean, low, high = report.interval(values)
    half = (
        2.7764451051977987 * values.std(ddof=1) / math.sqrt(5)
    )  # t of 4 degrees of freedom at 97.5 %
    assert (mean, low, high) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half)
    )
    assert np.isnan(report.interval(values[:1])[1])


def made_up_cells(table):
    rows = []
    for regime in ("sparse", "balanced"):
        rows.append(table.Cell(regime, "base", 0, 0))
        for seed in range(5):
            for n in (134, 268):
                rows += [table.Cell(regime, name, n, seed) for name in ("random", "learnalign")]
            rows.append(table.Cell(regime, "random", 268, seed, "compute"))
            rows += [table.Cell(regime, name, 2000, seed, "pass") for name in ("staged", "full")]
    gains = {"learnalign": 0.05, "staged": 0.02}
    return [
        {
            **dataclasses.asdict(cell),
            "accuracy": 0.4
            + 0.01 * cell.seed
            + gains.get(cell.selector, 0)
            + 0.001 * (cell.seed % 2),
            "n_eval": 500,
            "steps": 34,
            "compute": 1000.0,
            "families": json.dumps({"swap": cell.n}),
            "family_accuracy": json.dumps({"swap": 0.5, "nines": 0.0}),
        }
        for cell in rows
    ]


def test_differences_are_paired_by_seed(table, report):
    summary = report.summarise(pd.DataFrame(made_up_cells(table)))
    row = summary[
        (summary["selector"] == "learnalign")
        & (summary["n"] == 268)
        & (summary["regime"] == "sparse")
    ]
    assert row["difference_steps"].item() == pytest.approx(0.05)
    assert row["difference_compute"].item() == pytest.approx(0.05)
    # Seeds differ by more than the methods: only pairing shows the difference.
    assert row["difference_low_steps"].item() > 0.049
    assert row["high"].item() - row["low"].item() > 0.03


def test_the_report_has_all_tables_and_repeats(table, report, tmp_path):
    results = table.Results(tmp_path / "selection_table.parquet", table.Settings())
    for row in made_up_cells(table):
        results.add(row)
    page = report.write(results.path)
    first = page.read_text()
    report.write(results.path)
    assert page.read_text() == first
    assert first.count("\n## Accuracy at equal steps\n") == 1
    assert "**+5.0 [+5.0, +5.0]**" in first.split("\n## Accuracy")[0]  # against random, at one N
    assert "\n### sparse\n" in first
    assert "swap" in first  # the skills that were chosen
    assert (tmp_path / "accuracy_against_n.png").stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match=r"run benchmarks/selection/table\.py first"):
        report.write(tmp_path / "none.parquet")


def test_choices_that_cover_are_compared_seed_by_seed(report):
    accuracies = {
        "learnalign_coverage": (0.5, 0.6, 0.7),
        "learnalign": (0.4, 0.5, 0.6),
        "random": (0.7, 0.6, 0.5),
        "learnability": (0.5, 0.6),  # seeds that only one of them has are left out
    }
    rows = [
        {
            **{"regime": "longtail", "selector": name, "n": 268, "budget": "steps"},
            **{"seed": seed, "accuracy": value},
        }
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    section = report._covering_section(pd.DataFrame(rows))[-1]
    line = next(line for line in section.splitlines() if "longtail" in line)
    assert line.split(" | ")[2:5] == ["268", "3", "60.0 ± 24.8"]
    assert "| **+10.0 [+10.0, +10.0]** | +0.0 [" in line.replace("-0.0 [", "+0.0 [")
    assert line.endswith("| +0.0 [+0.0, +0.0] |")
    assert "sparse" not in section


def test_a_budget_is_compared_with_all_rollouts_seed_by_seed(report):
    rows = []
    for seed, (fewer, everybody) in enumerate([(0.5, 0.4), (0.6, 0.5), (0.7, 0.6)]):
        for name, value, tokens in (
            ("learnalign_logdet_budget", fewer, 40),
            ("learnalign_logdet", everybody, 100),
        ):
            row = {"regime": "sparse", "selector": name, "n": 268, "budget": "steps"}
            row |= {"seed": seed, "accuracy": value, "steps": 34}
            row |= {"selecting_tokens_generated": tokens}
            rows.append(row)
    # A seed that only one of them has is left out, and so is another N.
    rows.append({**rows[0], "seed": 7})
    rows.append({**rows[1], "n": 134})
    section = report._budget_section(pd.DataFrame(rows))[-1]
    line = next(line for line in section.splitlines() if "sparse" in line)
    assert line.split(" | ")[1:5] == ["equal steps", "268", "sparse", "3"]
    assert line.endswith("| 60.0 ± 24.8 | 50.0 ± 24.8 | **+10.0 [+10.0, +10.0]** | 34 | 40% |")
    assert report._budget_section(pd.DataFrame(rows[:2])) == []
