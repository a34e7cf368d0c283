"""Kill runs at moments that differ in kind, resume them, compare; `make test-faults` does so at hundreds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases

SCRIPT = Path(__file__).with_name("fault_injection.py")


def test_a_killed_run_ends_like_one_that_was_never_killed(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json", str(tmp_path / "faults.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert len(rows) >= 12
    assert len({row["job"] for row in rows}) == 10
    assert {row["way"] for row in rows} == {"recipe", "own script"}
    assert all(row["kills"] == 1 and row["verdict"] == "equal" for row in rows)
