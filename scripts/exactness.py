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
PAGE = ROOT / "docs" / "exactness.md"
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
HEADER = """# Exactness

<!-- Written by `make test-exactness`; the quick part of it is in `make test`. -->

Per prompt, per parameter: the captured feature (unprojected) against `torch.autograd.grad` of TRL's own
`_compute_loss` on the rows that TRL itself generated, in evaluation mode, in float32. Three prompts of different
lengths with four rollouts each; two layers of hidden size 16; all prompts in one pass, one prompt a pass, and the
rollouts of one prompt in two passes. *Error* is the largest relative error of any parameter's gradient of any prompt
in any of the three (beyond {tolerance:g} counts as wrong; gradients smaller than {floor:g} of the whole are measured
against that). The prompt is the batch: its own tokens normalise the loss, and the load balancing of experts is left
out.
"""


KNOWN = """Where padding changes what TRL itself computes (marked below), the features are those of the prompt
without padding, and prompts that share a pass are compared at equal length. A run captures such models one prompt at
a time; where log-probabilities do not show it, the self-check finds it by the gradient of TRL's own loss.
AdaMSS was run with scikit-learn, which it needs and which is not among the development packages.
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
        "## Left out\n\nFamilies of several modalities or without a small form: "
        + left_out()
        + ".\n"
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


def group_table(lines: list[dict[str, Any]]) -> str:
    rows = ["| | result | error | |", "|---|---|--:|---|"]
    for line in lines:
        if line["status"] in ("exact", "direct", "missing"):
            rows.append(
                f"| {name_of(line)} | {line['status']} | {line['error']:.0e} | {remarks(line)} |"
            )
    return "\n".join(rows) + "\n"


def remarks(line: dict[str, Any]) -> str:
    parts = []
    if line["direct"]:
        parts.append("through autograd: " + kinds(line["direct"]))
    elif line["alone"]:
        parts.append("one prompt a pass")
    if line["missing"]:
        parts.append("missing: " + kinds(line["missing"]))
    if line["equal_lengths"]:
        parts.append("prompts of equal length: padding changes what TRL itself computes")
    return "; ".join(parts)


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
    by_name = {name_of(line): line for line in lines}
    grid = {tuple(name.split(", ", 2)): line for name, line in by_name.items() if ", beta" in name}
    losses = list(dict.fromkeys(name[0] for name in grid if not name[0].startswith("LoRA")))
    parts = []
    for beta in ("beta 0", "beta 0.04"):
        rows = [f"| {beta} | {' | '.join(losses)} |", "|---|" + "--:|" * len(losses)]
        variants = list(dict.fromkeys(name[2:] for name in grid if name[0] in losses))
        for variant in variants:
            cells = [cell(grid.get((loss, beta, *variant))) for loss in losses]
            rows.append(f"| {' '.join(variant) or 'as it is'} | {' | '.join(cells)} |")
        parts.append("\n".join(rows) + "\n")
    others = [line for name, line in by_name.items() if name.split(", ")[0] not in losses]
    rows = ["| | |", "|---|--:|", *(f"| {name_of(line)} | {cell(line)} |" for line in others)]
    note = (
        'With `scale_rewards="batch"`, and with rewards normalized before they are summed, one positive factor for\n'
        "all prompts is left free: cosines do not see it.\n"
    )
    return "\n".join([*parts, "\n".join(rows), "", note])


def cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    return f"{line['error']:.0e}" if line["status"] in ("exact", "direct") else line["status"]


def lists(lines: list[dict[str, Any]]) -> str:
    parts = []
    for status, title in (
        ("wrong", "Not exact"),
        ("crash", "Crashes"),
        ("refused", "Refused"),
        ("trl", "Did not run without this package either"),
    ):
        own = [line for line in lines if line["status"] == status]
        if own:
            entries = [f"- {line['case']}: {line['note'] or differences(line)}" for line in own]
            parts.append(f"## {title}\n\n" + "\n".join(entries) + "\n")
    return "\n".join(parts)


def differences(line: dict[str, Any]) -> str:
    return f"{line['error']:.0e} in {kinds(list(line['differing']))}, with {', '.join(line['wrong_in'])}"


def left_out() -> str:
    import architectures

    return ", ".join(sorted(architectures.LEFT_OUT))


def name_of(line: dict[str, Any]) -> str:
    return line["case"].partition("/")[2]


if __name__ == "__main__":
    main()
