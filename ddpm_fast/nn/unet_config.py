"""What a U-Net is built from: `UNetConfig`.

The CIFAR-10 networks of Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (appendix B), and of Nichol &
Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", are

    UNetConfig(downsample_padding="asymmetric", norm_eps=1e-6,
               time_denominator="half-1", time_order="sin|cos")
    UNetConfig(num_res_blocks=3, attention_resolutions=(16, 8), num_heads=4,
               scale_shift=True, learned_variance=True)
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.objective import output_channels

# The least and the largest value of each integer. Nobody needs a larger network, and a file may ask for anything.
_RANGES = {
    "image_size": (1, 2**14),
    "in_channels": (1, 2**14),
    "model_channels": (1, 2**14),
    "num_res_blocks": (1, 2**10),
    "num_heads": (1, 2**14),
    "norm_groups": (1, 2**14),
    "num_classes": (0, 2**24),
    "channel_mult": (1, 2**14),
    "attention_resolutions": (1, 2**14),
}
_MOST_LEVELS = 15  # an image of the largest size can be halved 14 times
_CHOICES = {
    "resample": ("conv", "resblock"),
    "downsample_padding": ("symmetric", "asymmetric"),
    "time_denominator": ("half", "half-1"),
    "time_order": ("cos|sin", "sin|cos"),
}


class Images(Protocol):
    """What a network's config must know of a data set."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def num_classes(self) -> int | None: ...

    def square_side(self) -> int: ...


def norm_groups(channels: int) -> int:
    """The largest number of groups, up to the usual 32, that divides the channels and leaves at least four in each."""
    return next((groups for groups in range(32, 0, -1) if channels % groups == 0 and channels >= 4 * groups), 1)


@dataclass(frozen=True)
class UNetConfig:
    """What a U-Net is built from: plain numbers, strings and tuples, so that it can be stored as JSON.

    Raises:
        InputError: If the fields do not make a network. The message says which values would.
    """

    image_size: int = 32  # height and width of the samples
    in_channels: int = 3
    model_channels: int = 128  # channels of the first level
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)  # each level's channels, as multiples of model_channels
    num_res_blocks: int = 2  # residual blocks of a level in the encoder; the decoder has one more
    attention_resolutions: tuple[int, ...] = (16,)  # heights of levels with self-attention; the middle always has it
    num_heads: int = 1  # heads of the self-attention
    dropout: float = 0.0  # in the residual blocks
    num_classes: int = 0  # 0 means unconditional; otherwise class num_classes is the null class of guidance
    scale_shift: bool = False  # whether the embedding scales and shifts the second norm, or is added before it
    learned_variance: bool = False  # whether there are 2C output channels: the prediction, then the variance's
    resample: str = "conv"  # "conv" has a convolution of its own; "resblock" resamples inside a residual block
    downsample_padding: str = "symmetric"  # of the strided convolution; "asymmetric" pads only bottom and right
    time_denominator: str = "half"  # frequencies are 10000^(-i/half), or 10000^(-i/(half-1)) for "half-1"
    time_order: str = "cos|sin"  # which half of the time embedding has the cosines
    norm_groups: int = 32  # groups of the group norms
    norm_eps: float = 1e-5  # epsilon of the group norms

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.type))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {_shown(getattr(self, name))}; expected one of {', '.join(choices)}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; expected a probability in [0, 1)")
        if not 0 < self.norm_eps <= 1:
            raise InputError(f"norm_eps is {self.norm_eps}; expected a small positive number such as 1e-5")
        self._check_levels()
        self._check_channels()

    def _check_levels(self) -> None:
        """The image must be divisible into the levels, and attention must be at levels that exist."""
        if not self.channel_mult:
            raise InputError("channel_mult is empty; expected one multiplier for each level, such as (1, 2, 2, 2)")
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
                f"attention_resolutions has {_shown(unknown)}, but the levels of an image of {self.image_size} have "
                f"heights {list(self.resolutions)}: choose among these, or () for attention in the middle only"
            )

    def _check_channels(self) -> None:
        """The channels of each level must be divisible by what splits them."""
        if self.model_channels % 2 or self.model_channels < 4:
            raise InputError(
                f"model_channels is {self.model_channels}; expected an even number of at least 4, because half of the "
                "time embedding are sines and half cosines"
            )
        for level, channels in enumerate(self.level_channels):
            if channels % self.norm_groups:
                divisors = [g for g in range(1, 33) if all(c % g == 0 for c in self.level_channels)]
                raise InputError(
                    f"level {level} has {self.model_channels} x {self.channel_mult[level]} = {channels} "
                    f"channels, not divisible by norm_groups {self.norm_groups}: make model_channels a multiple of "
                    f"norm_groups, or set norm_groups to {divisors[-1]}"
                )
            is_last = level == len(self.level_channels) - 1
            attends = is_last or self.resolutions[level] in self.attention_resolutions
            if attends and channels % self.num_heads:
                divisors = [h for h in range(1, self.num_heads) if channels % h == 0]
                raise InputError(
                    f"level {level} has {channels} channels and attention, not divisible by num_heads "
                    f"{self.num_heads}: set num_heads to {divisors[-1]}"
                )

    @classmethod
    def for_images(cls, images: Images, **fields: Any) -> "UNetConfig":
        """A network for the images of a data set, as `python -m ddpm_fast.train` makes it if it is told nothing else.

        Args:
            images: What load_dataset gives. If it has classes, the network is conditioned on them.
            fields: Those of UNetConfig that are to be otherwise, such as model_channels=32.

        Raises:
            InputError: If the images are no squares, or the fields do not make a network for them.
        """
        chosen: dict[str, Any] = {
            "image_size": images.square_side(),
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

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The height (and width) of each level."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))

    @property
    def level_channels(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

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
            InputError: For unknown, missing and invalid fields. A checkpoint must have all of them, because a default
                may change later.
        """
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


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as the field's type: lists become tuples, and ints floats. Anything else must have the type."""
    if kind is int:
        return check_integer(name, value, *_RANGES[name])
    if kind == tuple[int, ...]:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name} is {_shown(value)}; expected a list of integers")
        if len(value) > _MOST_LEVELS:
            raise InputError(f"{name} has {len(value)} entries; expected at most {_MOST_LEVELS}, one for each level")
        return tuple(check_integer(name, v, *_RANGES[name]) for v in value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{name} is {_shown(value)}; expected {kind.__name__}")
    return value


def _shown(value: object) -> str:
    """The value for a message, shortened if it is long."""
    return reprlib.repr(value)
