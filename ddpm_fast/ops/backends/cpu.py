"""The ops on the C++ kernels of csrc/cpu/, and the instruction sets that these were built for."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.ops.backends.extension import (
    _C,
    DTYPES,
    Kernels,
    group_norm_backward_of,
    group_norm_of,
    pointer_of,
    rows_of,
    shape_of,
    unavailable,
)
from ddpm_fast.ops.tensors import Norm

__all__ = ["DTYPES", "OPS", "has_matrix_units", "isa", "isas", "refusal", "unavailable", "use_isa"]

if _C and (_isa := os.environ.get("DDPM_FAST_CPU_ISA")) and not _C.use_isa(_isa):
    raise InputError(f"DDPM_FAST_CPU_ISA={_isa}: this machine runs {', '.join(_C.isas())}")


def isas() -> list[str]:
    """The instruction sets that the kernels were built for and this machine runs, slowest first."""
    return _C.isas() if _C else []


def isa() -> str:
    """The one in use."""
    return _C.isa()


def use_isa(name: str) -> None:
    """Chooses another one. The results are the same bits, except a convolution's and a norm's; the speed differs."""
    if not _C.use_isa(name):
        raise InputError(f"instruction set {name!r}: this machine runs {', '.join(_C.isas())}")


def has_matrix_units() -> bool:
    """Whether this machine multiplies bf16 matrices several times as fast as fp32 ones."""
    return bool(_C) and _C.has_matrix_units()


def refusal(device: torch.device) -> str:
    """Why these kernels cannot run on tensors of this device, or the empty string."""
    return "" if device.type == "cpu" else f"its kernels are for CPU tensors and these are on {device}"


class _CpuKernels(Kernels):
    """The ops that a GPU has too, and those of the network."""

    def run(self, op: str, image: Tensor, *arguments: object) -> None:
        try:
            getattr(_C, op)(shape_of(image), *arguments, torch.get_num_threads())
        except IndexError as error:
            raise InputError(f"{op}: {error}") from None

    def group_norm(self, norm: Norm, y: Tensor, total: Tensor | None, statistics: Tensor) -> None:
        """The images are channels_last."""
        _C.group_norm(*group_norm_of(norm, y, total, statistics), torch.get_num_threads())

    def group_norm_backward(
        self,
        norm: Norm,
        grad: Tensor,
        grad_total: Tensor | None,
        statistics: Tensor,
        dx: Tensor,
        djoined: Tensor | None,
        sums: Tensor,
    ) -> None:
        """The images are channels_last and of x's dtype. There is no residual: x is the total where one was kept."""
        arguments = group_norm_backward_of(norm, grad, grad_total, statistics, dx, djoined, sums)
        _C.group_norm_backward(*arguments, torch.get_num_threads())

    def group_norm_parameters(
        self,
        sums: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        dweight: Tensor,
        dbias: Tensor,
        dscale: Tensor | None,
        dshift: Tensor | None,
    ) -> None:
        """sums: at least the first two of group_norm_backward's, contiguous."""
        vectors = (rows_of(values) for values in (weight, bias, scale))
        results = (pointer_of(made) for made in (dweight, dbias, dscale, dshift))
        _C.group_norm_parameters(*sums.shape[1:], sums.data_ptr(), *vectors, *results, torch.get_num_threads())

    def winograd(self, x: Tensor, filters: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """x and out are channels_last; filters and bias fp32."""
        n, channels, height, width = x.shape
        _C.winograd(
            n,
            height,
            width,
            channels,
            out.shape[1],
            DTYPES[x.dtype],
            x.data_ptr(),
            filters.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )

    def winograd_filters(self, weight: Tensor, flipped: bool, out: Tensor) -> None:
        """The weight may have any strides; out is contiguous fp32."""
        out_channels, channels = weight.shape[:2]
        out_stride, channel_stride, row_stride, column_stride = weight.stride()
        start = weight.data_ptr()
        if flipped:  # the kernel begins at the last tap and goes back
            start += 2 * (row_stride + column_stride) * weight.element_size()
            row_stride, column_stride = -row_stride, -column_stride
            out_channels, channels = channels, out_channels
            out_stride, channel_stride = channel_stride, out_stride
        _C.winograd_filters(
            out_channels,
            channels,
            DTYPES[weight.dtype],
            start,
            out_stride,
            channel_stride,
            row_stride,
            column_stride,
            out.data_ptr(),
            torch.get_num_threads(),
        )

    def winograd_weight_gradient(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        """x and grad are channels_last and of one dtype; out [K, C, 3, 3] is channels_last fp32."""
        n, channels, height, width = x.shape
        _C.winograd_weight_gradient(
            n,
            height,
            width,
            channels,
            grad.shape[1],
            DTYPES[x.dtype],
            x.data_ptr(),
            grad.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )

    def table(self) -> dict[str, Callable[..., None]]:
        return super().table() | {
            "group_norm": self.group_norm,
            "group_norm_backward": self.group_norm_backward,
            "group_norm_parameters": self.group_norm_parameters,
            "winograd": self.winograd,
            "winograd_filters": self.winograd_filters,
            "winograd_weight_gradient": self.winograd_weight_gradient,
        }


OPS = _CpuKernels().table()
