"""Test the oldest and the newest supported versions, each in a fresh environment, and print a table of both.

    python scripts/compatibility.py                       # about ten minutes; needs a package index
    python scripts/compatibility.py --write docs/compatibility.md

*Oldest* is the lowest version that pyproject.toml allows of every direct dependency, *newest* whatever an installer
picks today. torch is the pinned one in both: other builds of it cannot be had everywhere.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, make, run
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTS = (
    "tests/gradients/test_capture.py",
    "tests/planning/test_planning.py",
    "tests/training/test_resume.py",
    "tests/records/test_store.py",
)
CALLBACK = "tests/training/test_callback.py"
FEW = "bit_identical or disjoint or ended or log"  # of the callback's: the rest repeats them with other settings
PEFT = "peft>=0.18"  # an extra that some of these tests need


def dependencies() -> list[Requirement]:
    """Direct dependencies, torch left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"] if not line.startswith("torch")]


def lowest(requirement: Requirement) -> str:
    """`name==version` of the lowest version that a requirement allows."""
    bounds = [spec.version for spec in requirement.specifier if spec.operator in (">=", "==", "~=")]
    assert bounds, f"{requirement} has no lower bound"
    return f"{requirement.name}=={max(bounds, key=Version)}"


def supported_releases(name: str, specifier: SpecifierSet) -> list[str]:
    """Releases on the package index within a range, oldest first."""
    said = run(sys.executable, "-m", "pip", "index", "versions", name)
    found = re.search(r"Available versions: (.+)", said)
    assert found, said
    return sorted((v for v in found[1].split(", ") if specifier.contains(v)), key=Version)


def test(programs: Path) -> str:
    """Run the tests that touch TRL; the closing line of pytest."""
    command = [
        str(programs / "pytest"),
        "-q",
        "-p",
        "no:cacheprovider",
    ]  # not -m: that would import the checkout
    done = [
        subprocess.run([*command, *which], cwd=ROOT, capture_output=True, text=True)
        for which in (TESTS, (CALLBACK, "-k", FEW))
    ]
    lines = [
        result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr
        for result in done
    ]
    return (
        "passed" if not any(result.returncode for result in done) else "FAILED"
    ) + f" ({'; '.join(lines)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="also write the table here, as Markdown")
    parser.add_argument("--only", choices=("oldest", "newest"), help="only one of them")
    given = parser.parse_args()
    direct = dependencies()
    trl = next(requirement for requirement in direct if requirement.name == "trl")
    releases = supported_releases("trl", trl.specifier)
    sets = {
        "oldest": [lowest(requirement) for requirement in [*direct, Requirement(PEFT)]],
        "newest": [f"trl=={releases[-1]}", PEFT],
    }
    rows: dict[str, dict[str, str]] = {}
    for name, pins in sets.items():
        if given.only not in (None, name):
            continue
        print(f"{name}: {', '.join(pins)}", flush=True)
        with tempfile.TemporaryDirectory(prefix="compatibility-") as folder:
            extras = ("pytest>=8", "hypothesis>=6.100")
            programs = make(Path(folder), *pins, *extras, str(ROOT))
            freeze = dict(
                line.lower().replace("_", "-").split("==", 1)
                for line in run(programs / "pip", "freeze").splitlines()
                if "==" in line
            )
            names = [
                "torch",
                "peft",
                *(requirement.name.lower().replace("_", "-") for requirement in direct),
            ]
            rows[name] = {package: freeze.get(package, "?") for package in names} | {
                "tests": test(programs)
            }
            print(f"{name}: tests {rows[name]['tests']}", flush=True)
    table = markdown(rows, trl, releases)
    print(table)
    if given.write:
        given.write.write_text(table)
    if any("FAILED" in row["tests"] for row in rows.values()):
        sys.exit(1)


def markdown(rows: dict[str, dict[str, str]], trl: Requirement, releases: list[str]) -> str:
    """The table, with what it means."""
    python = ".".join(map(str, sys.version_info[:3]))
    lines = [
        "# Versions that were tested",
        "",
        "Made by `make test-compat`, which runs the tests that touch TRL with the lowest and with the newest "
        f"versions, each in a fresh environment; Python {python} on Linux, CPU.",
        "",
        f"Supported trl: `{trl.specifier}`, which is {', '.join(releases)} on the package index. trl 1.15 has no "
        "fused head on machines without Triton, so it cannot be tested on a CPU and is refused. *Oldest* has the "
        "lowest allowed version of every direct dependency, *newest* what an installer picks; torch is the pinned one "
        "in both: lower ones were not installed.",
        "",
        f"| | {' | '.join(rows)} |",
        f"|---|{'---|' * len(rows)}",
    ]
    for package in next(iter(rows.values())):
        lines.append(f"| {package} | {' | '.join(row[package] for row in rows.values())} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
