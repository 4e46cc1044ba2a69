"""What the U-Net has of its own: `group_norm` with what surrounds a norm there, and `winograd`, a 3x3 convolution.

The CPU's C++ kernels are the only ones. Wherever they cannot run (on a GPU, in float64, while torch.compile traces, in
forward-mode differentiation, on another backend that was asked for), plain torch does: they never refuse a backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast import compat
from ddpm_fast.errors import InputError, check_integer, check_number
from ddpm_fast.ops.backends import reference
from ddpm_fast.ops.checks import check_device, check_dtype, check_image, check_layout, check_like, check_tensors
from ddpm_fast.ops.declare import Gradient, declare, kernel_for
from ddpm_fast.ops.dispatch import active_backend
from ddpm_fast.ops.tensors import FLOATS, Norm

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
    scale_shift: tuple[Tensor, Tensor] | None = None,
    added: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Group normalisation (Wu & He 2018) with what a U-Net does around it, in one pass over the image:

        n = normalise(x + added) * weight + bias;   y = silu(n * (1 + scale) + shift)

    Computed in fp32 (float64 for float64) and rounded once. Differentiable in all tensors; a second derivative needs
    plain torch, `use_backend("reference")`.

    Args:
        x: float [N, C, ...].
        weight: float [C].
        bias: float [C].
        groups: how many. Mean and variance are taken over a group's C / groups channels and all pixels.
        eps: added to the variance.
        scale_shift: scale and shift, float [N, C] each, or [1, C] for all samples.
        added: float [N, C] or [1, C], which every pixel of x gets before it is normalised.
        silu: whether to apply SiLU.

    Returns:
        y, of x's shape and dtype.

    Raises:
        InputError: shapes, dtypes or devices do not fit.
    """
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        check_tensors("group_norm", x=x, weight=weight, bias=bias)
    if scale_shift is not None and not (isinstance(scale_shift, tuple | list) and len(scale_shift) == 2):
        raise InputError(f"group_norm: scale_shift is a {type(scale_shift).__name__}; expected a pair of tensors")
    scale, shift = scale_shift or (None, None)
    if type(groups) is not int:
        groups = check_integer("group_norm: groups", groups, 1)
    if type(eps) is not float:
        eps = check_number("group_norm: eps", eps, lambda v: v >= 0, "a number of at least 0")
    for name, values in (("scale", scale), ("shift", shift), ("added", added)):
        if values is not None and not isinstance(values, Tensor):
            check_tensors("group_norm", **{name: values})
    tensors = [values for values in (x, weight, bias, scale, shift, added) if values is not None]
    plain = x.ndim != 4 or torch.compiler.is_compiling() or compat.in_forward_mode()
    if plain or active_backend("group_norm", x.device, *[values.dtype for values in tensors]) == "reference":
        norm = Norm(x, weight, bias, scale, shift, added, groups, eps, silu)
        _check_norm(norm)
        return reference.plain_group_norm(norm)
    shape = x.shape[:2]
    scale, shift, added = (_of_all_samples(values, shape) for values in (scale, shift, added))
    return _ops.group_norm.default(x, weight, bias, scale, shift, added, groups, eps, silu)[0]


def _of_all_samples(values: Tensor | None, shape: torch.Size) -> Tensor | None:
    """[1, C] as [N, C]. Anything else is left to the check of the op."""
    if values is None or values.shape == shape or values.shape != (1, shape[1]) or values.layout is not torch.strided:
        return values
    return values.expand(shape)


def _check_norm(norm: Norm, op: str = "group_norm") -> None:
    """Names are looked for only where something does not fit: a tiny norm takes 20 us."""
    x, groups = norm.x, norm.groups
    shape = x.shape
    if len(shape) < 2:
        raise InputError(f"{op}: x has shape {tuple(shape)}; expected [N, C, ...]")
    n, channels = shape[:2]
    device, strided = x.device, torch.strided
    for i, values in enumerate(norm[:6]):
        if values is None:
            if i < 3:
                check_tensors(op, **{norm._fields[i]: values})
            continue
        if values.dtype not in FLOATS or values.device != device or values.layout is not strided:
            check_dtype(op, norm._fields[i], values.dtype)
            check_device(op, norm._fields[i], values, "x", x)
            check_layout(op, norm._fields[i], values)
        if i in (1, 2) and values.shape != (channels,):
            raise InputError(
                f"{op}: {norm._fields[i]} has shape {tuple(values.shape)} and x {channels} channels; expected "
                f"[{channels}]"
            )
        if i > 2 and values.shape not in ((n, channels), (1, channels)):
            raise InputError(
                f"{op}: {norm._fields[i]} has shape {tuple(values.shape)} and x {tuple(shape)}; "
                f"expected {(n, channels)}, or {(1, channels)} for all samples"
            )
    if (norm.scale is None) != (norm.shift is None):
        raise InputError(f"{op}: scale and shift belong together; give both, or neither")
    if groups < 1 or channels % groups:
        raise InputError(f"{op}: {groups} groups do not divide x's {channels} channels")


def _check_kernel_norm(norm: Norm, op: str = "group_norm") -> None:
    """What a kernel wants besides: images, and numbers for every sample."""
    _check_norm(norm, op)
    x = norm.x
    if x.ndim != 4:
        raise InputError(f"{op}: x has shape {tuple(x.shape)}; expected [N, C, H, W]")
    for values in (norm.scale, norm.shift, norm.added):
        if values is not None and values.shape[0] != x.shape[0]:
            raise InputError(f"{op}: scale, shift and added are of {values.shape[0]} samples and x of {x.shape[0]}")


def _channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def _group_norm_empty(*inputs):
    """(y, float64 [N, groups, 2]: each group's mean and 1 / sqrt(variance + eps))"""
    norm = Norm(*inputs)
    _check_kernel_norm(norm)
    y = torch.empty_like(norm.x, memory_format=torch.channels_last)
    return y, norm.x.new_empty(norm.x.shape[0], norm.groups, 2, dtype=torch.float64)


def _group_norm(*inputs):
    y, statistics = _group_norm_empty(*inputs)
    norm = Norm(_channels_last(inputs[0]), *inputs[1:])
    kernel_for("group_norm", *norm[:6])(norm, y, statistics)
    return y, statistics


def _group_norm_save(ctx, inputs, outputs):
    ctx.save_for_backward(*inputs[:6], outputs[1])
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
    gradient=Gradient(
        ("x", "weight", "bias", "scale", "shift", "added"),
        _group_norm_save,
        _group_norm_gradients,
        "run the model within use_backend('reference')",
    ),
)


# --- group_norm_backward: the sums, float64 [3, N, C], are those over the pixels of g, of g * n and of dL/dx, where g
# is the gradient of the loss before SiLU and n the normalised image


def _group_norm_backward_empty(grad, x, *rest):
    op = "group_norm_backward"
    *vectors, statistics, silu = rest
    groups = statistics.shape[1] if statistics.ndim == 3 else 0
    _check_kernel_norm(Norm(x, *vectors, groups=groups, eps=0.0, silu=silu), op)
    if statistics.dtype != torch.float64 or tuple(statistics.shape) != (x.shape[0], groups, 2):
        raise InputError(
            f"{op}: statistics are {statistics.dtype} of shape {tuple(statistics.shape)}; expected float64 "
            f"[{x.shape[0]}, groups, 2], from group_norm"
        )
    check_device(op, "statistics", statistics, "x", x)
    check_layout(op, "statistics", statistics)
    check_like(op, "grad", grad, "x", x)
    check_dtype(op, "grad", grad.dtype, (x.dtype,))
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, x.new_empty(3, *x.shape[:2], dtype=torch.float64)


def _group_norm_backward(grad, x, *rest):
    dx, sums = _group_norm_backward_empty(grad, x, *rest)
    *vectors, statistics, silu = rest
    # What eps did is in the statistics.
    norm = Norm(_channels_last(x), *vectors, groups=statistics.shape[1], eps=0.0, silu=silu)
    run = kernel_for("group_norm_backward", grad, *norm[:6])
    run(norm, _channels_last(grad), statistics.contiguous(), dx, sums)
    return dx, sums


declare(
    "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    "Tensor? added, Tensor statistics, bool silu) -> (Tensor, Tensor)",
    run=_group_norm_backward,
    shapes=_group_norm_backward_empty,
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
    check_tensors("winograd_filters", weight=weight)
    check_dtype("winograd_filters", "weight", weight.dtype)
    check_layout("winograd_filters", "weight", weight)
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not weight.numel():
        raise InputError(
            f"winograd_filters: weight has shape {tuple(weight.shape)}; expected [K, C, 3, 3] of at least one channel"
        )
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
    tensors = (x, filters) if bias is None else (x, filters, bias)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        check_tensors("winograd", x=x, filters=filters, **({} if bias is None else {"bias": bias}))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise InputError("winograd has no gradient: use torch.nn.functional.conv2d, or torch.no_grad()")
    if type(out_channels) is not int or not 0 <= out_channels < 2**62:
        out_channels = check_integer("winograd: out_channels", out_channels, 0, 2**62 - 1)
    return _ops.winograd(x, filters, bias, out_channels)


def _winograd_empty(x, filters, bias, out_channels):
    check_image("winograd", "x", x)
    expected = (-(-out_channels // _PANEL), 36, x.shape[1], _PANEL)
    if x.ndim != 4 or tuple(filters.shape) != expected or filters.dtype != torch.float32 or out_channels < 0:
        raise InputError(
            f"winograd: x has shape {tuple(x.shape)} and filters are {filters.dtype} of shape {tuple(filters.shape)}; "
            f"expected [N, C, H, W] and float32 {expected}, from winograd_filters"
        )
    check_device("winograd", "filters", filters, "x", x)
    check_layout("winograd", "filters", filters)
    if bias is not None:
        if bias.shape != (out_channels,):
            raise InputError(f"winograd: bias has shape {tuple(bias.shape)}; expected [{out_channels}]")
        check_dtype("winograd", "bias", bias.dtype)
        check_device("winograd", "bias", bias, "x", x)
        check_layout("winograd", "bias", bias)
    shape = (x.shape[0], out_channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _winograd(x, filters, bias, out_channels):
    out = _winograd_empty(x, filters, bias, out_channels)
    bias = None if bias is None else bias.float().contiguous()
    filters = filters.contiguous()
    if filters.data_ptr() % 64:  # the kernels load whole registers; torch's own memory begins at such an address
        filters = filters.clone()
    kernel_for("winograd", x)(_channels_last(x), filters, bias, out)
    return out


declare(
    "winograd(Tensor x, Tensor filters, Tensor? bias, SymInt out_channels) -> Tensor",
    run=_winograd,
    shapes=_winograd_empty,
)
