"""What a network is given beside x and t: the labels of samples, and their second images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.ops.tensors import widen


def labels_of(labels: int | Sequence[int] | Tensor, n: int) -> Tensor:
    """The labels of n samples, one for all or one for each: int64 [n] on the CPU.

    Raises:
        InputError: If they are not integers, or as many.
    """
    tensor = _integers(labels, n)
    if tensor.ndim == 0:
        tensor = tensor.expand(n)
    if tensor.shape != (n,):
        raise InputError(f"labels have shape {tuple(tensor.shape)}; expected one class, or {n}, one for each sample")
    return tensor


def check_condition(condition: Tensor | None, n: int, channels: int, name: str) -> Tensor | None:
    """The second image of n samples, [n or 1, channels, h, w] in any dtype and place; or None.

    Args:
        condition: What was given.
        n: The number of samples.
        channels: How many channels the network is given beside x; 0 for none.
        name: What the network is called.

    Raises:
        InputError: If the network needs one and there is none, or takes none, or it is another.
    """
    if condition is None:
        if channels and n:
            raise InputError(
                f"this {name} needs a second image of {channels} channels, such as the small image that it enlarges: "
                "give condition"
            )
        return None
    if not channels:
        raise InputError(f"the {name} takes no second image: leave condition out")
    if not isinstance(condition, Tensor) or not (condition.is_floating_point() or condition.dtype == torch.uint8):
        found = condition.dtype if isinstance(condition, Tensor) else type(condition).__name__
        raise InputError(f"condition is {found}; expected a tensor of floats about in [-1, 1], or uint8 in 0..255")
    shape = list(condition.shape)
    if len(shape) != 4 or shape[0] not in (1, n) or shape[1] != channels or 0 in shape[2:]:
        raise InputError(f"condition is {shape}; expected [{n}, {channels}, h, w], or one for all samples")
    if not condition.isfinite().all():
        raise InputError("condition has NaN or infinite values; expected floats about in [-1, 1]")
    return condition


def scaled_to(images: Tensor, n: int, size: Sequence[int]) -> Tensor:
    """Second images as the network is given them: scaled to a size bilinearly, fp32 [n, C, *size].

    Args:
        images: [n or 1, C, h, w], floats or uint8.
        n: How many samples there are.
        size: (H, W).
    """
    images = widen(images, torch.float32)
    if images.shape[2:] != torch.Size(size):
        images = F.interpolate(images, list(size), mode="bilinear")
    return images.expand(n, -1, -1, -1)


def _integers(labels: int | Sequence[int] | Tensor, n: int) -> Tensor:
    try:
        tensor = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"labels are {labels!r:.100}; expected one class, or {n}, one for each sample ({error})"
        ) from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        is_empty_list = tensor.ndim > 0 and not tensor.numel()  # torch makes floats of it
        if not is_empty_list:
            raise InputError(f"labels are {tensor.dtype}; expected integers, the numbers of classes")
    return tensor.long()
