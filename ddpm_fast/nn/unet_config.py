"""What a U-Net is built from: `UNetConfig`.

The CIFAR-10 networks of Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (appendix B), and of Nichol &
Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", are

    UNetConfig(downsample_padding="asymmetric", norm_eps=1e-6,
               time_denominator="half-1", time_order="sin|cos")
    UNetConfig(num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4,
               scale_shift=True, learned_variance=True)

The fields after norm_eps are there for networks that other codes have trained (formats/). Files that were written
before a field was added do not have it; from_dict then takes what was the only choice.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ddpm_fast.errors import InputError
from ddpm_fast.nn.config_fields import fields_from_dict, set_typed, shown
from ddpm_fast.objective import output_channels

_CHOICES = {
    "resample": ("conv", "resblock"),
    "downsample_padding": ("symmetric", "asymmetric"),
    "time_denominator": ("half", "half-1"),
    "time_order": ("cos|sin", "sin|cos"),
    "middle_attention": ("normed", "plain", "none"),
}
# The fields that files may lack, with what the networks in such files are.
_ADDED = {
    "stem_channels": 0,
    "decoder_attention": None,
    "middle_attention": "normed",
    "head_channels": 0,
    "null_class": True,
    "timestep_scale": 1.0,
    "condition_channels": 0,
    "augment_channels": 0,
}


class Images(Protocol):
    """What a network's config must know of a data set."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def num_classes(self) -> int | None: ...


def norm_groups(channels: int) -> int:
    """The largest number of groups, up to the usual 32, that divides the channels and leaves at least four in each."""
    return next((groups for groups in range(32, 0, -1) if channels % groups == 0 and channels >= 4 * groups), 1)


@dataclass(frozen=True)
class UNetConfig:
    """What a U-Net is built from: plain numbers, strings and tuples, so that it can be stored as JSON.

    Attributes:
        image_size: Height and width of the samples; two numbers where they differ.
        in_channels: Channels of the samples.
        model_channels: Channels of the first level.
        channel_mult: Each level's channels, as multiples of model_channels.
        num_res_blocks: Residual blocks of a level in the encoder; the decoder has one more.
        attention_resolutions: Heights of the levels with self-attention. The middle always has it.
        num_heads: Heads of the self-attention.
        dropout: Share that is dropped in the residual blocks.
        num_classes: 0 means unconditional; otherwise class num_classes is the null class of guidance.
        scale_shift: Whether the embedding scales and shifts the second norm, or is added before it.
        learned_variance: Whether there are 2C output channels: the prediction, then the variance's.
        resample: "conv" has a convolution of its own; "resblock" resamples inside a residual block.
        downsample_padding: Of the strided convolution: "symmetric", or "asymmetric", which pads only bottom and right.
        time_denominator: Frequencies are 10000^(-i/half) for "half", or 10000^(-i/(half-1)) for "half-1".
        time_order: Which half of the time embedding has the cosines: "cos|sin" or "sin|cos".
        norm_groups: Groups of the group norms.
        norm_eps: Epsilon of the group norms.
        stem_channels: Channels that the first convolution makes; 0 means model_channels.
        decoder_attention: attention_resolutions of the way up; None: those of the way down.
        middle_attention: "normed"; "plain" has no norm before the middle's attention, "none" has no attention there.
        head_channels: Channels of each head of the self-attention; 0 means that there are num_heads.
        null_class: Whether there is a null class.
        timestep_scale: What timesteps are multiplied by before they are embedded.
        condition_channels: Channels of a second image, which the network gets beside the sample.
        augment_channels: Length of the vector that tells how a training image was augmented; 0 for none.

    Raises:
        InputError: If the fields do not make a network. The message says which values would.
    """

    image_size: int | tuple[int, int] = 32
    in_channels: int = 3
    model_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    num_heads: int = 1
    dropout: float = 0.0
    num_classes: int = 0
    scale_shift: bool = False
    learned_variance: bool = False
    resample: str = "conv"
    downsample_padding: str = "symmetric"
    time_denominator: str = "half"
    time_order: str = "cos|sin"
    norm_groups: int = 32
    norm_eps: float = 1e-5
    stem_channels: int = 0
    decoder_attention: tuple[int, ...] | None = None
    middle_attention: str = "normed"
    head_channels: int = 0
    null_class: bool = True
    timestep_scale: float = 1.0
    condition_channels: int = 0
    augment_channels: int = 0

    def __post_init__(self) -> None:
        set_typed(self, _CHOICES)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; expected a probability in [0, 1)")
        if not 0 < self.norm_eps <= 1:
            raise InputError(f"norm_eps is {self.norm_eps}; expected a small positive number such as 1e-5")
        if not 0 < self.timestep_scale <= 1e6:
            raise InputError(
                f"timestep_scale is {self.timestep_scale}; expected 1, or 1000/T for a network of rescaled timesteps"
            )
        self._check_levels()
        self._check_channels()

    def _check_levels(self) -> None:
        """The image must be divisible into the levels, and attention must be at levels that exist."""
        if not self.channel_mult:
            raise InputError("channel_mult is empty; expected one multiplier for each level, such as (1, 2, 2, 2)")
        self.check_halves(self.height, self.width)
        for name in ("attention_resolutions", "decoder_attention"):
            unknown = [r for r in getattr(self, name) or () if r not in self.resolutions]
            if unknown:
                raise InputError(
                    f"{name} has {shown(unknown)}, but the levels of an image of {self.size_name} have heights "
                    f"{list(self.resolutions)}: choose among these, or () for attention in the middle only"
                )

    def check_halves(self, height: int, width: int) -> None:
        """Raises InputError for images of a size that cannot be halved for the levels, naming sizes that can."""
        divisor = 2 ** (len(self.channel_mult) - 1)
        if height % divisor == width % divisor == 0 and min(height, width) > 0:
            return
        both = (height,) if height == width else (height, width)
        lower = [size // divisor * divisor for size in both]
        upper = [low + divisor if size % divisor or not low else low for low, size in zip(lower, both, strict=True)]
        ways = ["x".join(map(str, sizes)) for sizes in (lower, upper) if min(sizes)]
        levels = min((size & -size).bit_length() for size in both)
        raise InputError(
            f"image_size {'x'.join(map(str, both))} cannot be halved {len(self.channel_mult) - 1} times for the "
            f"{len(self.channel_mult)} levels of channel_mult {self.channel_mult}: resize the images to "
            f"{' or '.join(dict.fromkeys(ways))}, or give channel_mult at most {levels} level{'s' * (levels != 1)}"
        )

    def _check_channels(self) -> None:
        """The channels of each level must be divisible by what splits them."""
        if self.model_channels % 2 or self.model_channels < 4:
            raise InputError(
                f"model_channels is {self.model_channels}; expected an even number of at least 4, because half of the "
                "time embedding are sines and half cosines"
            )
        for level, channels in enumerate(self.level_channels):
            if channels < 1 or channels % self.norm_groups:
                divisors = [g for g in range(1, 33) if all(c % g == 0 for c in self.level_channels)]
                raise InputError(
                    f"level {level} has {self.model_channels} x {self.channel_mult[level]} = {channels} "
                    f"channels, not divisible by norm_groups {self.norm_groups}: make model_channels a multiple of "
                    f"norm_groups, or set norm_groups to {divisors[-1]}"
                )
            if self._attends(level):
                self._check_heads(level, channels)
        if self.first_channels % self.norm_groups:
            raise InputError(
                f"the first convolution makes {self.first_channels} channels, not divisible by norm_groups "
                f"{self.norm_groups}: give stem_channels a multiple of it"
            )

    def _attends(self, level: int) -> bool:
        """Whether there is attention at a level, on the way down, on the way up or in the middle."""
        heights = {*self.attention_resolutions, *(self.decoder_attention or ())}
        is_last = level == len(self.channel_mult) - 1
        return self.resolutions[level] in heights or (is_last and self.middle_attention != "none")

    def _check_heads(self, level: int, channels: int) -> None:
        splits = self.head_channels or self.num_heads
        if channels % splits:
            name = "head_channels" if self.head_channels else "num_heads"
            divisors = [h for h in range(1, min(splits, channels + 1)) if channels % h == 0]
            raise InputError(
                f"level {level} has {channels} channels and attention, not divisible by {name} {splits}: set {name} to "
                f"{divisors[-1]}"
            )

    @classmethod
    def for_images(cls, images: Images, **fields: Any) -> "UNetConfig":
        """A network for the images of a data set, as `python -m ddpm_fast.train` makes it if it is told nothing else.

        Args:
            images: What load_dataset gives. If it has classes, the network is conditioned on them.
            fields: Those of UNetConfig that are to be otherwise, such as model_channels=32.

        Raises:
            InputError: If the fields do not make a network for the images.
        """
        chosen: dict[str, Any] = {
            "image_size": images.shape[1:],
            "in_channels": images.shape[0],
            "num_classes": images.num_classes or 0,
            "model_channels": 64,
            "channel_mult": (1, 2, 2),
            "attention_resolutions": (),
            "num_heads": 4,
            "dropout": 0.1,
            "scale_shift": True,
        }
        chosen |= fields
        chosen.setdefault("norm_groups", norm_groups(chosen["model_channels"]))
        return cls(**chosen)

    def resized(self, height: int, width: int) -> "UNetConfig":
        """The same network for samples of another size. It has the same weights: attention stays at its levels.

        Raises:
            InputError: If the size cannot be halved for the levels.
        """
        self.check_halves(height, width)
        heights = {own: height >> level for level, own in enumerate(self.resolutions)}
        down = tuple(heights[own] for own in self.attention_resolutions)
        up = self.decoder_attention and tuple(heights[own] for own in self.decoder_attention)
        return dataclasses.replace(self, image_size=(height, width), attention_resolutions=down, decoder_attention=up)

    @property
    def height(self) -> int:
        """The height of the samples."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        """The width of the samples."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), the shape of one sample."""
        return self.in_channels, self.height, self.width

    @property
    def size_name(self) -> str:
        """The size as options write it: "32", or "64x32" for a height of 64 and a width of 32."""
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The height of each level."""
        return tuple(self.height >> level for level in range(len(self.channel_mult)))

    @property
    def level_channels(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(round(self.model_channels * mult) for mult in self.channel_mult)

    @property
    def first_channels(self) -> int:
        """The channels that the first convolution makes."""
        return self.stem_channels or self.model_channels

    @property
    def label_rows(self) -> int:
        """The rows of the table of classes: the classes, and the null class if there is one."""
        return self.num_classes + self.null_class if self.num_classes else 0

    def heads(self, channels: int) -> int:
        """The heads of the self-attention over so many channels."""
        return channels // self.head_channels if self.head_channels else self.num_heads

    @property
    def out_channels(self) -> int:
        """The channels of the network's output."""
        return output_channels(self.in_channels, self.learned_variance)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with tuples as lists, as JSON gives them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "UNetConfig":
        """The config that `to_dict` described.

        Raises:
            InputError: For unknown, missing and invalid fields. A checkpoint must have all of them but those that were
                added later, because a default may change.
        """
        return cls(**fields_from_dict(cls, fields, "U-Net", _ADDED))
