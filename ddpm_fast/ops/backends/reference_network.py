"""The U-Net's ops in plain torch: the reference's part for ops/norm.py, ops/channels.py, ops/dropping.py
and ops/convolution.py."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ddpm_fast.noise import NoiseKey, dropout_bits
from ddpm_fast.ops.tensors import Norm, kept_scale, per_channel, working_dtype


def added_up(norm: Norm) -> Tensor:
    """x + residual + added in fp32, or float64 if x is."""
    x, dtype = norm.x, torch.promote_types(norm.x.dtype, torch.float32)
    total = x.to(dtype)
    if norm.residual is not None:
        total = total + norm.residual.to(dtype)
    return total if norm.added is None else total + per_channel(norm.added.to(dtype), x)


def plain_group_norm(norm: Norm) -> Tensor:
    """y of ops.group_norm in torch's own operations, differentiable to any order."""
    x, weight, bias, scale, shift, _, _, joined, groups, eps, silu = norm
    y = added_up(norm)
    compute = y.dtype
    if joined is not None:
        y = torch.cat([y, joined.to(compute)], 1)
    if torch.is_grad_enabled() and not y.requires_grad:
        # torch 2.13 crashes in the backward of a channels_last image that needs no gradient where the weight does. Not
        # .contiguous(), which keeps the strides of channels_last where the two formats are one, as for 1x1 images.
        y = y.clone(memory_format=torch.contiguous_format)
    # Not F.group_norm, which refuses groups of one value.
    y = torch.group_norm(y, groups, weight.to(compute), bias.to(compute), eps)
    if scale is not None and shift is not None:
        y = y * (1 + per_channel(scale.to(compute), x)) + per_channel(shift.to(compute), x)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def _widened(norm: Norm) -> Tensor:
    """[x + residual + added, joined] in float64"""
    total = added_up(norm._replace(x=norm.x.double()))
    return total if norm.joined is None else torch.cat([total, norm.joined.double()], 1)


def group_norm(norm: Norm, y: Tensor, total: Tensor | None, statistics: Tensor) -> None:
    if not y.numel():
        statistics.fill_(math.nan)
        return
    if total is not None:
        total.copy_(added_up(norm))
        norm = norm._replace(x=total, residual=None, added=None)
    y.copy_(plain_group_norm(norm))
    groups = _widened(norm).unflatten(1, (norm.groups, -1)).flatten(2)
    variance, mean = torch.var_mean(groups, 2, correction=0)
    centre = mean.float()
    statistics.copy_(torch.stack([centre, mean - centre, (variance + norm.eps).rsqrt()], 2))


def group_norm_backward(
    norm: Norm,
    grad: Tensor,
    grad_total: Tensor | None,
    statistics: Tensor,
    dx: Tensor,
    djoined: Tensor | None,
    sums: Tensor,
) -> None:
    x, weight, bias, scale, shift, *_ = norm
    if not grad.numel():
        sums.zero_()
        return
    per_group = grad.shape[1] // norm.groups

    def of_channels(of_groups: Tensor) -> Tensor:
        return per_channel(of_groups.repeat_interleave(per_group, 1), x)

    def group_mean(v: Tensor) -> Tensor:
        return of_channels(v.unflatten(1, (norm.groups, -1)).flatten(2).mean(2))

    centre, rest, rstd = (of_channels(v) for v in statistics.double().unbind(2))
    n = (_widened(norm) - (centre + rest)) * rstd
    spread = 1.0 if scale is None else 1 + per_channel(scale.double(), x)
    factor, offset = (per_channel(v.double()[None], x) * spread for v in (weight, bias))
    g = grad.double()
    if norm.silu:
        u = n * factor + offset + (0.0 if shift is None else per_channel(shift.double(), x))
        sigmoid = torch.sigmoid(u)
        g = g * sigmoid * (1 + u * (1 - sigmoid))
    exact = rstd * (factor * g - group_mean(factor * g) - n * group_mean(factor * g * n))
    if grad_total is not None:
        exact[:, : x.shape[1]] += grad_total
    dx.copy_(exact[:, : x.shape[1]])
    if djoined is not None:
        djoined.copy_(exact[:, x.shape[1] :])
    sums.copy_(torch.stack([v.flatten(2).sum(2) for v in (g, g * n, exact)]))


def group_norm_parameters(
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    dscale: Tensor | None,
    dshift: Tensor | None,
) -> None:
    of_g, of_gn, _ = sums.double()
    spread = 1.0 if scale is None else 1 + scale.double()
    dbias.copy_((of_g * spread).sum(0))
    dweight.copy_((of_gn * spread).sum(0))
    if dscale is not None and dshift is not None:
        dscale.copy_(weight.double() * of_gn + bias.double() * of_g)
        dshift.copy_(of_g)


def plain_add_bias(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> Tensor:
    """ops.add_bias in torch's own operations."""
    compute = torch.promote_types(x.dtype, torch.float32)
    out = x.to(compute)
    if residual is not None:
        out = out + residual.to(compute)
    if bias is not None:
        out = out + bias.to(compute)[:, None, None]
    return out.to(x.dtype)


def add_bias(x: Tensor, residual: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    norm = Norm(x, x, x, None, None, bias, residual, None, 1, 0.0, False)
    out.copy_(added_up(norm))


def channel_sums(image: Tensor, out: Tensor) -> None:
    out.copy_(image.double().sum((0, 2, 3)))


def winograd_matrices(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """G [6, 3], B^T [6, 6] and A^T [4, 6] of csrc/winograd.h, in float64."""
    points = (0.0, 0.625, -0.625, 1.5, -1.5)
    others = [[q for q in points if q != p] for p in points]
    filters = [
        [p**k / math.prod(p - q for q in rest) for k in range(3)] for p, rest in zip(points, others, strict=True)
    ]
    image = [[*np.poly(rest)[::-1], 0.0] for rest in others]
    outputs = [[p**k for p in points] + [float(k == 3)] for k in range(4)]
    rows = [*filters, [0.0, 0.0, 1.0]], [*image, list(np.poly(points)[::-1])], outputs
    g, b_t, a_t = (torch.tensor(matrix, dtype=torch.float64, device=device) for matrix in rows)
    return g, b_t, a_t


def winograd_filters(weight: Tensor, flipped: bool, out: Tensor) -> None:
    """F = G g G^T at the 36 points, in float64. flipped: of weight.transpose(0, 1).flip(2, 3)."""
    to_points, _, _ = winograd_matrices(weight.device)
    both = (to_points[:, None, :, None] * to_points[None, :, None, :]).reshape(36, 9)
    weight = weight.transpose(0, 1).flip(2, 3) if flipped else weight
    out.zero_()
    for panel, part in zip(out, weight.split(out.shape[3]), strict=True):
        taps = part.permute(2, 3, 1, 0).double().reshape(9, -1)
        panel[..., : len(part)] = (both @ taps).view(36, weight.shape[1], -1)


def winograd_weight_gradient(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """By the definition, without Winograd's algorithm."""
    dtype = working_dtype(x)
    out.copy_(conv2d_weight(x.to(dtype), out.shape, grad.to(dtype), padding=1))


def winograd(x: Tensor, filters: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Y = A^T [F * (B^T d B)] A of each 6x6 tile d, where F are the filters at the 36 points."""
    if not out.numel():
        return
    dtype = working_dtype(x)
    _, to_points, to_pixels = (matrix.to(dtype) for matrix in winograd_matrices(x.device))
    n, channels, height, width = x.shape
    down, across = -(-height // 4), -(-width // 4)
    padded = F.pad(x.to(dtype), (1, 4 * across + 1 - width, 1, 4 * down + 1 - height))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # [N, C, down, across, 6, 6]
    image = torch.einsum("pi,qj,ncyxij->ncyxpq", to_points, to_points, tiles)
    by_point = filters.to(dtype).permute(0, 3, 1, 2).reshape(-1, 6, 6, channels)[: out.shape[1]]
    products = torch.einsum("kpqc,ncyxpq->nkyxpq", by_point, image)
    pixels = torch.einsum("ip,jq,nkyxpq->nkyixj", to_pixels, to_pixels, products)
    y = pixels.reshape(n, out.shape[1], 4 * down, 4 * across)[:, :, :height, :width]
    out.copy_(y if bias is None else y + bias.to(dtype)[:, None, None])


def dropout(x: Tensor, key: NoiseKey, layer: int, dropped: int, out: Tensor) -> None:
    if not x.numel():
        return
    n, channels = x.shape[:2]
    bits = dropout_bits(key, layer, math.prod(x.shape[1:]))
    kept = (bits >= dropped).view(n, -1, channels).transpose(1, 2).reshape(x.shape)
    # Chosen and not multiplied, so that what is dropped is 0 also of an infinity.
    out.copy_(torch.where(kept, x.to(working_dtype(x)) * kept_scale(dropped), 0.0))
