"""`vllm.distributed.weight_transfer.packed_tensor`: tensors one after the other, without their names."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

DEFAULT_PACKED_BUFFER_SIZE_BYTES = 1024 * 1024 * 1024
DEFAULT_PACKED_NUM_BUFFERS = 2


def packed_nccl_broadcast_producer(
    iterator: Iterator[tuple[str, torch.Tensor]],
    group: Any,
    src: int,
    post_iter_func: Callable[[tuple[str, torch.Tensor]], torch.Tensor],
    buffer_size_bytes: int = DEFAULT_PACKED_BUFFER_SIZE_BYTES,
    num_buffers: int = DEFAULT_PACKED_NUM_BUFFERS,
) -> None:
    for item in iterator:
        group.broadcast(post_iter_func(item).detach().cpu().flatten(), src=src)
