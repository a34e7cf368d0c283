"""Two processes under each backend: what skipping and dynamic sampling leave of each step, and the step they make."""

import functools

import cases
import pytest
import torch
from launches import BACKENDS, launch

pytestmark = pytest.mark.distributed

WORKER = cases.ROOT / "tests" / "helpers" / "skipping_worker.py"
ALL = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}
SCENARIOS = {
    "tokens": {"loss_type": "bnpo", **ALL},
    "rows": {"loss_type": "grpo", **ALL},
    "generation": {"loss_type": "dapo", "gradient_accumulation_steps": 2},
    "lopsided": {"loss_type": "bnpo", "reward": "lopsided", "gradient_accumulation_steps": 2},
}
# Rows stay on their rank: what models with absolute positions see of a row depends on its padding.
STAYING = {"staying": {"loss_type": "bnpo", "family": "gpt2", "gradient_accumulation_steps": 2}}
# Of 12 completions a process has one group and a half, and of 20 two and a half: a group is on both.
DYNAMIC = {
    "batches": {"dynamic": {"max_batches": 3}, "loss_type": "dapo", "completions": 12},
    "oversampled": {"dynamic": {"oversample": 1.5}, "loss_type": "grpo", "completions": 12},
    # Three rollouts a prompt: two processes cannot share five groups, and roll out one more.
    "filled up": {
        "dynamic": {"oversample": 1.25, "max_batches": 2},
        "loss_type": "dapo",
        "completions": 12,
        "num_generations": 3,
    },
    "several steps": {
        "dynamic": {"oversample": 1.5, "max_batches": 2},
        "loss_type": "dapo",
        **ALL,
        "max_steps": 2,
    },
}
GATED = [
    backend if backend == "ddp" else pytest.param(backend, marks=pytest.mark.slow)
    for backend in BACKENDS
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    @functools.cache
    def run(backend):
        folder = tmp_path_factory.mktemp(backend)
        wanted = {**SCENARIOS, **DYNAMIC, **(STAYING if backend == "ddp" else {})}
        scenarios = {
            name: {**options, "fsdp": backend == "fsdp2"} for name, options in wanted.items()
        }
        return folder, launch(backend, folder, scenarios, worker=WORKER)

    return run


def scenarios_of(backend):
    return [*SCENARIOS, *(STAYING if backend == "ddp" else ())]


@pytest.mark.parametrize("backend", GATED)
def test_steps_are_those_of_all_rows(launched, backend):
    folder, found = launched(backend)
    for name in scenarios_of(backend):
        result = found[f"{name}, skipped"]
        assert result["processes"] == 2
        assert result["zero_stage"] == (int(backend[4]) if "zero" in backend else 0)
        assert result["sharded"] == (backend == "fsdp2" or "zero3" in backend)
        stock, ours = torch.load(folder / f"{name}.pt"), torch.load(folder / f"{name}, skipped.pt")
        assert len(stock) == 3
        assert float(((stock - ours).norm(dim=1) / stock.norm(dim=1)).max()) < 1e-4


@pytest.mark.parametrize("backend", GATED)
def test_ranks_share_the_rows_with_a_gradient_evenly(launched, backend):
    _, found = launched(backend)
    for name in scenarios_of(backend):
        everything, skipped = found[name]["rows"], found[f"{name}, skipped"]["rows"]
        assert skipped[0] == skipped[1]  # passes belong together
        assert len(skipped[0]) < len(everything[0])
        counts = found[f"{name}, skipped"]["counts"]
        assert counts["rows_given"] == sum(map(sum, everything))
        assert counts["rows_trained"] == sum(map(sum, skipped)) < counts["rows_given"]
    # Half of the rows at most have a gradient, all of them rolled out by one rank.
    lopsided = found["lopsided, skipped"]["counts"]
    assert lopsided["rows_trained"] <= lopsided["rows_given"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_choose_the_groups_that_one_chooses(launched, backend):
    folder, found = launched(backend)
    alone_folder, alone = launched("single")
    for name in DYNAMIC:
        for key in (name, f"{name}, skipped"):
            assert (found[key]["processes"], alone[key]["processes"]) == (2, 1)
            assert found[key]["observed"] == alone[key]["observed"]
            assert any(not all(trained) for _, _, trained in found[key]["observed"])
    # One optimizer step takes the whole generation: its gradient does not depend on how rows are dealt out.
    for name in ("batches", "oversampled", "filled up"):
        one = torch.load(alone_folder / f"{name}.pt")
        for key in (name, f"{name}, skipped"):
            two = torch.load(folder / f"{key}.pt")
            assert float(((one - two).norm(dim=1) / one.norm(dim=1)).max()) < 1e-4
