"""The ops on the C++ kernels of csrc/: tensors in, raw pointers out. Arguments were checked in ops/__init__.py.

This module is the backend for CPU tensors; cuda.py puts the same calls to the kernels for GPUs.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.registry import is_channels_last

try:
    from ddpm_fast import _C

    unavailable = ""
except ImportError as error:
    _C = None
    unavailable = (
        f"the C++ extension cannot be imported ({error}). Install the package with a C++ compiler at hand, from its "
        "source folder: pip install -e ."
    )

DTYPES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_IMAGE = (0, 1, False)
_NO_ROWS = (0, 1, 0, 0)

if _C and (_isa := os.environ.get("DDPM_FAST_CPU_ISA")) and not _C.use_isa(_isa):
    raise InputError(f"DDPM_FAST_CPU_ISA={_isa}: this machine runs {', '.join(_C.isas())}")


def isas() -> list[str]:
    """The instruction sets that the kernels were built for and this machine runs, slowest first."""
    return _C.isas() if _C else []


def isa() -> str:
    """The one in use."""
    return _C.isa()


def use_isa(name: str) -> None:
    """Chooses another one. The results are the same bits, but a convolution's; only the speed differs."""
    if not _C.use_isa(name):
        raise InputError(f"instruction set {name!r}: this machine runs {', '.join(_C.isas())}")


def has_matrix_units() -> bool:
    """Whether this machine multiplies bf16 matrices several times as fast as fp32 ones."""
    return bool(_C) and _C.has_matrix_units()


def refusal(device: torch.device) -> str:
    """Why these kernels cannot run on tensors of this device, or the empty string."""
    return "" if device.type == "cpu" else f"its kernels are for CPU tensors and these are on {device}"


def _image(image: Tensor | None) -> tuple[int, int, bool]:
    return _NO_IMAGE if image is None else (image.data_ptr(), DTYPES[image.dtype], is_channels_last(image))


def shape_of(image: Tensor) -> tuple[int, int, int]:
    """(samples, channels, positions): the product of the trailing dimensions."""
    n, channels = (image.shape[0], 1) if image.ndim < 2 else image.shape[:2]
    positions = 1
    for size in image.shape[2:]:
        positions *= size
    return n, channels, positions


def _table(table: Tensor) -> tuple[int, int]:
    return table.data_ptr(), table.shape[0]


def _noise(noise: Tensor | NoiseKey) -> tuple:
    if isinstance(noise, NoiseKey):
        return _NO_IMAGE, noise.seed.data_ptr(), noise.sample_id.data_ptr(), noise.step.data_ptr(), noise.stream
    return _image(noise), 0, 0, 0, 0


_POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)
_PANEL = 32  # output channels; kWinogradPanel of csrc/cpu/kernels.h


def winograd_filters(weight: Tensor) -> Tensor:
    """G g G^T of csrc/winograd.h in float64, rounded once: weight [K, C, 3, 3] -> fp32 [K/32, 36, C, 32], K rounded up
    to panels of 32 and the rest zeros."""
    rows = [[p**k / math.prod(p - q for q in _POINTS if q != p) for k in range(3)] for p in _POINTS]
    g = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device=weight.device)
    both = (g[:, None, :, None] * g[None, :, None, :]).reshape(36, 9)
    k, c = weight.shape[:2]
    filters = weight.new_zeros(-(-k // _PANEL), 36, c, _PANEL, dtype=torch.float32)
    for panel, part in zip(filters, weight.detach().split(_PANEL), strict=True):
        taps = part.permute(2, 3, 1, 0).double().reshape(9, -1)
        panel[..., : len(part)] = (both @ taps).view(36, c, -1)
    return filters


def winograd(x: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int) -> Tensor:
    """The 3x3 convolution, stride 1 and padding 1, of x [N, C, H, W] (fp32, bf16 or fp16) by filters of
    winograd_filters, plus bias [K]: [N, K, H, W] of x's dtype, channels_last. Computed in fp32 and rounded once.

    Infinity or NaN in a pixel reaches all 16 outputs of each tile whose 6x6 pixels it is among.
    """
    pixels = x.permute(0, 2, 3, 1).contiguous()
    out = pixels.new_empty(*pixels.shape[:3], out_channels)
    bias = None if bias is None else bias.float().contiguous()
    _C.winograd(
        *(tuple(pixels.shape), out_channels, DTYPES[x.dtype], pixels.data_ptr(), filters.data_ptr()),
        *(0 if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads()),
    )
    return out.permute(0, 3, 1, 2)


def _norm(x, weight, bias, scale, shift, added, groups, silu, statistics) -> tuple:
    n, c, height, width = x.shape
    return (
        *((n, c, height * width), groups, silu, DTYPES[x.dtype], x.data_ptr()),
        *(_rows(weight), _rows(bias), _rows(scale), _rows(shift), _rows(added), statistics.data_ptr()),
    )


def _rows(values: Tensor | None) -> tuple[int, int, int, int]:
    """[N, C], or [C] for every sample."""
    if values is None:
        return _NO_ROWS
    strides = values.stride()
    return values.data_ptr(), DTYPES[values.dtype], strides[0] if len(strides) == 2 else 0, strides[-1]


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """silu?(((x + added - mean) * rstd * weight + bias) * (1 + scale) + shift), and float64 [N, groups, 2]: mean, rstd.

    x: [N, C, H, W], channels_last; weight, bias: [C]; scale, shift, added: [N, C]; each of its own dtype.
    """
    y, statistics = torch.empty_like(x), x.new_empty(x.shape[0], groups, 2, dtype=torch.float64)
    norm = _norm(x, weight, bias, scale, shift, added, groups, silu, statistics)
    _C.group_norm(norm, eps, y.data_ptr(), torch.get_num_threads())
    return y, statistics


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    statistics: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """dL/dx, and float64 [3, N, C]: sums over the pixels of g, g * n and dL/dx, with g the loss's gradient before SiLU
    and n the normalised x. grad is channels_last and of x's dtype; the rest is as group_norm had and gave it."""
    dx, sums = torch.empty_like(x), x.new_empty(3, *x.shape[:2], dtype=torch.float64)
    norm = _norm(x, weight, bias, scale, shift, added, statistics.shape[1], silu, statistics)
    _C.group_norm_backward(norm, grad.data_ptr(), dx.data_ptr(), sums.data_ptr(), torch.get_num_threads())
    return dx, sums


class NativeOps(ABC):
    """The ops as functions of tensors, on one of the extension's two sets of kernels: a subclass knows where to run."""

    @abstractmethod
    def run(self, op: str, image: Tensor, *arguments) -> None:
        """Runs the exported function `op` on the arguments; image has the shape that the call is about."""

    def normal(self, key: NoiseKey, out: Tensor) -> None:
        self.run("normal", out, _noise(key), _image(out))

    def q_sample(self, x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey, out: Tensor) -> None:
        self.run("q_sample", x0, _image(x0), t.data_ptr(), _table(table), _noise(noise), _image(out))

    def diffusion_loss(
        self,
        output: Tensor,
        x0: Tensor,
        t: Tensor,
        table: Tensor,
        noise: Tensor | NoiseKey,
        residual: Tensor | None,
        loss: Tensor,
    ) -> None:
        self.run(
            *("diffusion_loss", x0, _image(output), _image(x0), t.data_ptr(), _table(table), _noise(noise)),
            *(_image(residual), loss.data_ptr()),
        )

    def hybrid_loss(
        self,
        output: Tensor,
        x0: Tensor,
        t: Tensor,
        table: Tensor,
        noise: Tensor | NoiseKey,
        gradient: Tensor | None,
        loss: Tensor,
        factors: Tensor,
    ) -> None:
        self.run(
            *("hybrid_loss", x0, factors.shape[1], _image(output), _image(x0), t.data_ptr(), _table(table)),
            *(_noise(noise), _image(gradient), loss.data_ptr(), 0, factors.data_ptr()),
        )

    def vlb_terms(
        self,
        output: Tensor,
        x0: Tensor,
        t: Tensor,
        table: Tensor,
        noise: Tensor | NoiseKey,
        gradient: Tensor | None,
        bits: Tensor,
        mse_x0: Tensor,
        factors: Tensor,
    ) -> None:
        self.run(
            *("vlb_terms", x0, factors.shape[1], _image(output), _image(x0), t.data_ptr(), _table(table)),
            *(_noise(noise), _image(gradient), bits.data_ptr(), mse_x0.data_ptr(), factors.data_ptr()),
        )

    def loss_backward(self, stored: Tensor, scale: Tensor, grad: Tensor) -> None:
        self.run("loss_backward", stored, scale.shape[1], _image(stored), scale.data_ptr(), _image(grad))

    def reverse_step(
        self,
        x_t: Tensor,
        output: Tensor,
        x0_previous: Tensor | None,
        table: Tensor,
        step: Tensor,
        noise: Tensor | NoiseKey,
        x_out: Tensor,
        x0_out: Tensor | None,
        model_out: Tensor | None,
    ) -> None:
        self.run(
            *("reverse_step", x_t, 2 if output.shape[1] > x_t.shape[1] else 1, _image(x_t), _image(output)),
            *(_image(x0_previous), _table(table), step.data_ptr(), _noise(noise)),
            *(_image(x_out), _image(x0_out), _image(model_out)),
        )

    def table(self) -> dict[str, Callable[..., None]]:
        """The ops by name."""
        return {
            "normal": self.normal,
            "q_sample": self.q_sample,
            "diffusion_loss": self.diffusion_loss,
            "hybrid_loss": self.hybrid_loss,
            "vlb_terms": self.vlb_terms,
            "loss_backward": self.loss_backward,
            "reverse_step": self.reverse_step,
        }


class _CpuOps(NativeOps):
    def run(self, op: str, image: Tensor, *arguments) -> None:
        try:
            getattr(_C, op)(shape_of(image), *arguments, torch.get_num_threads())
        except IndexError as error:
            raise InputError(f"{op}: {error}") from None


OPS = _CpuOps().table()
