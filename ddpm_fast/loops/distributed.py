"""What training on several processes (torch.distributed) needs. Without them there is one process."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_all_processes(x: Tensor) -> Tensor:
    """x [N] of every process, one after the other: [processes * N]. N must be the same everywhere."""
    if world_size() == 1:
        return x
    everywhere = x.new_empty(world_size() * len(x))
    dist.all_gather_into_tensor(everywhere, x.contiguous())
    return everywhere
