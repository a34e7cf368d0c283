"""The benchmark of skipping runs at a tiny size and writes the figures that others read."""

import json
import subprocess
import sys

import cases
import pytest

BENCHMARK = cases.ROOT / "benchmarks" / "skipping.py"


@pytest.mark.slow
def test_skipping(tmp_path):
    path = tmp_path / "figures.json"
    sizes = ["--cells", "tiny/quarter", "--processes", "1", "--rounds", "2", "--steps", "2"]
    command = [sys.executable, str(BENCHMARK), *sizes, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=cases.HANGS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| tiny/quarter | 1 " in done.stdout
    found = json.loads(path.read_text())
    assert found["settings"]["rounds"] == 2
    row = found["rows"][0]
    assert row["rows_given"] == 2 * 2 * 32  # rounds, steps, rows of a step
    assert row["rows_share"] == 0.25
    for part in ("step", "training", "step_slowest", "training_slowest"):
        low, high = row[f"{part}_ratio_range"]
        assert 0 < low <= row[f"{part}_ratio"] <= high
        assert set(row[f"{part}_seconds"]) == {"stock", "skipping"}
