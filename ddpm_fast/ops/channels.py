"""`add_bias`: the bias of a convolution and a residual, added in one pass. On a GPU a library's convolution leaves out
its bias for this: adding it by itself takes as long as the convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast import compat
from ddpm_fast.errors import InputError
from ddpm_fast.ops.backends import reference_network
from ddpm_fast.ops.checks import check_device, check_dtype, check_layout, check_like, check_tensors
from ddpm_fast.ops.declare import Gradient, declare, kernel_for
from ddpm_fast.ops.dispatch import has_kernel
from ddpm_fast.ops.tensors import channels_last

_ops = torch.ops.ddpm_fast


def add_bias(x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x + residual + bias, computed in fp32 (float64 for float64) and rounded once.

    Args:
        x: float [N, C, H, W].
        bias: float [C], or None.
        residual: of x's shape and dtype, or None.

    Returns:
        The sum, of x's shape and dtype, channels_last.

    Raises:
        InputError: shapes, dtypes or devices do not fit.
    """
    given = {name: value for name, value in (("bias", bias), ("residual", residual)) if value is not None}
    check_tensors("add_bias", x=x, **given)
    dtypes = [value.dtype for value in given.values()]
    if (
        torch.compiler.is_compiling()
        or compat.in_forward_mode()
        or not has_kernel("add_bias", x.device, x.dtype, *dtypes)
    ):
        _add_bias_empty(x, residual, bias)
        return reference_network.plain_add_bias(x, residual, bias)
    return _ops.add_bias(x, residual, bias)


def _check_images(op: str, x: Tensor) -> None:
    check_dtype(op, "x", x.dtype)
    check_layout(op, "x", x)
    if x.ndim != 4:
        raise InputError(f"{op}: x has shape {tuple(x.shape)}; expected [N, C, H, W]")


def _add_bias_empty(x, residual, bias):
    op = "add_bias"
    _check_images(op, x)
    if residual is not None:
        check_like(op, "residual", residual, "x", x)
        check_dtype(op, "residual", residual.dtype, (x.dtype,))
    if bias is not None:
        check_dtype(op, "bias", bias.dtype)
        check_layout(op, "bias", bias)
        if bias.shape != x.shape[1:2]:
            raise InputError(f"{op}: bias has shape {tuple(bias.shape)} and x {x.shape[1]} channels")
        check_device(op, "bias", bias, "x", x)
    return torch.empty_like(x, memory_format=torch.channels_last)


def _add_bias(x, residual, bias):
    out = _add_bias_empty(x, residual, bias)
    run = kernel_for("add_bias", x, *[value for value in (residual, bias) if value is not None])
    rows = None if bias is None else bias.expand(x.shape[:2])
    run(channels_last(x), None if residual is None else channels_last(residual), rows, out)
    return out


def _add_bias_save(ctx, inputs, output):
    ctx.has_residual, ctx.has_bias = inputs.residual is not None, inputs.bias is not None


def _add_bias_gradients(ctx, grad):
    return {
        "x": grad,
        "residual": grad if ctx.has_residual else None,
        "bias": _ops.channel_sums(grad) if ctx.has_bias else None,
    }


declare(
    "add_bias(Tensor x, Tensor? residual, Tensor? bias) -> Tensor",
    run=_add_bias,
    shapes=_add_bias_empty,
    gradient=Gradient(("x", "residual", "bias"), _add_bias_save, _add_bias_gradients),
)


def _channel_sums_empty(image):
    _check_images("channel_sums", image)
    return image.new_empty(image.shape[1], dtype=torch.float32)


def _channel_sums(image):
    out = _channel_sums_empty(image)
    kernel_for("channel_sums", image)(channels_last(image), out)
    return out


declare(
    "channel_sums(Tensor x) -> Tensor",  # fp32 [C]: over samples and pixels, the gradient of a bias
    run=_channel_sums,
    shapes=_channel_sums_empty,
    gradient=Gradient(
        ("x",),
        lambda ctx, inputs, output: ctx.save_for_backward(inputs.x),
        lambda ctx, grad: {"x": grad.to(ctx.saved_tensors[0].dtype)[:, None, None].expand_as(ctx.saved_tensors[0])},
    ),
)
