"""The benchmarks of continual selection's own cost: what they count, at sizes where it can be counted by hand."""

import json
import pickle

import numpy as np
import pytest
from loading import benchmark_modules


@pytest.fixture(scope="module")
def bench():
    with benchmark_modules("continual.scale", "many_processes", "common") as modules:
        yield modules


def test_the_scale_of_a_pool_is_written_with_its_settings(bench, tmp_path):
    options = ["--sizes", "300", "900", "--dim", "8", "--count", "16", "--generations", "6"]
    bench["continual.scale"].main([*options, "--json", str(tmp_path / "scale.json")])
    written = json.loads((tmp_path / "scale.json").read_text())
    assert [row["n"] for row in written["rows"]] == [300, 900]
    assert [row["features_mb"] for row in written["rows"]] == [300 * 8 * 4e-6, 900 * 8 * 4e-6]
    assert all(row["longest_draw_ms"] >= row["draw_ms"] > 0 for row in written["rows"])
    assert written["settings"]["generations"] == 6


def test_rows_that_move_are_those_that_another_process_trains_on(bench):
    flags = [np.ones(4, dtype=bool), np.zeros(4, dtype=bool)]
    tokens = [np.full(4, 7), np.full(4, 7)]
    found = bench["many_processes"].planned(flags, tokens, clock=lambda: 0.0)
    assert found["fullest_unmoved"] == 4
    assert found["rows_each"] == 2
    assert found["moved_share"] == 0.5
    assert found["most_sent"] == 2


def test_nothing_moves_where_every_row_has_a_gradient(bench):
    flags, tokens = [np.ones(4, dtype=bool)] * 2, [np.full(4, 7)] * 2
    found = bench["many_processes"].planned(flags, tokens, clock=lambda: 0.0)
    assert (found["rows_each"], found["moved_share"], found["most_sent"]) == (4, 0, 0)


def test_broadcast_and_history_grow_with_the_prompts_of_a_generation(bench, tmp_path):
    module = bench["many_processes"]
    base = ["--processes", "2", "--steps", "2", "--generations", "3", "--prompts"]
    small = module.main([*base, "16", "--json", str(tmp_path / "many.json")])
    assert json.loads((tmp_path / "many.json").read_text())["rows"] == small["rows"]
    large = module.main([*base, "1016"])
    assert large["broadcast_bytes"] - small["broadcast_bytes"] == pytest.approx(8000, abs=16)
    assert small["broadcast_bytes"] > len(pickle.dumps(np.zeros(16, dtype=np.int64)))
    # At least its counts and its name of 16 digits, at most all nine columns plainly.
    assert 20 < large["history_bytes_a_prompt"] < 100
