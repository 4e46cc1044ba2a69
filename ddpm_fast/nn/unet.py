"""The U-Net that predicts the noise (or x0, or v) from a noised image and its timestep, and the config that
builds it.

One class holds the network of Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (appendix B), and
its improved form of Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (scale-shift
conditioning, several attention heads, learned variance, classes). Their CIFAR-10 networks are

    UNetConfig(downsample_padding="asymmetric", norm_eps=1e-6,
               time_denominator="half-1", time_order="sin|cos")
    UNetConfig(num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4,
               scale_shift=True, learned_variance=True)
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn.layers import Attention, Downsample, GroupNorm, ResBlock, TimeEmbedding, Upsample, zeroed
from ddpm_fast.objective import output_channels

_CHOICES = {
    "resample": ("conv", "resblock"),
    "downsample_padding": ("symmetric", "asymmetric"),
    "time_denominator": ("half", "half-1"),
    "time_order": ("cos|sin", "sin|cos"),
}


@dataclass(frozen=True)
class UNetConfig:
    """What a U-Net is built from; plain numbers, strings and tuples, so that it travels as JSON.

    Raises InputError where the fields do not make a network, saying which values would.
    """

    image_size: int = 32  # height and width of the samples
    in_channels: int = 3
    model_channels: int = 128  # channels of the first level
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)  # each level's channels / model_channels
    num_res_blocks: int = 2  # per level on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (16,)  # heights with self-attention; the middle always has it
    num_heads: int = 1
    dropout: float = 0.0
    num_classes: int = 0  # 0: unconditional; else class num_classes is the null class of guidance
    scale_shift: bool = False  # the embedding scales and shifts the second norm; False: it is added before it
    learned_variance: bool = False  # 2*in_channels out: the prediction, then what sets its variance
    resample: str = "conv"  # "resblock": resample inside a residual block, without a convolution of its own
    downsample_padding: str = "symmetric"  # of the strided convolution; "asymmetric": bottom and right only
    time_denominator: str = "half"  # frequencies 10000^(-i/half) or 10000^(-i/(half-1))
    time_order: str = "cos|sin"
    norm_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.type))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        for name in (
            "image_size",
            "in_channels",
            "model_channels",
            "num_res_blocks",
            "num_heads",
            "norm_groups",
        ):
            _at_least(name, getattr(self, name), 1)
        _at_least("num_classes", self.num_classes, 0)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; expected a probability in [0, 1)")
        if not self.norm_eps > 0:
            raise InputError(f"norm_eps is {self.norm_eps}; expected a small positive number such as 1e-5")
        self._check_levels()
        self._check_channels()

    def _check_levels(self):
        if not self.channel_mult:
            raise InputError("channel_mult is empty; expected one multiplier a level, such as (1, 2, 2, 2)")
        for mult in self.channel_mult:
            _at_least("channel_mult", mult, 1)
        divisor = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % divisor:
            lower = self.image_size // divisor * divisor
            works = f"{lower} or {lower + divisor}" if lower else str(divisor)
            levels = (self.image_size & -self.image_size).bit_length()
            raise InputError(
                f"image_size {self.image_size} cannot be halved {len(self.channel_mult) - 1} times for the "
                f"{len(self.channel_mult)} levels of channel_mult {self.channel_mult}: resize the images to "
                f"{works}, or give channel_mult at most {levels} level{'s' if levels > 1 else ''}"
            )
        unknown = [r for r in self.attention_resolutions if r not in self.resolutions]
        if unknown:
            raise InputError(
                f"attention_resolutions has {unknown}, but the levels of an image of {self.image_size} have "
                f"heights {list(self.resolutions)}: choose among these, or () for attention in the middle only"
            )

    def _check_channels(self):
        if self.model_channels % 2 or self.model_channels < 4:
            raise InputError(
                f"model_channels is {self.model_channels}; expected an even number of at least 4 (sines and cosines)"
            )
        for level, channels in enumerate(self.level_channels):
            if channels % self.norm_groups:
                divisors = [g for g in range(1, 33) if all(c % g == 0 for c in self.level_channels)]
                raise InputError(
                    f"level {level} has {self.model_channels} x {self.channel_mult[level]} = {channels} "
                    f"channels, not divisible by norm_groups {self.norm_groups}: make model_channels a multiple of it, "
                    f"or set norm_groups to {divisors[-1]}"
                )
            is_last = level == len(self.level_channels) - 1
            attends = is_last or self.resolutions[level] in self.attention_resolutions
            if attends and channels % self.num_heads:
                divisors = [h for h in range(1, self.num_heads) if channels % h == 0]
                raise InputError(
                    f"level {level} has {channels} channels and attention, not divisible by num_heads "
                    f"{self.num_heads}: set num_heads to {divisors[-1]}"
                )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height (= width) of each level."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return output_channels(self.in_channels, self.learned_variance)

    def to_dict(self) -> dict[str, Any]:
        """All fields, tuples as lists: what JSON gives back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "UNetConfig":
        """The config of `to_dict`. Raises InputError for unknown, missing (a default may change: a checkpoint
        must say what it is) and invalid fields."""
        if not isinstance(fields, Mapping):
            raise InputError(f"a U-Net's config is a {type(fields).__name__}; expected a dict of its fields")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(map(str, fields)) - set(known))
        if unknown:
            raise InputError(f"unknown U-Net config field(s) {', '.join(unknown)}; known are {', '.join(known)}")
        missing = [name for name in known if name not in fields]
        if missing:
            raise InputError(
                f"missing U-Net config field(s) {', '.join(missing)}; all are needed: start from UNetConfig().to_dict()"
            )
        return cls(**fields)


def _at_least(name: str, value: int, least: int):
    if value < least:
        raise InputError(f"{name} is {value}; expected at least {least}")


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as the field's type: lists become tuples and ints floats; anything else must fit."""
    if kind == tuple[int, ...]:
        if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            return tuple(value)
        raise InputError(f"{name} is {value!r}; expected a list of integers")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{name} is {value!r}; expected {kind.__name__}")
    return value


class Stage(nn.Sequential):
    """Layers in sequence; those that are residual blocks are given the embedding too."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """The U-Net of Ho et al. 2020 and Nichol & Dhariwal 2021; see UNetConfig for what it can be.

    Every stage of the encoder leaves its output for one stage of the decoder, which joins it to its own
    input. The parameters are channels_last. At initialisation the output is exactly 0.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels = config.level_channels
        emb_channels = 4 * config.model_channels
        norm = {"groups": config.norm_groups, "eps": config.norm_eps}

        def res_block(c_in: int, c_out: int, resample: str | None = None) -> ResBlock:
            options = {"dropout": config.dropout, "scale_shift": config.scale_shift, "resample": resample}
            return ResBlock(c_in, c_out, emb_channels, **norm, **options)

        def attention(level: int) -> list[nn.Module]:
            if config.resolutions[level] not in config.attention_resolutions:
                return []
            return [Attention(channels[level], config.num_heads, **norm)]

        def downsample(c: int) -> nn.Module:
            inside = config.resample == "resblock"
            return res_block(c, c, "down") if inside else Downsample(c, config.downsample_padding)

        def upsample(c: int) -> nn.Module:
            return res_block(c, c, "up") if config.resample == "resblock" else Upsample(c)

        self.time_embedding = TimeEmbedding(config.model_channels, config.time_denominator, config.time_order)
        if config.num_classes:
            self.label_embedding = nn.Embedding(config.num_classes + 1, emb_channels)
        self.conv_in = nn.Conv2d(config.in_channels, config.model_channels, 3, padding=1)

        c = config.model_channels
        skips = [c]
        self.encoder = nn.ModuleList()
        for level, c_level in enumerate(channels):
            for _ in range(config.num_res_blocks):
                self.encoder.append(Stage(res_block(c, c_level), *attention(level)))
                c = c_level
                skips.append(c)
            if level < len(channels) - 1:
                self.encoder.append(Stage(downsample(c)))
                skips.append(c)

        self.middle = Stage(res_block(c, c), Attention(c, config.num_heads, **norm), res_block(c, c))

        self.decoder = nn.ModuleList()
        for level, c_level in reversed(list(enumerate(channels))):
            for block in range(config.num_res_blocks + 1):
                layers = [res_block(c + skips.pop(), c_level), *attention(level)]
                c = c_level
                if level > 0 and block == config.num_res_blocks:
                    layers.append(upsample(c))
                self.decoder.append(Stage(*layers))

        self.norm_out = GroupNorm(config.norm_groups, c, config.norm_eps)
        self.conv_out = zeroed(nn.Conv2d(c, config.out_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], t [N] integer or float, labels [N] integer or None -> [N, C or 2C, H, W],
        channels_last.

        None for a class-conditional network means the null class for all. x is cast to the parameters' dtype.
        The output has that dtype, or autocast's. Raises InputError for wrong shapes and dtypes, for labels
        given to an unconditional network, and for labels out of range (looked at on the CPU only: on a GPU it
        would wait).
        """
        self._check(x, t, labels)
        emb = self.time_embedding(t)
        if self.config.num_classes:
            table = self.label_embedding.weight
            emb = emb + (table[-1] if labels is None else F.embedding(labels, table))
        emb = F.silu(emb)

        x = x.to(self.conv_in.weight.dtype, memory_format=torch.channels_last)
        # With one input channel any memory format fits x, and the convolution may choose the wrong one.
        h = self.conv_in(x).contiguous(memory_format=torch.channels_last)
        skips = [h]
        for stage in self.encoder:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for stage in self.decoder:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(self.norm_out(h))

    def _check(self, x: Tensor, t: Tensor, labels: Tensor | None):
        config = self.config
        expected = (config.in_channels, config.image_size, config.image_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected or not x.is_floating_point():
            raise InputError(f"x is {x.dtype} {list(x.shape)}; expected floats [N, {', '.join(map(str, expected))}]")
        if t.shape != x.shape[:1] or t.dtype == torch.bool or t.is_complex():
            raise InputError(f"t is {t.dtype} {list(t.shape)}; expected one timestep a sample, [{x.shape[0]}]")
        if labels is None:
            return
        if not config.num_classes:
            raise InputError("labels were given to an unconditional network (num_classes = 0): leave them out")
        if labels.shape != x.shape[:1] or labels.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"labels are {labels.dtype} {list(labels.shape)}; expected one int64 class a sample, [{x.shape[0]}]"
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
            low, high = labels.min().item(), labels.max().item()
            if low < 0 or high > config.num_classes:
                raise InputError(
                    f"labels go from {low} to {high}; expected 0 to {config.num_classes - 1}, "
                    f"or {config.num_classes} for the null class"
                )
