"""The U-Net's layers: group norm, residual block, self-attention, down- and upsampling, time embedding.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (appendix B) and Nichol & Dhariwal 2021, "Improved
Denoising Diffusion Probabilistic Models" (section 3 and appendix A). Images are [N, C, H, W] in channels_last
memory, so that [N, H*W, C] is a view of them: attention and the norms read the same bytes as the
convolutions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.nn.convolution import Conv2d

# 2^18 fp32 values are 1 MiB; the CPU norm has three such buffers at a time, and two cores' L2 4 MiB.
# A U-Net's forward at batch 64, 28x28: 129 ms in chunks of 2^16, 107 of 2^18, 114 of 2^20, 134 in one piece.
_CHUNK = 1 << 18


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters set to zero: a residual branch that starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group normalisation, then optionally y*(1+scale)+shift and SiLU, in fp32 (float64 for float64).

    x: [N, C, H, W] of any float dtype; scale, shift: [N, C]. Returns x's shape and dtype.
    """

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = True):
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(compute), self.bias.to(compute)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if scale is not None:
                scale, shift = scale.to(compute), shift.to(compute)
            return _NormOnCPU.apply(x, weight, bias, scale, shift, self.num_groups, self.eps, self.silu)
        y = F.group_norm(x.to(compute), self.num_groups, weight, bias, self.eps)
        if scale is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        if self.silu:
            y = F.silu(y)
        return y.to(x.dtype)


class _NormOnCPU(torch.autograd.Function):
    """GroupNorm.forward for eager CPU tensors, as passes over pixels [N, P, C] along the channels.

    torch's channels_last kernel walks C/groups channels at a time - two, for 64 channels in 32 groups - below
    1,024 pixels, and takes bf16 five times as long as fp32. With u = x*gain + offset per sample and channel,
    the backward needs only sum(g) and sum(g*x) per channel, g = dL/du, and nothing of the image's size is
    kept but x. The samples go through in chunks whose fp32 intermediates stay in the cache.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, groups, eps, silu):
        n, c, height, width = x.shape
        mean, rstd = weight.new_empty(n, c), weight.new_empty(n, c)
        out = torch.empty(n, height * width, c, dtype=x.dtype)
        for rows in _chunks(x):
            pixels = _pixels(x[rows])
            mean[rows] = _group_mean(pixels.mean(1), groups)
            centred = pixels - mean[rows, None]
            rstd[rows] = torch.rsqrt(_group_mean(centred.square().mean(1), groups) + eps)
            gain, offset = _gain_offset(rows, mean, rstd, weight, bias, scale, shift)
            u = torch.addcmul(offset, pixels, gain, out=centred)
            out[rows] = F.silu(u) if silu else u
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return out.view(n, height, width, c).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        n, c, height, width = x.shape
        # Sums over pixels, of g and of g times the normalised x.
        sum_g, sum_gn = torch.empty_like(mean), torch.empty_like(mean)
        factor = weight.expand(n, c) if scale is None else weight * (1 + scale)
        dx = torch.empty(n, height * width, c, dtype=x.dtype)
        for rows in _chunks(x):
            pixels, g = _pixels(x[rows]), _pixels(grad[rows])
            gain, offset = _gain_offset(rows, mean, rstd, weight, bias, scale, shift)
            buffer = torch.empty_like(pixels)
            if ctx.silu:
                g = torch.ops.aten.silu_backward(g, torch.addcmul(offset, pixels, gain, out=buffer))
            sum_g[rows] = g.sum(1)
            sum_gx = torch.mul(g, pixels, out=buffer).sum(1)
            sum_gn[rows] = rstd[rows] * (sum_gx - mean[rows] * sum_g[rows])
            # dx = rstd * (f*g - mean(f*g) - normalised * mean(f*g*normalised)), means over the group.
            mean_fg, mean_fgn = (_group_mean(factor[rows] * s[rows], ctx.groups) for s in (sum_g, sum_gn))
            slope = -rstd[rows].square() * mean_fgn / pixels.shape[1]
            level = -rstd[rows] * mean_fg / pixels.shape[1] - slope * mean[rows]
            dx[rows] = torch.addcmul(level[:, None], pixels, slope[:, None], out=buffer).addcmul_(g, gain)
        dx = dx.view(n, height, width, c).permute(0, 3, 1, 2)
        if scale is None:
            return dx, sum_gn.sum(0), sum_g.sum(0), None, None, None, None, None
        grad_weight, grad_bias = (((1 + scale) * s).sum(0) for s in (sum_gn, sum_g))
        return dx, grad_weight, grad_bias, weight * sum_gn + bias * sum_g, sum_g, None, None, None


def _chunks(x: Tensor) -> list[slice]:
    """Slices of the batch of about _CHUNK elements."""
    step = max(1, _CHUNK // max(1, x[:1].numel()))
    return [slice(first, first + step) for first in range(0, x.shape[0], step)]


def _pixels(x: Tensor) -> Tensor:
    """x [N, C, H, W] as [N, H*W, C] in at least fp32; a view of fp32 channels_last."""
    pixels = x.permute(0, 2, 3, 1).reshape(x.shape[0], x.shape[2] * x.shape[3], x.shape[1])
    return pixels.to(torch.promote_types(x.dtype, torch.float32))


def _gain_offset(rows, mean, rstd, weight, bias, scale, shift) -> tuple[Tensor, Tensor]:
    """The samples' norm, affine and scale-shift as one u = x*gain + offset: [n, 1, C] each."""
    gain = rstd[rows] * weight
    offset = bias - mean[rows] * gain
    if scale is not None:
        gain, offset = gain * (1 + scale[rows]), offset * (1 + scale[rows]) + shift[rows]
    return gain[:, None], offset[:, None]


def _group_mean(per_channel: Tensor, groups: int) -> Tensor:
    """Each channel's value [N, C] replaced by the mean over its group."""
    n, c = per_channel.shape
    grouped = per_channel.view(n, groups, c // groups)
    return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(n, c)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then Linear-SiLU-Linear: t [N] (integer or float) -> [N, 4*channels].

    `denominator` spaces the frequencies 10000^(-i/half) or 10000^(-i/(half-1)), half = channels // 2;
    `order` says which half of the embedding holds the sines. Both exist in published checkpoints.
    """

    def __init__(self, channels: int, denominator: str, order: str):
        super().__init__()
        self.half = channels // 2
        self.denominator = self.half if denominator == "half" else self.half - 1
        self.order = order
        self.register_buffer("frequencies", self._table(), persistent=False)
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, 4 * channels)

    def _table(self) -> Tensor:
        i = torch.arange(self.half, dtype=torch.float64, device="cpu")
        return torch.exp(-math.log(10000.0) * i / self.denominator).float()

    def _apply(self, fn, recurse: bool = True):
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
            h = self.norm2(h + emb[:, :, None, None])
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
