"""The checks that the ops share. Each raises InputError, naming the op, what was wrong and what was expected.

They are part of the registered ops, which torch.compile, torch.export and other people's code call without the public
functions. What they let pass, a kernel can read and write without looking.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import MAX_ELEMENTS, NoiseKey
from ddpm_fast.ops.tensors import FLOATS

PIXELS = (*FLOATS, torch.uint8)


def check_dtype(op: str, name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    if dtype not in allowed:
        raise InputError(f"{op}: {name} is {dtype}; expected one of {', '.join(map(str, allowed))}")


def check_tensors(op: str, **values: object) -> None:
    """Every value is a tensor. The public functions look for that themselves, and call this if one is not."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{op}: {name} is a {type(value).__name__}; expected a tensor")


def check_image(op: str, name: str, image: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """An image is [N, C, ...] of one of the dtypes, with its elements in memory one by one."""
    check_dtype(op, name, image.dtype, dtypes)
    shape = image.shape
    if len(shape) < 2:
        raise InputError(f"{op}: {name} has shape {tuple(shape)}; expected [N, C, ...]")
    check_layout(op, name, image)
    check_elements(op, shape)


def check_layout(op: str, name: str, tensor: Tensor) -> None:
    """The tensor has strides: it is not sparse."""
    if tensor.layout is not torch.strided:
        raise InputError(f"{op}: {name} is a {tensor.layout} tensor; expected a dense one: call .to_dense()")


def check_elements(op: str, shape: tuple[int, ...]) -> None:
    elements = 1
    for size in shape[1:]:
        elements *= size
    if elements > MAX_ELEMENTS:
        raise InputError(f"{op}: a sample has {elements} elements; the noise's counter reaches {MAX_ELEMENTS}")


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The two have one shape and are on one device."""
    check_layout(op, name, tensor)
    if tensor.shape != other.shape:
        raise InputError(
            f"{op}: {name} has shape {tuple(tensor.shape)} and {other_name} {tuple(other.shape)}; they must be equal"
        )
    check_device(op, name, tensor, other_name, other)


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise InputError(f"{op}: {name} is on {tensor.device} and {other_name} on {other.device}; they must share one")


def check_groups(op: str, output: Tensor, image: Tensor, allowed: tuple[int, ...], name: str = "x0") -> None:
    """output has the image's shape, or with 2 allowed twice its channels, and is on its device."""
    shapes = [(image.shape[0], groups * image.shape[1], *image.shape[2:]) for groups in allowed]
    if tuple(output.shape) not in shapes:
        raise InputError(
            f"{op}: output has shape {tuple(output.shape)} and {name} {tuple(image.shape)}; expected an output of "
            f"{' or '.join(map(str, shapes))} (twice the channels: the prediction, then what sets a learned variance)"
        )
    check_device(op, "output", output, name, image)


def check_table(op: str, table: Tensor, columns: int, device: torch.device) -> None:
    if (
        table.ndim != 2
        or table.shape[1] != columns
        or table.dtype not in (torch.float32, torch.float64)
        or table.layout is not torch.strided
    ):
        raise InputError(
            f"{op}: table is {table.dtype} of shape {tuple(table.shape)}; expected float32 [rows, {columns}]"
        )
    if table.device != device:
        raise InputError(f"{op}: table is on {table.device} and the images on {device}; move it there once, beforehand")


def check_timesteps(op: str, image: Tensor, t: Tensor, table: Tensor, columns: int) -> None:
    """t is int64 [N] and the table has the columns, both on the image's device."""
    check_table(op, table, columns, image.device)
    check_layout(op, "t", t)
    if t.dtype != torch.int64 or t.shape != image.shape[:1]:
        raise InputError(
            f"{op}: t is {t.dtype} of shape {tuple(t.shape)}; expected int64 [{image.shape[0]}], one a sample"
        )
    check_device(op, "t", t, "the images", image)


def check_noise(op: str, noise: Tensor | NoiseKey, image: Tensor) -> None:
    """The noise fits the image."""
    if isinstance(noise, NoiseKey):
        if noise.sample_id.shape[0] != image.shape[0]:
            raise InputError(
                f"{op}: the NoiseKey names {noise.sample_id.shape[0]} samples and the batch has {image.shape[0]}"
            )
        if noise.seed.device != image.device:
            raise InputError(f"{op}: the NoiseKey is on {noise.seed.device} and the images on {image.device}")
    else:
        check_dtype(op, "noise", noise.dtype)
        check_like(op, "noise", noise, "the image", image)
