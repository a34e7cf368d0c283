"""Whether the pinned versions can be installed for every Python that `pyproject.toml` names.

    python scripts/python_versions.py        # a minute for each Python, with a package index; builds and keeps nothing

pip resolves `constraints.txt` for each Python and takes wheels alone, so it needs no other Python than the one that
runs this. What has no wheel anywhere is left out. That the versions can be installed does not say that anything was
run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE_ONLY = ("cellpylib", "deepspeed", "pycosat", "zss")
"""Pins whose releases are source: pip cannot resolve them for another Python than its own."""
_CLASSIFIER = "Programming Language :: Python :: "


def claimed() -> list[str]:
    """The Pythons of `pyproject.toml`'s classifiers, "3.11" and so on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [
        line.removeprefix(_CLASSIFIER)
        for line in project["classifiers"]
        if line.startswith(_CLASSIFIER)
    ]
    return [version for version in versions if "." in version]


def pins() -> list[str]:
    """The lines of `constraints.txt` that have wheels."""
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = [line for line in lines if line and not line.startswith("#")]
    return [line for line in pinned if line.split("==")[0] not in SOURCE_ONLY]


def problem(python: str) -> str | None:
    """What pip says against a Python; `None` if it finds a wheel of every pin."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "pins.txt"
        wanted.write_text("\n".join(pins()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
        command += ["--ignore-installed", "--only-binary=:all:", "--python-version", python]
        command += ["--target", folder, "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return done.stderr.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pythons", nargs="*", default=claimed(), help="default: those claimed")
    found = {python: problem(python) for python in parser.parse_args().pythons}
    for python, said in found.items():
        print(f"{python}: {said or 'every pin has a wheel'}")
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
