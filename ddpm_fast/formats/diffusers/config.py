"""The config.json of diffusers' UNet2DModel as a UNetConfig, and back.

Every field of a UNet2DModel is in DEFAULTS. A field is either translated, or must have the one value that our network
has; whatever else a file says is refused by the field's name, so that nothing is left out in silence. diffusers itself
is not needed.
"""

import json
from collections.abc import Container, Mapping
from typing import Any

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.nn.config_fields import shown
from ddpm_fast.nn.unet_config import UNetConfig

# What UNet2DModel takes for a field that its config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # used by learned time embeddings alone
}
# The values that a field may have, where our network has a choice of few or none.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True, False),
    "class_embed_type": (None,),
}
# What diffusers' EMAModel writes beside the fields of the network that it averages.
_OF_AVERAGES = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)
# The blocks of a level: plain, resampling in a residual block, and with attention, where a field of its own says how.
_DOWN = ("DownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D")
_UP = ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D")
_MOST_CHANNELS = 2**14
_MIDDLE_NORM = "mid_block.attentions.0.group_norm.weight"


def unet_config(
    given: Mapping[str, Any], *, learned: bool, null_class: bool = False, names: Container[str] = ()
) -> UNetConfig:
    """The U-Net that a UNet2DModel's config describes.

    Args:
        given: The fields of its config.json.
        learned: Whether the second half of its output channels sets the variance, which only a scheduler knows.
        null_class: Whether its last class stands for "no class".
        names: The names of the weights, if they are at hand: with scale_shift, older versions of diffusers had a norm
            in the attention of the middle that later ones leave out for the same config.

    Raises:
        InputError: For a field that our network has no counterpart of, and for values that make no network.
    """
    _check_known(given)
    fields = {**DEFAULTS, **given}
    for name, allowed in _ALLOWED.items():
        if not any(
            fields[name] == value and isinstance(fields[name], bool) == isinstance(value, bool) for value in allowed
        ):
            raise _refused(name, fields[name], f"this network has {name} = {' or '.join(map(json.dumps, allowed))}")
    channels = _integers(fields, "block_out_channels")
    down, up = _blocks(fields, "down_block_types", _DOWN), _blocks(fields, "up_block_types", _UP)
    if not channels or not len(channels) == len(down) == len(up):
        raise InputError(
            f"block_out_channels, down_block_types and up_block_types have {len(channels)}, {len(down)} and {len(up)} "
            "entries; expected one of each for every level"
        )
    size, first = _size(fields["sample_size"]), channels[0]
    heights = [(size if isinstance(size, int) else size[0]) >> level for level in range(len(channels))]
    on_the_way_down = tuple(h for h, kind in zip(heights, down, strict=True) if kind == "AttnDownBlock2D")
    on_the_way_up = tuple(h for h, kind in zip(heights, reversed(up), strict=True) if kind == "AttnUpBlock2D")
    if fields["time_embedding_dim"] not in (None, 4 * first):
        raise _refused("time_embedding_dim", fields["time_embedding_dim"], f"expected null or {4 * first}")
    classes = fields["num_class_embeds"]
    rows = 0 if classes is None else check_integer("num_class_embeds", classes, 1 + null_class, 2**24)
    resample = _resample(fields, down, up)
    padding = "asymmetric" if fields["downsample_padding"] == 0 and resample == "conv" else "symmetric"
    return UNetConfig(
        image_size=size,
        model_channels=first,
        channel_mult=tuple(c // first if c % first == 0 else c / first for c in channels),
        num_res_blocks=check_integer("layers_per_block", fields["layers_per_block"], 1, 2**10),
        attention_resolutions=on_the_way_down,
        decoder_attention=None if on_the_way_up == on_the_way_down else on_the_way_up,
        middle_attention=_middle(fields, names),
        dropout=fields["dropout"],
        num_classes=rows - null_class if rows else 0,
        null_class=null_class or not rows,
        scale_shift=fields["resnet_time_scale_shift"] == "scale_shift",
        learned_variance=learned,
        resample=resample,
        downsample_padding=padding,
        time_denominator="half-1" if fields["freq_shift"] == 1 else "half",
        time_order="cos|sin" if fields["flip_sin_to_cos"] else "sin|cos",
        norm_groups=check_integer("norm_num_groups", fields["norm_num_groups"], 1, _MOST_CHANNELS),
        norm_eps=fields["norm_eps"],
        **_heads(fields, channels, on_the_way_down + on_the_way_up, heights),
        **_image_channels(fields, learned),
    )


def unet_fields(config: UNetConfig) -> dict[str, Any]:
    """All fields of the UNet2DModel that is UNet(config), as its config.json has them.

    Raises:
        InputError: UNet2DModel cannot be this network; the message names the field of ours that it lacks.
    """
    down_heights = config.attention_resolutions
    up_heights = down_heights if config.decoder_attention is None else config.decoder_attention
    attended = {
        channels
        for height, channels in zip(config.resolutions, config.level_channels, strict=True)
        if height in (*down_heights, *up_heights)
    }
    if config.middle_attention != "none":
        attended.add(config.level_channels[-1])
    _check_holds(config)
    resnet = config.resample == "resblock"
    fields = {
        "sample_size": config.height if config.height == config.width else [config.height, config.width],
        "in_channels": config.in_channels + config.condition_channels,
        "out_channels": config.out_channels,
        "freq_shift": 1 if config.time_denominator == "half-1" else 0,
        "flip_sin_to_cos": config.time_order == "cos|sin",
        "down_block_types": [_DOWN[2 if height in down_heights else resnet] for height in config.resolutions],
        "up_block_types": [_UP[2 if height in up_heights else resnet] for height in reversed(config.resolutions)],
        "block_out_channels": list(config.level_channels),
        "layers_per_block": config.num_res_blocks,
        "downsample_padding": 0 if config.downsample_padding == "asymmetric" else 1,
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "dropout": config.dropout,
        "attention_head_dim": _head_width(config, attended),
        "norm_num_groups": config.norm_groups,
        # Without it, scale_shift takes the norm out of the middle's attention.
        "attn_norm_num_groups": config.norm_groups if config.middle_attention == "normed" else None,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "add_attention": config.middle_attention != "none",
        "num_class_embeds": config.label_rows or None,
    }
    return {**DEFAULTS, **fields}


def _check_holds(config: UNetConfig) -> None:
    """Raise InputError for a field of ours that UNet2DModel has no counterpart of."""
    first = config.level_channels[0]
    lacks = {
        "timestep_scale": (config.timestep_scale != 1, "embeds the timestep as it is"),
        "stem_channels": (config.stem_channels not in (0, first), f"has a stem of its first level's {first} channels"),
        "channel_mult": (config.model_channels != first, f"derives its time embedding from its first level's {first}"),
        "middle_attention": (
            config.middle_attention == "plain" and not config.scale_shift,
            "has a middle attention without a norm only with scale_shift",
        ),
    }
    for name, (differs, has) in lacks.items():
        if differs:
            raise InputError(f"UNet2DModel {has}; this network's {name} is {shown(getattr(config, name))}")


def _head_width(config: UNetConfig, attended: set[int]) -> int | None:
    """The attention_head_dim of a network that attends in levels of these channels."""
    if config.head_channels:
        return config.head_channels
    if config.num_heads == 1:
        return None
    widths = sorted({channels // config.num_heads for channels in attended})
    if len(widths) > 1:
        raise InputError(f"UNet2DModel has heads of one width; this network's are of {widths} channels")
    return widths[0] if widths else None


def _check_known(given: Mapping[str, Any]) -> None:
    """Raise InputError for another class, and for fields that UNet2DModel has not, unless they say nothing."""
    kind = given.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise _refused("_class_name", kind, "only UNet2DModel can be read: a network of images and timesteps")
    for name, value in given.items():
        known = name in DEFAULTS or name in _OF_AVERAGES or name.startswith("_")
        if not known and not (value is None or value is False or value == [] or value == {}):
            raise _refused(name, value, "UNet2DModel has no such field")


def _blocks(fields: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> list[str]:
    """The block types of a field, by their present names."""
    value = fields[name]
    if not isinstance(value, (list, tuple)) or not all(isinstance(kind, str) for kind in value):
        raise _refused(name, value, f"expected a list of {', '.join(allowed)}")
    kinds = [kind.removeprefix("UNetRes") for kind in value]
    other = sorted(set(kinds) - set(allowed))
    if other:
        raise _refused(name, other[0], f"expected a list of {', '.join(allowed)}")
    return kinds


def _resample(fields: Mapping[str, Any], down: list[str], up: list[str]) -> str:
    """Whether the levels resample by convolutions or inside residual blocks. The last level of a side does not."""
    kinds = {kind == _DOWN[1] or (kind == _DOWN[2] and fields["downsample_type"] == "resnet") for kind in down[:-1]}
    kinds |= {kind == _UP[1] or (kind == _UP[2] and fields["upsample_type"] == "resnet") for kind in up[:-1]}
    if len(kinds) > 1:
        raise InputError(
            "down_block_types, up_block_types, downsample_type and upsample_type let some levels resample by "
            "convolutions and others inside residual blocks; this network does one or the other"
        )
    return "resblock" if True in kinds else "conv"


def _middle(fields: Mapping[str, Any], names: Container[str]) -> str:
    if not fields["add_attention"]:
        return "none"
    groups = fields["attn_norm_num_groups"]
    if groups is not None and groups != fields["norm_num_groups"]:
        raise _refused("attn_norm_num_groups", groups, f"expected null or norm_num_groups, {fields['norm_num_groups']}")
    normed = groups is not None or fields["resnet_time_scale_shift"] == "default" or _MIDDLE_NORM in names
    return "normed" if normed else "plain"


def _heads(
    fields: Mapping[str, Any], channels: list[int], attending: tuple[int, ...], heights: list[int]
) -> dict[str, int]:
    """The heads: all of one width, or one for each attention."""
    width = fields["attention_head_dim"]
    if width is None:
        return {"num_heads": 1}
    check_integer("attention_head_dim", width, 1, _MOST_CHANNELS)
    attended = [c for c, height in zip(channels, heights, strict=True) if height in attending]
    attended += [channels[-1]] if fields["add_attention"] else []
    wrong = [c for c in attended if c % width]
    if wrong:
        raise _refused("attention_head_dim", width, f"expected a divisor of the {wrong[0]} channels of a level")
    return {"head_channels": width} if attended else {"num_heads": 1}


def _image_channels(fields: Mapping[str, Any], learned: bool) -> dict[str, int]:
    """The channels of the sample, and of the image that is given beside it: those that come in and do not go out."""
    given, made = (check_integer(name, fields[name], 1, _MOST_CHANNELS) for name in ("in_channels", "out_channels"))
    if learned and made % 2:
        raise _refused("out_channels", made, "with a learned variance it is twice the channels of a sample")
    sample = made // 2 if learned else made
    if sample > given:
        hint = (
            "; where the second half of them sets the variance, the scheduler's variance_type is learned_range"
            if made == 2 * given
            else ""
        )
        raise _refused("out_channels", made, f"expected at most in_channels, {given}{hint}")
    return {"in_channels": sample, "condition_channels": given - sample}


def _size(value: Any) -> int | tuple[int, int]:
    """The height and width of a sample."""
    if value is None:
        raise InputError(
            "sample_size is null, so the size of the samples is not known: give it, as in --sample_size 64 or "
            "--sample_size 64x32 (height x width)"
        )
    if isinstance(value, (list, tuple)) and len(value) == 2:
        height, width = (check_integer("sample_size", side, 1, 2**14) for side in value)
        return height if height == width else (height, width)
    return check_integer("sample_size", value, 1, 2**14)


def _integers(fields: Mapping[str, Any], name: str) -> list[int]:
    value = fields[name]
    if not isinstance(value, (list, tuple)):
        raise _refused(name, value, "expected a list of integers")
    return [check_integer(name, entry, 1, _MOST_CHANNELS) for entry in value]


def _refused(name: str, value: Any, why: str) -> InputError:
    return InputError(f"{name} is {shown(value)}, which ddpm_fast cannot read: {why}")
