"""Runs a backend's kernels of the network's ops on given operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from support import norms
from torch import Tensor

from ddpm_fast.ops.tensors import Norm


def _image_like(norm: Norm, channels: int) -> Tensor:
    n, _, *size = norm.x.shape
    return torch.empty(n, channels, *size, dtype=norm.x.dtype, device=norm.x.device).contiguous(
        memory_format=torch.channels_last
    )


def run(
    ops: Mapping[str, Callable], norm: Norm, grad: Tensor, grad_total: Tensor | None, keep_total: bool
) -> tuple[Norm, dict[str, Tensor], Tensor]:
    """Every op of a norm on a backend, without a check or autograd in between.

    Args:
        ops: the backend's kernels by name.
        norm: what the norm is of.
        grad: dL/dy.
        grad_total: dL/dtotal, or None.
        keep_total: whether to ask for the total. A residual without it has no backward.

    Returns:
        (the norm that y is of, its results by the names of norms.in_float64, the statistics)
    """
    n, channels = len(norm.x), len(norm.weight)
    y, total = _image_like(norm, channels), _image_like(norm, norm.x.shape[1]) if keep_total else None
    statistics = torch.full((n, norm.groups, 3), torch.nan, device=norm.x.device)
    ops["group_norm"](norm, y, total, statistics)
    found = {"y": y}
    if keep_total:
        assert torch.equal(total, composed_total(norm)), "total is not the rounded sum"
        norm = norms.of_total(norm, total)
    if norm.residual is not None:
        return norm, found, statistics
    dx, djoined = _image_like(norm, norm.x.shape[1]), None
    if norm.joined is not None:
        djoined = found["djoined"] = _image_like(norm, norm.joined.shape[1])
    sums = torch.full((3, n, channels), torch.nan, device=norm.x.device)
    ops["group_norm_backward"](norm, grad, grad_total, statistics, dx, djoined, sums)
    found |= {"dx": dx, "sum_g": sums[0], "sum_gn": sums[1], "sum_dx": sums[2]}
    found |= {name: torch.full((channels,), torch.nan, device=norm.x.device) for name in ("dweight", "dbias")}
    rows = torch.full((2, n, channels), torch.nan, device=norm.x.device) if norm.scale is not None else (None, None)
    ops["group_norm_parameters"](sums, norm.weight, norm.bias, norm.scale, found["dweight"], found["dbias"], *rows)
    if norm.scale is not None:
        found["dscale"], found["dshift"] = rows
    return norm, found, statistics


def composed_total(norm: Norm) -> Tensor:
    """x + residual + added, added in this order in fp32 and rounded once."""
    total = norm.x.float()
    if norm.residual is not None:
        total = total + norm.residual.float()
    if norm.added is not None:
        total = total + norm.added.float()[..., None, None]
    return total.to(norm.x.dtype)
