"""What the U-Net has of its own: `group_norm` with what surrounds a norm there, and `winograd`, a 3x3 convolution.

The CPU's C++ kernels are the only ones. Wherever they cannot run (on a GPU, in float64, while torch.compile traces, on
another backend that was asked for), plain torch does: these two never refuse a backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.ops.backends import reference
from ddpm_fast.ops.checks import check_device, check_dtype, check_image
from ddpm_fast.ops.declare import Gradient, declare, kernel_for
from ddpm_fast.ops.dispatch import active_backend

_ops = torch.ops.ddpm_fast
_PANEL = 32  # output channels; kWinogradPanel of csrc/cpu/kernels.h


# --- group_norm: its statistics are kept for the backward


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Group normalisation (Wu & He 2018) with what a U-Net does around it, in one pass over the image:

        n = normalise(x + added) * weight + bias;   y = silu(n * (1 + scale) + shift)

    Computed in fp32 (float64 for float64) and rounded once. Differentiable in all tensors; a second derivative needs
    plain torch, `use_backend("reference")`.

    Args:
        x: float [N, C, ...].
        weight, bias: float [C].
        groups: of C / groups channels each, over which and over the pixels mean and variance are taken.
        eps: added to the variance.
        scale, shift: float [N, C], or [1, C] for all samples; both or neither.
        added: float [N, C] or [1, C], which every pixel of x gets before it is normalised.
        silu: whether to apply SiLU.

    Returns:
        y, of x's shape and dtype.

    Raises:
        InputError: shapes, dtypes or devices do not fit.
    """
    rows = [scale, shift, added]
    for i, values in enumerate(rows):
        if values is not None:
            rows[i] = _checked_rows(("scale", "shift", "added")[i], values, x)
    scale, shift, added = rows
    if (scale is None) != (shift is None):
        raise InputError("group_norm: scale and shift go together; give both or neither")
    _check_norm(x, weight, bias, groups)
    if x.ndim != 4 or torch.compiler.is_compiling():
        return reference.plain_group_norm(x, weight, bias, groups, eps, scale, shift, added, silu)
    dtypes = [v.dtype for v in (x, weight, bias, scale, shift, added) if v is not None]
    if active_backend("group_norm", x.device, *dtypes) == "reference":
        return reference.plain_group_norm(x, weight, bias, groups, eps, scale, shift, added, silu)
    return _ops.group_norm.default(x, weight, bias, scale, shift, added, groups, eps, silu)[0]


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    check_image("group_norm", "x", x)
    channels = x.shape[1]
    for name, values in (("weight", weight), ("bias", bias)):
        if values.shape != (channels,):
            raise InputError(
                f"group_norm: {name} has shape {tuple(values.shape)} and x {channels} channels; expected [{channels}]"
            )
        check_dtype("group_norm", name, values.dtype)
        check_device("group_norm", name, values, "x", x)
    if groups < 1 or channels % groups:
        raise InputError(f"group_norm: {groups} groups do not divide x's {channels} channels")


def _checked_rows(name: str, values: Tensor, x: Tensor) -> Tensor:
    """[N, C]"""
    check_dtype("group_norm", name, values.dtype)
    check_device("group_norm", name, values, "x", x)
    if values.shape == x.shape[:2]:
        return values
    if values.shape == (1, x.shape[1]):
        return values.expand(x.shape[:2])
    raise InputError(
        f"group_norm: {name} has shape {tuple(values.shape)} and x {tuple(x.shape)}; expected {tuple(x.shape[:2])}, "
        f"or {(1, x.shape[1])} for all samples"
    )


def _group_norm_empty(x, weight, bias, scale, shift, added, groups, eps, silu):
    """(y, float64 [N, groups, 2]: each group's mean and 1 / sqrt(variance + eps))"""
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, x.new_empty(x.shape[0], groups, 2, dtype=torch.float64)


def _group_norm(x, weight, bias, scale, shift, added, groups, eps, silu):
    y, statistics = _group_norm_empty(x, weight, bias, scale, shift, added, groups, eps, silu)
    x = x.contiguous(memory_format=torch.channels_last)
    run = kernel_for("group_norm", x, weight, bias, scale, shift, added)
    run(x, weight, bias, scale, shift, added, eps, silu, y, statistics)
    return y, statistics


def _group_norm_save(ctx, inputs, outputs):
    ctx.save_for_backward(inputs.x, inputs.weight, inputs.bias, inputs.scale, inputs.shift, inputs.added, outputs[1])
    ctx.silu = inputs.silu
    ctx.mark_non_differentiable(outputs[1])
    ctx.set_materialize_grads(False)


def _group_norm_gradients(ctx, grad, _):
    if grad is None:
        return {}
    x, weight, bias, scale, shift, added, statistics = ctx.saved_tensors
    dx, sums = _ops.group_norm_backward(grad, x, weight, bias, scale, shift, added, statistics, ctx.silu)
    sum_g, sum_gn, sum_dx = sums
    by_sample = sums[:2] if scale is None else sums[:2] * (1 + scale.double())
    grad_bias, grad_weight = by_sample.sum(1)
    return {
        "x": dx,
        "weight": grad_weight,
        "bias": grad_bias,
        "scale": None if scale is None else weight * sum_gn + bias * sum_g,
        "shift": None if shift is None else sum_g,
        "added": None if added is None else sum_dx,
    }


declare(
    "group_norm(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? added, int groups, "
    "float eps, bool silu) -> (Tensor, Tensor)",
    run=_group_norm,
    shapes=_group_norm_empty,
    gradient=Gradient(_group_norm_save, _group_norm_gradients),
)


# --- group_norm_backward: the sums, float64 [3, N, C], are those over the pixels of g, of g * n and of dL/dx, where g
# is the gradient of the loss before SiLU and n the normalised image


def _group_norm_backward_empty(grad, x, weight, bias, scale, shift, added, statistics, silu):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, x.new_empty(3, *x.shape[:2], dtype=torch.float64)


def _group_norm_backward(grad, x, weight, bias, scale, shift, added, statistics, silu):
    dx, sums = _group_norm_backward_empty(grad, x, weight, bias, scale, shift, added, statistics, silu)
    grad, x = (image.contiguous(memory_format=torch.channels_last) for image in (grad, x))
    run = kernel_for("group_norm_backward", x, grad, weight, bias, scale, shift, added)
    run(grad, x, weight, bias, scale, shift, added, statistics, silu, dx, sums)
    return dx, sums


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("the CPU's group norm has no second derivative: run the model within use_backend('reference')")


declare(
    "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    "Tensor? added, Tensor statistics, bool silu) -> (Tensor, Tensor)",
    run=_group_norm_backward,
    shapes=_group_norm_backward_empty,
    gradient=Gradient(lambda ctx, inputs, outputs: None, _no_second_derivative),
)


# --- winograd


def winograd_filters(weight: Tensor) -> Tensor:
    """The filters of a 3x3 convolution as `winograd` takes them: G g G^T of csrc/winograd.h.

    Args:
        weight: float [K, C, 3, 3].

    Returns:
        fp32 [ceil(K / 32), 36, C, 32]: of panels of 32 output channels (what is left of the last one is zeros), the 36
        points of each input and output channel. Computed in float64, rounded once.

    Raises:
        InputError: the weight is not that of a 3x3 convolution.
    """
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise InputError(f"winograd_filters: weight has shape {tuple(weight.shape)}; expected [K, C, 3, 3]")
    to_points, _, _ = reference.winograd_matrices(weight.device)
    both = (to_points[:, None, :, None] * to_points[None, :, None, :]).reshape(36, 9)
    k, c = weight.shape[:2]
    filters = weight.new_zeros(-(-k // _PANEL), 36, c, _PANEL, dtype=torch.float32)
    for panel, part in zip(filters, weight.detach().split(_PANEL), strict=True):
        taps = part.permute(2, 3, 1, 0).double().reshape(9, -1)
        panel[..., : len(part)] = (both @ taps).view(36, c, -1)
    return filters


def winograd(x: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int) -> Tensor:
    """The 3x3 convolution with stride 1 and padding 1 by Winograd's F(4x4, 3x3) (Lavin & Gray 2016): a quarter of the
    multiplications.

    Computed in fp32 and rounded once. There is no gradient. Infinity or NaN in a pixel reaches all 16 outputs of each
    tile whose 6x6 pixels it is among.

    Args:
        x: float [N, C, H, W].
        filters: fp32 [ceil(K / 32), 36, C, 32], winograd_filters of the weight.
        bias: float [K], or None.
        out_channels: K.

    Returns:
        [N, K, H, W] of x's dtype, channels_last.

    Raises:
        InputError: shapes, dtypes or devices do not fit, or a gradient would be lost.
    """
    check_image("winograd", "x", x)
    expected = (-(-out_channels // _PANEL), 36, x.shape[1], _PANEL)
    if x.ndim != 4 or tuple(filters.shape) != expected or filters.dtype != torch.float32:
        raise InputError(
            f"winograd: x has shape {tuple(x.shape)} and filters are {filters.dtype} of shape {tuple(filters.shape)}; "
            f"expected [N, C, H, W] and float32 {expected}, from winograd_filters"
        )
    if bias is not None and bias.shape != (out_channels,):
        raise InputError(f"winograd: bias has shape {tuple(bias.shape)}; expected [{out_channels}]")
    tensors = [("filters", filters)] if bias is None else [("filters", filters), ("bias", bias)]
    for name, tensor in tensors:
        check_device("winograd", name, tensor, "x", x)
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for _, tensor in tensors)):
        raise InputError("winograd has no gradient: use torch.nn.functional.conv2d, or torch.no_grad()")
    return _ops.winograd(x, filters, bias, out_channels)


def _winograd_empty(x, filters, bias, out_channels):
    shape = (x.shape[0], out_channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _winograd(x, filters, bias, out_channels):
    out = _winograd_empty(x, filters, bias, out_channels)
    bias = None if bias is None else bias.float().contiguous()
    kernel_for("winograd", x)(x.contiguous(memory_format=torch.channels_last), filters.contiguous(), bias, out)
    return out


declare(
    "winograd(Tensor x, Tensor filters, Tensor? bias, SymInt out_channels) -> Tensor",
    run=_winograd,
    shapes=_winograd_empty,
)
