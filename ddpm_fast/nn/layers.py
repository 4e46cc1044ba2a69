"""The U-Net's layers: group norm, residual block, self-attention, down- and upsampling, time embedding.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (appendix B) and Nichol & Dhariwal 2021, "Improved
Denoising Diffusion Probabilistic Models" (section 3 and appendix A). Images are [N, C, H, W] in channels_last
memory, so that [N, H*W, C] is a view of them: attention and the norms read the same bytes as the
convolutions. Between the layers of a network an image may be pending (pending.py).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.nn.derived import Derives
from ddpm_fast.nn.pending import Pending, convolved, is_added_by_norms, is_fused, whole
from ddpm_fast.nn.products import Linear, computed
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import add_group_norm, dropout, group_norm


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
        self,
        x: Tensor | Pending,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        added: Tensor | None = None,
        joined: Tensor | None = None,
    ) -> Tensor:
        """Normalise an image, which may be pending: it is added up in the same pass.

        Args:
            x: [N, C, H, W], any float.
            scale: [N, C] or [1, C]. It comes with `shift`.
            shift: Likewise.
            added: [N, C] or [1, C], for an image that is not pending.
            joined: Channels that come after those of x, for a pending image.

        Returns:
            [N, C, H, W] of x's dtype, with the joined channels.
        """
        if (scale is None) != (shift is None):
            raise InputError("group_norm: scale and shift belong together; give both, or neither")
        scale_shift = None if scale is None or shift is None else (scale, shift)
        weight, bias, groups, eps = self.weight, self.bias, self.num_groups, self.eps
        if isinstance(x, Pending) and (joined is not None or not x.is_added_up):
            total, y = add_group_norm(
                x.addends(), weight, bias, groups, eps, scale_shift=scale_shift, joined=joined, silu=self.silu
            )
            x.keep(total)
            return y
        return group_norm(whole(x), weight, bias, groups, eps, scale_shift=scale_shift, added=added, silu=self.silu)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then Linear-SiLU-Linear: t [N] (integer or float) -> [N, 4*channels].

    What is `added` to the sinusoids, [N, channels], goes through the two layers with them.

    `denominator` spaces the frequencies 10000^(-i/half) or 10000^(-i/(half-1)), half = channels // 2;
    `order` says which half of the embedding holds the sines; `scale` multiplies the timestep first. All exist in
    published checkpoints.
    """

    frequencies: Tensor

    def __init__(self, channels: int, denominator: str, order: str, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.count = channels // 2  # of the frequencies
        self.denominator = self.count if denominator == "half" else self.count - 1
        self.order = order
        self.register_buffer("frequencies", self._table(), persistent=False)
        self.linear1 = Linear(channels, 4 * channels)
        self.linear2 = Linear(4 * channels, 4 * channels)

    def _table(self) -> Tensor:
        i = torch.arange(self.count, dtype=torch.float64, device="cpu")
        return torch.exp(-math.log(10000.0) * i / self.denominator).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TimeEmbedding":
        # model.to(bfloat16) would round the frequencies to 8 bits: at t = 999 the angle would be off by
        # radians.
        super()._apply(fn, recurse)
        self.frequencies = self._table().to(self.frequencies.device)
        return self

    def forward(self, t: Tensor, added: Tensor | None = None) -> Tensor:
        scaled = t.float() if self.scale == 1 else t.float() * self.scale
        angle = scaled[:, None] * self.frequencies
        parts = [angle.cos(), angle.sin()] if self.order == "cos|sin" else [angle.sin(), angle.cos()]
        embedding = torch.cat(parts, dim=1).to(self.linear1.weight.dtype)
        if added is not None:
            embedding = embedding + added
        return self.linear2(F.silu(self.linear1(embedding)))


class Dropout(nn.Dropout):
    """Sets a share of an image's elements to 0 in training, and divides the others by the share that is kept.

    With a key the elements are those of ops.dropout for these samples and this layer; without one, those that torch's
    own generator draws.

    Attributes:
        number: The layer's place among those of its network, which gives it a mask of its own.
    """

    def __init__(self, share: float, number: int = 0):
        super().__init__(share)
        self.number = number

    def forward(self, input: Tensor, key: NoiseKey | None = None) -> Tensor:
        if key is None:
            return super().forward(input)
        return dropout(input, key, self.number, self.p) if self.training and self.p else input


class Embedding:
    """What the residual blocks get beside the image: the embedding of timesteps and labels, and whose dropout it is.

    Attributes:
        emb: [N, E], or [1, E] for all samples, already through SiLU.
        rows: What each block makes of it, fp32 [N, C], with the bias of the block's first convolution if it is to be
            added. None if each block projects it by itself.
        key: The samples whose masks dropout takes, or None for torch's own dropout.
    """

    def __init__(self, emb: Tensor, rows: dict[nn.Module, Tensor] | None = None, key: NoiseKey | None = None):
        self.emb, self.rows, self.key = emb, rows, key


class ResBlock(nn.Module):
    """norm-SiLU-conv, the time embedding, norm-SiLU-dropout-conv, plus the skip.

    x: [N, in_channels, H, W]; emb: [N, emb_channels] or [1, emb_channels], already through SiLU. Returns [N,
    out_channels, H', W'], pending if x is. The embedding is added to the hidden image, or with `scale_shift` scales and
    shifts its norm. `joined` are channels of x that are in an image of their own, the last ones. `resample` is None,
    "down" (mean of 2x2) or "up" (nearest), applied to both branches before the first convolution.
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
        self.emb = Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = Dropout(dropout)
        self.conv2 = zeroed(Conv2d(out_channels, out_channels))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else Conv2d(in_channels, out_channels, 1, padding=0)

    def forward(self, x: Tensor | Pending, emb: Tensor | Embedding, joined: Tensor | None = None) -> Tensor | Pending:
        image = x if isinstance(x, Pending) else Pending(x)
        if not is_added_by_norms(image.image):
            one = image.total() if joined is None else torch.cat([image.total(), joined], dim=1)
            image, joined = Pending(one), None
        h = self.norm1(image.image if image.is_added_up and joined is None else image, joined=joined)
        h = convolved(self.conv1, self.resample(h))
        h = convolved(self.conv2, self._dropped(self._conditioned(h, emb), emb))
        result = self._with_skip(h, image.total(), joined)
        return result if isinstance(x, Pending) else result.total()

    def _conditioned(self, h: Pending, emb: Tensor | Embedding) -> Tensor:
        """The second norm, with the embedding and the first convolution's bias."""
        embedding = emb if isinstance(emb, Embedding) else Embedding(emb)
        bias = None if h.bias is None else h.bias[None]
        if embedding.rows is None:
            rows = self.emb(embedding.emb)
            if not self.scale_shift and bias is not None:
                rows = rows + bias
        else:
            rows = embedding.rows[self]
        if self.scale_shift:
            scale, shift = rows.chunk(2, dim=1)
            return self.norm2(h.image, scale, shift, added=bias)
        return self.norm2(h.image, added=rows)

    def _dropped(self, h: Tensor, emb: Tensor | Embedding) -> Tensor:
        key = emb.key if isinstance(emb, Embedding) else None
        return self.dropout(h) if key is None else self.dropout(h, key)

    def _with_skip(self, h: Pending, x: Tensor, joined: Tensor | None) -> Pending:
        """h with the skip as its residual. A 1x1 convolution of two images is a matrix product of each."""
        x = self.resample(x)
        if not isinstance(self.skip, Conv2d) or not is_added_by_norms(x):
            return h.plus(self.skip(x if joined is None else torch.cat([x, joined], dim=1)))
        bias = self.skip.bias
        if torch.is_grad_enabled() and bias is not None and h.bias is not None:
            # The gradient of a product's bias is a pass over an image; that of h's comes with the next norm's.
            h, bias = Pending(h.image, bias=h.bias + bias), None
        n, channels, height, width = x.shape
        own, others = self.skip.weight.flatten(1).split((channels, self.skip.in_channels - channels), dim=1)
        y = computed(_product, _pixels(x), None if joined is None else _pixels(joined), own, others, bias)
        return h.plus(y.view(n, height, width, self.skip.out_channels).permute(0, 3, 1, 2))


def _product(x: Tensor, joined: Tensor | None, own: Tensor, others: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of [x, joined] side by side, whose weight is [own, others]."""
    y = F.linear(x, own, bias)
    return y if joined is None else y.addmm_(joined, others.t().to(y.dtype))


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N*H*W, C]: a view, because the image is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class Attention(nn.Module):
    """Self-attention over all pixels, plus the skip: x [N, C, H, W] -> the same shape, pending if x is.

    With no groups there is no norm before it.
    """

    def __init__(self, channels: int, heads: int, *, groups: int | None, eps: float):
        super().__init__()
        self.heads = heads
        self.norm = None if groups is None else GroupNorm(groups, channels, eps, silu=False)
        self.qkv = Linear(channels, 3 * channels)
        self.proj = zeroed(Linear(channels, channels))

    def forward(self, x: Tensor | Pending) -> Tensor | Pending:
        image = x if isinstance(x, Pending) else Pending(x)
        if self.norm is None:
            h = image.total()
        else:
            h = self.norm(image if is_added_by_norms(image.image) else image.total())
        n, c, height, width = h.shape
        pixels = h.permute(0, 2, 3, 1).reshape(n, height * width, c)
        qkv = self.qkv(pixels).view(n, height * width, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = computed(F.scaled_dot_product_attention, q, k, v).transpose(1, 2).reshape(n, height * width, c)
        bias = None
        if type(self.proj) is Linear and is_fused(h):
            h, bias = F.linear(h, self.proj.weight), self.proj.bias
        else:
            h = self.proj(h)
        result = Pending(h.view(n, height, width, c).permute(0, 3, 1, 2), image.total(), bias)
        return result if isinstance(x, Pending) else result.total()


class MeanDown(nn.Module):
    """The mean of each 2x2 square: [N, C, H, W] -> [N, C, H/2, W/2]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class NearestUp(nn.Module):
    """Every pixel four times: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(Derives):
    """A 3x3 convolution of stride 2: [N, C, H, W] -> [N, C, H/2, W/2], pending if x is.

    `padding` "symmetric" pads all four sides by one; "asymmetric" only the bottom and the right, as Ho et al.
    do (TensorFlow's "same"). The two sample different pixels: weights do not carry over from one to the
    other.
    """

    def __init__(self, channels: int, padding: str):
        super().__init__()
        self.asymmetric = padding == "asymmetric"
        self.conv = Conv2d(channels, channels, stride=2, padding=0 if self.asymmetric else 1)

    def derive(self) -> tuple[Tensor, ...]:
        """The filters as 4x4 ones that begin with zeros: padded on all sides, they need no padded copy of the image."""
        return (F.pad(self.conv.weight, (1, 0, 1, 0)),)

    def forward(self, x: Tensor | Pending) -> Tensor | Pending:
        image = whole(x)
        if not self.asymmetric:
            result = convolved(self.conv, image)
        elif is_fused(image):
            (filters,) = self.derived()
            result = Pending(F.conv2d(image, filters, None, 2, 1), bias=self.conv.bias)
        else:
            result = Pending(self.conv(F.pad(image, (0, 1, 0, 1))))
        return result if isinstance(x, Pending) else result.total()


class Upsample(Derives):
    """Every pixel four times, then a 3x3 convolution: [N, C, H, W] -> [N, C, 2H, 2W], pending if x is."""

    def __init__(self, channels: int):
        super().__init__()
        self.nearest = NearestUp()
        self.conv = Conv2d(channels, channels)

    def derive(self) -> tuple[Tensor, ...]:
        """The filters of the transposed 4x4 convolution of stride 2 that does the same: each of its taps is the sum of
        those taps of the 3x3 filter which meet copies of one pixel. It takes 4 products where nearest and 3x3 take 9.
        """
        taps = F.avg_pool2d(self.conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
        return (taps.transpose(0, 1).contiguous(memory_format=torch.channels_last),)

    def forward(self, x: Tensor | Pending) -> Tensor | Pending:
        image = whole(x)
        if is_fused(image):
            (filters,) = self.derived()
            result = Pending(F.conv_transpose2d(image, filters, None, 2, 1), bias=self.conv.bias)
        else:
            result = Pending(self.conv(self.nearest(image)))
        return result if isinstance(x, Pending) else result.total()
