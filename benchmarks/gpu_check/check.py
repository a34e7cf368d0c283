"""What the package does on a GPU, checked in at most eight minutes; a JSON file, and a table as the last output.

    python benchmarks/gpu_check/check.py --json outputs/gpu_check.json      # every part, on the first GPU
    python benchmarks/gpu_check/check.py --parts features skipping          # some
    python benchmarks/gpu_check/check.py --device cpu --small               # the control flow, without a GPU

Needs an environment with torch on CUDA, TRL and what the package needs; no network. Parts run in a process beside this
one. A part that fails, or is stopped at its time limit, is noted, and the others go on. The exit status is 0 if
nothing failed, 1 if something did, and 2 for arguments that cannot be. Beside FILE.json there are FILE.md, the table,
and FILE.log, all that the parts have printed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_check.worker import ANOTHER_PROCESS  # noqa: E402

MINUTES = 8.0
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "vllm",
    "trl-learnalign",
)
PROBE = """
import json, torch
found = {"torch_cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    found |= {"gpu": card.name, "gpu_gigabytes": round(card.total_memory / 2**30, 1)}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Args:
        title (`str`): For the table.
        place (`str`): `module:function` that runs it.
        seconds (`float`): After so many it is killed, if [`MINUTES`] are given to the whole.
    """

    title: str
    place: str
    seconds: float


PARTS = {
    "features": Part("Features against TRL's own gradient", "gpu_check.features:run", 90),
    "skipping": Part("Skipping against stock TRL", "gpu_check.steps:run", 130),
    "capture": Part("Capture and projection over a plain step", "gpu_check.capture:run", 80),
    "quickstart": Part(
        "The quickstart's three lines beside the CPU's", "gpu_check.runs:quickstart", 90
    ),
    "resume": Part("A killed run resumed; rollouts by memory", "gpu_check.runs:resume", 90),
    "vllm": Part("vLLM, colocate and server", "gpu_check.engines:run", 150),
}
GOOD = ("passed", "skipped")
RESULTS = {True: "passed", False: "failed", None: ""}


@dataclass
class Outcome:
    """How a part came out.

    Args:
        part (`str`): Its name.
        title (`str`): Its title.
        status (`str`): `"passed"`, `"skipped"`, `"failed"`, `"stopped"` (at its time limit) or `"not run"`.
        seconds (`float`): What it took.
        note (`str`): Why it was skipped, stopped or ended with an error.
        checks (`list[dict]`): `check`, `passed` and `figures` of each, also those before an error.
    """

    part: str
    title: str
    status: str = "not run"
    seconds: float = 0.0
    note: str = ""
    checks: list[dict[str, Any]] = field(default_factory=list)

    def end(self, status: str | None = None, note: str = "") -> None:
        """Conclude; without a status, from the checks."""
        failed = sum(check["passed"] is False for check in self.checks)
        self.status = status or ("failed" if failed else "passed")
        self.note = note or (f"{failed} of {len(self.checks)} checks failed" if failed else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, write, print."""
    options = parse(arguments)
    machine = look_around(options.device)
    if options.device == "cuda" and "gpu" not in machine:
        problem = machine.get("problem", "torch sees no CUDA device here")
        options.refuse(f"{problem}; --device cpu --small runs the control flow without a GPU.")
    begun = time.monotonic()
    outcomes = [Outcome(name, PARTS[name].title) for name in options.parts]
    figures: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": versions(),
        "settings": {"device": options.device, "small": options.small, "minutes": options.minutes},
    }

    def write() -> None:
        figures["seconds"] = round(time.monotonic() - begun, 1)
        figures["parts"] = [asdict(outcome) for outcome in outcomes]
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
        options.json.with_suffix(".md").write_text(table(figures))

    write()
    with tempfile.TemporaryDirectory() as folder, options.json.with_suffix(".log").open("w") as log:
        deadline = begun + options.minutes * 60
        waiting = outcomes
        while waiting and time.monotonic() < deadline:
            worker = Worker(waiting, options, machine, Path(folder), log)
            waiting = worker.watch(deadline, write)
    for outcome in waiting:
        outcome.note = f"the {options.minutes:g} minutes were over"
    write()
    print(table(figures))
    return 0 if all(outcome.status in GOOD for outcome in outcomes) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; what cannot be is refused before anything is started."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)}",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: for the control flow")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="for everything; limits of the parts are in proportion",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=Path("outputs/gpu_check.json"),
        help="the figures",
    )
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu takes hours at full size; give --small as well.")
    if not 0 < options.minutes <= 60:
        parser.error(f"--minutes {options.minutes:g} is not between 0 and 60.")
    if options.json.suffix != ".json":
        parser.error(
            f"--json {options.json} has to end in .json: a .md and a .log are written beside it."
        )
    try:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.touch()
    except OSError as error:
        parser.error(f"--json {options.json} cannot be written: {error.strerror}.")
    options.parts = list(dict.fromkeys(options.parts))
    options.refuse = parser.error
    return options


def look_around(device: str) -> dict[str, Any]:
    """The card, as torch sees it in a process of its own: a context of this one's would take some of its memory."""
    if device == "cpu":
        return {"cores": os.cpu_count()}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        return {"problem": done.stderr.strip().splitlines()[-1]}
    return {"cores": os.cpu_count(), **json.loads(done.stdout.splitlines()[-1])}


def versions() -> dict[str, str]:
    """Of the packages that matter."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Worker:
    """A process that runs parts one after the other, known by the lines that it writes.

    Args:
        outcomes (sequence of `Outcome`): Of the parts, in order.
        options (`argparse.Namespace`): Command line.
        machine (mapping): What [`look_around`] found.
        folder (`Path`): Temporary.
        log (file): For all that it prints.
    """

    def __init__(
        self,
        outcomes: Sequence[Outcome],
        options: argparse.Namespace,
        machine: Mapping[str, Any],
        folder: Path,
        log: Any,
    ):
        self.waiting = list(outcomes)
        self.current: Outcome | None = None
        self.minutes = options.minutes
        self._begun = time.monotonic()
        descriptor, name = tempfile.mkstemp(dir=folder)
        self._lines, self._rest = os.fdopen(descriptor), ""
        gpus = gpus_of(machine)
        command = [sys.executable, "-m", "gpu_check.worker"]
        command += [f"{outcome.part}={PARTS[outcome.part].place}" for outcome in outcomes]
        command += ["--device", options.device, "--folder", str(folder), "--lines", name]
        command += ["--small"] if options.small else []
        command += ["--other-gpu", gpus[1]] if len(gpus) > 1 else []
        # A session of its own, so that everything that it starts can be killed with it.
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment(gpus), start_new_session=True
        )

    def watch(self, deadline: float, write: Any) -> list[Outcome]:
        """Until it ends or has to be stopped.

        Args:
            deadline (`float`): Monotonic time at which everything is over.
            write (callable): Called after each part.

        Returns:
            `list[Outcome]`: Of the parts that it has not begun.
        """
        try:
            while True:
                # Asked before the lines are read: none is missed.
                ended = self.process.poll() is not None
                self._read(write)
                if ended:
                    code = self.process.returncode
                    if code not in (0, ANOTHER_PROCESS) and self.current is None and self.waiting:
                        self._begin()  # it ended before it could begin
                    self._end("failed", f"the process ended with code {code}")
                    break
                if time.monotonic() > deadline:
                    self._end("stopped", "at the end of the time for everything")
                    break
                if self.current and time.monotonic() > self._begun + self._limit(self.current):
                    self._end("stopped", f"at its limit of {self._limit(self.current):g} seconds")
                    break
                time.sleep(0.1)
        finally:
            self._kill()
            self._lines.close()
        write()
        return self.waiting

    def _read(self, write: Any) -> None:
        *whole, self._rest = (self._rest + self._lines.read()).split("\n")
        for text in whole:
            line = json.loads(text)
            event = line.pop("event")
            if event == "begin":
                self._begin()
            elif event == "check" and self.current:
                self.current.checks.append(line)
            elif event == "end":
                error, skipped = line.get("error"), line.get("skipped")
                status = "failed" if error else "skipped" if skipped else None
                self._end(status, error or skipped or "")
                write()

    def _limit(self, outcome: Outcome) -> float:
        """Seconds of a part, in proportion to those of the whole."""
        return PARTS[outcome.part].seconds * self.minutes / MINUTES

    def _begin(self) -> None:
        self.current, self._begun = self.waiting.pop(0), time.monotonic()
        print(f"{self.current.title} ...", file=sys.stderr, flush=True)

    def _end(self, status: str | None, note: str) -> None:
        if self.current is None:
            return
        self.current.seconds = round(time.monotonic() - self._begun, 1)
        self.current.end(status, note)
        print(f"  {self.current.status} {self.current.note}", file=sys.stderr, flush=True)
        self.current = None

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def gpus_of(machine: Mapping[str, Any]) -> list[str]:
    """Names of the GPUs for CUDA_VISIBLE_DEVICES; none for a check of the CPU."""
    if "gpu" not in machine:
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(machine["gpus"])]


def environment(gpus: Sequence[str]) -> dict[str, str]:
    """Of a worker: this checkout's package, no hub, and one GPU at most: of several, transformers would use all."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    threads = {} if gpus else {"OMP_NUM_THREADS": "1"}  # tiny models: more threads only wait
    return {
        **os.environ,
        **offline,
        **threads,
        "CUDA_VISIBLE_DEVICES": gpus[0] if gpus else "",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TOKENIZERS_PARALLELISM": "false",
    }


def table(figures: Mapping[str, Any]) -> str:
    """All that came out, as Markdown."""
    machine, settings = figures["machine"], figures["settings"]
    where = machine.get("gpu", "the CPU: nothing here was run on a GPU")
    size = ", --small" if settings["small"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    parts = figures["parts"]
    lines = [
        f"GPU check of {figures['date']} on {where}{size}; {figures['seconds']:g} seconds. {packages}.",
        "",
    ]
    lines += rows(
        ("part", "result", "seconds", ""),
        [(part["title"], part["status"], part["seconds"], part["note"]) for part in parts],
    )
    for part in parts:
        if part["checks"]:
            names = dict.fromkeys(name for check in part["checks"] for name in check["figures"])
            lines += ["", f"{part['title']}:", ""]
            lines += rows(
                ("", "result", *names),
                [
                    (check["check"], RESULTS[check["passed"]], *map(check["figures"].get, names))
                    for check in part["checks"]
                ],
            )
    return "\n".join(lines) + "\n"


def rows(header: Sequence[str], cells: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(map(cell, line)) + " |" for line in cells]


def cell(value: Any) -> str:
    """A number in four digits; text that cannot break the table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
