"""Two CPU processes under each backend, compared with one process."""

import functools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from launches import BACKENDS, launch

from trl_learnalign.records.store import ShardStore

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow

FULL_AND_LORA = {
    "full": {},
    "full_unscored": {"pool": "full"},
    "lora": {"lora": True, "beta": 0.1},
    "lora_unscored": {"lora": True, "beta": 0.1, "pool": "lora"},
    "checkpointing": {"gradient_checkpointing": True},
}
COVERING = {
    "covering": {
        "settings": {"stages": [6, 4], "selector": ["learnalign_coverage", "learnalign_logdet"]}
    },
}
RESTART = {
    "restart": {
        "settings": {"warmup_samples": 6, "after_warmup": "restart", "stages": [4]},
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
    },
    # What the stage alone would be: the same pool from the initial weights.
    "alone": {
        "pool": "restart",
        "settings": {"stages": [4]},
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
    },
}
REST = {
    **RESTART,
    "lopsided": {"reward": "lopsided", "settings": {"stages": [4]}},
    "history": {
        "reward": "by row",
        "settings": {"stages": [1.0], "stage_epochs": 2, "selector": "random"},
        "num_iterations": 2,
    },
}
# What the gate runs, of backends and scenarios; `make test-distributed` runs all.
GATED = [b if b in ("ddp", "zero3_partitioned") else pytest.param(b, marks=slow) for b in BACKENDS]


def features(folder, name, shards=5):
    """All features of a scoring on disk, by dataset row."""
    store = ShardStore(folder / name / "_learnalign" / "stage_1" / "gradients", {}, shards)
    found = {}
    for _, shard in store.read_all(range(shards)):
        rows = shard["feature_rows"].tolist()
        prompts = torch.arange(18).split(4)
        for row, vector in zip(rows, shard["features"], strict=True):
            found[int(prompts[_][row])] = vector
    return found


def scoring(folder, name):
    """What the record says of it."""
    record = json.loads((folder / name / "_learnalign" / "run.json").read_text())
    return record["phases"]["stage_1"]["selection"]["scoring"]


def self_check(folder, name):
    return scoring(folder, name)["self_check"]


def coverage(folder, name):
    return scoring(folder, name)["coverage"]


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    """Folder and results of a backend: one launch runs all scenarios that the selected tests look at, as starting
    takes longer than they do.
    """
    own = [item for item in request.session.items if item.module is request.module]
    needs_rest = any(item.get_closest_marker("slow") for item in own)
    wanted = {**FULL_AND_LORA, **COVERING, **(REST if needs_rest else {})}

    @functools.cache
    def run(backend):
        folder = tmp_path_factory.mktemp(backend)
        scenarios = {
            name: {**options, "fsdp": backend == "fsdp2"} for name, options in wanted.items()
        }
        return folder, launch(backend, folder, scenarios)

    return run


@pytest.mark.parametrize("backend", GATED)
def test_two_processes_select_what_one_selects(launched, backend):
    alone_folder, alone = launched("single")
    folder, found = launched(backend)
    for name in ("full", "lora", "checkpointing"):
        result = found[name]
        assert result["processes"] == 2
        assert result["distributed_type"] == ("DEEPSPEED" if "zero" in backend else "MULTI_CPU")
        assert result["zero_stage"] == (int(backend[4]) if "zero" in backend else 0)
        assert result["sharded"] == (backend == "fsdp2" or "zero3" in backend)
        assert result["pools"] == alone[name]["pools"]
        checked = self_check(folder, name)
        if backend == "fsdp2":
            assert "FSDP2" in checked["not_checked"]
        else:
            assert len(checked["prompts"]) == 4  # two on each rank
            assert checked["relative_error"] < 1e-5
        ours, theirs = features(folder, name), features(alone_folder, name)
        assert ours.keys() == theirs.keys()
        assert len(ours) >= 8
        for prompt in ours:
            assert float((ours[prompt] - theirs[prompt]).norm() / theirs[prompt].norm()) < 1e-5
    for name in ("full", "lora"):
        assert found[name]["grad_norms"] == found[f"{name}_unscored"]["grad_norms"]
        assert found[name]["digests"] == found[f"{name}_unscored"]["digests"]
        assert len(found[name]["grad_norms"]) == 3
        assert np.isfinite(found[name]["grad_norms"]).all()


@pytest.mark.parametrize("backend", GATED)
def test_two_processes_cover_the_pool_as_one_does(launched, backend):
    alone_folder, alone = launched("single")
    folder, found = launched(backend)
    assert found["covering"]["pools"]["stage_1"] == alone["covering"]["pools"]["stage_1"]
    noted = [
        json.loads((each / "covering" / "_learnalign" / "run.json").read_text())["phases"][
            "stage_1"
        ]
        for each in (folder, alone_folder)
    ]
    ours, theirs = (each["selection"]["breadth"] for each in noted)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(found["covering"]["pools"]["stage_2"]) == 4


@slow
@pytest.mark.parametrize("backend", ["single", *BACKENDS])
def test_restart_is_a_run_of_the_stage_alone(launched, backend):
    """With the same random numbers from the stage's start on: the same weights after every step, to the last bit."""
    _, found = launched(backend)
    alone, restarted = found["alone"], found["restart"]
    steps = len(alone["grad_norms"])
    assert steps == 2
    assert restarted["digests"][-steps - 1 :] == alone["digests"]
    assert restarted["grad_norms"][-steps:] == alone["grad_norms"]
    assert restarted["learning_rates"][-steps:] == alone["learning_rates"]
    assert (
        len(set(restarted["digests"])) == len(restarted["digests"]) - 1
    )  # back to the first one, once


@slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_with_nothing_to_learn_does_not_hang(launched, backend):
    folder, found = launched(backend)
    learnable = set(features(folder, "lopsided"))
    assert {row // 4 % 2 for row in learnable} == {1}
    assert set(found["lopsided"]["pools"]["stage_1"]) <= learnable


@slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_success_goes_to_its_prompt_in_the_reward_history(launched, backend):
    folder, found = launched(backend)
    assert found["history"]["processes"] == 2
    table = pd.read_parquet(folder / "history" / "_learnalign" / "reward_history.parquet")
    assert (
        table.groupby("pass")["index"].agg(lambda rows: sorted(set(rows))).tolist()
        == [list(range(18))] * 2
    )
    np.testing.assert_allclose(table["success_rate"], table["index"] % 5 / 4)


def test_a_rank_that_dies_is_named_and_the_others_end(tmp_path):
    said = launch("ddp", tmp_path, {"dying": {"die_at_call": 3}}, expect_failure=True)
    assert "rank 1 failed while measuring shard 3 of stage_1" in said
    assert "OSError: the grader is gone" in said
    store = tmp_path / "dying" / "_learnalign" / "stage_1" / "gradients"
    assert len(list(store.glob("shard-*.safetensors"))) == 2  # what was finished before stays


@slow
@pytest.mark.parametrize("backend", ["ddp", "zero3_partitioned"])
def test_gradients_that_are_wrong_on_one_rank_stop_all(tmp_path, backend):
    wrong = {
        "wrong": {"wrong_on_last_rank": True, "reward": "lopsided", "settings": {"stages": [4]}}
    }
    said = launch(backend, tmp_path, wrong, expect_failure=True)
    assert "SelfCheckError: check_gradients: the captured gradients of prompts [4, 5]" in said
    assert "[rank0]" in said
    assert "[rank1]" in said


FUSED = [
    f"model.layers.{layer}.mlp.{name}"
    for layer in range(2)
    for name in ("experts.down_proj", "experts.gate_up_proj", "gate.weight")
]


ROUTED = {
    "leaf": {"family": "routed", "leaf": True},
    "leaf_unscored": {"family": "routed", "leaf": True, "pool": "leaf"},
    "fused": {"family": "mixtral"},
    "fused_unscored": {"family": "mixtral", "pool": "fused"},
}


@slow
def test_routed_experts_on_partitioned_weights_are_captured_or_named(tmp_path):
    """Decided by all ranks together; and what ZeRO-3 reduces in the next step is untouched by scoring."""
    alone = launch("single", tmp_path / "single", {"leaf": {"family": "routed"}})
    found = launch("zero3_partitioned", tmp_path / "zero3", ROUTED)
    for name in ("leaf", "fused"):
        assert self_check(tmp_path / "zero3", name)["relative_error"] < 1e-5
        assert found[name]["grad_norms"] == found[f"{name}_unscored"]["grad_norms"]
        assert found[name]["digests"] == found[f"{name}_unscored"]["digests"]
    assert coverage(tmp_path / "zero3", "leaf")["share"] == 1
    assert found["leaf"]["pools"] == alone["leaf"]["pools"]
    ours, theirs = features(tmp_path / "zero3", "leaf"), features(tmp_path / "single", "leaf")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[p] - theirs[p]).norm() / theirs[p].norm()) for p in ours) < 1e-5
    assert coverage(tmp_path / "zero3", "fused")["missing"] == FUSED


@slow
def test_fused_experts_under_fsdp2_are_named(tmp_path):
    launch("fsdp2", tmp_path, {"fused": {"family": "mixtral", "fsdp": True}})
    assert coverage(tmp_path, "fused")["missing"] == FUSED
    assert coverage(tmp_path, "fused")["share"] < 0.5


@slow
def test_ranks_that_disagree_are_refused(tmp_path):
    said = launch("ddp", tmp_path, {"diverging": {"diverge": True}}, expect_failure=True)
    assert "Ranks disagree on plan, dataset and selection settings: {0: " in said
    assert "same arguments, dataset and library versions" in said


@slow
def test_processes_that_would_train_apart_are_refused(tmp_path):
    said = launch("ddp", tmp_path, {"apart": {"use_cpu": False}}, expect_failure=True)
    assert "The launcher started 2 processes, but this one sees 1" in said
    assert "set use_cpu=True" in said


@slow
def test_fsdp_that_accelerate_leaves_out_is_refused(tmp_path):
    said = launch("ddp", tmp_path, {"plain": {}}, expect_failure=True, ACCELERATE_USE_FSDP="true")
    assert "FSDP was requested, but accelerate runs" in said


SAVING = {
    "save_strategy": "steps",
    "save_steps": 1,
    "settings": {"stages": [6, 6], "stage_epochs": 2},
}


@slow
@pytest.mark.parametrize(("first", "second"), [("ddp", "single"), ("single", "ddp")])
def test_a_run_continues_on_another_number_of_processes(tmp_path, first, second):
    """Pools and prompt order are functions of the position in prompts, never of ranks."""
    folder = tmp_path / "run"
    killed = launch(first, folder, {"run": {**SAVING, "kill_at": 3}})["run"]
    resumed = launch(second, folder, {"again": {**SAVING, "output": "run", "resume": True}})[
        "again"
    ]
    assert killed["processes"] + resumed["processes"] == 3
    assert resumed["pools"]["stage_1"] == killed["pools"]["stage_1"]
    assert not set(resumed["pools"]["stage_1"]) & set(resumed["pools"]["stage_2"])
    from trl_learnalign.plan import training_order

    trained = sorted(map(tuple, killed["trained"] + resumed["trained"]))
    for stage, start in (("stage_1", 0), ("stage_2", 6)):
        order = training_order(42, stage, resumed["pools"][stage], 0, 12).reshape(6, 2)
        expected = sorted(
            (start + step, int(row)) for step, rows in enumerate(order) for row in set(rows)
        )
        assert [(step, row) for step, row in trained if start <= step < start + 6] == expected


@slow
def test_an_interrupted_scoring_continues_on_another_number_of_processes(tmp_path, launched):
    launch("ddp", tmp_path, {"run": {"die_at_call": 3}}, expect_failure=True)
    resumed = launch("single", tmp_path, {"again": {"output": "run"}})["again"]
    assert resumed["pools"] == launched("single")[1]["full"]["pools"]
    assert (
        resumed["scored"] == 2 * 2 + 1
    )  # two shards of two calls and the last one; two were found
