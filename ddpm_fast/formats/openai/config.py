"""A U-Net's config from the shapes of improved- or guided-diffusion's parameters and the flags of their scripts.

What both say has to agree. Where the shapes say nothing, a flag that is left out has its code's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpm_fast.errors import InputError
from ddpm_fast.formats.openai.flags import MODEL_FLAGS
from ddpm_fast.formats.openai.shapes import Shapes
from ddpm_fast.nn.unet_config import UNetConfig

# The levels of their networks by the size of the images. improved-diffusion alone has 32, guided-diffusion 128 and 512.
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
UPSAMPLER_MULT: dict[int, tuple[float, ...]] = {
    64: (1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (1, 1, 2, 2, 4, 4),
}


def make_config(shapes: Shapes, given: Mapping[str, Any], timestep_scale: float) -> UNetConfig:
    """The config of a file's network.

    Args:
        shapes: What the shapes say.
        given: The flags that were given.
        timestep_scale: What their diffusion multiplies timesteps by.

    Raises:
        InputError: If a flag contradicts the shapes, the size of the images cannot be told, or the flags and shapes
            are those of no such network.
    """
    channels, is_upsampler, learned = _channels(shapes, given)
    _check_flags(shapes, given)
    size = _image_size(shapes, given, is_upsampler)
    _check_attention(shapes, given, size)
    width = given.get("num_head_channels", -1)
    heads = given.get("num_heads", MODEL_FLAGS["num_heads"])
    _check_heads(shapes, given, heads, width)
    return UNetConfig(
        image_size=size,
        in_channels=channels,
        model_channels=shapes.model_channels,
        channel_mult=shapes.channel_mult,
        num_res_blocks=shapes.num_res_blocks,
        attention_resolutions=tuple(size >> level for level, here in enumerate(shapes.attends) if here),
        num_heads=1 if width != -1 else heads,
        head_channels=width if width != -1 else 0,
        dropout=given.get("dropout", 0.0),
        num_classes=shapes.num_classes,
        null_class=not shapes.num_classes,
        scale_shift=shapes.scale_shift,
        learned_variance=learned,
        resample="resblock" if shapes.resblock_updown else "conv",
        stem_channels=0 if shapes.stem_channels == shapes.model_channels else shapes.stem_channels,
        timestep_scale=timestep_scale,
        condition_channels=channels if is_upsampler else 0,
    )


def learns_variance(shapes: Shapes, given: Mapping[str, Any]) -> bool:
    """Whether the network learns the variance.

    Raises:
        InputError: Where the channels that it reads and writes contradict the flags, or do not tell.
    """
    return _channels(shapes, given)[2]


def _channels(shapes: Shapes, given: Mapping[str, Any]) -> tuple[int, bool, bool]:
    """The channels of a sample, whether the network is an upsampler, and whether it learns the variance."""
    reads, writes = shapes.channels_in, shapes.channels_out
    whole = f"input_blocks.0.0.weight reads {reads} channels, and out.2.weight writes {writes}"
    cases = [
        (reads // (1 + up), up, learned)
        for up in (False, True)
        for learned in (False, True)
        if reads * (1 + learned) == writes * (1 + up) and reads % (1 + up) == 0
    ]
    if not cases:
        raise InputError(
            f"{whole}; expected as many, or twice as many written where the variance is learned, or twice as many read "
            "by an upsampler"
        )
    for flag in ("in_channels", "large_size", "small_size", "learn_sigma"):
        if flag in given:
            cases = [case for case in cases if _agrees(flag, given[flag], case)]
            if not cases:
                raise _contradiction(flag, given[flag], whole)
    if len(cases) > 1:
        cases = [case for case in cases if case[0] == MODEL_FLAGS["in_channels"]]
    if not cases:
        raise InputError(f"{whole}, which does not say how many channels an image has: add --in_channels to the flags")
    if cases[0][1] and "image_size" in given:
        raise InputError(
            f"{whole}: it is an upsampler, which has no flag --image_size: give --large_size {given['image_size']}, "
            "and --small_size for the size that it enlarges"
        )
    return cases[0]


def _agrees(flag: str, value: object, case: tuple[int, bool, bool]) -> bool:
    """Whether a flag allows these channels of a sample, with or without upsampling and learning the variance."""
    channels, is_upsampler, learned = case
    if flag == "in_channels":
        return channels == value
    return learned == value if flag == "learn_sigma" else is_upsampler


def _check_flags(shapes: Shapes, given: Mapping[str, Any]) -> None:
    """Raise InputError for a flag whose value is to be seen in one number of the shapes, and another there."""
    multiples = _numbers(given, "channel_mult", float)
    level_channels = tuple(int(multiple * shapes.model_channels) for multiple in multiples)
    blocks = len(shapes.level_channels) * shapes.num_res_blocks
    table = "is a label_emb.weight" if shapes.num_classes else "is no label_emb.weight"
    shift = "twice " if shapes.scale_shift else ""
    resampled = "residual blocks" if shapes.resblock_updown else "convolutions"
    said = {
        "num_channels": (shapes.model_channels, f"time_embed.0.weight has {shapes.model_channels} columns"),
        "num_res_blocks": (
            shapes.num_res_blocks,
            f"{len(shapes.level_channels)} levels have {blocks} blocks on the way down",
        ),
        "class_cond": (shapes.num_classes > 0, f"there {table}"),
        "use_scale_shift_norm": (shapes.scale_shift, f"emb_layers.1.weight has {shift}the rows of out_layers.0.weight"),
    }
    if len(shapes.level_channels) > 1:
        said["resblock_updown"] = shapes.resblock_updown, f"{resampled} resample between the levels"
    for flag, (value, where) in said.items():
        if given.get(flag, value) != value:
            raise _contradiction(flag, given[flag], where)
    if multiples and level_channels != shapes.level_channels:
        raise _contradiction("channel_mult", given["channel_mult"], _levels(shapes))


def _image_size(shapes: Shapes, given: Mapping[str, Any], is_upsampler: bool) -> int:
    """The height and width of the samples."""
    flag, sizes = ("large_size", UPSAMPLER_MULT) if is_upsampler else ("image_size", CHANNEL_MULT)
    fixed = bool(given.get("channel_mult"))
    if flag in given:
        size = given[flag]
        usual = sizes.get(size)
        if usual is not None and usual != shapes.channel_mult and not fixed:
            raise InputError(
                f"--{flag} {size} contradicts the weights: with it their code makes levels of "
                f"{_joined(usual)} times num_channels, but {_levels(shapes)}; give the size of the images, or add "
                f"--channel_mult {_joined(shapes.channel_mult)} if a script has these levels"
            )
        return size
    default = 256 if is_upsampler else 64
    fits = [size for size, usual in sizes.items() if usual == shapes.channel_mult]
    if fixed or default in fits:
        return default
    if len(fits) != 1:
        raise InputError(f"{_levels(shapes)}, which does not say how large the images are: add --{flag} to the flags")
    return fits[0]


def _check_attention(shapes: Shapes, given: Mapping[str, Any], size: int) -> None:
    """Raise InputError if the flag attention_resolutions is for other levels than those that have attention."""
    resolutions = _numbers(given, "attention_resolutions", int)
    if "attention_resolutions" not in given:
        return
    factors = {size // resolution for resolution in resolutions}
    if tuple(2**level in factors for level in range(len(shapes.attends))) != shapes.attends:
        have = [size >> level for level, here in enumerate(shapes.attends) if here]
        raise _contradiction(
            "attention_resolutions",
            given["attention_resolutions"],
            f"of images of {size} pixels, the levels of {_joined(have) or 'no'} pixels have qkv.weight",
        )


def _check_heads(shapes: Shapes, given: Mapping[str, Any], heads: int, width: int) -> None:
    """Raise InputError if the heads do not divide the channels, or differ between the way down and up."""
    flag, divisor = ("num_heads", heads) if width == -1 else ("num_head_channels", width)
    up = given.get("num_heads_upsample", -1)
    if width == -1 and up not in (-1, heads) and any(shapes.attends):
        raise InputError(
            f"--num_heads_upsample {up} is not supported: the way up has as many heads as the way down, {heads}"
        )
    attending = [channels for channels, here in zip(shapes.level_channels, shapes.attends, strict=True) if here]
    for channels in (*attending, shapes.level_channels[-1]):
        if divisor < 1 or channels % divisor:
            raise _contradiction(flag, divisor, f"an attention has {channels} channels, which it does not divide")


def _numbers(given: Mapping[str, Any], flag: str, kind: type[int] | type[float]) -> tuple[float, ...]:
    """The numbers of a flag that is a list with commas, or none."""
    text = given.get(flag, "")
    if not text:
        return ()
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except (ValueError, OverflowError):
        numbers = (0,)
    if not all(0 < number < 2**14 for number in numbers):
        raise InputError(f"--{flag} is {text!r:.200}; expected numbers with commas between them, such as 1,2,4")
    return numbers


def _contradiction(flag: str, value: object, where: str) -> InputError:
    return InputError(
        f"--{flag} {value} contradicts the weights: {where}. Give the flags that this file was trained with, or leave "
        f"--{flag} out"
    )


def _levels(shapes: Shapes) -> str:
    return (
        f"output_blocks have levels of {_joined(shapes.level_channels)} channels, {_joined(shapes.channel_mult)} times "
        f"the {shapes.model_channels} of time_embed.0.weight"
    )


def _joined(numbers: Any) -> str:
    return ",".join(f"{number:g}" for number in numbers)
