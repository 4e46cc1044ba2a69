"""Operands of the network's ops, their results in float64, and the error that plain torch makes in fp32: a kernel's may
be twice that. Everything is on the CPU, and float64's derivatives are autograd's, so that no formula is shared with a
kernel.

    norm, grad, grad_total = operands(Norms((2, 12, 5, 3), groups=3, options={"silu", "scale"}, mean=30.0))
    exact = in_float64(norm, grad, grad_total)
    check({"y": y, "dx": dx}, exact, in_fp32(norm, grad, grad_total))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.ops.tensors import Norm

# Results are right to two fp32 roundings of the largest number that goes into them, if plain torch is not worse.
TINY = 2.0**-22
IMAGES = ("y", "dx", "djoined")
# A mean that is 1000 standard deviations in fp32, and as many as the dtype's digits can show in the others.
MEANS = {torch.float32: 1000.0, torch.bfloat16: 30.0, torch.float16: 200.0}


@dataclass(frozen=True)
class Norms:
    """A group norm by its sizes.

    Args:
        shape: x's, [N, Cx, H, W].
        groups: of all channels, the joined image's included.
        joined: the joined image's channels; 0 for none.
        options: some of "scale" (with shift), "added", "residual", "silu" and "grad_total".
        dtype: the images'.
        vectors: the dtype of weight, bias, scale, shift and added.
        mean: of x and joined, whose standard deviation is 1.
    """

    shape: tuple[int, int, int, int]
    groups: int
    joined: int = 0
    options: frozenset[str] | set[str] = frozenset()
    dtype: torch.dtype = torch.float32
    vectors: torch.dtype = torch.float32
    mean: float = 0.0


def operands(case: Norms, seed: int = 0) -> tuple[Norm, Tensor, Tensor | None]:
    """(norm, grad, grad_total). The images are channels_last, and scale and shift halves of the same rows."""
    generator = torch.Generator().manual_seed(seed)
    n, channels, *size = case.shape
    both = channels + case.joined

    def image(channels: int, mean: float = 0.0) -> Tensor:
        values = torch.randn(n, channels, *size, generator=generator, dtype=torch.float64) + mean
        return values.to(case.dtype).contiguous(memory_format=torch.channels_last)

    def vector(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.vectors)

    scale, shift = vector(n, 2 * both).chunk(2, dim=1) if "scale" in case.options else (None, None)
    norm = Norm(
        x=image(channels, case.mean),
        weight=vector(both),
        bias=vector(both),
        scale=scale,
        shift=shift,
        added=vector(n, channels) if "added" in case.options else None,
        residual=image(channels) if "residual" in case.options else None,
        joined=image(case.joined, case.mean) if case.joined else None,
        groups=case.groups,
        eps=1e-5,
        silu="silu" in case.options,
    )
    return norm, image(both), image(channels) if "grad_total" in case.options else None


def of_total(norm: Norm, total: Tensor) -> Norm:
    """The norm of a total that was kept: what its y has to be, and what its backward is given."""
    return norm._replace(x=total, residual=None, added=None)


class Result(NamedTuple):
    """magnitude: the largest sum of the absolute values whose sum a result's value is."""

    value: Tensor
    magnitude: float


def _summed(norm: Norm, dtype: torch.dtype) -> Tensor:
    v = norm.x.to(dtype)
    if norm.residual is not None:
        v = v + norm.residual.to(dtype)
    return v if norm.added is None else v + norm.added.to(dtype)[..., None, None]


def total_of(norm: Norm) -> Tensor:
    """x + residual + added, in float64."""
    return _summed(norm, torch.float64)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def _through_torch(norm: Norm, grad: Tensor, grad_total: Tensor | None, dtype: torch.dtype) -> dict[str, Result]:
    v = _summed(norm, dtype).contiguous().requires_grad_()
    joined = None if norm.joined is None else norm.joined.to(dtype).contiguous().requires_grad_()
    weight, bias = (values.to(dtype).requires_grad_() for values in (norm.weight, norm.bias))
    n, channels = norm.x.shape[0], len(weight)
    rows = torch.zeros(n, channels, dtype=dtype)
    scale, shift = ((rows if values is None else values.to(dtype)).requires_grad_() for values in norm[3:5])
    image = v if joined is None else torch.cat([v, joined], dim=1)
    normalised = torch.group_norm(image, norm.groups, None, None, norm.eps)  # F.group_norm refuses groups of one value
    factor, offset = weight * (1 + scale), bias * (1 + scale) + shift
    u = normalised * factor[..., None, None] + offset[..., None, None]
    y = torch.nn.functional.silu(u) if norm.silu else u
    leaves = [v, weight, bias, scale, shift, u, factor, offset]
    gradients = torch.autograd.grad(y, leaves if joined is None else [*leaves, joined], grad.to(dtype))
    dx, dweight, dbias, dscale, dshift, g, sum_gn, sum_g, *djoined = (values.detach() for values in gradients)
    dx = dx if grad_total is None else dx + grad_total.to(dtype)
    groups = image.detach().unflatten(1, (norm.groups, -1)).flatten(2)
    variance, mean = torch.var_mean(groups, 2, correction=0)
    rstd = (variance + norm.eps).rsqrt()
    by_group = rstd.repeat_interleave(channels // norm.groups, 1)[..., None, None]
    terms = 2 * (by_group * factor.detach()[..., None, None] * g).abs()  # what dx is the difference of
    if grad_total is not None:
        terms[:, : dx.shape[1]] += grad_total.abs()
    gn = (g * normalised.detach()).abs().sum((2, 3))
    spread = (1 + scale.detach()).abs()
    found = {
        "y": (y.detach(), _largest(y)),
        "mean": (mean, _largest(mean)),
        "rstd": (rstd, _largest(rstd)),
        "dx": (dx, _largest(terms)),
        "sum_g": (sum_g, _largest(g.abs().sum((2, 3)))),
        "sum_gn": (sum_gn, _largest(gn)),
        "sum_dx": (torch.cat([dx, *djoined], 1).sum((2, 3)), _largest(terms.sum((2, 3)))),
        "dweight": (dweight, _largest((spread * gn).sum(0))),
        "dbias": (dbias, _largest((spread * g.abs().sum((2, 3))).sum(0))),
    }
    if joined is not None:
        found["djoined"] = djoined[0], _largest(terms)
    if norm.scale is not None:
        found["dscale"] = dscale, _largest(weight.abs() * gn + bias.abs() * g.abs().sum((2, 3)))
        found["dshift"] = dshift, _largest(g.abs().sum((2, 3)))
    return {name: Result(value, magnitude) for name, (value, magnitude) in found.items()}


def in_float64(norm: Norm, grad: Tensor, grad_total: Tensor | None = None) -> dict[str, Result]:
    """Every result of group_norm, group_norm_backward and group_norm_parameters by name: y, mean and rstd [N, groups];
    dx, djoined, sum_g, sum_gn and sum_dx [N, C]; dweight, dbias [C], dscale, dshift [N, C]."""
    return _through_torch(norm, grad, grad_total, torch.float64)


def in_fp32(norm: Norm, grad: Tensor, grad_total: Tensor | None = None) -> dict[str, Tensor]:
    """The same from torch's own operations in fp32, images rounded to their dtype."""
    found = _through_torch(norm, grad, grad_total, torch.float32)
    return {name: value.to(norm.x.dtype) if name in IMAGES else value for name, (value, _) in found.items()}


def error_of(found: Tensor, exact: Tensor) -> float:
    """The largest absolute error; NaN where there is one."""
    return float((found.detach().cpu().double() - exact).abs().max())


def check(found: Mapping[str, Tensor], exact: Mapping[str, Result], plain: Mapping[str, Tensor]) -> None:
    """Fails where a result's error is more than twice that of plain torch, and two fp32 roundings."""
    for name, value in found.items():
        right = exact[name]
        assert value.shape == right.value.shape, f"{name} has shape {tuple(value.shape)}"
        error, allowed = error_of(value, right.value), 2 * error_of(plain[name], right.value) + TINY * right.magnitude
        assert error <= allowed, f"{name} is wrong by {error:.3g}, allowed {allowed:.3g}"


def check_statistics(statistics: Tensor, exact: Mapping[str, Result]) -> None:
    """Fails where statistics (centre, rest, rstd) are off by more than 1e-6 of a standard deviation, or of 1 / it."""
    centre, rest, rstd = statistics.detach().cpu().double().unbind(2)
    mean, expected = exact["mean"].value, exact["rstd"].value
    # Of groups without variance the mean itself is what an fp32 number can hold: 2^-48 of it in two.
    off = ((centre + rest - mean).abs() - 2.0**-40 * mean.abs()).clamp(min=0) * expected
    assert float(off.max()) <= 1e-6, f"the mean is off by {float(off.max()):.3g} of a standard deviation"
    assert torch.equal(centre, (centre + rest).float().double()), "centre is not the mean rounded to fp32"
    worst = float((rstd / expected - 1).abs().max())
    assert worst <= 1e-6, f"rstd is off by {worst:.3g} of itself"
