"""A line of the ledger, and what it is made from: an op as it was called, and the bytes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.ledger.pretence import META

CONVOLUTIONS, PRODUCTS, ATTENTION, NORMS = "convolutions", "matrix products", "attention", "norms"
ELEMENTWISE, COPIES, REDUCTIONS, RESAMPLING = "elementwise", "copies and casts", "reductions", "resampling"
OPTIMISER, DIFFUSION = "optimiser", "diffusion"
KINDS = (CONVOLUTIONS, PRODUCTS, ATTENTION, NORMS, ELEMENTWISE, COPIES, REDUCTIONS, RESAMPLING, OPTIMISER, DIFFUSION)
_REDUCING_PARTS = (": moments", ": sums")

Storages = tuple[tuple[StorageWeakRef, int], ...]


class Line(NamedTuple):
    """An entry of the ledger: kernels of one kind that an op launches, and the bytes that they move together.

    fusable: whether a compiler could make it a part of a neighbour: the line reads and writes tensors element by
    element, or reduces them. reduces: whether what depends on it has to wait for the whole of it. reads, writes: the
    tensors' storages, with the bytes.
    """

    op: str
    kind: str
    kernels: int
    bytes: int
    fusable: bool = False
    reduces: bool = False
    reads: Storages = ()
    writes: Storages = ()


class Call(NamedTuple):
    """An op as it was called. arguments: by the names of its schema. results: its results, as a list."""

    name: str
    arguments: dict[str, Any]
    results: list[Tensor]

    @property
    def inputs(self) -> list[Tensor]:
        return [value for value in flat(self.arguments.values()) if value.device == META]


def flat(values: Any) -> list[Tensor]:
    """The tensors among the values, and in the lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += flat(value)
    return found


def size(tensor: Tensor) -> int:
    """The bytes of memory that a tensor's elements take: what is expanded is read once."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(length for length, step in steps if step != 0 or length == 0)


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def line(
    op: str, kind: str, reads: Sequence[Tensor], writes: Sequence[Tensor], kernels: int = 1, fusable: bool = False
) -> Line:
    """A line whose kernels together read and write each of the tensors once."""
    # Weak references: autograd takes a gradient over only where nobody else has it, and copies it otherwise.
    sides = [tuple((StorageWeakRef(t.untyped_storage()), size(t)) for t in side) for side in (reads, writes)]
    moved = sum(n for side in sides for _, n in side)
    return Line(op, kind, kernels, moved, fusable, kind == REDUCTIONS or op.endswith(_REDUCING_PARTS), *sides)
