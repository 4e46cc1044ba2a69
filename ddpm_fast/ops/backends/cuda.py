"""The ops on the CUDA C++ kernels of csrc/cuda/: tensors in, raw pointers and the caller's stream out.

Nothing waits for the GPU, and a call can be captured in a CUDA graph. Where a sample is summed in parts (by a loss, or
by the norm of a large image), the sums of the parts go through a workspace, which is allocated like any tensor (in the
graph's own pool during a capture).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import compat
from ddpm_fast.ops.backends.extension import (
    _C,
    DTYPES,
    Kernels,
    group_norm_backward_of,
    group_norm_of,
    pointer_of,
    rows_of,
    shape_of,
)
from ddpm_fast.ops.backends.extension import unavailable as no_extension
from ddpm_fast.ops.tensors import Norm

__all__ = ["DTYPES", "OPS", "capabilities", "refusal", "unavailable"]

_SUMS = {"diffusion_loss", "hybrid_loss", "vlb_terms"}
_REINSTALL = "reinstall with it: pip install --no-build-isolation -e . (DDPM_FAST_CUDA_ARCHS=90 for compute 9.0 alone)"

_kernels: Any = getattr(_C, "cuda", None)


def _missing() -> str:
    """Why there are no kernels that could run with this torch, or the empty string."""
    if torch.version.hip is not None:  # whose GPUs torch calls "cuda" as well
        return f"its kernels are for NVIDIA's GPUs, and this torch computes on AMD's (ROCm {torch.version.hip})"
    if not _kernels:
        return f"the C++ extension was built without nvcc. Put CUDA's nvcc on the PATH and {_REINSTALL}"
    return ""


unavailable = no_extension or _missing()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def capabilities() -> str:
    """The compute capabilities that the kernels were built for, in words."""
    return ", ".join(f"{arch // 10}.{arch % 10}" for arch in _kernels.archs)


@cache
def _driver_refusal() -> str:
    """Why no GPU can be used here at all, or the empty string."""
    if not torch.cuda.is_available():
        return "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU or driver"
    driver, runtime = _kernels.driver_version(), _kernels.runtime_version()
    if driver // 1000 < runtime // 1000:
        return (
            f"its kernels were built with CUDA {_version(runtime)} and this driver supports {_version(driver)}: update "
            f"the driver, or put an nvcc of CUDA {driver // 1000} on the PATH and {_REINSTALL}"
        )
    return ""


@cache
def _device_refusal(index: int) -> str:
    """Why the kernels cannot run on this GPU, or the empty string."""
    major, minor = torch.cuda.get_device_capability(index)
    # Machine code runs on later minor versions of its generation, PTX is compiled for anything later.
    if any(arch // 10 == major and arch % 10 <= minor for arch in _kernels.archs) or _kernels.ptx <= 10 * major + minor:
        return ""
    return (
        f"its kernels were built for compute capabilities {capabilities()} and cuda:{index} "
        f"({torch.cuda.get_device_name(index)}) has {major}.{minor}: set DDPM_FAST_CUDA_ARCHS={10 * major + minor} "
        f"and {_REINSTALL}"
    )


def refusal(device: torch.device) -> str:
    """Why these kernels cannot run on tensors of this device, or the empty string."""
    if device.type != "cuda":
        return f"its kernels are for CUDA tensors and these are on {device}"
    return _driver_refusal() or _device_refusal(torch.cuda.current_device() if device.index is None else device.index)


class _CudaKernels(Kernels):
    def run(self, op: str, image: Tensor, *arguments: object) -> None:
        if image.numel() == 0:
            return
        shape, device, workspace = shape_of(image), image.device, None
        if op in _SUMS and (floats := _kernels.workspace(shape)):
            workspace = torch.empty(floats, dtype=torch.float32, device=device)
        getattr(_kernels, op)(shape, *arguments, _where(device, workspace))

    def group_norm(self, norm: Norm, y: Tensor, total: Tensor | None, statistics: Tensor) -> None:
        """The images are channels_last."""
        _run("group_norm", norm.x.device, *group_norm_of(norm, y, total, statistics))

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
        _run("group_norm_backward", norm.x.device, *arguments)

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
        where = _where(sums.device, None)
        _kernels.group_norm_parameters(*sums.shape[1:], sums.data_ptr(), *vectors, *results, where)

    def add_bias(self, x: Tensor, residual: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
        """The images are channels_last and of one dtype; bias is [N, C]."""
        pointers = x.data_ptr(), pointer_of(residual), rows_of(bias), out.data_ptr()
        _kernels.add_bias(shape_of(x), DTYPES[x.dtype], *pointers, _where(x.device, None))

    def channel_sums(self, image: Tensor, out: Tensor) -> None:
        """The image is channels_last."""
        _run("channel_sums", image.device, shape_of(image), DTYPES[image.dtype], image.data_ptr(), out.data_ptr())

    def table(self) -> dict[str, Callable[..., None]]:
        return super().table() | {
            "group_norm": self.group_norm,
            "group_norm_backward": self.group_norm_backward,
            "group_norm_parameters": self.group_norm_parameters,
            "add_bias": self.add_bias,
            "channel_sums": self.channel_sums,
        }


def _run(op: str, device: torch.device, *arguments: object) -> None:
    """A call of an op that says itself how much memory it works in: none, where the images fit into registers."""
    floats = getattr(_kernels, f"{op}_workspace")(*arguments)
    workspace = torch.empty(floats, dtype=torch.float32, device=device) if floats else None
    getattr(_kernels, op)(*arguments, _where(device, workspace))


def _where(device: torch.device, workspace: Tensor | None) -> tuple[int, int, int]:
    """(device, stream, workspace) as the extension takes them."""
    stream = compat.current_stream(device.index)
    return device.index, stream, 0 if workspace is None else workspace.data_ptr()


OPS = _CudaKernels().table()
