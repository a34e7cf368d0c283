"""Let the disk of a run be too small, or fill up in its middle; make space, resume, and compare.

    python tests/faults/disk_faults.py            # 12 sizes, 5 moments
    python tests/faults/disk_faults.py --quick    # 2 sizes, 2 moments

Each run has a file system of its own (it takes the right to mount one). It must end with the promised sentence, and
when there is space again, resume as recipes or as a script do. Its result must be that of an undisturbed run, bit for
bit but for times.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fault_events import Fault
from fault_injection import Reference, Series, refusal, same_results, uninterrupted
from fault_jobs import ANEW, OWN_SCRIPT, RECIPE, REFUSED, notes, outcome
from fault_server import Attempt, import_everything

PROMISE = re.compile(
    r"Cannot write (/\S+): the disk is full: free some space, then run the same command again. "
    r"Everything written before is intact\."
)
SHARES = [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97]
"""Sizes of the disk, of what the whole run takes."""

MOMENTS = [
    "epoch begins",
    "rollouts are rewarded",
    "before save_model",
    "after torch.save optimizer.pt",
    "os.rename checkpoint-N/learnalign_complete.json",
]
"""When somebody else fills it."""

FILLER = "filler"

_LIMIT = 6  # attempts


@dataclass
class Trouble:
    """A run on a disk that gives trouble.

    Args:
        job (`str`): What kind of run.
        way (`str`): How it is resumed.
        share (`float`, *optional*): Size of the disk.
        moment (`str`, *optional*): When somebody else fills it.
    """

    job: str
    way: str
    share: float | None = None
    moment: str | None = None
    said: list[str] = field(default_factory=list)
    verdict: str = ""


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    mount(folder, f"size={size}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}"
        )


def go(trouble: Trouble, root: Path, reference: Reference, whole: int) -> None:
    """Run into the trouble, mend it, go on, and judge."""
    place = root / "disk"
    size = whole * 4 if trouble.share is None else int(whole * trouble.share)
    with disk(place, size):
        folder, fault = place / "run", None
        if trouble.moment is not None:
            events = reference.events[0]
            found = [i for i, event in enumerate(events) if event == trouble.moment]
            # Until nothing more can be written; `dd` ends with an error when that is so.
            command = ["sh", "-c", f"dd if=/dev/zero of={place / FILLER} bs=1k 2>/dev/null || true"]
            fault = Fault(0, found[len(found) // 2] + 1, command=command)
        code = Attempt(folder, trouble.job, ANEW, fault, beside=root).run()
        if code == REFUSED:
            trouble.said.append(notes(root / "run", "errors")[-1][1])
        (place / FILLER).unlink(missing_ok=True)
        mount(place, f"remount,size={4 * whole}")
        code = resume(trouble, folder, code, root)
        if code == 0:
            lines = same_results.differences(outcome(root / "run"), reference.outcome)
            trouble.verdict = "; ".join(lines[:4]) or "equal"
        else:
            trouble.verdict = f"does not end: {trouble.said[-1]}"
    if trouble.said and not PROMISE.fullmatch(trouble.said[0]):
        trouble.verdict = f"says {trouble.said[0]!r}; then {trouble.verdict}"
    for path in root.glob("run*"):
        path.unlink()


def resume(trouble: Trouble, folder: Path, code: int, root: Path) -> int:
    """Go on until it ends, or says something that names no remedy; returns the last code."""
    series, way, attempts = Series(trouble.job, trouble.way, ""), trouble.way, 0
    while code == REFUSED and attempts < _LIMIT:
        attempts += 1
        before = len(notes(root / "run", "errors"))
        code = Attempt(folder, trouble.job, way, beside=root).run()
        if code == REFUSED:
            errors = notes(root / "run", "errors")[before:]
            trouble.said.append(errors[-1][1])
            found = refusal(series, errors)
            if found is None:
                break
            way, away, _ = found
            for path in away:
                path.rename(path.with_name(f"{path.name}.taken_away"))
    return code


def troubles(quick: bool) -> list[Trouble]:
    """What is tried: both ways of resuming, in turn."""
    shares = SHARES[3::6] if quick else SHARES
    moments = MOMENTS[2::2] if quick else MOMENTS
    jobs, ways = ["staged", "adaptive"], [RECIPE, OWN_SCRIPT, OWN_SCRIPT, RECIPE]
    return [Trouble(jobs[i % 2], ways[i % 4], share=share) for i, share in enumerate(shares)] + [
        Trouble("adaptive", ways[i % 4], moment=moment) for i, moment in enumerate(moments)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few that differ in kind")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="disks-"))
    import_everything(root)
    references, sizes, done = {}, {}, troubles(options.quick)
    for job in dict.fromkeys(trouble.job for trouble in done):
        whole = root / f"whole {job}"
        references[job] = uninterrupted(whole, job)
        sizes[job] = sum(path.stat().st_blocks * 512 for path in whole.rglob("*"))
    for trouble in done:
        go(trouble, root, references[trouble.job], sizes[trouble.job])
        where = trouble.moment or f"{trouble.share:.0%} of {sizes[trouble.job]:,} bytes"
        said = trouble.said[0] if trouble.said else "nothing"
        print(
            f"{trouble.job:9} {trouble.way:10} {where}: {said[:160]}\n    {trouble.verdict}",
            flush=True,
        )
    shutil.rmtree(root, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(trouble) for trouble in done], indent=2))
    sys.exit(any(trouble.verdict != "equal" for trouble in done))


if __name__ == "__main__":
    main()
