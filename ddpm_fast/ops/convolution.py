"""`convolve`, a 3x3 convolution of the U-Net with its gradients, by Winograd's algorithm where there are kernels for it
(on a CPU); and its parts: `winograd_filters`, `winograd`, and the gradient by the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ddpm_fast import compat
from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.ops.checks import check_device, check_dtype, check_image, check_layout, check_tensors
from ddpm_fast.ops.declare import Gradient, declare, kernel_for
from ddpm_fast.ops.dispatch import active_backend
from ddpm_fast.ops.tensors import channels_last

_ops = torch.ops.ddpm_fast
_PANEL = 32  # output channels; kWinogradPanel of csrc/cpu/kernels.h


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 3x3 convolution with stride 1 and padding 1: F.conv2d(x, weight, bias, padding=1), faster on a CPU.

    There it is Winograd's F(4x4, 3x3), see `winograd`, and so is its gradient by x. Plain torch computes the rest: on
    other devices, in float64, while torch.compile traces, in forward mode, within torch.func's transforms, and within
    `use_backend("reference")`. The gradient of what was computed within that is plain torch's too. A derivative that is
    recorded for a second one (create_graph=True) is plain torch's as well, so there are derivatives of any order.

    The filters are computed from the weight at each call, and again for the gradient by x, in fp32: a weight of another
    dtype than x's is not rounded to it, and its gradient arrives in its own dtype, summed in fp32.

    Args:
        x: float [N, C, H, W]. It and the weight are what is kept for the gradients.
        weight: float [K, C, 3, 3].
        bias: float [K], or None.

    Returns:
        [N, K, H, W] of x's dtype, channels_last where a kernel computed it.

    Raises:
        InputError: shapes, dtypes or devices do not fit.
    """
    check_tensors("convolve", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if (
        torch.compiler.is_compiling()
        or compat.in_forward_mode()
        or compat.in_functorch()
        or active_backend("winograd", x.device, x.dtype) == "reference"
    ):
        _check_convolution(x, weight, bias)
        return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=1)
    return _ops.convolve(x, weight, bias)


def winograd_filters(weight: Tensor) -> Tensor:
    """The filters of a 3x3 convolution as `winograd` takes them: G g G^T of csrc/winograd.h.

    Computed in fp32 from the weight as it is, with an error of about 1e-7 of the norm. A float64 weight, and any on the
    reference backend, is transformed in float64 and rounded once. There is no gradient.

    Args:
        weight: float [K, C, 3, 3], of any strides.

    Returns:
        fp32 [ceil(K / 32), 36, C, 32]: of panels of 32 output channels (what is left of the last one is zeros), the 36
        points of each input and output channel.

    Raises:
        InputError: the weight is not that of a 3x3 convolution.
    """
    check_tensors("winograd_filters", weight=weight)
    return _ops.winograd_filters(weight.detach(), False)


def winograd(x: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int) -> Tensor:
    """The 3x3 convolution with stride 1 and padding 1 by Winograd's F(4x4, 3x3) (Lavin & Gray 2016): a quarter of the
    multiplications.

    Computed in fp32 and rounded once. There is no gradient; `convolve` has them all. Infinity or NaN in a pixel reaches
    all 16 outputs of each tile whose 6x6 pixels it is among.

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
        raise InputError("winograd has no gradient: use convolve, or torch.no_grad()")
    if type(out_channels) is not int or not 0 <= out_channels < 2**62:
        out_channels = check_integer("winograd: out_channels", out_channels, 0, 2**62 - 1)
    return _ops.winograd(x, filters, bias, out_channels)


# --- winograd: the images, by filters that were made before


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
    kernel_for("winograd", x)(channels_last(x), filters, bias, out)
    return out


declare(
    "winograd(Tensor x, Tensor filters, Tensor? bias, SymInt out_channels) -> Tensor",
    run=_winograd,
    shapes=_winograd_empty,
)


# --- winograd_filters: flipped, those of weight.transpose(0, 1).flip(2, 3), with which winograd gives the gradient by x


def _check_weight(op: str, weight: Tensor) -> None:
    check_dtype(op, "weight", weight.dtype)
    check_layout(op, "weight", weight)
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not weight.numel():
        raise InputError(f"{op}: weight has shape {tuple(weight.shape)}; expected [K, C, 3, 3] of at least one channel")


def _winograd_filters_empty(weight, flipped):
    _check_weight("winograd_filters", weight)
    c, k = weight.shape[:2] if flipped else (weight.shape[1], weight.shape[0])
    return weight.new_empty(-(-k // _PANEL), 36, c, _PANEL, dtype=torch.float32)


def _winograd_filters(weight, flipped):
    out = _winograd_filters_empty(weight, flipped)
    kernel_for("winograd_filters", weight)(weight, flipped, out)
    return out


declare(
    "winograd_filters(Tensor weight, bool flipped) -> Tensor",
    run=_winograd_filters,
    shapes=_winograd_filters_empty,
)


# --- winograd_weight_gradient: fp32 [K, C, 3, 3], the gradient of (convolve(x, weight) * grad).sum() by the weight


def _winograd_weight_gradient_empty(x, grad):
    op = "winograd_weight_gradient"
    check_image(op, "x", x)
    check_image(op, "grad", grad, (x.dtype,))
    if x.ndim != 4 or grad.ndim != 4 or grad.shape[:1] != x.shape[:1] or grad.shape[2:] != x.shape[2:]:
        raise InputError(
            f"{op}: grad has shape {tuple(grad.shape)} and x {tuple(x.shape)}; expected [N, K, H, W] and [N, C, H, W]"
        )
    check_device(op, "grad", grad, "x", x)
    shape = (grad.shape[1], x.shape[1], 3, 3)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


def _winograd_weight_gradient(x, grad):
    out = _winograd_weight_gradient_empty(x, grad)
    if not x.numel() or not grad.numel():
        return out.zero_()
    kernel_for("winograd_weight_gradient", x)(channels_last(x), channels_last(grad), out)
    return out


declare(
    "winograd_weight_gradient(Tensor x, Tensor grad) -> Tensor",
    run=_winograd_weight_gradient,
    shapes=_winograd_weight_gradient_empty,
)


# --- convolve: the three together


def _check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "convolve"
    check_image(op, "x", x)
    _check_weight(op, weight)
    if x.ndim != 4 or x.shape[1] != weight.shape[1] or not (x.shape[2] and x.shape[3]):
        raise InputError(
            f"{op}: x has shape {tuple(x.shape)}; expected [N, {weight.shape[1]}, H, W] for this weight, with pixels"
        )
    check_device(op, "weight", weight, "x", x)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise InputError(f"{op}: bias has shape {tuple(bias.shape)}; expected [{weight.shape[0]}]")
        check_dtype(op, "bias", bias.dtype)
        check_device(op, "bias", bias, "x", x)
        check_layout(op, "bias", bias)


def _convolve_empty(x, weight, bias):
    _check_convolution(x, weight, bias)
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolve(x, weight, bias):
    _check_convolution(x, weight, bias)
    return _winograd(x, _winograd_filters(weight, False), bias, weight.shape[0])


def _convolve_save(ctx, inputs, output):
    of_x, of_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(inputs.x if of_weight else None, inputs.weight if of_x else None)
    ctx.weight_dtype = inputs.weight.dtype
    ctx.bias_dtype = None if inputs.bias is None else inputs.bias.dtype


def _convolve_gradients(ctx, grad):
    x, weight = ctx.saved_tensors
    found = {}
    if ctx.needs_input_grad[0]:
        found["x"] = _gradient_by_x(weight, grad)
    if ctx.needs_input_grad[1]:
        found["weight"] = _gradient_by_weight(x, grad, ctx.weight_dtype)
    if ctx.needs_input_grad[2]:
        # Of a sample in fp32, and these in float64: the same bits on any number of threads, and in bf16 twice as fast
        # as one sum with dtype=float32.
        of_samples = grad.flatten(2).sum(2, dtype=torch.promote_types(grad.dtype, torch.float32))
        found["bias"] = of_samples.sum(0, dtype=torch.float64).to(ctx.bias_dtype)
    return found


def _gradient_by_x(weight: Tensor, grad: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # create_graph=True: differentiable operations
        dtype = torch.promote_types(grad.dtype, weight.dtype)
        shape = (grad.shape[0], weight.shape[1], *grad.shape[2:])
        return conv2d_input(shape, weight.to(dtype), grad.to(dtype), padding=1).to(grad.dtype)
    return _ops.winograd(grad, _ops.winograd_filters(weight, True), None, weight.shape[1])


def _gradient_by_weight(x: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled():
        wide = torch.promote_types(grad.dtype, dtype)
        shape = (grad.shape[1], x.shape[1], 3, 3)
        return conv2d_weight(x.to(wide), shape, grad.to(wide), padding=1).to(dtype)
    return _ops.winograd_weight_gradient(x, grad).to(dtype)


declare(
    "convolve(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    run=_convolve,
    shapes=_convolve_empty,
    gradient=Gradient(("x", "weight", "bias"), _convolve_save, _convolve_gradients),
)
