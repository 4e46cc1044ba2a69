"""The processes that train together (torch.distributed), and what they tell each other. Without them there is one.

Nothing here starts a process: torchrun, accelerate launch, srun or Ray do.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _is_on() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _is_on() else 1


def of_all_processes(x: Tensor) -> Tensor:
    """x [N] of every process, one after the other: [processes * N]. N must be the same everywhere."""
    if world_size() == 1:
        return x
    everywhere = x.new_empty(world_size() * len(x))
    dist.all_gather_into_tensor(everywhere, x.contiguous())
    return everywhere


def of_first_process(value: Any) -> Any:
    """What the first process gives, in every process: something that can be pickled."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _is_on() -> bool:
    return dist.is_available() and dist.is_initialized()
