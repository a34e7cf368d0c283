"""A release of TRL that there is not: a copy of the installed one, of another version and with changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import cases
import trl

WORKER = Path(__file__).with_name("next_release_worker.py")
TRAINER = "trainer/grpo_trainer.py"


def copy_of_trl(folder: Path, version: str, changes: Mapping[str, str]) -> Path:
    """Where a copy of the installed TRL is, to be put before it on the path.

    Args:
        folder (`Path`): Where it goes.
        version (`str`): What it says that it is.
        changes (mapping): Text of the trainer's file → what replaces it, everywhere.
    """
    shutil.copytree(Path(trl.__file__).parent, folder / "trl")
    information = folder / f"trl-{version}.dist-info"
    information.mkdir()
    described = metadata.distribution("trl").read_text("METADATA")
    before = f"\nVersion: {metadata.version('trl')}\n"
    assert before in described
    (information / "METADATA").write_text(described.replace(before, f"\nVersion: {version}\n"))
    file = folder / "trl" / TRAINER
    source = file.read_text()
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    file.write_text(source)
    return folder


def run_with(folder: Path, version: str, changes: Mapping[str, str]) -> dict[str, Any]:
    """What a short staged run with such a release says of itself (`next_release_worker`)."""
    copy = copy_of_trl(folder / "release", version, changes)
    path = [copy, cases.ROOT, WORKER.parent]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HF_HUB_OFFLINE": "1",
    }
    out = folder / "said.json"
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder / "run"), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())
