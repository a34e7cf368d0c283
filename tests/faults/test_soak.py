import json
import subprocess
import sys
from pathlib import Path

import cases
import pytest

SCRIPT = Path(__file__).with_name("soak.py")


@pytest.mark.slow
def test_scoring_leaves_no_files_open_and_no_hooks(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            "--prompts",
            "96",
            "--shard_size",
            "8",
            "--json",
            tmp_path / "s.json",
        ],
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["shards"] == 12
    assert found["open_files"][0] == found["open_files"][1]
    assert found["hooks"] == [0, 0]
    # A leak of what a shard holds (8 prompts with their graphs) would be ten times this.
    assert found["mb_per_shard_second_half"] < 2
