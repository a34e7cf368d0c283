"""Trainers that generate with a transformers model behind vLLM's interface (`fake_vllm`), in this process or a server.

Nothing of TRL is replaced but what has to be there on a machine without a GPU: that vLLM is installed, and that the
device of a weight transfer is CUDA's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cases
import pytest
import requests
import torch
from packaging.version import Version
from trl import __version__ as trl_version
from trl.generation import vllm_client, vllm_generation
from trl.scripts.vllm_serve import ScriptArguments, build_command
from trl.trainer import grpo_trainer

SPOKEN = pytest.mark.skipif(
    Version(trl_version).release < (1, 16), reason="before trl 1.16 TRL spoke to vLLM otherwise"
)
PACKAGE = Path(__file__).parent / "fake_vllm"
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What TRL sets for an engine in its process, and leaves."""


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """TRL finds vLLM."""
    environment = {name: os.environ.get(name) for name in ENVIRONMENT}
    sys.path.insert(0, str(PACKAGE))
    try:
        _load_again()
        with _without_cuda():
            yield
    finally:
        sys.path.remove(str(PACKAGE))
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        _load_again()
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _load_again() -> None:
    """TRL imports vLLM's names when its modules are loaded, if it is there."""
    importlib.reload(vllm_client)
    importlib.reload(vllm_generation)
    grpo_trainer.VLLMGeneration = vllm_generation.VLLMGeneration


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    client = vllm_client.VLLMClient
    init = client.init_communicator

    def of_no_device(self, device):
        init(self, torch.device("cuda"))

    client.init_communicator = of_no_device
    try:
        yield
    finally:
        client.init_communicator = init


def saved_policy(folder: Path, **options) -> Path:
    """A checkpoint, since an engine reads config and tokenizer from one."""
    cases.model(**options).save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    return folder


def policy_of(folder: Path):
    return type(cases.model()).from_pretrained(folder, dtype=torch.float32)


def trainer(output_dir, checkpoint: Path, **options):
    """A trainer whose engine is in this process; `vllm_mode="server"` for another."""
    return cases.trainer(output_dir, policy_of(checkpoint), use_vllm=True, **options)


def core(trainer):
    """The engine behind a trainer."""
    return trainer.vllm_generation.llm.core


@dataclass
class Server:
    """A server, started by the command that TRL builds for it."""

    url: str

    def log(self):
        return requests.get(f"{self.url}/fake/log", timeout=60).json()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def server(checkpoint: Path, log: Path) -> Iterator[Server]:
    """A server of a checkpoint; to be started while vLLM is [`installed`]."""
    port = free_port()
    command = build_command(ScriptArguments(model=str(checkpoint), host="127.0.0.1", port=port))
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(PACKAGE),
        "OMP_NUM_THREADS": "1",
    }
    with (
        log.open("w") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            yield Server(f"http://127.0.0.1:{port}")
        finally:
            process.kill()
