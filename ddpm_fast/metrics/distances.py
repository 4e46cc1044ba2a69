"""Distances between the vectors of two sets, a block of rows at a time, so that the memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 25  # distances that are held at once: 128 MiB of float32


class Found(NamedTuple):
    """The nearest vectors of another set.

    Attributes:
        squares: [n, k], their squared distances, from the smallest.
        indices: int64 [n, k], which vectors have these distances.
    """

    squares: Tensor
    indices: Tensor


def comparable(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets [n, d] moved by the mean of the second, so that little cancels in their distances.

    They are float64 if either set is, or has integers, and float32 otherwise; on the first one's device.
    """
    single = all(vectors.is_floating_point() and vectors.dtype != torch.float64 for vectors in (first, second))
    mean = second.double().mean(0) if not single else second.mean(0, dtype=torch.float32)
    moved = [vectors.to(mean.dtype) - mean.to(vectors.device) for vectors in (first, second)]
    return moved[0], moved[1].to(first.device)


def squared_distances(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The squared Euclidean distances of rows [n, d] from columns [m, d]: blocks of rows, each with its place."""
    norms = columns.square().sum(1)
    step = max(1, _BLOCK // max(1, len(columns)))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        block = torch.addmm(norms, part, columns.T, alpha=-2).add_(part.square().sum(1, keepdim=True))
        yield slice(start, start + len(part)), block.clamp_(min=0)


def nearest_of(rows: Tensor, columns: Tensor, k: int, skip_self: bool = False) -> Found:
    """The k nearest columns of each row.

    Args:
        rows: [n, d].
        columns: [m, d], m at least k, or k + 1 with skip_self.
        k: How many.
        skip_self: Whether the i-th column is not counted for the i-th row, because both are the same set.
    """
    found = []
    for place, block in squared_distances(rows, columns):
        if skip_self:
            block.diagonal(place.start).fill_(torch.inf)
        indices = block.topk(k, largest=False).indices
        # The distances of the few that were found once more, without the cancellation: those of copies are 0.
        exact = torch.stack([(rows[place] - columns[chosen]).square().sum(1) for chosen in indices.unbind(1)], 1)
        exact, order = exact.sort(dim=1, stable=True)
        found.append((exact, indices.gather(1, order)))
    return Found(torch.cat([one for one, _ in found]), torch.cat([one for _, one in found]))
