"""Whether a refactor changed anything: the same tiny jobs in two checkouts, at a fixed seed, compared bit by bit.

    python scripts/same_results.py --against REV      # this checkout and that commit, on this machine
    python scripts/same_results.py --write FILE       # the results of this checkout, as JSON

Compared: the pools, losses, final weights, tables (column by column) and shards (all tensors but the seconds) of runs
of each kind (`RUNS`), of one that is interrupted and resumed, and of one on two processes; the choices of each kind of
selector; the subsets of `select`; and every number in the report of a stored run. Bits are compared on one machine
only: floating point differs from processor to processor.

Each checkout runs its own copy of this script with its own test helpers and stored run, so names of settings and
modules may differ between the two. A job that was changed in one of them shows as a difference.

What that commit did not have yet (a column, a tensor, a file) is listed as new and is no difference; what it had and
this checkout lacks is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STORED_RUN = ROOT / "tests" / "stored" / "run" / "whole"
SELECTORS = [
    "random",
    "learnability",
    "token_length",
    "ifd",
    "feature_similarity",
    "learnalign",
    "learnalign_coverage",
    "learnalign_logdet",
]
VOLATILE = {"seconds"}

ADAPTIVE = dict(warmup_samples=0, stages=[1.0], order="adaptive", skip_zero_advantages=True)
RUNS: dict[str, dict[str, Any]] = {
    "staged": dict(
        warmup_samples=4,
        stages=[0.5, 0.25, 0.25],
        selector="learnalign",
        skip_zero_advantages=False,
        feature_dim=64,
        reliability=True,
    ),
    "restarted": dict(
        warmup_samples=4,
        stages=[8],
        after_warmup="restart",
        skip_zero_advantages=False,
        feature_dim=64,
    ),
    "adaptive": dict(ADAPTIVE, stage_epochs=3),
    "dynamic sampling": dict(ADAPTIVE, stage_epochs=1, oversample=1.5, max_generation_batches=3),
    "rollout budget": dict(
        warmup_samples=4,
        stages=[6],
        selector="learnability",
        rollout_budget=0.4,
        budget_rounds=3,
        feature_dim=64,
        shard_size=4,
    ),
}
"""Settings of each kind of run, beside those of the paper."""


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def tensors(path: Path) -> dict[str, str]:
    """Digests of a shard's tensors, by name."""
    from safetensors.torch import load_file

    digests = {}
    for name, tensor in sorted(load_file(path).items()):
        if name not in VOLATILE:
            kind = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
            digests[name] = digest(kind + tensor.contiguous().numpy().tobytes())
    return digests


def columns(path: Path) -> dict[str, str]:
    """Digests of a table's columns, by name."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    digests = {}
    for name in table.column_names:
        values = json.dumps(table.column(name).to_pylist(), default=str)
        digests[name] = digest(values.encode())
    return digests


def tables(folder: Path) -> dict[str, dict[str, str]]:
    """Parquet tables and shards below a folder, by name without the checksum that their seconds change."""
    contents = {}
    for path in sorted(folder.rglob("*.parquet")):
        contents[place_of(path, folder)] = columns(path)
    for path in sorted(folder.rglob("shard-*.safetensors")):
        name = re.sub(r"-[0-9a-f]{32}", "", place_of(path, folder))
        contents[name] = tensors(path)
    return contents


def place_of(path: Path, folder: Path) -> str:
    """A path below a folder; the record folder goes by one name, whatever a commit called it."""
    parts = path.relative_to(folder).parts
    return "/".join("_learnalign" if part == "learnalign" else part for part in parts)


def weights(trainer: Any) -> str:
    state = trainer.model.state_dict()
    return digest(b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state)))


def described(trainer: Any, callback: Any) -> dict[str, Any]:
    """What a run came to."""
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [[entry["step"], entry["loss"], entry["grad_norm"]] for entry in logged]
    stages = [phase.name for phase in callback.plan.stages]
    return {
        "pools": {name: callback.selected(name).tolist() for name in stages},
        "losses": losses,
        "weights": weights(trainer),
        "files": tables(callback.folder),
    }


def one_run(
    cases: Any,
    folder: Path,
    settings: dict[str, Any],
    data: Any = None,
    stop_at: int | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A run with the paper's settings but for those given; killed before step `stop_at` begins, or resumed."""
    import interruptions

    from trl_learnalign import LearnAlignCallback, LearnAlignConfig

    policy = cases.model(max_position_embeddings=512)
    pool = cases.dataset(24) if data is None else data
    trainer = cases.trainer(folder, policy, data=pool, **options)
    callback = LearnAlignCallback(trainer, LearnAlignConfig(**settings))
    trainer.add_callback(callback)
    if stop_at is not None:
        trainer.add_callback(interruptions.KillAt(stop_at))
    with suppress(interruptions.Killed):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return described(trainer, callback)


def resumed_run(cases: Any, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A run that is killed inside a generation, and resumed from the checkpoint before it."""
    saves = dict(save_strategy="steps", save_steps=1, num_iterations=2, steps_per_generation=2)
    one_run(cases, folder, settings, stop_at=5, **saves)
    return one_run(cases, folder, settings, checkpoint=folder / "checkpoint-5", **saves)


def chosen_by_selectors(cases: Any, folder: Path) -> dict[str, Any]:
    """One stage of six prompts by each selector."""
    chosen = {}
    for selector in SELECTORS:
        settings = dict(
            warmup_samples=0,
            stages=[6],
            selector=selector,
            skip_zero_advantages=False,
            feature_dim=64,
        )
        run = one_run(cases, folder / selector, settings, data=answered(cases))
        chosen[selector] = {"pool": run["pools"]["stage_1"], "weights": run["weights"]}
    return chosen


def answered(cases: Any) -> Any:
    """Prompts with reference solutions of different lengths."""
    solutions = [f"{i * 7}+{'ab' * (i % 4)}" for i in range(16)]
    return cases.dataset(16).add_column("reference", solutions)


def selected_subsets(folder: Path) -> dict[str, Any]:
    """Two subsets by two selectors, without the training that would follow."""
    import subsets

    selection, rollouts = subsets.select(folder, selector=["learnalign", "ifd"])
    return {"rollouts": rollouts, "files": tables(folder), "weights": weights(selection.trainer)}


def on_two_processes() -> dict[str, Any]:
    """A run in adaptive order on two processes, each a launch's; what the main one came to."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "results.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        command = [*launcher, *meeting, __file__, "--write", str(file), "--as-one-of-two"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def as_one_of_two(file: Path) -> None:
    """The part of one of two processes; the main one writes."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import cases

    folder = file.parent / "run"
    batch = dict(per_device_train_batch_size=4)
    run = one_run(cases, folder, RUNS["adaptive"], **batch)
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(run))


def report_numbers(folder: Path) -> list[str]:
    """Every number that the report of a stored run shows, besides dates, versions and drawing coordinates."""
    from trl_learnalign.report import write_report

    copied = folder / "report"
    shutil.copytree(STORED_RUN, copied)
    page = Path(write_report(copied)).read_text()
    page = re.sub(r"(?s)<(style|script|svg|head)\b.*?</\1>", " ", page)
    text = re.sub(r"<[^>]+>", " ", page)
    return re.findall(r"-?\d+(?:\.\d+)?", text)


def results() -> dict[str, Any]:
    """All results of the package that Python finds first."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    import cases

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            **{kind: one_run(cases, folder / kind, settings) for kind, settings in RUNS.items()},
            "resumed": resumed_run(cases, folder / "resumed", RUNS["adaptive"]),
            "two processes": on_two_processes(),
            "selectors": chosen_by_selectors(cases, folder / "selectors"),
            "subsets": selected_subsets(folder / "subsets"),
            "report": report_numbers(folder),
        }


def results_of(package: Path) -> dict[str, Any]:
    """The results of a checkout, by its own copy of this script."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "results.json"
        environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        script = package / "scripts" / "same_results.py"
        command = [sys.executable, str(script), "--write", str(file)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Places where results differ that both have, or that ours lack."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for name in sorted(theirs):
            lines += differences(ours.get(name), theirs[name], f"{place}/{name}")
        return lines
    return [] if ours == theirs else [f"{place}: {str(ours)[:200]} here, {str(theirs)[:200]} there"]


def additions(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Places that our results have and theirs lack."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return []
    lines = []
    for name in sorted(ours):
        if name in theirs:
            lines += additions(ours[name], theirs[name], f"{place}/{name}")
        else:
            lines.append(f"{place}/{name}: new here")
    return lines


def against(revision: str) -> tuple[list[str], list[str]]:
    """What differs between this checkout and a commit, and what only this checkout has."""
    with tempfile.TemporaryDirectory() as name:
        checkout = Path(name) / "checkout"
        worktree = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*worktree, "add", "-q", "--detach", str(checkout), revision], check=True)
        try:
            ours, theirs = results_of(ROOT), results_of(checkout)
        finally:
            subprocess.run([*worktree, "remove", "--force", str(checkout)], check=True)
    return differences(ours, theirs), additions(ours, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="REV", help="commit to compare with")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write this checkout's results")
    parser.add_argument("--as-one-of-two", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_one_of_two:
        as_one_of_two(given.write)
    elif given.write is not None:
        given.write.write_text(json.dumps(results(), indent=1) + "\n")
    if given.against is not None:
        changed, new = against(given.against)
        verdict = [] if changed else [f"the same results as {given.against}"]
        print("\n".join([*changed, *new, *verdict]))
        sys.exit(bool(changed))


if __name__ == "__main__":
    main()
