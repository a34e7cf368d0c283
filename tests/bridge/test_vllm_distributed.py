"""Two processes with vLLM: an engine in each, one engine over both, and a server for both."""

import cases
import pytest
import vllm_cases
from launches import launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    vllm_cases.SPOKEN,
]

WORKER = cases.ROOT / "tests" / "helpers" / "vllm_worker.py"


def results(backend, folder, scenarios):
    folder.mkdir()
    vllm_cases.saved_policy(folder / "qwen2")
    return launch(backend, folder, scenarios, worker=WORKER)


def test_two_processes_with_an_engine_each_select_what_one_selects(tmp_path):
    """Calls are seeded by shard, and engines in these processes draw by the seed."""
    scenarios = {"each": {}}
    two = results("ddp", tmp_path / "ddp", scenarios)["each"]
    one = results("single", tmp_path / "single", scenarios)["each"]
    assert (two["processes"], one["processes"]) == (2, 1)
    for what in ("success_rates", "chosen", "steps", "scoring_batch_prompts"):
        assert two[what] == one[what]


def test_processes_that_are_one_engine_draw_the_same_tokens(tmp_path):
    """Each has a shard of its own, but not a seed of its own: the engine would fall apart."""
    scenarios = {"shared": {"vllm_tensor_parallel_size": 2}}
    shared = results("ddp", tmp_path / "ddp", scenarios)["shared"]
    assert shared["processes"] == 2
    assert len(shared["chosen"]) == 6
    assert 0 < sum(shared["success_rates"]) < 12


def test_a_server_serves_two_processes(tmp_path):
    with vllm_cases.installed():
        vllm_cases.saved_policy(tmp_path / "served")
        with vllm_cases.server(tmp_path / "served", tmp_path / "log.txt") as server:
            options = {
                "vllm_mode": "server",
                "vllm_server_base_url": server.url,
                "vllm_group_port": vllm_cases.free_port(),
            }
            served = results("ddp", tmp_path / "ddp", {"served": options})["served"]
            log = server.log()
    assert served["processes"] == 2
    assert len(served["chosen"]) == 6
    # Two shards side by side in one request, then the third with its companion, which is thrown away; then training.
    assert log["rows"] == [32, 32, *[8] * served["steps"]]
    assert len(set(log["generations"][:3])) == 1
    assert len(set(log["generations"])) == served["steps"]
