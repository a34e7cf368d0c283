"""Fresh virtual environments, made the way a user makes them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torch_pin() -> str:
    """The exact torch of constraints.txt: a looser request would fetch a CUDA build of several gigabytes."""
    found = re.search(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[0]


def make(folder: Path, *requirements: str) -> Path:
    """Make an environment, install torch and then `requirements`; returns its folder of programs."""
    venv.create(folder, with_pip=True, clear=True)
    programs = folder / "bin"
    run(programs / "pip", "install", "--quiet", "--upgrade", "pip")
    run(programs / "pip", "install", "--quiet", "--no-compile", torch_pin())
    run(programs / "pip", "install", "--quiet", "--no-compile", *requirements)
    return programs


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command; its output.

    Raises:
        `SystemExit`: With its output, if it fails.
    """
    # The checkout must not be importable by accident: what is installed is what is tested.
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=own, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(
            f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout
