"""Counts what a GPU would do for the ops that torch is asked for, as they come by on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ledger.entries import Call, Line, flat, is_channels_last
from benchmarks.ledger.rules import lines_of


class Counter(TorchDispatchMode):
    """Inside, every op on the meta device adds its lines, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        schema = func._schema
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | (kwargs or {})
        name = schema.name.partition("::")[2]
        result = _result(name, func, args, kwargs or {}, given)
        aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
        results = flat([result]) or [t for n, t in _written(schema, given)]
        call = Call(name, {argument.name: None for argument in schema.arguments} | given, results)
        views = bool(aliases) and not any(alias.is_write for alias in aliases)
        self.lines += lines_of(call, schema.name.startswith("ddpm_fast::"), views)
        return result


def _written(schema: Any, given: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors that an op without a result writes to."""
    names = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return [(name, tensor) for name in names if name in given for tensor in flat([given[name]])]


def _result(name: str, func: Any, args: tuple, kwargs: dict, given: dict[str, Any]) -> Any:
    """What an op returns on the meta device, in the memory format that it has on a GPU."""
    if name == "_fused_adamw_":  # it has no form on meta, and returns nothing
        return None
    result = func(*args, **kwargs)
    if (
        name == "convolution"
        and result.ndim == 4
        and (is_channels_last(given["input"]) or is_channels_last(given["weight"]))
    ):
        return result.contiguous(memory_format=torch.channels_last)
    if name == "convolution_backward" and given["input"].ndim == 4:
        last = is_channels_last(given["input"]) or is_channels_last(given["weight"])
        layout = torch.channels_last if last else torch.contiguous_format
        return tuple(t.contiguous(memory_format=layout) if t is not None and t.ndim == 4 else t for t in result)
    if name in ("native_group_norm", "native_group_norm_backward"):
        return (None if result[0] is None else result[0].contiguous(), *result[1:])
    return result
