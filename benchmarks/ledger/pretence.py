"""The paths that torch takes on a GPU, taken on the meta device, where there is nothing to compute with.

torch knows no autocast on `meta`, splits attention into its matrix products there, and has no fused or multi-tensor
form of the optimiser. Inside `as_on_a_gpu` the calls are changed into those that a GPU gets, for the ledger to see.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
# Of autocast's lists for CUDA (ATen/autocast_mode.h), by the names of the functions in Python.
_LOWER = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul"}
_LOWER |= {"__matmul__", "mm", "mv", "bmm", "addmm", "baddbmm", "einsum", "prelu", "scaled_dot_product_attention"}
_FP32 = {"exp", "log", "reciprocal", "rsqrt", "pow", "__pow__", "softplus", "layer_norm", "group_norm", "rms_norm"}
_FP32 |= {"l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "cross_entropy", "softmax", "log_softmax", "cumsum"}
_FP32 |= {"prod", "sum", "norm", "interpolate", "upsample_nearest2d"}


class Autocast(TorchFunctionMode):
    """torch.autocast for tensors on `meta`: the same casts, and a weight's copy is kept until the end of the block.

    Args:
        device_type: what torch.autocast is told; only "meta" does anything.
        dtype: of the matrix products and convolutions.
        enabled: whether anything is cast.
    """

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any):
        super().__init__()
        self.dtype, self.enabled = dtype or torch.bfloat16, enabled and device_type == "meta"
        self.weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.enabled and name in _LOWER | _FP32:
            dtype = self.dtype if name in _LOWER else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {key: self._cast(value, dtype) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.device == META):
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        if dtype == torch.float32 or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self.weights:
            self.weights[id(value)] = value.to(dtype)
        return self.weights[id(value)]


class _Functions(TorchFunctionMode):
    """Attention as one op, as a GPU's is. What is asked of a value, which is not there, is answered with yes: AdamW
    asks whether the learning rate is allowed."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__bool__" and args[0].device == META:
            return True
        if name == "scaled_dot_product_attention" and args[0].device == META:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, what is called on tensors on `meta` is what a GPU would get."""
    with (
        # The device, besides torch's own, for which it takes the fused and the multi-tensor forms: since 2.1 it asks
        # for this name each time. Without the name the optimiser would refuse its fused form.
        mock.patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "meta"),
        mock.patch.object(torch, "autocast", Autocast),
        _Functions(),
    ):
        yield
