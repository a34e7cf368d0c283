import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pandas as pd
import pytest
import question_files
import yaml
from datasets import Dataset, load_from_disk
from histories import write_history
from subsets import data, roomy, select

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.cli.arguments import parse, planned_config
from trl_learnalign.measuring.rollouts import RolloutMeasure
from trl_learnalign.plan import make_plan
from trl_learnalign.preflight.checks import drop_unneeded_warmup
from trl_learnalign.preflight.forecast import geometry
from trl_learnalign.ranking import overlaps, rank_correlations
from trl_learnalign.records.history import RewardHistory
from trl_learnalign.selectors import SELECTORS
from trl_learnalign.training.subset import SubsetConfig


def rows(folder, selector, size):
    return load_from_disk(str(folder / "subsets" / selector / f"top_{size}"))["selection_index"]


def test_subsets_are_nested_and_come_in_three_forms(tmp_path):
    selection, _ = select(tmp_path, top=[6, 3, 9, 12])
    folder = tmp_path / "subsets" / "learnalign"
    scores = pd.read_parquet(folder / "scores.parquet").set_index("index")
    best = scores.sort_values("rank").index.tolist()
    for size in (3, 6, 9, 12):
        subset = load_from_disk(str(folder / f"top_{size}"))
        assert subset["selection_index"] == best[:size]
        assert subset["row"] == best[:size]
        assert subset["prompt"] == [data()[i]["prompt"] for i in best[:size]]
        assert subset["selection_rank"] == list(range(1, size + 1))
        np.testing.assert_allclose(subset["selection_score"], scores.loc[best[:size], "score"])
        np.testing.assert_allclose(
            subset["selection_learnability"], scores.loc[best[:size], "learnability"]
        )
        np.testing.assert_allclose(
            subset["selection_success_rate"], scores.loc[best[:size], "success_rate"]
        )
        assert subset.features["prompt"] == data().features["prompt"]
        lines = [
            json.loads(line) for line in (folder / f"top_{size}.jsonl").read_text().splitlines()
        ]
        assert lines == subset.to_list()
        assert Dataset.from_parquet(str(folder / f"top_{size}.parquet")).to_list() == lines
    record = json.loads((tmp_path / "_learnalign" / "run.json").read_text())
    note = record["phases"]["subsets"]["learnalign"]
    assert note["sizes"] == {"3": 3, "6": 6, "9": 9, "12": 12}
    assert record["phases"]["warmup"]["training"]["steps"] == 2
    assert [phase["name"] for phase in record["plan"]["phases"]] == ["warmup"]
    assert selection.trainer.state.global_step == 2


def test_the_subset_is_what_a_training_run_would_select(tmp_path):
    """With the same warm-up: that of a run which restarts after it."""
    trainer = cases.trainer(tmp_path / "train", roomy(), data=data())
    settings = dict(warmup_samples=4, feature_dim=64, shard_size=4)
    config = LearnAlignConfig(**settings, stages=[4], after_warmup="restart")
    trainer.add_callback(callback := LearnAlignCallback(trainer, config))
    trainer.train()
    select(tmp_path / "select", top=[4])
    assert (
        sorted(rows(tmp_path / "select", "learnalign", 4)) == callback.selected("stage_1").tolist()
    )
    columns = ["index", "score", "success_rate", "rank"]
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "select" / "subsets" / "learnalign" / "scores.parquet")[columns],
        pd.read_parquet(tmp_path / "train" / "_learnalign" / "stage_1.parquet")[columns],
    )


def test_another_size_or_selector_takes_no_rollout_and_no_training(tmp_path, monkeypatch):
    _, first = select(tmp_path, selector=["alignment"])
    assert first == 4 * 4 + 12 * 4  # warm-up, and one scoring pass
    before = (tmp_path / "subsets" / "alignment" / "top_3.jsonl").read_text()
    monkeypatch.setattr("trl.GRPOTrainer.train", None)
    again, rollouts = select(
        tmp_path, top=[3, 5, 8], selector=["learnalign", "learnability", "random", "alignment"]
    )
    assert rollouts == 0
    assert [ranking.selector.name for ranking in again.rankings] == [
        "learnalign",
        "learnability",
        "random",
        "alignment",
    ]
    assert (tmp_path / "subsets" / "alignment" / "top_3.jsonl").read_text() == before
    record = json.loads((tmp_path / "_learnalign" / "run.json").read_text())
    assert list(record["phases"]["subsets"]) == [
        "alignment",
        "learnalign",
        "learnability",
        "random",
    ]
    assert record["phases"]["warmup"]["training"]["steps"] == 2


@pytest.mark.parametrize("warmup", [4, 0])
def test_what_another_selector_needs_is_measured_with_the_same_policy(tmp_path, warmup):
    _, first = select(tmp_path, selector="learnalign", warmup_samples=warmup)
    assert first == 4 * warmup + 12 * 4
    later, rollouts = select(tmp_path, selector=["ifd", "learnalign"], warmup_samples=warmup)
    assert rollouts == 0
    assert later.trainer.state.global_step == warmup // 2  # resumed at the end of the warm-up
    both, _ = select(tmp_path / "both", selector=["ifd", "learnalign"], warmup_samples=warmup)
    for ours, theirs in zip(later.rankings, both.rankings, strict=True):
        np.testing.assert_array_equal(ours.scores, theirs.scores)
    lone, _ = select(tmp_path / "alone", selector="ifd", warmup_samples=0)
    same = np.array_equal(lone.rankings[0].scores, later.rankings[0].scores, equal_nan=True)
    assert same == (warmup == 0)  # the warmed-up policy reads otherwise than the base model


def test_an_interrupted_scoring_goes_on_without_a_second_warm_up(tmp_path, monkeypatch):
    whole, _ = select(tmp_path / "whole")
    measure, shards = RolloutMeasure.roll_out, []

    def power_cut(self, number, *rest):
        shards.append(number)
        if len(shards) == 3:
            raise KeyboardInterrupt
        return measure(self, number, *rest)

    monkeypatch.setattr(RolloutMeasure, "roll_out", power_cut)
    with pytest.raises(KeyboardInterrupt):
        select(tmp_path / "cut")
    resumed, rollouts = select(tmp_path / "cut")
    assert shards == [0, 1, 2, 2]
    assert rollouts == 4 * 4  # one shard of four prompts
    np.testing.assert_array_equal(resumed.rankings[0].scores, whole.rankings[0].scores)


def test_two_runs_write_the_same_files(tmp_path):
    for name in ("a", "b"):
        select(tmp_path / name, selector=["learnalign", "random"])
    files = sorted(
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a" / "subsets").rglob("*.*")
    )
    assert len(files) > 15
    for path in files:
        if (
            path.name != "state.json" and path.suffix != ".json"
        ):  # datasets notes random fingerprints there
            assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), (
                path
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(warmup_samples=6), "warmup_samples was 4 and is 6"),
        (dict(selection_seed=3), "selection_seed was 42 and is 3"),
        (dict(options={"learning_rate": 1e-5}), r"training\.learning_rate was"),
        (dict(options={"temperature": 0.5}), r"sampling\.temperature was"),
        (dict(policy=cases.model(max_position_embeddings=512, seed=1)), "base_weights was"),
        (dict(pool=data(13)), "dataset was"),
    ],
)
def test_another_policy_or_pool_in_the_same_folder_is_refused(tmp_path, change, message):
    folder = tmp_path / "run"
    select(folder, selector="random", top=[3], warmup_samples=4)
    with pytest.raises(RuntimeError, match=message + r".*another output_dir"):
        select(folder, **{"selector": "random", "top": [3], **change})


def test_measurements_of_other_settings_are_refused(tmp_path):
    select(tmp_path)
    with pytest.raises(RuntimeError, match=r"projection: the folder has .*another output_dir"):
        select(tmp_path, feature_dim=128)


def everything(folder, **settings):
    write_history(
        folder / "history.parquet", RewardHistory(np.arange(24).reshape(12, 2) / 24, np.arange(12))
    )
    trusted = data(16).select(range(12, 16))
    return select(
        folder / "run",
        selector=list(SELECTORS),
        validation=trusted,
        reward_history=str(folder / "history.parquet"),
        **settings,
    )[0]


def test_all_selectors_rank_one_pool(tmp_path):
    selection = everything(tmp_path)
    folder = tmp_path / "run" / "subsets"
    for name in SELECTORS:
        assert rows(tmp_path / "run", name, 6)[:3] == rows(tmp_path / "run", name, 3)
    table = pd.read_csv(folder / "correlations.csv", index_col="selector")
    assert list(table.index) == list(table.columns) == list(SELECTORS)
    pd.testing.assert_frame_equal(
        table, pd.read_parquet(folder / "correlations.parquet").set_index("selector")
    )
    from scipy.stats import spearmanr

    scores = {ranking.selector.name: ranking.scores for ranking in selection.rankings}
    for one, other in (("learnalign", "alignment"), ("ppl_top", "ifd"), ("limr", "learnability")):
        known = ~np.isnan(scores[one]) & ~np.isnan(scores[other])
        truth = spearmanr(scores[one][known], scores[other][known]).statistic
        assert table.loc[one, other] == pytest.approx(truth)
    shared = pd.read_csv(folder / "overlaps.csv", index_col="selector")
    common = set(rows(tmp_path / "run", "limr", 6)) & set(rows(tmp_path / "run", "random", 6))
    assert shared.loc["limr", "random"] == pytest.approx(len(common) / 6)


def test_the_ledger_charges_each_measure_once_whoever_asks(tmp_path):
    def ledger(folder):
        return json.loads((folder / "_learnalign" / "run.json").read_text())["ledger"]

    _, rollouts = select(tmp_path / "apart", selector=["ifd"])
    assert rollouts == 4 * 4
    read = ledger(tmp_path / "apart")["scoring"]["scoring"]
    assert read["tokens_forward"] > 0
    assert read["tokens_generated"] == read["tokens_trained"] == 0
    select(tmp_path / "apart", selector=["learnalign"])
    select(
        tmp_path / "apart", selector=["learnability"]
    )  # its rollouts are there, with gradients it does not need
    select(tmp_path / "apart", selector=["random"])
    apart = ledger(tmp_path / "apart")
    table = pd.read_parquet(tmp_path / "apart" / "subsets" / "learnalign" / "scores.parquet")
    assert apart["scoring"]["scoring"]["tokens_generated"] == round(
        4 * table["mean_completion_length"].sum()
    )
    assert apart["scoring"]["scoring"]["tokens_forward"] == read["tokens_forward"]
    assert apart["scoring"]["scoring"]["tokens_trained"] > 0
    select(tmp_path / "together", selector=["learnability", "learnalign", "ifd"])
    for kind in ("tokens_generated", "tokens_prompt", "tokens_forward", "tokens_trained"):
        assert apart["total"][kind] == ledger(tmp_path / "together")["total"][kind]
        assert (
            apart["total"][kind]
            == apart["warmup"]["training"][kind] + apart["scoring"]["scoring"][kind]
        )


def test_correlations_by_hand():
    nan = float("nan")
    scores = {
        "up": np.array([1.0, 2.0, 3.0, 4.0]),
        "down": np.array([40.0, 30.0, 20.0, -5.0]),
        "tied": np.array([0.0, 0.0, 1.0, 1.0]),
        "partly": np.array([nan, 7.0, 5.0, nan]),
        "flat": np.zeros(4),
        "unknown": np.full(4, nan),
    }
    table = rank_correlations(scores)
    assert table.loc["up", "up"] == pytest.approx(1)
    assert table.loc["up", "down"] == pytest.approx(-1)
    assert table.loc["up", "tied"] == pytest.approx(2 / np.sqrt(5))  # ranks 1.5, 1.5, 3.5, 3.5
    assert table.loc["up", "partly"] == pytest.approx(-1)
    assert table.loc["up", ["flat", "unknown"]].isna().all()
    shares = overlaps({"a": [1, 2, 3, 4], "b": [4, 5, 6, 1]})
    assert shares.to_numpy().tolist() == [[1, 0.5], [0.5, 1]]


def test_a_subset_can_be_selected_from_again(tmp_path):
    select(tmp_path / "first", top=[8], selector="token_length")
    pool = load_from_disk(str(tmp_path / "first" / "subsets" / "token_length" / "top_8"))
    select(tmp_path / "second", top=[4], selector="random", pool=pool)
    subset = load_from_disk(str(tmp_path / "second" / "subsets" / "random" / "top_4"))
    assert sorted(subset.column_names) == sorted(pool.column_names)
    assert subset["row"] == [pool[i]["row"] for i in subset["selection_index"]]


def test_unscored_prompts_come_last_and_have_no_score(tmp_path):
    select(tmp_path, top=[3, 9], pool_sample=5, selector="token_length")
    subset = load_from_disk(str(tmp_path / "subsets" / "token_length" / "top_9"))
    assert [score is None for score in subset["selection_score"]] == [False] * 5 + [True] * 4
    assert len(set(subset["selection_index"])) == 9


def test_too_few_learnable_prompts_are_said_and_can_shrink_the_subset(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(cases, "accuracy_reward", lambda completions, **_: [0.0] * len(completions))
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        select(tmp_path, on_shortfall="shrink", warmup_samples=0)
    said = "only 0 of 12 candidates are learnable, fewer than the requested 6; selected: 1, 1 with learnability 0"
    done = "on_shortfall='shrink': fewer prompts than requested are used"
    assert f"learnalign: {said} ({done})" in caplog.text
    assert len(rows(tmp_path, "learnalign", 6)) == 1


def test_subsets_are_pushed_as_configurations_on_request(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Dataset,
        "push_to_hub",
        lambda self, name, config_name: pushed.append((name, config_name, len(self))),
    )
    select(tmp_path, selector="random", warmup_samples=0)
    assert pushed == []
    select(tmp_path, selector="random", warmup_samples=0, push_to_hub_id="someone/subsets")
    assert pushed == [
        ("someone/subsets", "random_top_3", 3),
        ("someone/subsets", "random_top_6", 6),
    ]


BAD = [
    (dict(top=[0]), r"top=0: give a whole number of at least 1"),
    (dict(top=["many"]), "top='many': give a whole number"),
    (dict(), "The number of prompts to select is missing"),
    (dict(top=[3], selector=[]), r"selector=\[\]: give one name, or several"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SubsetConfig(**options)


def test_sizes_come_from_stages_where_they_are_counts():
    assert SubsetConfig(stages=[1000]).sizes == [1000]
    assert SubsetConfig(stages=[500, 200]).sizes == [200, 500]
    assert SubsetConfig(stages=[0.5, 0.5], top=7).sizes == [7]
    assert SubsetConfig(top=[1]).sizes == [1]
    assert SubsetConfig(top=[5, 5], selector=["random", "ifd", "random"]).selectors == [
        "random",
        "ifd",
    ]
    assert SubsetConfig(top=5, warmup_samples=0, after_warmup="restart").after_warmup == "continue"


def test_more_than_the_pool_has_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"top=\[3, 13\], but the pool has 12 prompts"):
        select(tmp_path, top=[3, 13])


# ---- The command ----------------------------------------------------------------------------------------------------


def files(folder):
    """A model and problems in a folder, and arguments that train with them."""
    question_files.write(folder)
    return [
        *("--model_name_or_path", "model", "--dataset_name", "train.jsonl"),
        *("--eval_dataset_name", "test.jsonl", *question_files.SMALL, "--beta", "0"),
        *("--per_device_eval_batch_size", "5", "--generation_batch_size", "8"),
    ]


def launch(monkeypatch, recipe, *arguments):
    """A recipe, in this process: importing everything anew takes longer than the rest."""
    path = cases.ROOT / "recipes" / f"{recipe}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


def test_from_a_pool_to_a_subset_to_a_trained_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = files(tmp_path)
    selection = ["--output_dir", "out", "--top", "4", "8", "--selector", "learnalign", "ifd"]
    launch(monkeypatch, "select_subset", *arguments, *selection)
    said = capsys.readouterr().out
    assert "Subsets: out/subsets/<selector>/top_<N>" in said
    assert "rank correlations: out/subsets/correlations.csv" in said
    assert "report: out/report.html" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<section id="selectors">' in page
    assert 'aria-label="correlations"' in page
    assert rows(tmp_path / "out", "ifd", 8)[:4] == rows(tmp_path / "out", "ifd", 4)
    for ending in ("", ".parquet", ".jsonl"):
        subset, output = f"out/subsets/ifd/top_8{ending}", f"trained{ending}"
        training = [
            "--subset",
            subset,
            "--output_dir",
            output,
            "--save_strategy",
            "no",
            "--stage_epochs",
            "2",
        ]
        training += ["--stage_steps", "0"]
        launch(monkeypatch, "train_subset", *arguments, *training)
        history = pd.read_parquet(Path(output) / "_learnalign" / "reward_history.parquet")
        assert set(history["phase"]) == {"stage_1"}
        assert history.groupby("pass")["index"].agg(sorted).tolist() == [list(range(8))] * 2
        summary = json.loads((Path(output) / "summary.json").read_text())
        assert summary["accuracy"].keys() == {"base", "stage_1"}
        assert summary["n_eval"] == 5
    digests = {
        json.loads(Path(f"trained{e}/_learnalign/run.json").read_text())["identity"]["dataset"]
        for e in ("", ".parquet")
    }
    assert len(digests) == 1


def test_a_subset_is_chosen_and_trained_on_from_the_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*files(tmp_path), "--stages", "6", "--stage_steps", "0", "--save_strategy", "no"]
    launch(monkeypatch, "train_subset", *arguments, "--output_dir", "learnalign")
    phases = json.loads(Path("learnalign/_learnalign/run.json").read_text())["phases"]
    assert [phases[name]["training"]["steps"] for name in ("warmup", "stage_1")] == [2, 3]
    # A selector that does not roll out gets no warm-up.
    launch(monkeypatch, "train_subset", *arguments, "--output_dir", "ifd", "--selector", "ifd")
    record = json.loads(Path("ifd/_learnalign/run.json").read_text())
    assert list(record["phases"]) == ["base", "stage_1"]
    assert record["config"]["warmup_samples"] == 0


@pytest.mark.parametrize(
    ("selector", "after", "warmup"),
    [
        ("random", "restart", 0),
        (["random", "ppl_top"], "restart", 0),
        ("limr", "restart", 0),
        ("learnability", "restart", 4),
        ("feature_similarity", "restart", 4),
        (["random", "learnalign"], "restart", 4),
        ("random", "continue", 4),
    ],
)
def test_a_warm_up_serves_selectors_that_roll_out(selector, after, warmup):
    given = LearnAlignConfig(warmup_samples=4, stages=[3, 3], selector=selector, after_warmup=after)
    found = drop_unneeded_warmup(given)
    assert found.warmup_samples == warmup
    assert found.after_warmup == (after if warmup else "continue")


CELLS = [
    *(
        ("table1_gsm8k", ["--selector", name, "--stages", n])
        for name, n in (("random", "100"), ("ifd", "2000"))
    ),
    ("table1_gsm8k", ["--selector", "random", "--stages", "1.0"]),
    ("table1_gsm8k", ["--warmup_samples", "0", "--after_warmup", "continue"]),
    ("table1_gsm8k", ["--selector", "alignment"]),
    ("table1_gsm8k", ["--selector", "feature_similarity"]),
    ("table2_math", []),
    ("dapo_math_17k", ["--gradient_rollouts", "one_correct"]),
]


@pytest.mark.parametrize(("name", "overrides"), CELLS)
def test_every_cell_of_the_tables_can_be_planned(name, overrides):
    config = str(cases.ROOT / "recipes" / "configs" / f"{name}.yaml")
    _, settings, args, _ = parse(None, ["--config", config, *overrides], trainer=planned_config())
    plan = make_plan(settings, 7473, geometry(args))
    assert (args.num_generations, args.temperature) == (8, 1.0)
    assert args.generation_batch_size == (64 if name == "dapo_math_17k" else 48)
    assert plan.stages[0].size == (7473 if "1.0" in overrides else settings.stages[0])


def test_the_papers_settings_are_in_the_yaml():
    def settings(name):
        return yaml.safe_load((cases.ROOT / "recipes" / "configs" / f"{name}.yaml").read_text())

    one, two, dapo, select = map(
        settings, ("table1_gsm8k", "table2_math", "dapo_math_17k", "select_gsm8k")
    )
    assert [s["model_name_or_path"] for s in (one, two)] == [
        "Qwen/Qwen2.5-1.5B-Instruct",
        "Qwen/Qwen2.5-Math-1.5B",
    ]
    assert [s["warmup_samples"] for s in (one, two, dapo, select)] == [300, 300, 1000, 300]
    assert [s["stages"] for s in (one, two, dapo)] == [1000] * 3
    assert select["top"] == [100, 500, 1000, 2000]
    for found in (one, two, dapo, select):
        assert (found["learning_rate"], found["beta"], found["epsilon"]) == (1e-6, 0.04, 0.2)
        assert found["reward_weights"] == [2.0, 1.0]
    assert all(found["after_warmup"] == "restart" for found in (one, two, dapo))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_select_what_one_selects(tmp_path):
    arguments = [
        *files(tmp_path),
        "--per_device_train_batch_size",
        "4",
        "--scoring_batch_prompts",
        "2",
    ]
    arguments += [
        "--shard_size",
        "4",
        "--top",
        "6",
        "--selector",
        "learnalign",
        "ifd",
        "feature_similarity",
    ]

    def go(output, *extra, backend=None):
        accelerate = [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
            "--main_process_port",
            "0",
        ]
        config = cases.ROOT / "accelerate_configs" / f"cpu_2_processes_{backend}.yaml"
        launcher = [*accelerate, "--config_file", str(config)] if backend else [sys.executable]
        command = [
            *launcher,
            str(cases.ROOT / "recipes" / "select_subset.py"),
            *arguments,
            "--output_dir",
            output,
            *extra,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cases.ROOT)}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=cases.HANGS,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        record = json.loads((tmp_path / output / "_learnalign" / "run.json").read_text())
        assert record["trainer"]["processes"] == (2 if backend else 1)
        return done.stdout

    go("one", "--warmup_samples", "0")
    for backend in ("ddp", "zero3"):
        go(backend, "--warmup_samples", "0", backend=backend)
        for name in ("learnalign", "ifd", "feature_similarity"):
            one, two = (
                pd.read_parquet(tmp_path / run / "subsets" / name / "scores.parquet")
                for run in ("one", backend)
            )
            assert one["rank"].tolist() == two["rank"].tolist()
            np.testing.assert_allclose(one["score"], two["score"], rtol=1e-4, atol=1e-9)
            assert rows(tmp_path / "one", name, 6) == rows(tmp_path / backend, name, 6)
    # With a warm-up; and then a selector that asks the warmed-up policy something new.
    go("warm", backend="zero3")
    before = rows(tmp_path / "warm", "learnalign", 6)
    go("warm", "--selector", "learnalign", "selectit", "--top", "4", "6", backend="zero3")
    assert rows(tmp_path / "warm", "learnalign", 6) == before
    found = go("warm", "--selector", "selectit", "--top", "5", backend="zero3")
    assert "All measurements exist already" in found


def refusal(monkeypatch, *arguments):
    from trl_learnalign import cli as cli

    monkeypatch.setattr(sys, "argv", ["trl-learnalign"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["select", *map(str, arguments)])
    return str(ended.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--top", "30"], "top=[30], but the pool has 20 prompts"),
        (["--top", "4", "--selector", "best"], "selector='best': choose one of"),
        (
            ["--top", "4", "--selector", "random", "limr"],
            "selector='limr' ranks prompts by the success rates of a previous",
        ),
        (["--stages", "0.5", "0.5"], "The number of prompts to select is missing"),
        (["--top", "4", "--dry_run"], "--dry_run plans training runs"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(tmp_path, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    said = refusal(monkeypatch, *files(tmp_path), "--output_dir", "out", *extra)
    assert message in said
    assert not (tmp_path / "out" / "_learnalign").exists()


def test_usage_lists_the_selectors(capsys):
    from trl_learnalign.cli import select as command

    command.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in SELECTORS)


# ---- Within a rollout budget ----------------------------------------------------------------------------------------


def prompts_of_rounds(folder):
    paths = sorted((folder / "_learnalign" / "stage_1").glob("round_*/prompts.json"))
    return [json.loads(path.read_text())["rows"] for path in paths]


def test_a_budget_is_spent_once_whoever_ranks(tmp_path):
    """What was rolled out serves later calls; a selector that needs gradients takes them of the same prompts."""
    budget = dict(top=[2, 4], rollout_budget=0.5, budget_rounds=2)
    _, rollouts = select(tmp_path, selector="learnability", **budget)
    rounds = prompts_of_rounds(tmp_path)
    assert [len(rows) for rows in rounds] == [3, 3]
    first = pd.read_parquet(tmp_path / "subsets" / "learnability" / "scores.parquet")
    assert sorted(first["index"]) == sorted(rounds[0] + rounds[1])
    _, more = select(tmp_path, selector="learnability", **{**budget, "top": [3]})
    assert (rollouts > 0, more) == (True, 0)
    selection, _ = select(tmp_path, selector="learnalign", **budget)
    assert prompts_of_rounds(tmp_path) == rounds
    second = pd.read_parquet(tmp_path / "subsets" / "learnalign" / "scores.parquet")
    assert second["index"].tolist() == first["index"].tolist()
    assert second["success_rate"].tolist() == first["success_rate"].tolist()
    note = json.loads((tmp_path / "_learnalign" / "run.json").read_text())["phases"]
    assert [part["prompts"] for part in note["subsets"]["learnalign"]["scoring"]["rounds"]] == [
        3,
        3,
    ]
    assert selection.config.needs_belief


def test_a_subset_larger_than_the_budget_is_filled(tmp_path):
    select(tmp_path, top=[9], selector="learnability", rollout_budget=0.5)
    subset = load_from_disk(str(tmp_path / "subsets" / "learnability" / "top_9"))
    assert [rate is None for rate in subset["selection_success_rate"]] == [False] * 6 + [True] * 3


def test_selectors_of_two_pools_are_ranked_in_calls_of_their_own(tmp_path):
    budget = dict(top=[3], rollout_budget=0.5)
    said = r"=0\.5: learnability rank only the prompts that are rolled out, but random rank all candidates"
    with pytest.raises(ValueError, match=said):
        select(tmp_path / "both", selector=["learnability", "random"], **budget)
    for selector, size in (("token_length", 12), ("learnability", 6)):
        select(tmp_path / "each", selector=selector, **budget)
        scores = pd.read_parquet(tmp_path / "each" / "subsets" / selector / "scores.parquet")
        assert len(scores) == size
