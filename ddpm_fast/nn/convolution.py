"""The U-Net's convolutions. On a CPU three quarters of the time of training and sampling are in those of 3x3, nearly at
the multipliers' peak rate, so only fewer multiplications make them faster. On a GPU the library adds a bias in a pass
of its own, which takes as long as the convolution, so biases are left to whatever reads the result (pending.py).
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpm_fast import compat
from ddpm_fast.nn.products import computed
from ddpm_fast.ops import active_backend, convolve, winograd, winograd_filters
from ddpm_fast.ops.backends import cpu


class _Limits(NamedTuple):
    """Where Winograd's algorithm is faster than the library's convolution.

    channels: At least so many, in and out: below, the transforms cost more than the products saved.
    tiles: At least so many of 4x4 pixels: below, its four times as many weights cost more.
    waste: By dtype, the most pixels that the tiles may have for each pixel of the image: it is 1.8 for 9x9, which takes
        nine tiles. Winograd's algorithm is computed in fp32 whatever the dtype. The library takes half of its fp32 time
        in bf16, and an eighth where the CPU multiplies bf16 matrices in units of their own.
    """

    channels: int
    tiles: int
    waste: dict[torch.dtype, float]


_HALVES = {} if cpu.has_matrix_units() else {torch.bfloat16: 1.5, torch.float16: 2.0}
_KEPT = _Limits(channels=32, tiles=4, waste={torch.float32: 2.0, **_HALVES})  # with filters of an earlier call
_MADE = _Limits(channels=32, tiles=16, waste={torch.float32: 2.0, **_HALVES})  # with filters made at each call
_CAST_BY_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)

# Each layer's transformed filters, with what they were made from. They are not attributes of the layer, because a
# copied, pickled or averaged network must not carry them.
_transformed: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor, Tensor]] = weakref.WeakKeyDictionary()


class Conv2d(nn.Conv2d):
    """A convolution, 3x3 and of the image's own size unless something else is asked for: [N, C, H, W] -> [N, K, H, W].

    Images on the CPU go through Winograd's algorithm wherever that is faster, in training and in sampling: it takes a
    quarter of the multiplications. Everything else is F.conv2d. The two differ by rounding, in fp32 by less than 2e-6
    of the output's norm, and their gradients likewise. For exactly what F.conv2d computes, run the model within
    `ddpm_fast.use_backend("reference")`; the gradients of what ran in there are F.conv2d's, wherever backward() is
    called. (The group norms are then plain torch's as well.)

    Under autocast the image is cast and the result has autocast's dtype, as always. The weight is used as it is, not
    rounded to that dtype, and its gradient is summed in fp32 and not rounded either.

    In eval mode, where no gradient is recorded, the filters that the algorithm takes are kept. They are four times the
    memory of fp32 weights (with K rounded up to a multiple of 32), from the first call that needs them until the layer
    is in train mode again, or gone. Otherwise they are made at each call, and once more in its backward.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)

    def train(self, mode: bool = True) -> Conv2d:
        if mode:
            _transformed.pop(self, None)
        return super().train(mode)

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """Convolve x [N, C, H, W]; without the bias if add_bias is False."""
        if self.training and not torch.compiler.is_compiling():
            _transformed.pop(self, None)  # train mode may be set without train(), as an attribute
        bias = self.bias if add_bias else None
        if not self.takes_winograd(x):
            return self._conv_forward(x, self.weight, bias)
        x = x.to(_dtype_of_result(x))
        if self._keeps_filters(x):
            return winograd(x, self._filters(), bias, self.weight.shape[0])
        return convolve(x, self.weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What forward() of torch's own layer computes."""
        return computed(super()._conv_forward, input, weight, bias)

    def takes_winograd(self, x: Tensor) -> bool:
        """Whether this image, here and now, goes through Winograd's algorithm."""
        if torch.compiler.is_compiling() or x.ndim != 4:
            return False
        n, channels, height, width = x.shape
        tiles = n * -(-height // 4) * -(-width // 4)
        dtype, limits = _dtype_of_result(x), _KEPT if self._keeps_filters(x) else _MADE
        is_cast = torch.is_autocast_enabled("cpu")
        tensors = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
        return (
            min(channels, self.weight.shape[0]) >= limits.channels
            and tiles >= limits.tiles
            and 16 * tiles <= limits.waste.get(dtype, 0) * n * height * width
            and self._is_as_it_was_made()
            and channels == self.weight.shape[1]
            and all(v.dtype in _CAST_BY_AUTOCAST if is_cast else v.dtype == dtype for v in tensors)
            and all(v.device == x.device for v in tensors)
            # A subclass of Tensor may be anything, and an inference tensor does not count its changes.
            and type(x) is Tensor
            and type(self.weight) is nn.Parameter
            and not self.weight.is_inference()
            and not compat.in_forward_mode()
            and not compat.in_functorch()
            and active_backend("winograd", x.device, dtype) != "reference"
        )

    def _keeps_filters(self, x: Tensor) -> bool:
        """Whether the filters may be those of an earlier call: in eval mode, where no gradient is recorded."""
        tensors = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        return not self.training and not (torch.is_grad_enabled() and any(v.requires_grad for v in tensors))

    def _is_as_it_was_made(self) -> bool:
        """Whether no attribute was edited in a way that makes this another convolution, which F.conv2d may still do."""
        settings = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        out_channels = self.weight.shape[0] if self.weight.ndim == 4 else 0
        return (
            settings == ((1, 1), (1, 1), (1, 1), 1, "zeros")
            and self.weight.shape[2:] == (3, 3)
            and (self.bias is None or self.bias.shape == (out_channels,))
        )

    def _filters(self) -> Tensor:
        """The transformed weight, made again if the weight has changed. What is written through `.data` is not counted
        as a change, so an 8x8 sample of the weight is compared too."""
        weight = self.weight.detach()
        state = weight.data_ptr(), compat.changes_of(self.weight)
        probe = weight[:: -(-weight.shape[0] // 8), :: -(-weight.shape[1] // 8), 1, 1]
        held = _transformed.get(self)
        if held is None or held[0] != state or not torch.equal(held[1], probe):
            held = _transformed[self] = state, probe.clone(), winograd_filters(weight)
        return held[2]


def _dtype_of_result(x: Tensor) -> torch.dtype:
    """That of autocast where it is on, which casts the image to it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
