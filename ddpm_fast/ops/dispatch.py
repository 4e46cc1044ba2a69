"""Which code runs an op: the C++ kernels for CUDA or the CPU, Triton's, or plain torch.

The default is the fastest backend that is there and handles the call's device and dtypes. use_backend() or the
environment variable DDPM_FAST_BACKEND chooses one by name, and then nothing else is tried: if it cannot run the call,
the error says why and what to do. The network's ops are the exception: plain torch runs them where a backend cannot.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import NamedTuple, cast

import torch

from ddpm_fast.errors import InputError
from ddpm_fast.ops.backends import cpu, cuda, reference

NAMES = ("cuda", "cpu", "triton", "reference")  # fastest first
# What torch has as well, and kernels do faster.
NETWORK_OPS = (
    "group_norm",
    "group_norm_backward",
    "group_norm_parameters",
    "add_bias",
    "channel_sums",
    "dropout",
    "winograd",
    "winograd_filters",
    "winograd_weight_gradient",
)
_USUAL_ON_CPU = (None, "cpu")
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


class _Unset:
    """What _block holds where no `with use_backend(...)` is entered; None is a choice, that of the default."""


# The choice of the innermost `with` of this thread, or of this task where tasks share a thread.
_block: ContextVar[str | type[_Unset] | None] = ContextVar("ddpm_fast_backend", default=_Unset)
_environment = os.environ.get("DDPM_FAST_BACKEND") or None
_lock = threading.RLock()  # of _calls; a destructor may take it at any time


class _Call:
    """A call of use_backend that no `with` was entered by, or not yet."""

    def __init__(self, name: str | None):
        self.name, self.thread = name, threading.get_ident()
        self.is_plain = False  # whether it is certain that no `with` follows


_calls: list[_Call] = []  # the newest one last


class use_backend:
    """Chooses a backend for all ops: for its block as a context manager, or by a plain call from now on.

    A block chooses for its own thread (and asyncio task) alone. Threads that are started within it, such as those of a
    DataLoader, do not inherit its choice. A plain call chooses for the whole process, except for threads that are
    within a block; made within a block, it chooses for the rest of that block. The gradient of what was computed within
    a block runs on the block's backend, wherever and in whichever thread backward() is called.

    Args:
        name: "cuda", "cpu", "triton" or "reference"; None for the default again.

    Raises:
        InputError: there is no such backend, or it cannot run here; the message says why and how to get it.
    """

    _call: _Call | None = None

    def __init__(self, name: str | None):
        self._name = None if name is None else _check_name(name)
        self._previous = _block.get()
        if self._previous is not _Unset:
            _block.set(self._name)
            return
        self._call = _Call(self._name)
        with _lock:
            newest = max((i for i, call in enumerate(_calls) if call.is_plain), default=0)
            _calls[:] = [*_calls[newest:], self._call]

    def __enter__(self) -> use_backend:
        if self._call is not None:
            self._previous = _block.get()
            with _lock:
                if self._call in _calls:
                    _calls.remove(self._call)
        _block.set(self._name)
        return self

    def __exit__(self, *_: object) -> None:
        _block.set(self._previous)

    def __del__(self) -> None:
        # Of a plain call nothing is kept, so that this follows at once. Only then can other threads know that the call
        # was not the beginning of a block.
        if self._call is not None:
            self._call.is_plain = True


def _chosen() -> str | None:
    """The backend that was asked for by name, here and now."""
    name = _block.get()
    if name is not _Unset:
        return cast("str | None", name)
    return _chosen_by_call() if _calls else _environment


def _chosen_by_call() -> str | None:
    thread = threading.get_ident()
    with _lock:
        for call in reversed(_calls):
            if call.thread == thread:
                call.is_plain = True  # this thread goes on without a block
            if call.is_plain:
                return call.name
    return _environment


def current_block() -> object:
    """What to give to `within`, later or in another thread, for the choice of the block that is entered now."""
    return _block.get()


@contextlib.contextmanager
def within(block: object) -> Iterator[None]:
    """Inside, the choice of a block that was entered before; see current_block."""
    previous = _block.get()
    _block.set(cast("str | type[_Unset] | None", block))
    try:
        yield
    finally:
        _block.set(previous)


def active_backend(op: str, device: torch.device | str = "cpu", *dtypes: torch.dtype) -> str:
    """The name of the backend that would run `op` on tensors of this device and these dtypes.

    Raises InputError where a backend was asked for by name and cannot run the call. For the network's ops (NETWORK_OPS)
    the answer is then "reference".
    """
    device = torch.device(device) if isinstance(device, str) else device
    chosen = _chosen()
    if chosen is None:
        if _usual_module(op, device, dtypes) is not None:
            return device.type
        return next((name for name in NAMES if not _refusal(name, op, device, dtypes)), "reference")
    if reason := _refusal(_check_name(chosen), op, device, dtypes):
        if op in NETWORK_OPS:
            return "reference"
        raise InputError(f"backend {chosen!r} cannot run {op}: {reason}")
    return chosen


def is_usual_on_cpu() -> bool:
    """Whether the C++ kernels run what is on the CPU, here and now."""
    return not cpu.unavailable and _chosen() in _USUAL_ON_CPU


def has_kernel(op: str, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether a kernel, rather than plain torch, would run an op of the network on such tensors.

    The meta device stands for a GPU: what is counted there is what runs on one.
    """
    if device.type == "meta":
        return _chosen() != "reference" and all(dtype in cuda.DTYPES for dtype in dtypes)
    return active_backend(op, device, *dtypes) != "reference"


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
    if _chosen() is None and (module := _usual_module(op, device, dtypes)) is not None:
        return module.OPS[op]
    return _module(active_backend(op, device, *dtypes)).OPS[op]
