"""What the loops over a network need to know of it: where it is, its mode, and whether labels fit it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn import UNet


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """The device and dtype of the model's parameters; the CPU and None for a model without. Raises InputError for what
    is no module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; expected a torch.nn.Module, called as model(x, t)")
    parameter = next(model.parameters(), None)
    return (torch.device("cpu"), None) if parameter is None else (parameter.device, parameter.dtype)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards every module of it in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_labels(model: nn.Module, labels: int | Sequence[int] | Tensor | None, n: int) -> Tensor | None:
    """The labels as int64 [n] on the CPU, or None. Raises InputError if they are no integers, or do not fit n or a
    U-Net's classes."""
    if labels is None:
        return None
    try:
        tensor = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels are {labels!r:.100}; expected one class, or {n}, one a sample ({error})") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        if len(tensor.shape) and not tensor.numel():
            tensor = tensor.long()  # what an empty list becomes
        else:
            raise InputError(f"labels are {tensor.dtype}; expected integers, the numbers of classes")
    tensor = tensor.long()
    if tensor.ndim == 0:
        tensor = tensor.expand(n)
    if tensor.shape != (n,):
        raise InputError(f"labels have shape {tuple(tensor.shape)}; expected one class, or {n}, one a sample")
    if not isinstance(model, UNet):
        return tensor
    classes = model.config.num_classes
    if classes == 0:
        raise InputError("this model is unconditional (it was trained without classes): leave the labels out")
    if n and not 0 <= int(tensor.min()) <= int(tensor.max()) <= classes:
        raise InputError(
            f"labels run from {int(tensor.min())} to {int(tensor.max())}; this model has the classes 0..{classes - 1} "
            f"(and {classes} for none)"
        )
    return tensor
