"""Tensors in one block of memory, so that what is done to all of them alike is one operation instead of hundreds.

On a GPU an operation on a small tensor takes as long as its launch, some two microseconds, and a U-Net has 250 weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGNMENT = 64  # elements: 128 bytes of bf16, which is more than a convolution asks for


class Block:
    """Memory for tensors of one dtype that are shaped like others, with the same strides.

    Two blocks for the same tensors have their elements in the same places.

    Attributes:
        memory: All of it, 1-D. What lies between the tensors is 0.
        tensors: The tensors, views of it.
    """

    def __init__(self, like: Sequence[Tensor], dtype: torch.dtype):
        starts, end = [], 0
        for tensor in like:
            starts.append(end)
            end += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
        self.memory = torch.zeros(end, dtype=dtype, device=like[0].device if like else None)
        self.tensors = [
            self.memory.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride(), start)
            for tensor, start in zip(like, starts, strict=True)
        ]


@torch.no_grad()
def lay_out(model: nn.Module) -> None:
    """Move a model's parameters to one block of memory; they keep their values and memory formats.

    The parameters must have one dtype and device. Whoever has kept their storage sees no more changes.
    """
    parameters = list(model.parameters())
    block = Block(parameters, parameters[0].dtype)
    for parameter, place in zip(parameters, block.tensors, strict=True):
        place.copy_(parameter)
        parameter.data = place


def memory_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """The memory of tensors that lie in one block of their dtype, 1-D; or None."""
    if len(tensors) < 2:
        return None
    first = tensors[0]
    places = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), t.dtype) for t in tensors}
    size = first.untyped_storage().nbytes() // first.itemsize
    # On the device meta each address is 0, but tensors of their own do not have room for all.
    if len(places) > 1 or size < sum(t.numel() for t in tensors):
        return None
    return first.detach().as_strided((size,), (1,), 0)


def strided_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor with its elements in memory as the other's are: itself, nearly always."""
    pairs = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    if all(a == b for size, a, b in pairs if size > 1):
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory. Strides along a size of 1 differ, and would each cost a
    kernel."""
    return tensor.as_strided((tensor.numel(),), (1,))
