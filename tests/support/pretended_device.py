"""A device that is not there, for a process of its own: tensors that say they are on it, and are computed on the CPU.

It stands for Apple's and Intel's GPUs ("mps", "xpu"): torch has operations for them and this package no kernels. It has
no float64, which Apple's GPUs do not have, and takes no tensor of the CPU beside its own. So a test sees where a code
that has only met CPUs and CUDA would fail elsewhere, and that its numbers are right where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# Tensors of a type of one's own know no inference mode. This has to be imported before the package.
torch.inference_mode = lambda mode=True: torch.no_grad() if mode is True else nullcontext()
NAME = "pretended"
WIDE = (torch.float64, torch.complex128)
COPIES = (
    torch.ops.aten.to.device,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
)


def _asked_for(args: Any, kwargs: Any) -> torch.device | None:
    """The device among the arguments."""
    return next((value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.device)), None)


class OnDevice(Tensor):
    """A tensor that says it is on `device`. Its numbers are `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> OnDevice:
        if held.dtype in WIDE:
            raise TypeError(f"{device.type} has no {held.dtype}")
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=device, requires_grad=held.requires_grad
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, next(a for a in tree_flatten((args, kwargs))[0] if type(a) is cls).device)

    # What is asked where tensors may overlap.
    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r}, {self.device})"


def run(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    """Run an operation of torch that has to do with the device."""
    if func.namespace == "ddpm_fast":  # as the device would: by what the op is registered with for all devices
        with _Factories():
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    given = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
    for tensor in given:
        if type(tensor) is not OnDevice and tensor.dim() and func not in COPIES:
            raise RuntimeError(f"{func}: a tensor {tuple(tensor.shape)} on the {tensor.device} beside one on {device}")
    target = _asked_for(args, kwargs) or device

    def held(value: Any) -> Any:
        if type(value) is OnDevice:
            return value.held
        return torch.device("cpu") if isinstance(value, torch.device) else value

    result = func(*tree_map(held, args), **tree_map(held, kwargs))
    outer = {id(a.held): a for a in given if type(a) is OnDevice}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or target.type != device.type:
            return value
        return outer[id(value)] if id(value) in outer else OnDevice(value, device)

    return tree_map(wrap, result)


class _Factories(TorchDispatchMode):
    """Makes what is made on the device with no tensor of it among the arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(type(a) is OnDevice for a in tree_flatten((args, kwargs))[0])
        wanted = _asked_for(args, kwargs)
        if there or (wanted is not None and wanted.type == NAME):
            return run(func, args, kwargs, torch.device(NAME, 0))
        return func(*args, **kwargs)


class _Module(backend_registration._DummyBackendModule):
    """What torch.autocast asks, which a training step enters."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Inside, torch has a device of the type `NAME`. A process cannot be rid of it again, nor have another."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    with _Factories():
        yield torch.device(NAME, 0)
