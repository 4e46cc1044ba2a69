"""The weights in a file of improved- or guided-diffusion, checked: what each entry is, and whether all are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.fit import offenders


def checked_state(content: object) -> dict[str, Tensor]:
    """What a file holds as a state dict of weights, none of them larger than the memory behind it.

    Raises:
        InputError: If it holds anything else.
    """
    if not isinstance(content, dict):
        raise InputError(f"it holds a {type(content).__name__}; expected the state dict of a network")
    wrong = [printable(str(name)[:100]) for name, value in content.items() if not _is_weight(name, value)]
    if wrong:
        raise InputError(
            f"{offenders('it has entries that are no floating-point weights under a name:', wrong)[0]}; expected the "
            "state dict of a network alone, as model*.pt and ema_*.pt are"
        )
    return {name: value.detach() for name, value in content.items()}


def shape_of(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a weight: as many sizes as expected, none of them 0.

    Raises:
        InputError: If there is no such weight, or it has another number of sizes or one of 0.
    """
    value = state.get(name)
    if value is None:
        raise InputError(f"it has no {name}: this is no whole file of improved- or guided-diffusion")
    if value.ndim != ndim or 0 in value.shape:
        raise InputError(f"its {name} has the shape {list(value.shape)[:8]}; expected {ndim} sizes of at least 1")
    return tuple(value.shape)


def check_fits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], of: str) -> None:
    """Raise InputError unless weights have the names and shapes of those that are wanted.

    Args:
        state: The weights of a file.
        wanted: Those that it should have.
        of: Whose weights these are, for the message: "they are not those of ...".
    """
    shapes = {name: list(value.shape) for name, value in wanted.items()}
    found = {printable(name[:100]): list(value.shape)[:8] for name, value in state.items()}
    problems = offenders("it lacks", [f"{name} {shapes[name]}" for name in shapes if name not in found])
    problems += offenders("it has", [f"{name} {found[name]}" for name in found if name not in shapes])
    differ = [name for name in shapes if found.get(name, shapes[name]) != shapes[name]]
    problems += offenders("of another shape is", [f"{name} {found[name]} instead of {shapes[name]}" for name in differ])
    if problems:
        raise InputError(f"its weights are not those of {of}: {'; '.join(problems)}")


def unfilled(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The parameters of a network on the meta device: their names, shapes and dtypes, with nothing behind them.

    Args:
        make: Makes the network.
    """
    with torch.device("meta"), _Unfilled():
        return make().state_dict()


class _Unfilled(TorchFunctionMode):
    """Leaves out the initial values. On the meta device the first normal ones cost 2 s, in which torch imports what
    its Python functions for that device need."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" and args:
            return args[0]
        return func(*args, **(kwargs or {}))


def _is_weight(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    if value.layout is not torch.strided or not value.is_floating_point():
        return False
    # Strides of 0 make a tensor of any size from one number.
    return value.numel() * value.itemsize <= value.untyped_storage().nbytes()
