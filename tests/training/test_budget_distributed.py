"""A rollout budget on two processes is spent as on one."""

import cases
import numpy as np
import pytest
from launches import launch

pytestmark = pytest.mark.distributed

WORKER = cases.ROOT / "tests" / "helpers" / "budget_worker.py"
SCENARIOS = {
    "budget": {
        "warmup_samples": 4,
        "selector": "learnalign_coverage",
        "rollout_budget": 0.5,
        "budget_rounds": 3,
        "adaptive_embeddings": "sampling_cases:embeddings",
    }
}


@pytest.mark.slow
def test_two_processes_roll_out_and_choose_what_one_does(tmp_path):
    two, one = (
        launch(backend, tmp_path / backend, SCENARIOS, worker=WORKER)["budget"]
        for backend in ("ddp", "single")
    )
    assert (two["processes"], one["processes"]) == (2, 1)
    assert [len(rows) for rows in one["stage_1"]["rounds"]] == [7, 7, 6]
    for stage in ("stage_1", "stage_2"):
        for what in ("rounds", "chosen", "generated"):
            assert two[stage][what] == one[stage][what]
        for ours, theirs in zip(two[stage]["noted"], one[stage]["noted"], strict=True):
            assert ours.pop("believed", None) == pytest.approx(theirs.pop("believed", None))
            assert ours == theirs
        np.testing.assert_allclose(two[stage]["scores"], one[stage]["scores"], atol=1e-6)
    assert two["examples"] == one["examples"] != []
