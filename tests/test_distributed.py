"""Two CPU processes under each backend, compared with one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import torch

from trl_learnalign.store import ShardStore

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("distributed_worker.py")
ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: {file}
  zero3_init_flag: false
num_machines: 1
num_processes: 2
use_cpu: true
"""
FULL_AND_LORA = {
    "full": {},
    "full_unscored": {"pool": "full"},
    "lora": {"lora": True, "beta": 0.1},
    "lora_unscored": {"lora": True, "beta": 0.1, "pool": "lora"},
    "checkpointing": {"gradient_checkpointing": True},
}
BACKENDS = ["ddp", "zero1", "zero2", "zero3", "zero3_partitioned", "fsdp2"]


def launch(backend, folder, scenarios, expect_failure=False, timeout=600, **environment):
    folder.mkdir(exist_ok=True)
    cases.model().save_pretrained(folder / "policy")
    arguments = [str(WORKER), str(folder), json.dumps(scenarios)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    if backend == "single":
        command = [sys.executable, *arguments]
    elif backend in ("ddp", "fsdp2"):
        command = [*torchrun, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *arguments]
    else:
        optimization = {"stage": int(backend[4])}
        if backend == "zero3_partitioned":
            optimization["stage3_param_persistence_threshold"] = 0
        (folder / "deepspeed.json").write_text(json.dumps({**ZERO, "zero_optimization": optimization}))
        (folder / "accelerate.yaml").write_text(ACCELERATE.format(file=folder / "deepspeed.json"))
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command = [*launcher, "--config_file", str(folder / "accelerate.yaml"), "--main_process_port", "0", *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if expect_failure:
        assert done.returncode != 0
        return done.stdout + done.stderr
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())


def features(folder, name, shards=5):
    """All features of a scoring on disk, by dataset row."""
    store = ShardStore(folder / name / "learnalign" / "stage_1" / "gradients", {}, shards)
    found = {}
    for _, shard in store.read_all(range(shards)):
        rows = shard["feature_rows"].tolist()
        prompts = torch.arange(18).split(4)
        for row, vector in zip(rows, shard["features"], strict=True):
            found[int(prompts[_][row])] = vector
    return found


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return folder, launch("single", folder, FULL_AND_LORA)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_select_what_one_selects(tmp_path, single, backend):
    alone_folder, alone = single
    scenarios = {name: {**options, "fsdp": backend == "fsdp2"} for name, options in FULL_AND_LORA.items()}
    found = launch(backend, tmp_path, scenarios)
    for name in ("full", "lora", "checkpointing"):
        result = found[name]
        assert result["processes"] == 2
        assert result["distributed_type"] == ("DEEPSPEED" if "zero" in backend else "MULTI_CPU")
        assert result["zero_stage"] == (int(backend[4]) if "zero" in backend else 0)
        assert result["sharded"] == (backend == "fsdp2" or "zero3" in backend)
        assert result["pools"] == alone[name]["pools"]
        ours, theirs = features(tmp_path, name), features(alone_folder, name)
        assert ours.keys() == theirs.keys()
        assert len(ours) >= 8
        for prompt in ours:
            assert float((ours[prompt] - theirs[prompt]).norm() / theirs[prompt].norm()) < 1e-5
    for name in ("full", "lora"):
        assert found[name]["grad_norms"] == found[f"{name}_unscored"]["grad_norms"]
        assert found[name]["digests"] == found[f"{name}_unscored"]["digests"]
        assert len(found[name]["grad_norms"]) == 3
        assert np.isfinite(found[name]["grad_norms"]).all()


RESTART = {
    "restart": {
        "settings": {"warmup_samples": 6, "after_warmup": "restart", "stages": [4]},
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
    },
    # What the stage alone would be: the same pool from the initial weights.
    "alone": {"pool": "restart", "settings": {"stages": [4]}, "lr_scheduler_type": "cosine", "weight_decay": 0.1},
}


@pytest.mark.parametrize("backend", ["single", *BACKENDS])
def test_restart_is_a_run_of_the_stage_alone(tmp_path, backend):
    """With the same random numbers from the stage's start on: the same weights after every step, to the last bit."""
    scenarios = {name: {**options, "fsdp": backend == "fsdp2"} for name, options in RESTART.items()}
    found = launch(backend, tmp_path, scenarios)
    alone, restarted = found["alone"], found["restart"]
    steps = len(alone["grad_norms"])
    assert steps == 2
    assert restarted["digests"][-steps - 1 :] == alone["digests"]
    assert restarted["grad_norms"][-steps:] == alone["grad_norms"]
    assert restarted["learning_rates"][-steps:] == alone["learning_rates"]
    assert len(set(restarted["digests"])) == len(restarted["digests"]) - 1  # back to the first one, once
