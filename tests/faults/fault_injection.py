"""Kill runs of each kind at random moments, resume them, and compare with the run that was never interrupted.

    python tests/faults/fault_injection.py            # a few hundred kills
    python tests/faults/fault_injection.py --quick    # a dozen that differ in kind

Each attempt at a run is a process of its own that dies by SIGKILL: by its own hand at one of its file operations or at
a part of a step, with or without the file torn that it was writing; or at a random moment by its parent's. Of two
processes one dies, and the launcher ends the other. Half of the runs are resumed as recipes do it, at the newest whole
checkpoint, the others as a script does it, by `train(resume_from_checkpoint=True)`. Where that is refused, the remedy
that the message names is followed to the letter. Resumed runs are killed again.

Then weights, the order of prompts, tables (the history among them), records (the ledger among them) and the log must
be those of the uninterrupted run, bit for bit but for times. No finished shard may have been measured twice, and no
more steps made anew than lie between two checkpoints.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fault_events import Fault
from fault_jobs import ANEW, JOBS, OWN_SCRIPT, RECIPE, REFUSED, notes, outcome, same_results
from fault_server import Attempt, import_everything

_LIMIT = 8  # attempts after the last kill: a run that needs more does not get anywhere


@dataclass(frozen=True)
class Reference:
    """The run that was never interrupted.

    Args:
        outcome (mapping): What it came to.
        events (`list[list[str]]`): Of each process.
        seconds (`float`): Of the processor, that each process has used.
    """

    outcome: dict[str, Any]
    events: list[list[str]]
    seconds: float


@dataclass
class Series:
    """A run that is killed and resumed until it ends.

    Args:
        job (`str`): What kind of run.
        way (`str`): How it is resumed.
        seed (`str`): Of what is random about it.
        options (mapping): Of the trainer.
        at (`str`, *optional*): The event of its first kill; by default a random one.
    """

    job: str
    way: str
    seed: str
    options: dict[str, Any] = field(default_factory=dict)
    at: str | None = None
    killed_at: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    verdict: str = ""

    @property
    def kills(self) -> int:
        return len(self.killed_at)


# ---- Moments --------------------------------------------------------------------------------------------------------


def moment(series: Series, reference: Reference, random_: random.Random) -> dict[str, Any]:
    """When an attempt is killed, as arguments of [`Attempt`], and in words."""
    rank = random_.randrange(len(reference.events)) if series.at is None else 0
    events = reference.events[rank]
    # A resumed run has less before it.
    within = len(events) if not series.killed_at else len(events) // 2
    kind = series.at or random_.choice(sorted(set(events[:within])))
    torn = random_.choice([None, 0.0, random_.random()])
    linger = random_.choice([0.0, 0.02, 0.2])
    how = "kind" if series.at is not None else random_.choice(["kind", "kind", "event", "time"])
    if how == "time":
        after = random_.uniform(0.02, reference.seconds * within / len(events))
        return {"kill_after": after, "linger": linger, "said": f"after {after:.2f} s"}
    if how == "event":
        number = random_.randrange(within)
    else:
        number = random_.choice([i for i in range(within) if events[i] == kind])
    said = f"{events[number]} ({number + 1} of rank {rank}, torn: {torn})"
    return {"fault": Fault(rank, number + 1, torn), "linger": linger, "said": said}


# ---- Remedies -------------------------------------------------------------------------------------------------------


def remedy(message: str, series: Series) -> tuple[str, list[Path], bool] | None:
    """What a message says is to be done: how to resume, what to take away first, whether in another folder."""
    away = [
        Path(name)
        for name in re.findall(
            r"(?:[Dd]elete|[Mm]ove) (/\S+?)[.,;:]?(?: away)?(?=[ .,;]|$)", message
        )
    ]
    if "Delete this file" in message and (named := re.match(r"(/\S+)", message)):
        away.append(Path(named[1]))
    if named := re.search(r"resume_from_checkpoint='([^']+)'", message):
        return named[1], away, False
    if "start again with another output_dir" in message:
        return ANEW, away, True
    if "resume_from_checkpoint=True" in message:
        return OWN_SCRIPT, away, False
    if "same command again" in message:
        return series.way, away, False
    return None


# ---- One series -----------------------------------------------------------------------------------------------------


def go(series: Series, folder: Path, reference: Reference) -> None:
    """Kill and resume until the run has ended; then judge."""
    random_ = random.Random(series.seed)
    planned = 1 if series.at is not None else random_.choice([1, 1, 2, 3])
    way, attempts, code = ANEW, 0, -signal.SIGKILL
    while code != 0 and attempts < planned + _LIMIT:
        attempts += 1
        wanted = moment(series, reference, random_) if planned > 0 else {"said": ""}
        planned -= 1
        said, errors = wanted.pop("said"), len(notes(folder, "errors"))
        code = Attempt(folder, series.job, way, options=series.options, **wanted).run()
        way = series.way
        if code == -signal.SIGKILL:
            series.killed_at.append(said)
        elif code == REFUSED:
            found = refusal(series, notes(folder, "errors")[errors:])
            if found is None:
                break
            way, away, elsewhere = found
            for path in away:
                path.rename(path.with_name(f"{path.name}.taken_away"))
            if elsewhere:
                folder = folder.with_name(f"{folder.name} anew")
        elif code != 0:
            break
    series.verdict = judge(series, folder, reference) if code == 0 else _no_end(series, code)


def refusal(series: Series, errors: list[list[str]]) -> tuple[str, list[Path], bool] | None:
    """The remedy of the first error of an attempt that names one, all ranks together; see [`remedy`]."""
    for kind, message in errors:
        series.refusals.append(f"{kind}: {message}")
        if (found := remedy(message, series)) is not None:
            return found
    return None


def _no_end(series: Series, code: int) -> str:
    if code == -signal.SIGTERM:
        return "hangs"
    return f"does not end: {series.refusals[-1][:300] if series.refusals else code}"


def judge(series: Series, folder: Path, reference: Reference) -> str:
    """`"equal"`, or what is not."""
    lines = same_results.differences(outcome(folder), reference.outcome)
    lines += same_results.additions(outcome(folder), reference.outcome)
    shards = Counter(map(tuple, notes(folder, "shards")))
    lines += [f"{shard} measured {count} times" for shard, count in shards.items() if count > 1]
    interval = JOBS[series.job].interval
    lines += [f"{steps} steps made anew" for steps in made_anew(folder) if steps > interval]
    return "; ".join(lines[:4]) or "equal"


def made_anew(folder: Path) -> Iterator[int]:
    """For each resumed attempt, how many steps that had ended it makes again."""
    reached = 0
    for entry in notes(folder, "steps"):
        if "begun" in entry:
            yield reached - entry["begun"]
            reached = entry["begun"]
        else:
            reached = max(reached, entry["ended"])


def uninterrupted(folder: Path, job: str) -> Reference:
    """The run that is never killed."""
    code = Attempt(folder, job, ANEW).run()
    log = folder.with_name(f"{folder.name}.log").read_text()
    assert code == 0, f"{job} fails by itself: {log[-3000:]}"
    found = outcome(folder)
    assert found["steps"] == JOBS[job].steps, f"{job} takes {found['steps']} steps"
    events = [notes(folder, f"events_{rank}")[0] for rank in range(JOBS[job].processes)]
    return Reference(found, events, max(notes(folder, "seconds")))


# ---- All series -----------------------------------------------------------------------------------------------------

QUICK = [
    ("adaptive", RECIPE, "os.rename checkpoint-N/learnalign_complete.json"),
    ("adaptive", OWN_SCRIPT, "after save_model"),
    ("dynamic sampling", OWN_SCRIPT, "rollouts are rewarded"),
    ("mid-generation", RECIPE, "step begins"),
    ("mid-generation", OWN_SCRIPT, "optimizer steps"),
    ("rollout budget", RECIPE, "os.rename _learnalign/run.json"),
    ("rollout budget", OWN_SCRIPT, "epoch begins"),
    ("compute budget", OWN_SCRIPT, "after torch.save optimizer.pt"),
    ("staged", RECIPE, "epoch ends"),
    ("restart", OWN_SCRIPT, "epoch begins"),
    ("trainer's order", OWN_SCRIPT, "step ends"),
    ("two processes", RECIPE, "step ends"),
    ("two processes, staged", OWN_SCRIPT, "saved"),
]
"""A dozen kills that differ in kind."""


def series_of(options: argparse.Namespace) -> list[Series]:
    """What is tried."""
    if options.quick:
        return [Series(job, way, f"{job}/{at}", at=at) for job, way, at in QUICK]
    chosen = []
    for job in options.jobs or JOBS:
        for number in range(options.series):
            for way in (RECIPE, OWN_SCRIPT):
                seed = f"{options.seed}/{job}/{way}/{number}"
                limit = random.Random(seed).choice([None, None, 2, 1])
                limits = {} if limit is None else {"save_total_limit": limit}
                chosen.append(Series(job, way, seed, limits))
    return chosen


def work(
    part: list[tuple[int, Series]], root: Path, references: dict[str, Reference], found: Any
) -> None:
    """A process that goes through some of the series."""
    for number, series in part:
        folder = root / f"{number}"
        go(series, folder, references[series.job])
        if series.verdict == "equal":
            for path in root.glob(f"{number}[ .]*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(folder, ignore_errors=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.put((number, series, used.ru_utime + used.ru_stime))
    found.put(None)


def all_of_them(every: list[Series], root: Path, jobs: int) -> tuple[list[Series], float]:
    """Go through all series; returns them with their verdicts, and the seconds of processors that they took."""
    references = {}
    for job in dict.fromkeys(series.job for series in every):
        references[job] = uninterrupted(root / f"whole {job}", job)
        count = sum(map(len, references[job].events))
        print(f"{job}: {count} events, {references[job].seconds:.1f} s", flush=True)
    fork, numbered = multiprocessing.get_context("fork"), list(enumerate(every))
    results = fork.SimpleQueue()
    parts = [numbered[first::jobs] for first in range(jobs)]
    workers = [fork.Process(target=work, args=(part, root, references, results)) for part in parts]
    for worker in workers:
        worker.start()
    done, seconds, left = [], {}, len(workers)
    while left:
        result = results.get()
        if result is None:
            left -= 1
            continue
        number, series, used = result
        seconds[number % jobs] = used
        done.append(series)
        refused = f", refused {len(series.refusals)}" if series.refusals else ""
        print(
            f"{number:4} {series.job:21} {series.way:10} {series.kills} killed{refused}: {series.verdict}",
            flush=True,
        )
        if series.verdict != "equal":
            print(
                *[f"       {line}" for line in [*series.killed_at, *series.refusals]],
                sep="\n",
                flush=True,
            )
    for worker in workers:
        worker.join()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return done, used.ru_utime + used.ru_stime + sum(seconds.values())


def table(done: list[Series]) -> str:
    """Counts by kind of run and way of resuming."""
    names = f"{'run':21} {'resumed as':10} {'series':>6} {'kills':>6}"
    heading = f"{names} {'equal':>6} {'refused, then equal':>20} {'wrong':>6}"
    lines = [heading]
    groups = sorted({(series.job, series.way) for series in done})
    for job, way in [*groups, ("all", "")]:
        some = [series for series in done if job == "all" or (series.job, series.way) == (job, way)]
        equal = [series for series in some if series.verdict == "equal"]
        refused = sum(bool(series.refusals) for series in equal)
        kills = sum(series.kills for series in some)
        counts = f"{len(equal) - refused:6} {refused:20} {len(some) - len(equal):6}"
        lines.append(f"{job:21} {way:10} {len(some):6} {kills:6} {counts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a dozen kills that differ in kind")
    parser.add_argument(
        "--series", type=int, default=8, help="of each kind of run and way of resuming"
    )
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), help="kinds of run; default: all")
    parser.add_argument("--at-once", type=int, default=2, help="series at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--keep", type=Path, help="leave folders and logs of what is not equal here"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=options.keep))
    import_everything(root)
    done, seconds = all_of_them(series_of(options), root, options.at_once)
    if options.keep is None:
        shutil.rmtree(root, ignore_errors=True)
    print(f"\n{table(done)}\n{seconds / 60:.1f} minutes of processors")
    bad = [series for series in done if series.verdict != "equal"]
    if options.json:
        rows = [{**asdict(series), "kills": series.kills} for series in done]
        options.json.write_text(
            json.dumps({"rows": rows, "processor_minutes": seconds / 60}, indent=2)
        )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
