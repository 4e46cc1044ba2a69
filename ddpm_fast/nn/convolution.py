"""The U-Net's convolutions. Sampling on a CPU spends three quarters of its time in those of 3x3, nearly at the
multipliers' peak rate, so only fewer multiplications make them faster. On a GPU the library adds a bias in a pass of
its own, which takes as long as the convolution, so biases are left to whatever reads the result (pending.py).
"""

import weakref

import torch
from torch import Tensor, nn

from ddpm_fast import compat
from ddpm_fast.nn.products import computed
from ddpm_fast.ops import active_backend, winograd, winograd_filters
from ddpm_fast.ops.backends import cpu

# Below these Winograd's transforms, or its four times as many weights, cost more than the products saved.
_MIN_CHANNELS = 32
_MIN_TILES = 4
# The most pixels that the 4x4 tiles may have for each pixel of the image: it is 1.8 for 9x9, which takes nine tiles.
# Winograd's algorithm is computed in fp32 whatever the dtype. The library takes half of its fp32 time in bf16, and an
# eighth where the CPU multiplies bf16 matrices in units of their own.
_MAX_WASTE = {torch.float32: 2.0}
if not cpu.has_matrix_units():
    _MAX_WASTE |= {torch.bfloat16: 1.5, torch.float16: 2.0}

# Each layer's transformed filters, with what they were made from. They are not attributes of the layer, because a
# copied, pickled or averaged network must not carry them.
_transformed: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor, Tensor]] = weakref.WeakKeyDictionary()


class Conv2d(nn.Conv2d):
    """A convolution, 3x3 and of the image's own size unless something else is asked for: [N, C, H, W] -> [N, K, H, W].

    In eval mode, where no gradient is recorded, images on the CPU go through ops.winograd wherever that is faster: it
    takes a quarter of the multiplications. Everything else is F.conv2d. The two differ by rounding, in fp32 by less
    than 2e-6 of the output's norm. For exactly what training computes, leave the model in train mode, or run it within
    `ddpm_fast.use_backend("reference")`. The transformed filters take four times the memory of fp32 weights (with K
    rounded up to a multiple of 32), from the first call that needs them until the layer is in train mode again, or
    gone.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)

    def train(self, mode: bool = True) -> "Conv2d":
        if mode:
            _transformed.pop(self, None)
        return super().train(mode)

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """Convolve x [N, C, H, W]; without the bias if add_bias is False."""
        if self.training and not torch.compiler.is_compiling():
            _transformed.pop(self, None)  # train mode may be set without train(), as an attribute
        bias = self.bias if add_bias else None
        if self.takes_winograd(x):
            return winograd(x, self._filters(), bias, self.weight.shape[0])
        return self._conv_forward(x, self.weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What forward() of torch's own layer computes."""
        return computed(super()._conv_forward, input, weight, bias)

    def takes_winograd(self, x: Tensor) -> bool:
        """Whether this image, here and now, goes through Winograd's algorithm."""
        if self.training or torch.compiler.is_compiling() or x.ndim != 4:
            return False
        n, channels, height, width = x.shape
        tiles = n * -(-height // 4) * -(-width // 4)
        tensors = [x, self.weight] if self.bias is None else [x, self.weight, self.bias]
        return (
            min(channels, self.weight.shape[0]) >= _MIN_CHANNELS
            and tiles >= _MIN_TILES
            and 16 * tiles <= _MAX_WASTE.get(x.dtype, 0) * n * height * width
            and self._is_as_it_was_made()
            and channels == self.weight.shape[1]
            and all(v.dtype == x.dtype and v.device == x.device for v in tensors)
            # A subclass of Tensor may be anything, and an inference tensor does not count its changes.
            and type(x) is Tensor
            and type(self.weight) is nn.Parameter
            and not self.weight.is_inference()
            and not (torch.is_grad_enabled() and any(v.requires_grad for v in tensors))
            and not torch.is_autocast_enabled("cpu")
            and not compat.in_forward_mode()
            and active_backend("winograd", x.device, x.dtype) != "reference"
        )

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
