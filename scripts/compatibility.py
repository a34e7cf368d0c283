"""Test releases of TRL, each in a fresh environment, and write a page of what works with which.

    python scripts/compatibility.py                      # what has no result yet; needs a package index
    python scripts/compatibility.py --only trl-1.9 --again
    python scripts/compatibility.py --without zero3      # leave a group of tests out
    python scripts/compatibility.py --page               # only write the page anew
    python scripts/compatibility.py --exchange FOLDER    # quicker: one environment, in which TRL is exchanged

Of each minor release the latest is tested, with whatever else an installer picks. *oldest* has the lowest version
that pyproject.toml allows of every direct dependency, *oldest-transformers* that of transformers beside the latest
TRL, *transformers-5.17* and the like a release of transformers that vLLM asks for. torch is the pinned one
everywhere: the newest release that has a build for CPUs alone. An environment is removed when its tests are done;
each result is a file of docs/compatibility/, and a run that was interrupted goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fresh_environment import ROOT, make, run
from packaging.requirements import Requirement
from packaging.version import Version

RESULTS = ROOT / "docs" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
TESTS_NEED = ("pytest>=8", "hypothesis>=6.100", "jmespath")
EXTRAS = ("peft", "deepspeed")
BESIDE = {"trl-1.15": ["triton"]}
"""What else an environment needs: trl 1.15 has its kernels in Triton alone."""

VLLM_TAKES = ("5.17",)
"""Minor releases of transformers that users of vLLM have: 5.17 is the newest that vLLM 0.31 allows."""

NOT_RUN: tuple[str, ...] = ()
"""Dependencies that came after *oldest* was tested: what it had of them is not known. Empty when it is run again."""

CAPTURE = "tests/gradients/test_capture.py::"
CALLBACK = "tests/training/test_callback.py::"
ADAPTIVE = "tests/training/test_adaptive_run.py::"
MEASURES = "tests/measuring/test_measures.py::"
SAMPLING = "tests/bridge/test_dynamic_sampling.py::"
SKIPPING = "tests/bridge/test_skipping.py::"
RELEASE = "tests/bridge/test_release.py::"
PROCESSES = "tests/bridge/test_two_processes.py::"

# What the page has a column for: title, and tests (a whole one, or one of its cases).
FEATURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "names": ("names and signatures", (f"{RELEASE}test_everything_that_is_needed_is_there",)),
    "gradients": (
        "features are TRL's gradient",
        (
            f"{CAPTURE}test_every_loss_type",
            f"{CAPTURE}test_trainer_settings",
            f"{CAPTURE}test_small_and_large_coefficients_survive_float16",
            f"{CAPTURE}test_prompts_of_the_usual_models_share_passes",
            "tests/measuring/test_self_check.py::test_two_prompts_agree_with_the_trainer_to_rounding",
        ),
    ),
    "lora": (
        "LoRA",
        (f"{CAPTURE}test_lora", f"{MEASURES}test_lora_policies_are_read_with_their_adapters"),
    ),
    "head": ("the head's likelihoods", (f"{MEASURES}test_likelihoods_equal_a_direct_computation",)),
    "stages": (
        "staged selection",
        (
            f"{CALLBACK}test_stages_are_disjoint_and_cover_the_pool",
            f"{CALLBACK}test_scoring_leaves_training_bit_identical",
            f"{CALLBACK}test_restart_goes_back_to_the_initial_state",
            "tests/training/test_resume.py::test_an_interrupted_scoring_goes_on_where_it_stood",
            "tests/training/test_resume.py::"
            "test_resume_at_a_boundary_and_inside_a_stage_gives_the_same_run[iterations]",
        ),
    ),
    "adaptive": (
        "adaptive order",
        (
            f"{ADAPTIVE}test_prompts_are_drawn_by_what_came_out_before",
            f"{ADAPTIVE}test_with_nothing_switched_on_a_stock_trainer_trains_bit_identically",
        ),
    ),
    "skipping": (
        "skipping rows",
        (
            f"{RELEASE}test_skipped_rows_change_no_gradient_or_are_not_skipped",
            f"{SKIPPING}test_whole_trainings_end_at_the_same_weights[0]",
            f"{SKIPPING}test_the_log_says_what_was_skipped",
        ),
    ),
    "sampling": (
        "dynamic sampling",
        (
            f"{SAMPLING}test_oversampling_keeps_the_most_learnable",
            f"{SAMPLING}test_where_the_first_batch_is_enough_nothing_changes_to_the_last_bit",
            f"{SAMPLING}test_logs_tell_of_everything_and_the_table_of_what_is_trained_on",
        ),
    ),
    "environments": (
        "tools and environments",
        (
            "tests/measuring/test_identity.py::"
            "test_a_scoring_pass_does_not_enter_the_environments_of_training",
        ),
    ),
    "vllm": ("vLLM, by signature", (f"{RELEASE}test_vllm_fetches_weights_by_the_step",)),
    "ddp": ("DDP, 2 processes", (f"{PROCESSES}test_two_processes_select_what_one_selects[ddp]",)),
    "zero3": (
        "ZeRO-3, 2 processes",
        (f"{PROCESSES}test_two_processes_select_what_one_selects[zero3_partitioned]",),
    ),
}
APART = ("ddp", "zero3")
"""Features whose tests start processes: each has a session of its own."""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dependencies() -> list[Requirement]:
    """Direct dependencies and those of the extras that are tested, torch left out."""
    table = project()
    lines = list(table["dependencies"])
    for extra in EXTRAS:
        lines += table["optional-dependencies"][extra]
    return [Requirement(line) for line in lines if not line.startswith("torch")]


def packages() -> list[str]:
    """Names of torch and the direct dependencies, in one spelling."""
    names = ["torch", *(requirement.name for requirement in dependencies())]
    return [name.lower().replace("_", "-") for name in names]


def lowest(requirement: Requirement) -> str:
    """`name==version` of the lowest version that a requirement allows."""
    bounds = [spec.version for spec in requirement.specifier if spec.operator in (">=", "==", "~=")]
    assert bounds, f"{requirement} has no lower bound"
    return f"{requirement.name}=={max(bounds, key=Version)}"


def latest_of_each_minor(versions: Iterable[str], oldest: str) -> list[str]:
    """The latest release of each minor one from the oldest on, oldest first."""
    latest: dict[tuple[int, int], Version] = {}
    for version in map(Version, versions):
        if version < Version(oldest) or version.is_prerelease:
            continue
        minor = (version.major, version.minor)
        latest[minor] = max(version, latest.get(minor, version))
    return [str(latest[minor]) for minor in sorted(latest)]


def environments() -> dict[str, list[str]]:
    """Name of each environment → what is pinned in it."""
    said = run(sys.executable, "-m", "pip", "index", "versions", "trl")
    found = re.search(r"Available versions: (.+)", said)
    assert found, said
    needed = {requirement.name: requirement for requirement in dependencies()}
    oldest_trl = lowest(needed["trl"]).split("==")[1]
    releases = latest_of_each_minor(found[1].split(", "), oldest_trl)
    extras = [*EXTRAS]
    sets = {f"trl-{'.'.join(v.split('.')[:2])}": [f"trl=={v}", *extras] for v in releases}
    sets["oldest"] = [lowest(requirement) for requirement in needed.values()]
    old_transformers = lowest(needed["transformers"])
    latest_trl = f"trl=={releases[-1]}"
    sets["oldest-transformers"] = [latest_trl, old_transformers, *extras]
    for minor in VLLM_TAKES:
        sets[f"transformers-{minor}"] = [latest_trl, f"transformers=={minor}.*", *extras]
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="only these environments, as trl-1.9")
    parser.add_argument("--without", nargs="+", default=[], choices=APART, help="features left out")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    parser.add_argument(
        "--exchange", type=Path, help="keep one environment here; for releases, not for the oldest"
    )
    given = parser.parse_args()
    if not given.page:
        for name, pins in environments().items():
            if given.only is None or name in given.only:
                kept = given.exchange if name.startswith("trl-") else None
                bring_up_to_date(name, pins, given.without, given.again, kept)
    PAGE.write_text(page(read_results()))
    failed = [name for name, found in read_results().items() if count(found, "failed")]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def bring_up_to_date(
    name: str, pins: list[str], left_out: list[str], again: bool, kept: Path | None = None
) -> None:
    """Run what has no result yet in an environment, and write the result."""
    file = RESULTS / f"{name}.json"
    result: dict[str, Any] = {"features": {}}
    if file.exists() and not again:
        result = json.loads(file.read_text())
    done = result["features"]
    waiting = [feature for feature in FEATURES if feature not in done and feature not in left_out]
    if not waiting:
        return
    print(f"{name}: {', '.join(pins)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="compatibility-") as folder:
        pins = [*TESTS_NEED, *pins, *BESIDE.get(name, [])]
        programs = prepared(kept or Path(folder) / "environment", pins)
        result["environment"] = "fresh" if kept is None else "TRL exchanged"
        result["versions"] = installed(programs)
        result["python"] = platform.python_version()
        result["head"] = head_of(programs)
        together = [feature for feature in waiting if feature not in APART]
        apart = [[feature] for feature in waiting if feature in APART]
        for features in [together, *apart]:
            if not features:
                continue
            done.update(test(programs, Path(folder), features))
            file.write_text(json.dumps(result, indent=2) + "\n")
            for feature in features:
                print(f"  {feature}: {done[feature]}", flush=True)


def prepared(folder: Path, pins: list[str]) -> Path:
    """Programs of an environment: a new one, or the one that is there with other versions."""
    if not folder.exists():
        return make(folder, *pins, str(ROOT))
    programs = folder / "bin"
    run(programs / "pip", "install", "--quiet", "--no-compile", *pins)
    ours = ("--force-reinstall", "--no-deps", str(ROOT))
    run(programs / "pip", "install", "--quiet", "--no-compile", *ours)
    return programs


def installed(programs: Path) -> dict[str, str]:
    """Versions of the direct dependencies in an environment."""
    freeze = {}
    for line in run(programs / "pip", "freeze").splitlines():
        package, equals, version = line.partition("==")
        if equals:
            freeze[package.lower().replace("_", "-")] = version
    return {name: freeze.get(name, "none") for name in packages()}


def head_of(programs: Path) -> str:
    """Which LM head the bridge captures in an environment."""
    code = "from trl_learnalign.bridge.policy import lm_head; print(lm_head.__name__)"
    said = run(programs / "python", "-c", code, cwd=programs).split()
    return said[-1].rpartition(".")[2]


def test(programs: Path, folder: Path, features: list[str]) -> dict[str, dict[str, Any]]:
    """Results of some features' tests, run in one session."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    tests = [name for feature in features for name in FEATURES[feature][1]]
    command = [str(programs / "pytest"), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # By the program, not `python -m`: that would import the checkout.
    done = subprocess.run(
        [*command, *tests],
        cwd=ROOT,
        env=surroundings(programs),
        capture_output=True,
        text=True,
    )
    if not report.exists():
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])
    cases = list(ElementTree.parse(report).iter("testcase"))
    return {feature: of_feature(feature, cases) for feature in features}


def surroundings(programs: Path) -> dict[str, str]:
    """Environment variables of the tests."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **own,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_INTERPRET": "1",  # kernels on a CPU, where there is Triton
        "HF_HUB_OFFLINE": "1",
        # What DeepSpeed compiles at its first launch stays with the environment.
        "TORCH_EXTENSIONS_DIR": str(programs.parent / "torch_extensions"),
    }


def of_feature(feature: str, cases: list[ElementTree.Element]) -> dict[str, Any]:
    """What became of a feature's tests."""
    outcome: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in cases:
        path = case.get("classname", "").replace(".", "/") + ".py"
        name = f"{path}::{case.get('name')}"
        whole = name.partition("[")[0]
        if not {name, whole} & set(FEATURES[feature][1]):
            continue
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            outcome["failed"] += 1
            failures.append(name)
        elif "skipped" in kinds:
            outcome["skipped"] += 1
        else:
            outcome["passed"] += 1
    if failures:
        outcome["failures"] = failures
    return outcome


def read_results() -> dict[str, dict[str, Any]]:
    """All results, releases first and in their order."""
    found = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}

    def place(name: str) -> tuple[int, Any]:
        number = name.removeprefix("trl-")
        return (0, Version(number)) if number != name else (1, name)

    return {name: found[name] for name in sorted(found, key=place)}


def count(result: dict[str, Any], kind: str) -> int:
    """Tests of a result that passed, failed or were skipped."""
    return sum(outcome[kind] for outcome in result["features"].values())


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page: what works with which release, and the versions beside it."""
    table = project()
    supported = next(line for line in table["dependencies"] if line.startswith("trl"))
    lines = [
        "# Versions that were tested",
        "",
        "Made by `make test-compat`, which tests minor releases of TRL on Linux and CPU, with whatever else an "
        "installer picks beside them, and the lowest version that `pyproject.toml` allows of every direct dependency "
        "(*oldest*). torch is the pinned one everywhere: newer releases (2.14, 2.15) were not run, because no build "
        "of them for CPUs alone could be had. `constraints.txt` has the versions of the latest release's column. "
        "Columns that are not there have not been run yet.",
        "",
        *not_run(),
        f"`{supported}` has no upper bound. A release that is not in the table runs, with one line that says that it "
        "is untested, if it has every name and signature that is needed; features are compared with the gradient of "
        "TRL's own loss on the first prompts, and whether rows can be skipped is tried on the loss itself. Where one "
        "of them fails, the run stops and says what is missing, before anything is selected or trained.",
        "",
        "Numbers are tests that passed; ✗ those that failed, ∅ those that do not apply there, – what was not run or "
        "not written down.",
        "",
        f"| | {' | '.join(results)} |",
        f"|---|{'---|' * len(results)}",
    ]
    for feature, (title, _) in FEATURES.items():
        cells = [cell(result["features"].get(feature)) for result in results.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    heads = [result["head"].removesuffix("Head").lower() for result in results.values()]
    lines.append(f"| LM head is captured as | {' | '.join(heads)} |")
    for package in packages():
        cells = [result["versions"].get(package, "–") for result in results.values()]
        lines.append(f"| {package} | {' | '.join(cells)} |")
    pythons = [result["python"] for result in results.values()]
    lines.append(f"| Python | {' | '.join(pythons)} |")
    made = [result["environment"] for result in results.values()]
    lines.append(f"| environment | {' | '.join(made)} |")
    return "\n".join([*lines, "", *NOTES]) + "\n"


def not_run() -> list[str]:
    """The paragraph about lowest versions that no environment has had."""
    bounds = [str(requirement) for requirement in dependencies() if requirement.name in NOT_RUN]
    if not bounds:
        return []
    names = " and ".join(f"`{bound}`" for bound in bounds)
    return [
        f"{names} came in after these environments were tested: their lowest versions were not run in *oldest*.",
        "",
    ]


def cell(outcome: dict[str, Any] | None) -> str:
    """What one feature comes to in one environment."""
    if outcome is None:
        return "–"
    if outcome["failed"]:
        return f"{outcome['passed']}, {outcome['failed']} ✗"
    if not outcome["passed"]:
        return "∅"
    return str(outcome["passed"])


NOTES = (
    "What differs between releases, and what is done about it (`trl_learnalign/bridge/versions/`):",
    "",
    "- **LM head.** From trl 1.15 on it is fused with the loss, and the capture takes the fused function's place "
    "(*fused*). Before, the model gives logits, and the head is captured as the linear layer that it is (*plain*): "
    "the same features, more memory.",
    "- **trl 1.15 needs Triton**: without it, its own training fails, and it is refused with that hint. It is tested "
    "with Triton's interpreter, which runs on a CPU.",
    "- **trl before 1.16 imports `requests`** without asking for it; it is among the dependencies for that reason.",
    "- **Environments** (`environment_factory`): TRL itself asks for transformers 5.2 and later, and for "
    "`jmespath` in some releases.",
    "- **Gemma 3 of transformers 4** cannot be trained by trl 1.15 and later: its fused head looks for the backbone "
    "in another place. Its tests are skipped there.",
    '- **trl 1.8 and 1.9, `loss_type="luspo"`**: the loss is averaged over padding, so rows without a gradient are '
    "not skipped, which the log says.",
    "- **trl 1.8, `mask_truncated_completions`**: the loss divides by tokens that it masks, so dynamic sampling is "
    "refused.",
    "- **trl before 1.15, `use_liger_kernel`**: the loss is Liger's own; rows are not skipped.",
    "",
    "*fresh*: an environment of its own. *TRL exchanged*: TRL alone was installed anew, in the environment of the "
    "release tested before.",
    "",
    "vLLM needs a GPU and is not run here: *by signature* means that the trainer's step counter, which tells the "
    "engine to fetch new weights, is read and written where it is expected. With trl 1.16 both of its modes are "
    "tested with a transformers model behind the interface of vLLM 0.31, the newest that it supports. The source of "
    "vLLM 0.33 has all names, signatures and fields that they use. vLLM chooses torch and transformers itself, so it "
    "cannot be installed with `constraints.txt`: 0.31 takes torch 2.13.0 and transformers before 5.18, 0.33 torch "
    "2.14.0 and transformers before 5.21. *transformers-5.17* has the newest transformers that 0.31 takes, and "
    "no vLLM; transformers 5.18 to 5.20, which 0.33 takes, were not run.",
)


if __name__ == "__main__":
    main()
