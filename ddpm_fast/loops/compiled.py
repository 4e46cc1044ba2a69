"""Networks called through torch.compile, which fuses what a network does between its convolutions.

The model itself is neither wrapped nor changed: its call is compiled, and kept beside it for as long as it lives. So
the names of its weights stay as they are, and a CUDA graph of ours may hold the compiled kernels as any others.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from ddpm_fast import compat
from ddpm_fast.errors import InputError
from ddpm_fast.loops.network import Call

# Dropout draws what it draws in eager mode. Otherwise the compiler has random numbers of its own.
_OPTIONS: dict[str, str | int | bool | Callable] = {"fallback_random": True}
# Of each model, by the layout of the arguments. None is forgotten before the model is: a CUDA graph may read the
# constants of any, and each takes so long to compile that there will be few.
_compiled: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Call]] = weakref.WeakKeyDictionary()


def compiled(model: nn.Module) -> Call:
    """What is called in place of a model.

    Args:
        model: Called as model(x, t) or model(x, t, labels), or with arguments by name.

    Returns:
        A function of the same arguments, which compiles the call for each new layout of them (shapes, dtypes and
        strides). It raises InputError where that fails.
    """
    kept = _compiled.setdefault(model, {})

    def call(*arguments: Tensor | None, **named: Tensor | None) -> Tensor:
        given = (*arguments, *named.values())
        layout = (*named, *(None if a is None else (a.shape, a.dtype, a.stride()) for a in given))
        if layout not in kept:
            kept[layout] = _compile(_call)
        return _run(kept[layout], model, *arguments, **named)

    return call


@functools.cache
def check_compiler(device: torch.device) -> None:
    """Raises InputError if nothing can be compiled for this device, because a compiler is missing, say."""
    _run(_compile(_successor), torch.zeros(8, device=device))


def _call(model: nn.Module, *arguments: Tensor, **named: Tensor) -> Tensor:
    return model(*arguments, **named)


def _successor(x: Tensor) -> Tensor:
    return x + 1


def _compile(function: Call) -> Call:
    """A compiled copy of a function, which knows nothing of other copies.

    PyTorch keeps what it compiled, and counts how often it did, with a function's code object, and gives up at eight.
    A code object of its own has its own count, and takes what was compiled along when it is freed.
    """
    copy = types.FunctionType(function.__code__.replace(), globals(), function.__name__)
    return torch.compile(copy, dynamic=False, options=_OPTIONS)


def _run(function: Call, *arguments: object, **named: object) -> Tensor:
    try:
        return function(*arguments, **named)
    except RuntimeError as error:
        if not compat.is_compile_error(error):
            raise
        reason = " ".join(line for line in str(error).splitlines()[:2] if line)
        raise InputError(
            f"compile is on, but torch.compile failed: {reason}. Install the compiler that it misses (a C++ compiler, "
            "or for a GPU Triton and a C compiler), or go without compile"
        ) from error
