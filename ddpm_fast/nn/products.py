"""Matrix products in a precision that the CPU has instructions for.

A CPU without bf16 instructions multiplies bf16 matrices in the library's slowest loops: on two Zen 3 cores at 3 to 20
GFLOP/s where fp32 runs at 150. There convolutions, linear layers and attention are computed in fp32, and their results
rounded once, which is at least as exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import compat

_IS_NATIVE = {torch.bfloat16: compat.cpu_has_bf16(), torch.float16: compat.cpu_has_fp16()}


def computed(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """function(*tensors), in fp32 where the CPU lacks instructions for the precision that it would be computed in.

    Args:
        function: A product in torch's own operations: differentiable, and cast by autocast.
        tensors: An image, weights and biases, of one dtype unless autocast is on; None is passed on.

    Returns:
        What function returns, in the dtype that it would have.
    """
    images = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.device.type == "cpu" for tensor in images):
        return function(*tensors)
    dtypes = {tensor.dtype for tensor in images}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in dtypes:
        dtypes = {torch.get_autocast_dtype("cpu")}
    dtype = dtypes.pop()
    if dtypes or _IS_NATIVE.get(dtype, True):
        return function(*tensors)
    with torch.autocast("cpu", enabled=False):
        return function(*(None if tensor is None else tensor.float() for tensor in tensors)).to(dtype)


class Linear(nn.Linear):
    """nn.Linear, computed in a precision that the CPU has instructions for."""

    def forward(self, x: Tensor) -> Tensor:
        return computed(F.linear, x, self.weight, self.bias)
