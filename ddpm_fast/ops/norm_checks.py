"""What a norm's operands must be. As in checks.py, each function raises InputError."""

from __future__ import annotations

import torch

from ddpm_fast.errors import InputError
from ddpm_fast.ops.checks import check_device, check_dtype, check_layout, check_like, check_tensors
from ddpm_fast.ops.tensors import FLOATS, Norm

_VECTORS = ("weight", "bias", "scale", "shift", "added")
_IMAGES = ("residual", "joined")


def check_norm(norm: Norm, op: str = "group_norm") -> None:
    """Names are looked for only where something does not fit: a tiny norm takes 20 us."""
    x, groups = norm.x, norm.groups
    if len(x.shape) < 2:
        raise InputError(f"{op}: x has shape {tuple(x.shape)}; expected [N, C, ...]")
    device, strided = x.device, torch.strided
    for i, values in enumerate(norm[:8]):
        if values is None:
            if i < 3:
                check_tensors(op, **{norm._fields[i]: values})
            continue
        if values.dtype not in FLOATS or values.device != device or values.layout is not strided:
            check_dtype(op, norm._fields[i], values.dtype)
            check_device(op, norm._fields[i], values, "x", x)
            check_layout(op, norm._fields[i], values)
    if norm.residual is not None or norm.joined is not None:
        _check_images(norm, op)
    _check_vectors(norm, op)
    if (norm.scale is None) != (norm.shift is None):
        raise InputError(f"{op}: scale and shift belong together; give both, or neither")
    channels = norm.weight.shape[0]
    if groups < 1 or channels % groups:
        raise InputError(f"{op}: {groups} groups do not divide x's {channels} channels")


def _check_images(norm: Norm, op: str) -> None:
    """residual has x's shape, joined has it but for the channels, and all have one dtype."""
    x = norm.x
    for name in _IMAGES:
        image = getattr(norm, name)
        if image is None:
            continue
        check_dtype(op, name, image.dtype, (x.dtype,))
        expected = (x.shape[0], image.shape[1] if image.ndim > 1 else 1, *x.shape[2:])
        if name == "residual":
            check_like(op, name, image, "x", x)
        elif tuple(image.shape) != expected:
            raise InputError(
                f"{op}: joined has shape {tuple(image.shape)} and x {tuple(x.shape)}; expected the same but for the "
                "number of channels"
            )


def _check_vectors(norm: Norm, op: str) -> None:
    """weight and bias have a number for each channel, the others for each sample and channel."""
    n, own = norm.x.shape[:2]
    channels = own if norm.joined is None else own + norm.joined.shape[1]
    for name in _VECTORS:
        values = getattr(norm, name)
        if values is None:
            continue
        width = own if name == "added" else channels
        if name in ("weight", "bias"):
            if values.shape != (width,):
                raise InputError(
                    f"{op}: {name} has shape {tuple(values.shape)} and x {width} channels; expected [{width}]"
                )
        elif values.shape not in ((n, width), (1, width)):
            raise InputError(
                f"{op}: {name} has shape {tuple(values.shape)} and x {tuple(norm.x.shape)}; "
                f"expected {(n, width)}, or {(1, width)} for all samples"
            )


def check_kernel_norm(norm: Norm, op: str = "group_norm") -> None:
    """What a kernel wants besides: images, and numbers for every sample."""
    check_norm(norm, op)
    x = norm.x
    if x.ndim != 4:
        raise InputError(f"{op}: x has shape {tuple(x.shape)}; expected [N, C, H, W]")
    for values in (norm.scale, norm.shift):
        if values is not None and values.shape[0] != x.shape[0]:
            raise InputError(f"{op}: scale and shift are of {values.shape[0]} samples and x of {x.shape[0]}")
