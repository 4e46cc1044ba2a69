"""The U-Net's layers: group norm, residual block, self-attention, down- and upsampling, time embedding.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (appendix B) and Nichol & Dhariwal 2021, "Improved
Denoising Diffusion Probabilistic Models" (section 3 and appendix A). Images are [N, C, H, W] in channels_last
memory, so that [N, H*W, C] is a view of them: attention and the norms read the same bytes as the
convolutions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.ops import group_norm


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters set to zero: a residual branch that starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group normalisation, then optionally y*(1+scale)+shift and SiLU: ops.group_norm with this layer's weights."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = True):
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, added: Tensor | None = None
    ) -> Tensor:
        """x [N, C, H, W], any float; scale and shift, or neither, and added: [N, C]. Returns x's shape and dtype."""
        if scale is None or shift is None:
            if scale is not shift:
                raise InputError("group_norm: scale and shift belong together; give both, or neither")
            scale_shift = None
        else:
            scale_shift = (scale, shift)
        return group_norm(
            x,
            self.weight,
            self.bias,
            self.num_groups,
            self.eps,
            scale_shift=scale_shift,
            added=added,
            silu=self.silu,
        )


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then Linear-SiLU-Linear: t [N] (integer or float) -> [N, 4*channels].

    `denominator` spaces the frequencies 10000^(-i/half) or 10000^(-i/(half-1)), half = channels // 2;
    `order` says which half of the embedding holds the sines. Both exist in published checkpoints.
    """

    frequencies: Tensor

    def __init__(self, channels: int, denominator: str, order: str) -> None:
        super().__init__()
        self.count = channels // 2  # of the frequencies
        self.denominator = self.count if denominator == "half" else self.count - 1
        self.order = order
        self.register_buffer("frequencies", self._table(), persistent=False)
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, 4 * channels)

    def _table(self) -> Tensor:
        i = torch.arange(self.count, dtype=torch.float64, device="cpu")
        return torch.exp(-math.log(10000.0) * i / self.denominator).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TimeEmbedding":
        # model.to(bfloat16) would round the frequencies to 8 bits: at t = 999 the angle would be off by
        # radians.
        super()._apply(fn, recurse)
        self.frequencies = self._table().to(self.frequencies.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.frequencies
        parts = [angle.cos(), angle.sin()] if self.order == "cos|sin" else [angle.sin(), angle.cos()]
        embedding = torch.cat(parts, dim=1).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(embedding)))


class ResBlock(nn.Module):
    """norm-SiLU-conv, the time embedding, norm-SiLU-dropout-conv, plus the skip.

    x: [N, in_channels, H, W]; emb: [N, emb_channels], already through SiLU. Returns [N, out_channels, H',
    W']. The embedding is added to the hidden image, or with `scale_shift` scales and shifts its norm.
    `resample` is None, "down" (mean of 2x2) or "up" (nearest), applied to both branches before the first
    convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.resample = {None: nn.Identity, "down": MeanDown, "up": NearestUp}[resample]()
        self.conv1 = Conv2d(in_channels, out_channels)
        self.emb = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(Conv2d(out_channels, out_channels))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resample(self.norm1(x)))
        emb = self.emb(emb)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h, scale, shift)
        else:
            h = self.norm2(h, added=emb)
        return self.skip(self.resample(x)) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over all pixels, plus the skip: x [N, C, H, W] -> the same shape."""

    def __init__(self, channels: int, heads: int, *, groups: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, channels, eps, silu=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        pixels = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)
        qkv = self.qkv(pixels).view(n, height * width, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        return x + self.proj(h).view(n, height, width, c).permute(0, 3, 1, 2)


class MeanDown(nn.Module):
    """The mean of each 2x2 square: [N, C, H, W] -> [N, C, H/2, W/2]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class NearestUp(nn.Module):
    """Every pixel four times: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2: [N, C, H, W] -> [N, C, H/2, W/2].

    `padding` "symmetric" pads all four sides by one; "asymmetric" only the bottom and the right, as Ho et al.
    do (TensorFlow's "same"). The two sample different pixels: weights do not carry over from one to the
    other.
    """

    def __init__(self, channels: int, padding: str):
        super().__init__()
        self.asymmetric = padding == "asymmetric"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Every pixel four times, then a 3x3 convolution: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.nearest = NearestUp()
        self.conv = Conv2d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.nearest(x))
