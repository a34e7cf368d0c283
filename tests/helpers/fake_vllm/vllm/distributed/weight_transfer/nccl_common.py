"""`vllm.distributed.weight_transfer.nccl_common`, with a socket in the place of NCCL."""

import socket
from types import SimpleNamespace
from typing import Any

import torch


class Communicator:
    """The trainer's end; it is rank 0, and the other end has to come to it."""

    def __init__(self, connection: socket.socket):
        self.group = SimpleNamespace(store=object(), socket=connection)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        if src != 0:
            raise ValueError(f"src={src}: weights come from the trainer, rank 0")
        self.group.socket.sendall(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def trainer_init(init_info: Any, rank: int = 0) -> Communicator:
    if rank != 0 or init_info["world_size"] != 2:
        raise NotImplementedError("one trainer and one worker")
    with socket.create_server((init_info["master_address"], init_info["master_port"])) as server:
        server.settimeout(60)
        connection, _ = server.accept()
    return Communicator(connection)
