"""`winograd`, a 3x3 convolution of the U-Net, which a CPU has C++ kernels for. Elsewhere plain torch computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.ops.backends import reference_network
from ddpm_fast.ops.checks import check_device, check_dtype, check_image, check_layout, check_tensors
from ddpm_fast.ops.declare import declare, kernel_for
from ddpm_fast.ops.tensors import channels_last

_ops = torch.ops.ddpm_fast
_PANEL = 32  # output channels; kWinogradPanel of csrc/cpu/kernels.h


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
    to_points, _, _ = reference_network.winograd_matrices(weight.device)
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
    kernel_for("winograd", x)(channels_last(x), filters, bias, out)
    return out


declare(
    "winograd(Tensor x, Tensor filters, Tensor? bias, SymInt out_channels) -> Tensor",
    run=_winograd,
    shapes=_winograd_empty,
)
