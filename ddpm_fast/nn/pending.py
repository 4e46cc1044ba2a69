"""Images that are not added up yet. On a GPU each pass over an image costs as much as a convolution's share of it, so
the bias of a convolution and the residual of a block are not added where they arise: the next group norm reads all of
them at once, and writes their sum beside its own result. On a CPU that is so of residuals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ddpm_fast import compat
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.ops import Addends, add_bias, has_kernel

_unfused: ContextVar[bool] = ContextVar("ddpm_fast_unfused", default=False)


def is_fused(x: Tensor) -> bool:
    """Whether all additions are left to the ops that read their results: on a GPU, and on the meta device, which stands
    for one. On a CPU a library's convolution adds its bias for nothing, and torch.compile fuses by itself."""
    if torch.compiler.is_compiling() or compat.in_forward_mode() or _unfused.get():
        return False
    return has_kernel("add_bias", x.device, x.dtype)


def is_added_by_norms(x: Tensor) -> bool:
    """Whether residuals are left to the next group norm, and the channels of joined images to their readers: wherever
    there are kernels for it."""
    if torch.compiler.is_compiling() or compat.in_forward_mode() or _unfused.get():
        return False
    return has_kernel("group_norm", x.device, x.dtype)


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Inside, every layer gives a whole image."""
    token = _unfused.set(True)
    try:
        yield
    finally:
        _unfused.reset(token)


def whole(x: Tensor | Pending) -> Tensor:
    """The image, added up if it is pending."""
    return x.total() if isinstance(x, Pending) else x


class Pending:
    """image + residual + bias, added up when somebody needs it, and then kept.

    Attributes:
        image: [N, C, H, W].
        residual: Of the image's shape, or None.
        bias: [C], or None.
    """

    def __init__(self, image: Tensor, residual: Tensor | None = None, bias: Tensor | None = None):
        self.image, self.residual, self.bias = image, residual, bias

    @property
    def is_added_up(self) -> bool:
        return self.residual is None and self.bias is None

    def plus(self, residual: Tensor) -> Pending:
        """The same with a residual, which it does not have yet."""
        return Pending(self.image, residual, self.bias)

    def addends(self) -> Addends:
        """What the next group norm adds up."""
        return Addends(self.image, self.residual, None if self.bias is None else self.bias[None])

    def total(self) -> Tensor:
        """The sum."""
        if not self.is_added_up:
            if is_fused(self.image):
                self.keep(add_bias(self.image, self.bias, self.residual))
            else:
                image = self.image if self.bias is None else self.image + self.bias[:, None, None]
                self.keep(image if self.residual is None else self.residual + image)
        return self.image

    def keep(self, total: Tensor) -> None:
        """The sum, computed by somebody else."""
        self.image, self.residual, self.bias = total, None, None


def convolved(layer: nn.Module, x: Tensor) -> Pending:
    """The layer's result, its bias left to be added where that costs less."""
    if isinstance(layer, Conv2d) and is_fused(x):
        return Pending(layer(x, add_bias=False), bias=layer.bias)
    return Pending(layer(x))
