"""Compare captured features with the gradient of TRL's own loss, on every architecture, adapter and setting.

    python scripts/exactness.py                        # go on where the last one stopped; then write the page
    python scripts/exactness.py --only adapter/LoRA    # cases whose name contains this, again
    python scripts/exactness.py --fresh                # everything again

Results are appended to `outputs/exactness.jsonl`, one line a case. Cases run in a process of their own, many one after
the other; one that brings the process down or takes too long is noted, and the next process goes on behind it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "outputs" / "exactness.jsonl"
PAGE = ROOT / "docs" / "results" / "exactness.md"
PATIENCE = 180  # seconds for one case


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="cases whose name contains this, also if they have a result")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker.split("\n"))
        return
    if arguments.fresh:
        RESULTS.unlink(missing_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    keys = case_keys()
    done = set() if arguments.only else set(results())
    waiting = [key for key in keys if key not in done and (arguments.only or "") in key]
    while waiting:
        waiting = run_worker(waiting)
    PAGE.write_text(page(keys, results()))
    print(f"{PAGE.relative_to(ROOT)}: {counts(results())}")


def results() -> dict[str, dict[str, Any]]:
    """The latest result of each case."""
    if not RESULTS.exists():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {line["case"]: line for line in lines}


def append(key: str, outcome: dict[str, Any]) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps({"case": key, **outcome}) + "\n")


def case_keys() -> list[str]:
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import exactness

    return [case.key for case in exactness.every_case()]


def run_worker(waiting: list[str]) -> list[str]:
    """One process over the waiting cases; what is left if it ends early, without the case that ended it."""
    command = [sys.executable, __file__, "--worker", "\n".join(waiting)]
    before = RESULTS.stat().st_size if RESULTS.exists() else 0
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    seen, since, done = before, time.monotonic(), 0
    while process.poll() is None:
        time.sleep(0.5)
        size = RESULTS.stat().st_size if RESULTS.exists() else 0
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            process.kill()
            process.wait()
    with RESULTS.open() if RESULTS.exists() else open(os.devnull) as file:
        file.seek(before)
        done = sum(1 for _ in file)
    if done < len(waiting):
        reason = f"the process ended with code {process.returncode}"
        append(waiting[done], {"status": "crash", "note": reason})
        done += 1
    return waiting[done:]


def work(keys: list[str]) -> None:
    """Run cases one after the other."""
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import exactness
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    known = {case.key: case for case in exactness.every_case()}
    for key in keys:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = exactness.judge(known[key], Path(folder))
        append(key, {**found.summary(), "seconds": round(time.monotonic() - started, 2)})
        print(f"{found.status:8} {found.error:.1e} {key} {found.note}", flush=True)
        gc.collect()


def counts(found: dict[str, dict[str, Any]]) -> str:
    statuses = [line["status"] for line in found.values()]
    return ", ".join(
        f"{statuses.count(status)} {status}" for status in MEANINGS if status in statuses
    )


# The page

MEANINGS = {
    "exact": "a layer rule covers every parameter, and its gradient is TRL's",
    "direct": "as exact; some parameters have no rule and go through autograd, one prompt at a time",
    "missing": "as exact, except for parameters that the coverage names as missing",
    "refused": "by the package, with a reason, before any result",
    "trl": "did not run without this package either: too small a form, a package not installed, or not supported",
    "wrong": "the feature differs from the gradient and the coverage does not say so",
    "crash": "the capture fails where TRL alone runs",
}
GROUPS = {
    "architecture": "Architectures",
    "module": "Modules put into a Qwen2",
    "adapter": "Adapters and partly frozen models",
}
HEADER = """# Exactness: every case

Written by `make test-exactness`; the quick part of it is in `make test`. In short: [exactness.md](../exactness.md).

Which architectures, adapters and losses have exact features. Per prompt, per parameter: the captured feature
(unprojected) against `torch.autograd.grad` of TRL's own
`_compute_loss` on the rows that TRL itself generated, in evaluation mode, in float32. Three prompts of different
lengths with four rollouts each; two layers of hidden size 16; all prompts in one pass, one prompt a pass, and the
rollouts of one prompt in two passes. *Error* is the largest relative error of any parameter's gradient of any prompt
in any of the three (beyond {tolerance:g} counts as wrong; gradients smaller than {floor:g} of the whole are measured
against that). The prompt is the batch: its own tokens normalise the loss, and the load balancing of experts is left
out.
"""


KNOWN = """Where padding changes what TRL itself computes (marked \\*), the features are those of the prompt without
padding, and prompts that share a pass are compared at equal length. A run captures such models one prompt at a time;
where log-probabilities do not show it, the self-check finds it by the gradient of TRL's own loss. Which parameters go
through autograd, a run names in its log and record. AdaMSS was run with scikit-learn, which it needs and which is not
among the development packages.
"""


def page(keys: list[str], found: dict[str, dict[str, Any]]) -> str:
    import exactness

    lines = [found[key] for key in keys if key in found]
    parts = [HEADER.format(tolerance=exactness.TOLERANCE, floor=exactness.FLOOR)]
    packages = ("trl", "transformers", "peft", "torch", "accelerate")
    parts.append(
        ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages) + ".\n"
    )
    parts.append(overview(lines))
    parts.append(KNOWN)
    for group, title in GROUPS.items():
        parts.append(
            f"## {title}\n\n"
            + group_table([line for line in lines if line["case"].startswith(group)])
        )
    parts.append(
        "## Settings of the loss\n\n"
        + settings_tables([line for line in lines if "setting/" in line["case"]])
    )
    parts.append(lists(lines))
    parts.append(
        f"## Left out\n\n{len(left_out())} families of several modalities or without a small form "
        "(`LEFT_OUT` in tests/helpers/architectures.py).\n"
    )
    return "\n".join(parts)


def overview(lines: list[dict[str, Any]]) -> str:
    groups = [*GROUPS, "setting"]
    rows = [
        f"| result | meaning | {' | '.join(f'{group}s' for group in groups)} |",
        "|---|---|" + "--:|" * len(groups),
    ]
    for status, meaning in MEANINGS.items():
        own = [line["case"].partition("/")[0] for line in lines if line["status"] == status]
        rows.append(
            f"| {status} | {meaning} | {' | '.join(str(own.count(group)) for group in groups)} |"
        )
    return "\n".join(rows) + "\n"


STAR = r"\*"
REMARKS = {
    "exact": "covered by rules alone",
    "alone": "covered by rules, one prompt a pass",
    "direct": "some parameters through autograd, one prompt at a time",
    "missing": "parameters missing",
}


def group_table(lines: list[dict[str, Any]]) -> str:
    """One row for each way to be captured: the largest error, and the names."""
    rows = ["| captured | cases | largest error | which |", "|---|--:|--:|---|"]
    for remark, words in REMARKS.items():
        own = [line for line in lines if remark_of(line) == remark]
        if own:
            error = max(line["error"] for line in own)
            names = "; ".join(mark(line) for line in own)
            rows.append(f"| {words} | {len(own)} | {error:.0e} | {names} |")
    return "\n".join(rows) + "\n"


def remark_of(line: dict[str, Any]) -> str | None:
    """The row of a case; `None` for one that was not captured."""
    if line["status"] == "exact" and line["alone"]:
        return "alone"
    return line["status"] if line["status"] in REMARKS else None


def mark(line: dict[str, Any]) -> str:
    """A name; with what is missing, and a star where padding changes what TRL itself computes."""
    missing = f" ({kinds(line['missing'])})" if line["missing"] else ""
    star = STAR if line["equal_lengths"] else ""
    return f"{name_of(line)}{star}{missing}"


def kinds(names: list[str]) -> str:
    """Parameter names without the numbers of layers, a few of them."""
    parts = [
        [part for part in name.split(".") if not part.isdigit() and part != "default"][-2:]
        for name in names
    ]
    unique = list(dict.fromkeys(".".join(part) for part in parts))
    more = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
    return ", ".join(f"`{name}`" for name in unique[:3]) + more


def settings_tables(lines: list[dict[str, Any]]) -> str:
    """The largest error over the losses, for each setting and beta; other settings in one line."""
    by_name = {name_of(line): line for line in lines}
    grid = {tuple(name.split(", ", 2)): line for name, line in by_name.items() if ", beta" in name}
    losses = list(dict.fromkeys(name[0] for name in grid if not name[0].startswith("LoRA")))
    variants = list(dict.fromkeys(name[2:] for name in grid if name[0] in losses))
    rows = ["| | beta 0 | beta 0.04 |", "|---|--:|--:|"]
    for variant in variants:
        cells = []
        for beta in ("beta 0", "beta 0.04"):
            keys = [(loss, beta, *variant) for loss in losses]
            cells.append(largest([grid[key] for key in keys]))
        rows.append(f"| {' '.join(variant) or 'as it is'} | {' | '.join(cells)} |")
    others = [line for name, line in by_name.items() if name.split(", ")[0] not in losses]
    names = "; ".join(name_of(line) for line in others)
    parts = [
        f"Largest error over the losses {', '.join(losses)}:\n",
        "\n".join(rows),
        f"\nOther settings, {largest(others)} at most: {names}.\n",
        'With `scale_rewards="batch"`, and with rewards normalized before they are summed, one positive factor for\n'
        "all prompts is left free: cosines do not see it.\n",
    ]
    return "\n".join(parts)


def largest(lines: list[dict[str, Any]]) -> str:
    """The largest error of some cases; what else became of them, if they were not all captured."""
    statuses = {line["status"] for line in lines} - {"exact", "direct"}
    if statuses:
        return ", ".join(sorted(statuses))
    return f"{max(line['error'] for line in lines):.0e}"


def lists(lines: list[dict[str, Any]]) -> str:
    """Cases that were not captured, those of one reason together."""
    parts = []
    for status, title in (
        ("wrong", "Not exact"),
        ("crash", "Crashes"),
        ("refused", "Refused"),
        ("trl", "Did not run without this package either"),
    ):
        reasons: dict[str, list[str]] = {}
        for line in lines:
            if line["status"] == status:
                reason = line["note"] or differences(line)
                reasons.setdefault(reason, []).append(line["case"])
        if reasons:
            entries = [f"- {reason_of(cases)}: {reason}" for reason, cases in reasons.items()]
            parts.append(f"## {title}\n\n" + "\n".join(entries) + "\n")
    return "\n".join(parts)


def reason_of(cases: list[str]) -> str:
    """The cases of a reason: up to two by name."""
    return ", ".join(cases) if len(cases) <= 2 else f"{len(cases)} cases, as {cases[0]}"


def differences(line: dict[str, Any]) -> str:
    return f"{line['error']:.0e} in {kinds(list(line['differing']))}, with {', '.join(line['wrong_in'])}"


def left_out() -> set[str]:
    import architectures

    return architectures.LEFT_OUT


def name_of(line: dict[str, Any]) -> str:
    return line["case"].partition("/")[2]


if __name__ == "__main__":
    main()
