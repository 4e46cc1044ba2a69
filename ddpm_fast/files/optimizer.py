"""AdamW's state as named tensors, as training states hold it, and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.files import tensorfile
from ddpm_fast.files.fit import offenders

_MOMENTS = ("exp_avg", "exp_avg_sq")

NamedParameters = Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]


def optimizer_to_tensors(opt: torch.optim.Optimizer, names: NamedParameters) -> dict[str, Tensor]:
    """AdamW's state as tensors named `<parameter>.step`, `.exp_avg` and `.exp_avg_sq`.

    These are the optimizer's own tensors, not copies. A parameter that was never stepped has only a `.step` of 0.

    Args:
        opt: The optimizer.
        names: `model.named_parameters()`.

    Raises:
        InputError: If a parameter has no name, or the optimizer keeps other things than these three.
    """
    tensors = {}
    for name, (parameter, _) in _named(opt, names).items():
        state = opt.state.get(parameter) or {"step": torch.zeros(())}
        other = sorted(set(state) - {"step", *_MOMENTS})
        if other:
            raise InputError(f"the optimizer keeps {', '.join(other)} for {name}; expected AdamW without amsgrad")
        tensors.update({f"{name}.{key}": value.detach() for key, value in state.items()})
    return tensors


def load_optimizer_tensors(opt: torch.optim.Optimizer, names: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
    """Set AdamW's state from `optimizer_to_tensors`, bit for bit, in each parameter's device and memory format.

    Learning rates and the other settings of `opt` stay as they are.

    Args:
        opt: The optimizer.
        names: `model.named_parameters()`.
        tensors: What `optimizer_to_tensors` returned.

    Raises:
        InputError: If a parameter's state is missing, incomplete or unexpected, or has another shape or dtype; `opt`
            stays unchanged.
    """
    named = _named(opt, names)
    expected = {}
    for name, (parameter, _) in named.items():
        expected[f"{name}.step"] = "float32 []"
        if any(f"{name}.{key}" in tensors for key in _MOMENTS):
            expected |= {f"{name}.{key}": tensorfile.kind(parameter) for key in _MOMENTS}
    found = {key: tensorfile.kind(tensor) for key, tensor in tensors.items()}
    problems = offenders("missing", [key for key in expected if key not in found])
    problems += offenders("unexpected", [key for key in found if key not in expected])
    differ = [key for key in expected if found.get(key, expected[key]) != expected[key]]
    problems += offenders("of another kind", [f"{key} {found[key]} instead of {expected[key]}" for key in differ])
    if problems:
        raise InputError(
            f"the optimizer's saved state does not fit the model: {'; '.join(problems)}. "
            "Resume with the config that the checkpoint was made with"
        )
    for name, (parameter, group) in named.items():
        opt.state.pop(parameter, None)
        if f"{name}.exp_avg" not in tensors:
            continue
        # Optimizers that are capturable or fused count their steps on the device, the others on the CPU.
        on_device = group.get("capturable") or group.get("fused")
        step = tensors[f"{name}.step"].to(parameter.device if on_device else "cpu", copy=True)
        moments = {k: torch.empty_like(parameter, requires_grad=False) for k in _MOMENTS}
        with torch.no_grad():
            for key, moment in moments.items():
                moment.copy_(tensors[f"{name}.{key}"])
        opt.state[parameter] = {"step": step, **moments}


def _named(opt: torch.optim.Optimizer, names: NamedParameters) -> dict[str, tuple[nn.Parameter, dict[str, Any]]]:
    """The optimizer's parameters by name, each with its parameter group."""
    name_of = {id(parameter): name for name, parameter in dict(names).items()}
    parameters = [(p, group) for group in opt.param_groups for p in group["params"]]
    unnamed = [list(p.shape) for p, _ in parameters if id(p) not in name_of]
    if unnamed:
        raise InputError(
            f"{len(unnamed)} of the optimizer's {len(parameters)} parameters have no name, the first of "
            f"shape {unnamed[0]}: give named_parameters() of the model that it optimizes"
        )
    return {name_of[id(p)]: (p, group) for p, group in parameters}
