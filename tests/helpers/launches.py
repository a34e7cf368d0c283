"""Scenarios on two processes, under each backend."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases

WORKER = Path(__file__).with_name("distributed_worker.py")
BACKENDS = ["ddp", "zero1", "zero2", "zero3", "zero3_partitioned", "fsdp2"]

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


def free_port() -> int:
    """A port that nobody listens on now; accelerate 1.4 takes 0 for a port and waits."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def launch(
    backend: str,
    folder: Path,
    scenarios: dict[str, Any],
    expect_failure: bool = False,
    worker: Path = WORKER,
    **environment: str,
) -> Any:
    """What a worker writes of its scenarios, or, of one that must fail, what it prints.

    Args:
        backend (`str`): One of [`BACKENDS`], or `"single"`: one process.
        folder (`Path`): Where models, configurations and results go.
        scenarios (`dict`): Name -> options, for the worker.
        expect_failure (`bool`): Whether the launch must fail.
        worker (`Path`): The script.
        **environment: Further variables.
    """
    folder.mkdir(exist_ok=True)
    for family in {options.get("family", "qwen2") for options in scenarios.values()}:
        cases.model(family).save_pretrained(folder / family)
    arguments = [str(worker), str(folder), json.dumps(scenarios)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
    ]
    if backend == "single":
        command = [sys.executable, *arguments]
    elif backend in ("ddp", "fsdp2"):
        command = [
            *torchrun,
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            *arguments,
        ]
    else:
        optimization = {"stage": int(backend[4])}
        if backend == "zero3_partitioned":
            optimization["stage3_param_persistence_threshold"] = 0
        (folder / "deepspeed.json").write_text(
            json.dumps({**ZERO, "zero_optimization": optimization})
        )
        (folder / "accelerate.yaml").write_text(ACCELERATE.format(file=folder / "deepspeed.json"))
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command = [
            *launcher,
            "--config_file",
            str(folder / "accelerate.yaml"),
            "--main_process_port",
            str(free_port()),
            *arguments,
        ]
    paths = os.pathsep.join(map(str, (cases.ROOT, WORKER.parent)))
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
        "WORKER_SECONDS": str(cases.HANGS - 20),
    }
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    if expect_failure:
        assert done.returncode != 0
        return done.stdout + done.stderr
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())
