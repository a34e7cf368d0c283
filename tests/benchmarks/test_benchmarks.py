"""Each benchmark runs at a tiny size and writes the figures that others read."""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import torch
from loading import benchmark_modules


@pytest.fixture
def run(tmp_path, capsys):
    def run(name, *arguments):
        threads, path = torch.get_num_threads(), tmp_path / "figures.json"
        try:
            with benchmark_modules(name) as modules:
                modules[name].main([*map(str, arguments), "--json", str(path)])
        finally:
            torch.set_num_threads(threads)
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


TINY = (
    "--model",
    "tiny",
    "--groups",
    3,
    "--rollouts",
    3,
    "--prompt-tokens",
    3,
    "--completion-tokens",
    5,
)


@pytest.mark.slow
def test_capture_cost(run):
    found, printed = run(
        "capture_cost", *TINY, "--repeats", 1, "--slice", 500, "--dim", 512, "--rank", 16
    )
    peers = {"bergson": "bergson", "trak": "trak", "dattri": "dattri"}
    installed = {name for name, module in peers.items() if importlib.util.find_spec(module)}
    assert set(found["skipped"]) == set(peers) - installed
    methods = {"floor", "exact", "factored", "loop", "less"} | installed
    for name in methods:
        assert 0 < found[f"{name}_over_plain"] < math.inf
        assert found["seconds"][name] > 0
    assert found["loop_over_plain"] < found["less_over_plain"]
    if sys.platform == "linux":
        assert 0 < found["peak_memory_over_plain"] < 3
    assert found["model"]["linear_layers"] == 14
    assert found["settings"]["groups"] == 3
    assert {"torch", "trl"} <= set(found["versions"])
    assert "| factored |" in printed


def test_fidelity(run):
    arguments = ("--seeds", 2, "--dim", 512, "--dims", 64, "--ranks", 16)
    found, printed = run("fidelity", *TINY, *arguments)
    for name in ("exact", "factored"):
        figures = found[name]
        # 3 pairs of prompts: their error is within a factor of a few of 1 / sqrt(d).
        assert 0 < figures["cosine_rmse"] < 5 / math.sqrt(512)
        assert -1 <= figures["spearman"] <= 1
        assert 0 <= figures["top25_overlap"] <= 1
        assert found["capture_relative_error"][name] < 1e-5
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["exact, d=64"]["cosine_rmse"] > rows["exact"]["cosine_rmse"]
    assert len(rows["exact"]["by_seed"]) == 2
    assert ("bergson" in found) == (importlib.util.find_spec("bergson") is not None)
    assert "| factored " in printed


def test_the_judge_of_fidelity_passes_the_truth_and_nothing_else():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(12, 40)) + 0.5
    with benchmark_modules("fidelity") as modules:
        fidelity = modules["fidelity"]
    truth = fidelity.cosines(torch.from_numpy(features))
    judge = fidelity.Judge(truth, torch.from_numpy(generator.uniform(0.05, 0.25, 12)))
    assert judge(truth) == {"cosine_rmse": 0, "spearman": pytest.approx(1), "top25_overlap": 1}
    other = fidelity.cosines(torch.from_numpy(features[generator.permutation(12)]))
    assert judge(other)["cosine_rmse"] > 0.05
    assert judge(other)["spearman"] < 0.99


def test_coverage_scale(run):
    found, printed = run("coverage_scale", "--sizes", 60, 120, "--dim", 64, "--groups", 10)
    names = ["learnalign", "learnalign_coverage", "learnalign_logdet"]
    assert [(row["n"], row["selector"]) for row in found["rows"]] == [
        (size, name) for size in (60, 120) for name in names
    ]
    for row in found["rows"]:
        assert row["chosen"] == row["n"] // 10
        assert row["seconds"] >= 0
        assert 1 <= row["directions"] <= row["prompts"] <= row["chosen"]
        assert 0 < row["covered"] <= 1
    for average, coverage, _ in (found["rows"][:3], found["rows"][3:]):
        assert coverage["covered"] >= average["covered"]
    assert "| learnalign_logdet" in printed


def test_scoring_batch(run):
    sizes = ("--prompts", 4, "--sizes", 1, 4, 8, "--rollouts", 3, "--repeats", 1)
    found, printed = run("scoring_batch", *sizes)
    assert [row["rollouts"] for row in found["rows"]] == [3, 12]  # no more prompts than there are
    first, second = found["rows"]
    assert first["generation"] == first["scoring"] == 1
    assert second["generation"] > 0
    assert second["scoring s"] > 0
    assert set(found["seconds"]) == {"rollouts 1", "rollouts 4", "all 1", "all 4"}
    assert "| 4 " in printed


def test_scoring_scale(run):
    sizes = (
        "--sizes",
        60,
        130,
        "--matrix",
        100,
        "--dim",
        64,
        "--shard",
        32,
        "--distinct",
        90,
        "--repeats",
        1,
    )
    found, printed = run("scoring_scale", *sizes)
    assert [row["n"] for row in found["rows"]] == [60, 130]
    for row in found["rows"]:
        assert row["seconds"] > 0
        assert row["features_mb"] == pytest.approx(row["n"] * 64 * 4 / 1e6)
        if sys.platform == "linux":
            assert row["peak_mb"] < 50
    assert found["speedup_over_matrix_100"] > 0
    assert found["matrix"]["same_selection"] is True
    assert "the same" in printed
