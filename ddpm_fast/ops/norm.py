"""`group_norm` and `add_group_norm`: the norm of a U-Net with what surrounds it there, in one pass over the image.

Plain torch runs them where no kernel can (in float64, while torch.compile traces, in forward-mode differentiation, on
another backend that was asked for): they never refuse a backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast import compat
from ddpm_fast.errors import InputError, check_integer, check_number
from ddpm_fast.ops.backends import reference_network
from ddpm_fast.ops.checks import check_device, check_dtype, check_layout, check_like, check_tensors
from ddpm_fast.ops.declare import Gradient, declare, kernel_for
from ddpm_fast.ops.direct import on_cpu
from ddpm_fast.ops.dispatch import has_kernel
from ddpm_fast.ops.norm_checks import check_kernel_norm, check_norm
from ddpm_fast.ops.tensors import Norm, channels_last

_ops = torch.ops.ddpm_fast


class Addends(NamedTuple):
    """What is added up to an image, see add_group_norm.

    Attributes:
        image: float [N, C, ...].
        residual: of the image's shape and dtype, or None.
        added: float [N, C] or [1, C], for every pixel, or None.
    """

    image: Tensor
    residual: Tensor | None = None
    added: Tensor | None = None


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
    if (direct := on_cpu()) is not None:
        y = direct.group_norm(x, weight, bias, groups, eps, scale_shift, added, silu)
        if y is not None:
            return y
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        check_tensors("group_norm", x=x, weight=weight, bias=bias)
    norm = _norm_of("group_norm", Addends(x, None, added), None, (weight, bias, groups, eps), scale_shift, silu)
    if _is_plain(norm):
        check_norm(norm)
        return reference_network.plain_group_norm(norm)
    return _of_op(norm, keep=False)[0]


def add_group_norm(
    addends: Addends,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    joined: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """An image that is added up, and its group norm, in one pass:

        total = image + residual + added;   y = group_norm([total, joined] along the channels)

    A residual block of a U-Net needs both, and one of the decoder also normalises the encoder's image with its own,
    which need not be copied side by side first. `total` is rounded once, and it is what is normalised. Differentiable
    as group_norm is.

    Args:
        addends: The image [N, C, ...] and what is added to it; images of one dtype.
        weight: float [C + D].
        bias: float [C + D].
        groups: See group_norm. A group may have channels of both images.
        eps: added to the variance.
        scale_shift: scale and shift, float [N, C + D] each, or [1, C + D] for all samples.
        joined: [N, D, ...] of the image's dtype, or None for D = 0.
        silu: whether to apply SiLU.

    Returns:
        total, of the image's shape and dtype, and y [N, C + D, ...].

    Raises:
        InputError: shapes, dtypes or devices do not fit.
    """
    if not isinstance(addends, Addends):
        raise InputError(f"add_group_norm: addends is a {type(addends).__name__}; expected an Addends")
    check_tensors("add_group_norm", image=addends.image, weight=weight, bias=bias)
    norm = _norm_of("add_group_norm", addends, joined, (weight, bias, groups, eps), scale_shift, silu)
    if _is_plain(norm):
        check_norm(norm, "add_group_norm")
        total = reference_network.added_up(norm).to(norm.x.dtype)
        return total, reference_network.plain_group_norm(norm._replace(x=total, residual=None, added=None))
    y, total, _ = _of_op(norm, keep=True)
    return total, y


def _norm_of(
    op: str,
    addends: Addends,
    joined: Tensor | None,
    layer: tuple[Tensor, Tensor, int, float],
    scale_shift: tuple[Tensor, Tensor] | None,
    silu: bool,
) -> Norm:
    """The arguments of a public function, with the types that they must have."""
    weight, bias, groups, eps = layer
    if scale_shift is not None and not (isinstance(scale_shift, tuple | list) and len(scale_shift) == 2):
        raise InputError(f"{op}: scale_shift is a {type(scale_shift).__name__}; expected a pair of tensors")
    scale, shift = scale_shift or (None, None)
    if type(groups) is not int:
        groups = check_integer(f"{op}: groups", groups, 1)
    if type(eps) is not float:
        eps = check_number(f"{op}: eps", eps, lambda v: v >= 0, "a number of at least 0")
    x, residual, added = addends
    norm = Norm(x, weight, bias, scale, shift, added, residual, joined, groups, eps, silu)
    for name, values in zip(norm._fields[3:8], norm[3:8], strict=True):
        if values is not None and not isinstance(values, Tensor):
            check_tensors(op, **{name: values})
    return norm


def _is_plain(norm: Norm) -> bool:
    """Whether plain torch computes this norm, here and now."""
    if norm.x.ndim != 4 or torch.compiler.is_compiling() or compat.in_forward_mode():
        return True
    dtypes = [values.dtype for values in norm[:8] if values is not None]
    return not has_kernel("group_norm", norm.x.device, *dtypes)


def _of_op(norm: Norm, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, channels = norm.x.shape[:2]
    width = channels if norm.joined is None else channels + norm.joined.shape[1]
    scale, shift = (_of_all_samples(values, (n, width)) for values in (norm.scale, norm.shift))
    return _call_group_norm(*norm._replace(scale=scale, shift=shift), keep)


def _of_all_samples(values: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """[1, C] as [N, C]. Anything else is left to the check of the op."""
    if values is None or values.shape == shape or values.shape != (1, shape[1]) or values.layout is not torch.strided:
        return values
    return values.expand(shape)


def _like(image: Tensor, channels: int | None = None) -> Tensor:
    """An image to be written, channels_last."""
    shape = (image.shape[0], image.shape[1] if channels is None else channels, *image.shape[2:])
    return torch.empty(shape, dtype=image.dtype, device=image.device, memory_format=torch.channels_last)


# --- group_norm: its statistics are kept for the backward


def _group_norm_empty(*inputs):
    """(y, total or an empty tensor, fp32 [N, groups, 3]: each group's mean as the sum of two numbers, and
    1 / sqrt(variance + eps))"""
    *fields, keep = inputs
    norm = Norm(*fields)
    check_kernel_norm(norm)
    if not keep and (norm.residual is not None or norm.joined is not None):
        raise InputError("group_norm: residual and joined need keep=True, because their sum is what the gradient reads")
    x = norm.x
    total = _like(x) if keep else x.new_empty(0)
    return _like(x, norm.weight.shape[0]), total, x.new_empty(x.shape[0], norm.groups, 3, dtype=torch.float32)


def _group_norm(*inputs):
    y, total, statistics = _group_norm_empty(*inputs)
    *fields, keep = inputs
    norm = _readable(Norm(*fields))
    kernel_for("group_norm", *norm[:8])(norm, y, total if keep else None, statistics)
    return y, total, statistics


def _readable(norm: Norm) -> Norm:
    """The norm as kernels read it: images in channels_last memory, and what is added for every sample."""
    residual, joined = (None if image is None else channels_last(image) for image in (norm.residual, norm.joined))
    added = _of_all_samples(norm.added, (norm.x.shape[0], norm.x.shape[1]))
    return norm._replace(x=channels_last(norm.x), added=added, residual=residual, joined=joined)


def _group_norm_save(ctx, inputs, outputs):
    _, total, statistics = outputs
    x, added = (total, None) if inputs.keep else (inputs.x, inputs.added)
    vectors = inputs.weight, inputs.bias, inputs.scale, inputs.shift, added
    ctx.save_for_backward(x, *vectors, inputs.joined, statistics)
    ctx.silu, ctx.is_kept, ctx.has_residual = inputs.silu, inputs.keep, inputs.residual is not None
    ctx.added = None if inputs.added is None else inputs.added.shape[0]  # rows
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)


def _group_norm_gradients(ctx, grad, grad_total, _):
    grad_total = grad_total if ctx.is_kept else None
    if grad is None and grad_total is None:
        return {}
    x, weight, bias, scale, shift, added, joined, statistics = ctx.saved_tensors
    if grad is None:  # y was not used
        rows = None if ctx.added is None else _of_rows(grad_total.flatten(2).sum(2), ctx.added)
        return {"x": grad_total, "residual": grad_total if ctx.has_residual else None, "added": rows}
    vectors = (weight, bias, scale, shift, added)
    dx, djoined, sums = _ops.group_norm_backward(grad, grad_total, x, joined, *vectors, statistics, ctx.silu)
    dweight, dbias, dscale, dshift = _ops.group_norm_parameters(sums, weight, bias, scale)
    return {
        "x": dx,
        "weight": dweight,
        "bias": dbias,
        "scale": None if scale is None else dscale,
        "shift": None if shift is None else dshift,
        "added": None if ctx.added is None else _of_rows(sums[2, :, : x.shape[1]], ctx.added),
        "residual": dx if ctx.has_residual else None,
        "joined": None if joined is None else djoined,
    }


def _of_rows(sums: Tensor, rows: int) -> Tensor:
    """The gradient [rows, C] of what was added, from that of each sample [N, C]."""
    return sums if rows == sums.shape[0] else sums.sum(0, keepdim=True)


_call_group_norm = declare(
    "group_norm(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? added, Tensor? residual, "
    "Tensor? joined, int groups, float eps, bool silu, bool keep) -> (Tensor, Tensor, Tensor)",
    run=_group_norm,
    shapes=_group_norm_empty,
    gradient=Gradient(
        ("x", "weight", "bias", "scale", "shift", "added", "residual", "joined"),
        _group_norm_save,
        _group_norm_gradients,
        "run the model within use_backend('reference')",
    ),
)


# --- group_norm_backward: the sums, fp32 [3, N, C], are those over the pixels of g, of g * n and of dL/dx, where g
# is the gradient of the loss before SiLU and n the normalised image. x is the total where it was kept


def _group_norm_backward_empty(grad, grad_total, x, joined, *rest):
    op = "group_norm_backward"
    *vectors, statistics, silu = rest
    groups = statistics.shape[1] if statistics.ndim == 3 else 0
    norm = Norm(x, *vectors, residual=None, joined=joined, groups=groups, eps=0.0, silu=silu)
    check_kernel_norm(norm, op)
    if statistics.dtype != torch.float32 or tuple(statistics.shape) != (x.shape[0], groups, 3):
        raise InputError(
            f"{op}: statistics are {statistics.dtype} of shape {tuple(statistics.shape)}; expected float32 "
            f"[{x.shape[0]}, groups, 3], from group_norm"
        )
    check_device(op, "statistics", statistics, "x", x)
    check_layout(op, "statistics", statistics)
    channels = norm.weight.shape[0]
    check_dtype(op, "grad", grad.dtype, (x.dtype,))
    if tuple(grad.shape) != (x.shape[0], channels, *x.shape[2:]):
        raise InputError(
            f"{op}: grad has shape {tuple(grad.shape)} and x {tuple(x.shape)}; expected {channels} channels of x's size"
        )
    check_device(op, "grad", grad, "x", x)
    check_layout(op, "grad", grad)
    if grad_total is not None:
        check_like(op, "grad_total", grad_total, "x", x)
        check_dtype(op, "grad_total", grad_total.dtype, (x.dtype,))
    djoined = x.new_empty(0) if joined is None else _like(joined)
    return _like(x), djoined, x.new_empty(3, x.shape[0], channels, dtype=torch.float32)


def _group_norm_backward(grad, grad_total, x, joined, *rest):
    dx, djoined, sums = _group_norm_backward_empty(grad, grad_total, x, joined, *rest)
    *vectors, statistics, silu = rest
    # What eps did is in the statistics.
    norm = Norm(x, *vectors, residual=None, joined=joined, groups=statistics.shape[1], eps=0.0, silu=silu)
    run = kernel_for("group_norm_backward", grad, *norm[:8])
    given = None if grad_total is None else channels_last(grad_total)
    arguments = channels_last(grad), given, statistics.contiguous(), dx, None if joined is None else djoined, sums
    run(_readable(norm), *arguments)
    return dx, djoined, sums


declare(
    "group_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor? joined, Tensor weight, Tensor bias, "
    "Tensor? scale, Tensor? shift, Tensor? added, Tensor statistics, bool silu) -> (Tensor, Tensor, Tensor)",
    run=_group_norm_backward,
    shapes=_group_norm_backward_empty,
)


# --- group_norm_parameters: what the sums of the backward say of the weights


def _group_norm_parameters_empty(sums, weight, bias, scale):
    """(dL/dweight [C], dL/dbias [C], dL/dscale and dL/dshift [N, C], empty without scale), fp32"""
    op = "group_norm_parameters"
    if sums.dtype != torch.float32 or sums.ndim != 3 or sums.shape[0] != 3:
        raise InputError(f"{op}: sums are {sums.dtype} {tuple(sums.shape)}; expected float32 [3, N, C]")
    n, channels = sums.shape[1:]
    check_layout(op, "sums", sums)
    for name, values, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (n, channels)),
    ):
        if values is None and name == "scale":
            continue
        if tuple(values.shape) != shape:
            raise InputError(f"{op}: {name} has shape {tuple(values.shape)}; expected {shape}")
        check_dtype(op, name, values.dtype)
        check_device(op, name, values, "sums", sums)
        check_layout(op, name, values)
    rows = (0,) if scale is None else (n, channels)
    return tuple(sums.new_empty(shape) for shape in ((channels,), (channels,), rows, rows))


def _group_norm_parameters(sums, weight, bias, scale):
    dweight, dbias, dscale, dshift = _group_norm_parameters_empty(sums, weight, bias, scale)
    dtypes = [v for v in (weight, bias, scale) if v is not None]
    run = kernel_for("group_norm_parameters", sums, *dtypes)
    rows = (None, None) if scale is None else (dscale, dshift)
    run(sums.contiguous(), weight, bias, scale, dweight, dbias, *rows)
    return dweight, dbias, dscale, dshift


declare(
    "group_norm_parameters(Tensor sums, Tensor weight, Tensor bias, Tensor? scale) -> (Tensor, Tensor, Tensor, Tensor)",
    run=_group_norm_parameters,
    shapes=_group_norm_parameters_empty,
)
