"""A classifier of noised images: the way down and the middle of a U-Net, and a pool that makes logits of them.

It says which class a noised image is of, and its gradient guides a sampler towards one (loops/classifier_guidance.py).
The network is that of Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (section 4), with each of
the pools that its code has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.nn.config_fields import fields_from_dict, shown
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.nn.layers import Embedding, GroupNorm, TimeEmbedding
from ddpm_fast.nn.products import Linear
from ddpm_fast.nn.unet import Layers
from ddpm_fast.nn.unet_config import UNetConfig

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
_HIDDEN = 2048  # features between the two layers of the spatial pools
_MOST_CLASSES = 2**24


@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier is built from.

    Attributes:
        unet: The U-Net whose way down and middle it has. Its images are unconditional and have no condition.
        num_classes: The number of classes.
        pool: How an image becomes one vector:

            - "adaptive": the mean of all pixels.
            - "attention": the mean attends to all pixels. Images are of the config's size then.
            - "spatial": the means of every stage's images, and a hidden layer with ReLU.
            - "spatial_v2": the same, with a norm and SiLU.

    Raises:
        InputError: If the fields do not make a network.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    num_classes: int = 1000
    pool: str = "attention"

    def __post_init__(self) -> None:
        if not isinstance(self.unet, UNetConfig):
            raise InputError(f"unet is a {type(self.unet).__name__}; expected a UNetConfig")
        object.__setattr__(self, "num_classes", check_integer("num_classes", self.num_classes, 1, _MOST_CLASSES))
        if self.pool not in POOLS:
            raise InputError(f"pool is {shown(self.pool)}; expected one of {', '.join(POOLS)}")
        for name in ("num_classes", "condition_channels", "augment_channels"):
            if value := getattr(self.unet, name):
                raise InputError(f"the classifier's U-Net has {name} {value}; expected 0: it is given images alone")
        if self.pool == "attention" and self.channels % self.unet.heads(self.channels):
            raise InputError(
                f"the last level has {self.channels} channels, not divisible by num_heads {self.unet.num_heads}: the "
                "pool attends there"
            )
        if self.pool == "spatial_v2" and _HIDDEN % self.unet.norm_groups:
            raise InputError(
                f"norm_groups is {self.unet.norm_groups}; expected a divisor of the {_HIDDEN} hidden features"
            )

    @property
    def channels(self) -> int:
        """The channels of the last level."""
        return self.unet.level_channels[-1]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON gives them back."""
        return {"unet": self.unet.to_dict(), "num_classes": self.num_classes, "pool": self.pool}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ClassifierConfig:
        """The config that `to_dict` described.

        Raises:
            InputError: For unknown, missing and invalid fields.
        """
        found = fields_from_dict(cls, fields, "classifier", {})
        return cls(**found | {"unet": UNetConfig.from_dict(found["unet"])})


class AttentionPool(nn.Module):
    """One vector of an image, [N, C, H, W] -> [N, C]: the mean of its pixels attends to them and to itself.

    Each pixel and the mean have a learned position, so images are of one size. It is section 4.2 of Dhariwal & Nichol
    2021, after CLIP's (Radford et al. 2021).
    """

    def __init__(self, pixels: int, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(pixels + 1, channels) / channels**0.5)
        self.qkv = Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        pixels = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1) + self.position
        qkv = self.qkv(tokens).view(n, -1, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Of all answers only the mean's is read.
        return F.scaled_dot_product_attention(q[:, :, :1], k, v).reshape(n, c)


class Classifier(nn.Module):
    """logits [N, num_classes] of noised images x at the timesteps t.

    Attributes:
        config: What it was built from.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config, unet = config, config.unet
        layers = Layers(unet)
        self.time_embedding = TimeEmbedding(
            unet.model_channels, unet.time_denominator, unet.time_order, unet.timestep_scale
        )
        self.conv_in = Conv2d(unet.in_channels, unet.first_channels)
        self.encoder, channels = layers.encoder()
        c = channels[-1]
        self.middle = layers.middle(c)
        if config.pool.startswith("spatial"):
            self.hidden = Linear(sum(channels) + c, _HIDDEN)
            if config.pool == "spatial_v2":
                self.hidden_norm = GroupNorm(unet.norm_groups, _HIDDEN, unet.norm_eps)
            self.head = Linear(_HIDDEN, config.num_classes)
        else:
            self.norm_out = GroupNorm(unet.norm_groups, c, unet.norm_eps)
            if config.pool == "attention":
                shrunk = 2 ** (len(unet.channel_mult) - 1)
                self.pool = AttentionPool((unet.height // shrunk) * (unet.width // shrunk), c, unet.heads(c))
            self.head = Linear(c, config.num_classes)
        # torch's own stubs lack this overload.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Classify noised images.

        Args:
            x: [N, C, H, W], floats. They are cast to the parameters' dtype.
            t: [N], the timesteps, integer or float.

        Returns:
            [N, num_classes], in the parameters' dtype or autocast's.

        Raises:
            InputError: For wrong shapes and dtypes.
        """
        self._check(x, t)
        emb = Embedding(F.silu(self.time_embedding(t)))
        h = self.conv_in(x.to(self.conv_in.weight.dtype, memory_format=torch.channels_last))
        # With one input channel x fits any memory format, and the convolution may choose the wrong one.
        h = h.contiguous(memory_format=torch.channels_last)
        images = [h]
        for stage in (*self.encoder, self.middle):
            images.append(stage(images[-1], emb))
        return self.head(self._pooled(images))

    def _pooled(self, images: list[Tensor]) -> Tensor:
        """The vector of each sample, from the images of all stages."""
        h = images[-1]
        if self.config.pool == "attention":
            return self.pool(self.norm_out(h))
        if self.config.pool == "adaptive":
            return self.norm_out(h).mean(dim=(2, 3))
        hidden = self.hidden(torch.cat([image.mean(dim=(2, 3)) for image in images], dim=1))
        if self.config.pool == "spatial":
            return F.relu(hidden)
        return self.hidden_norm(hidden[:, :, None, None]).flatten(1)

    def _check(self, x: Tensor, t: Tensor) -> None:
        unet = self.config.unet
        is_fixed = self.config.pool == "attention"
        fits = x.ndim == 4 and x.shape[1] == unet.in_channels and x.is_floating_point()
        if not fits or (is_fixed and tuple(x.shape[1:]) != unet.shape):
            wanted = f"{unet.height}, {unet.width}" if is_fixed else "H, W"
            raise InputError(
                f"the classifier is given {x.dtype} {list(x.shape)}; expected floats [N, {unet.in_channels}, {wanted}]"
            )
        unet.check_halves(x.shape[2], x.shape[3])
        if t.shape != x.shape[:1] or t.dtype == torch.bool or t.is_complex():
            raise InputError(f"t is {t.dtype} {list(t.shape)}; expected one timestep for each sample, [{x.shape[0]}]")
