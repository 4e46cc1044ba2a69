"""Which code runs an op: the C++ kernels for CUDA or the CPU, Triton's, or plain torch.

The default is the fastest backend that is there and handles the call's device and dtypes. use_backend() or the
environment variable DDPM_FAST_BACKEND chooses one by name, and then nothing else is tried: if it cannot run the call,
the error says why and what to do. The network's ops are the exception: plain torch runs them where a backend cannot.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from ddpm_fast.errors import InputError
from ddpm_fast.ops.backends import cpu, cuda, reference

NAMES = ("cuda", "cpu", "triton", "reference")  # fastest first
# What torch has as well, and the CPU's C++ kernels do faster.
NETWORK_OPS = ("group_norm", "group_norm_backward", "winograd")
_MODULES = {"cuda": cuda, "cpu": cpu, "reference": reference}


class Status(NamedTuple):
    """A line of `python -m ddpm_fast.info`: a backend, the ops it has, and why it is not there if it is not."""

    name: str
    ops: tuple[str, ...]
    unavailable: str


@cache
def _triton() -> ModuleType:
    """Imported when somebody first asks for it: importing Triton takes longer than all the rest."""
    return importlib.import_module("ddpm_fast.ops.backends.triton")


def _module(name: str) -> ModuleType:
    return _triton() if name == "triton" else _MODULES[name]


def backend_status() -> list[Status]:
    """Every backend, fastest first, with what it can do here."""
    return [Status(name, tuple(_module(name).OPS), _module(name).unavailable) for name in NAMES]


def cannot_run_on(name: str, device: torch.device) -> str:
    """Why an available backend cannot run on tensors of this device, or the empty string."""
    return _module(name).refusal(device)


def _refusal(name: str, op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why a backend cannot run a call, or the empty string."""
    module = _module(name)
    if module.unavailable:
        return module.unavailable
    if op not in module.OPS:
        return f"it has no kernel for {op}; it has {', '.join(module.OPS)}"
    if reason := module.refusal(device):
        return reason
    for dtype in dtypes:
        if dtype not in module.DTYPES:
            return f"it has no {dtype}; use the reference backend for that, or one of {list(module.DTYPES)}"
    return ""


def _check_name(name: str) -> str:
    if name not in NAMES:
        raise InputError(f"backend {name!r} is unknown; there are {', '.join(NAMES)}")
    if reason := _module(name).unavailable:
        raise InputError(f"backend {name!r} is not available: {reason}")
    return name


_chosen: str | None = os.environ.get("DDPM_FAST_BACKEND") or None


class use_backend:
    """Chooses a backend for all ops, from now on or, as a context manager, for its block.

    Args:
        name: "cuda", "cpu", "triton" or "reference"; None for the default again.

    Raises:
        InputError: there is no such backend, or it cannot run here; the message says why and how to get it.
    """

    def __init__(self, name: str | None):
        global _chosen
        self._previous = _chosen
        _chosen = None if name is None else _check_name(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _chosen
        _chosen = self._previous


def active_backend(op: str, device: torch.device | str = "cpu", *dtypes: torch.dtype) -> str:
    """The name of the backend that would run `op` on tensors of this device and these dtypes.

    Raises InputError where a backend was asked for by name and cannot run the call. For the network's ops (group_norm,
    winograd) the answer is then "reference".
    """
    device = torch.device(device) if isinstance(device, str) else device
    if _chosen is None:
        if _usual_module(op, device, dtypes) is not None:
            return device.type
        return next((name for name in NAMES if not _refusal(name, op, device, dtypes)), "reference")
    if reason := _refusal(_check_name(_chosen), op, device, dtypes):
        if op in NETWORK_OPS:
            return "reference"
        raise InputError(f"backend {_chosen!r} cannot run {op}: {reason}")
    return _chosen


def _usual_module(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> ModuleType | None:
    """The C++ kernels for the device if they take the call, or None: the common case, without building any reason."""
    module = _MODULES.get(device.type)
    if module is None or module.unavailable or op not in module.OPS or module.refusal(device):
        return None
    supported = module.DTYPES
    for dtype in dtypes:
        if dtype not in supported:
            return None
    return module


def kernel(op: str, device: torch.device, *dtypes: torch.dtype) -> Callable[..., None]:
    """The function that runs `op`, by the rule of active_backend."""
    if _chosen is None and (module := _usual_module(op, device, dtypes)) is not None:
        return module.OPS[op]
    return _module(active_backend(op, device, *dtypes)).OPS[op]
