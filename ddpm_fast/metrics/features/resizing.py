"""How images of any size are brought to the size that a network of features takes.

Each of the two ways is a function of one image alone: no result depends on the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.errors import InputError


def check_images(images: Tensor) -> None:
    """Raise InputError unless images are uint8 [n, 1 or 3, H, W] with pixels."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images are {found:.200}; expected a tensor, uint8 [n, C, H, W]")
    if images.shape[1] not in (1, 3) or not images.shape[2] or not images.shape[3]:
        raise InputError(f"images have shape {list(images.shape)}; expected [n, C, H, W] with C = 1 (grey) or 3 (RGB)")


def as_rgb(images: Tensor) -> Tensor:
    """Images [n, 3, H, W]; the grey level of [n, 1, H, W] is taken for red, green and blue, without a copy."""
    return images.expand(-1, 3, -1, -1)


def bicubic(images: Tensor, size: int) -> Tensor:
    """Images resized to a square by antialiased bicubic interpolation, as Pillow computes it, in fp32.

    In each direction, output pixel i is sum_j k((j + 1/2 - c) / s) x_j / sum_j k((j + 1/2 - c) / s), where
    c = (i + 1/2) n / size is its centre in the n input pixels, s = max(n / size, 1), and k the cubic of Keys 1981 with
    a = -1/2. Pixels outside the image do not count. Nothing is rounded or clipped.

    Args:
        images: [n, C, H, W], uint8 or float. An image of the size already keeps its values.
        size: The side.

    Returns:
        fp32 [n, C, size, size].
    """
    images = images.float()
    if tuple(images.shape[2:]) == (size, size) or not len(images):
        return images.new_empty(0, images.shape[1], size, size) if not len(images) else images
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=True)


def bicubic_uint8(images: Tensor, size: int) -> Tensor:
    """What bicubic gives, rounded to the nearest of 0..255: uint8 [n, C, size, size]."""
    if tuple(images.shape[2:]) == (size, size):
        return images
    return bicubic(images, size).round_().clamp_(0, 255).to(torch.uint8)


def as_tensorflow(images: Tensor, size: int) -> Tensor:
    """Images resized to a square as TensorFlow 1's resize_bilinear does: align_corners=False, no half-pixel centres.

    In each direction, output pixel i lies at p = i (n / size) of the n input pixels, the product in fp32. With
    l = floor(p) and h = min(l + 1, n - 1), it is x_l + (x_h - x_l) (p - l). The horizontal direction is computed first.
    Making an image smaller skips pixels; that is how the Inception features of the papers are defined.

    Args:
        images: [n, C, H, W], uint8 or float.
        size: The side.

    Returns:
        fp32 [n, C, size, size].
    """
    images = images.float()
    for dimension in (3, 2):
        n = images.shape[dimension]
        # TensorFlow divides in fp32, and multiplies by the result in fp32. Nothing is copied to the device for it.
        scale = float(torch.tensor(n, dtype=torch.float32) / size)
        place = torch.arange(size, dtype=torch.float32, device=images.device) * scale
        low = place.long()
        share = (place - low).view((size, 1) if dimension == 2 else (size,))
        first = images.index_select(dimension, low)
        second = images.index_select(dimension, (low + 1).clamp_(max=n - 1))
        # Not torch.lerp, which computes from the other end where the share is above 1/2, and so rounds differently.
        images = second.sub_(first).mul_(share).add_(first)
    return images
