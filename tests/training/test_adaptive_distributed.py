"""The adaptive order on two processes under each backend, interrupted and not."""

import functools

import cases
import numpy as np
import pytest
from launches import BACKENDS, launch

pytestmark = pytest.mark.distributed

WORKER = cases.ROOT / "tests" / "helpers" / "adaptive_worker.py"
# A function of the prompt, not of the policy: floating-point numbers of a policy differ between backends.
BELIEF = {"adaptive_embeddings": "sampling_cases:embeddings", "stage_steps": 8}
SCENARIOS = {
    "adaptive": {"skip_zero_advantages": True, **BELIEF},
    "oversampled": {"oversample": 1.5, "skip_zero_advantages": True, **BELIEF},
    "against the belief": {"baseline": "belief", "skip_zero_advantages": True, **BELIEF},
    "graded": {"graded": True, **BELIEF},
    "by cost": {"adaptive_gain_per_cost": True, "generation_price": 8.0, **BELIEF},
    "of the policy": {"stage_steps": 4},
}
GATED = [
    backend if backend == "ddp" else pytest.param(backend, marks=pytest.mark.slow)
    for backend in BACKENDS
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    @functools.cache
    def run(backend):
        scenarios = {}
        for name, options in SCENARIOS.items():
            resumes = name == "adaptive" and backend != "fsdp2"
            for kill_at in (None, 3) if resumes else (None,):
                key = name if kill_at is None else f"{name}, interrupted"
                scenarios[key] = {"fsdp": backend == "fsdp2", "kill_at": kill_at, **options}
        return launch(backend, tmp_path_factory.mktemp(backend), scenarios, worker=WORKER)

    return run


@pytest.mark.parametrize("backend", GATED)
def test_two_processes_train_on_what_one_trains_on(launched, backend):
    two, one = launched(backend), launched("single")
    for name in ("adaptive", "oversampled", "graded", "by cost"):
        assert (two[name]["processes"], one[name]["processes"]) == (2, 1)
        assert two[name]["order"] == one[name]["order"] != []
        assert two[name]["right"] == one[name]["right"]
        assert two[name]["lengths"] == one[name]["lengths"]
        np.testing.assert_allclose(two[name]["predicted"], one[name]["predicted"], rtol=1e-12)
        noted = [found[name]["notes"][0] for found in (two, one)]
        for kind in ("groups", "useful", "prompts", "groups_trained", "repeated", "tokens_given"):
            assert noted[0][kind] == noted[1][kind]


@pytest.mark.parametrize("backend", GATED)
def test_the_belief_is_the_same_baseline_on_all_processes(launched, backend):
    """The table has what one process computes; the loss has it row by row, since rollouts differ in length."""
    two, one = (found["against the belief"] for found in (launched(backend), launched("single")))
    assert two["order"] == one["order"] != []
    made = np.array(two["advantages"])
    np.testing.assert_allclose(made, one["advantages"], rtol=1e-5)
    assert 0 < (made == 0).sum() < made.size
    assert (np.sign(made) != np.sign(made.mean(axis=1, keepdims=True))).any()
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert abs(one["loss"]) > 1e-3
    useful = [
        found["notes"][0]["tokens_trained"] - found["notes"][0]["tokens_idle"]
        for found in (two, one)
    ]
    assert useful[0] == useful[1] > 0


@pytest.mark.parametrize("backend", GATED[: BACKENDS.index("fsdp2")])
def test_an_interrupted_run_goes_on_bit_by_bit(launched, backend):
    found = launched(backend)
    whole, interrupted = found["adaptive"], found["adaptive, interrupted"]
    assert whole == interrupted


@pytest.mark.parametrize("backend", GATED)
def test_prompts_are_told_apart_by_the_policy_wherever_its_weights_are(launched, backend):
    found = launched(backend)["of the policy"]
    assert found["sharded"] == (backend == "fsdp2" or "zero3" in backend)
    assert len(found["order"]) == 8
    assert len(set(np.round(found["predicted"][2:], 6))) > 1
