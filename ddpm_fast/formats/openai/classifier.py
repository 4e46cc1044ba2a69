"""guided-diffusion's classifiers of noised images (Dhariwal & Nichol 2021, section 4) as ours.

A file is a state dict alone. Its shapes tell nearly all: their code has one list of levels for each size of images, so
the channels of the stages say which it is. The flags of their scripts are compared with that. Of what shapes do not
tell, the heads of the attention are 64 channels wide in all of their classifiers, with the older order of queries, keys
and values, and timesteps are as they are unless --rescale_timesteps says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files.fit import check_finite
from ddpm_fast.files.memory import memory_for
from ddpm_fast.formats.flags import parse_flags
from ddpm_fast.formats.openai.config import CHANNEL_MULT
from ddpm_fast.formats.openai.flags import DIFFUSION_FLAGS, GUIDED, KNOWN
from ddpm_fast.formats.openai.names import from_theirs
from ddpm_fast.formats.openai.weights import check_fits, checked_state, shape_of, unfilled
from ddpm_fast.nn.classifier import Classifier, ClassifierConfig
from ddpm_fast.nn.unet_config import UNetConfig

_HEAD_CHANNELS = 64
_SIZES = (64, 128, 256, 512)
_NAMES = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.2.out_layers.3.weight")
# The layers after the middle: their names, and ours. What tells the pools apart is the first of each.
_POOLS = {
    "attention": {
        "2.positional_embedding": "pool.position",
        "0.weight": "norm_out.weight",
        "0.bias": "norm_out.bias",
        "2.qkv_proj.weight": "pool.qkv.weight",
        "2.qkv_proj.bias": "pool.qkv.bias",
        "2.c_proj.weight": "head.weight",
        "2.c_proj.bias": "head.bias",
    },
    "spatial": {
        "2.weight": "head.weight",
        "2.bias": "head.bias",
        "0.weight": "hidden.weight",
        "0.bias": "hidden.bias",
    },
    "spatial_v2": {
        "1.weight": "hidden_norm.weight",
        "1.bias": "hidden_norm.bias",
        "0.weight": "hidden.weight",
        "0.bias": "hidden.bias",
        "3.weight": "head.weight",
        "3.bias": "head.bias",
    },
    "adaptive": {
        "3.weight": "head.weight",
        "3.bias": "head.bias",
        "0.weight": "norm_out.weight",
        "0.bias": "norm_out.bias",
    },
}


def claims(content: object) -> bool:
    """Whether what a file holds is a classifier of guided-diffusion. It never raises."""
    return (
        isinstance(content, dict)
        and all(name in content for name in _NAMES)
        and not any(isinstance(name, str) and name.startswith("output_blocks.") for name in content)
    )


def read(content: object, path: Path, flags: str | None) -> Classifier:
    """The classifier of a file, in eval mode, with float32 weights on the CPU.

    Args:
        content: What the file holds: their parameters under their names.
        path: The file, for messages.
        flags: The flags of their scripts, such as "--image_size 128 --classifier_width 128". All may be left out; one
            that contradicts the shapes is refused.

    Raises:
        InputError: If the weights are not those of such a classifier, or a flag is unknown or contradicts them.
    """
    try:
        state = checked_state(content)
        config = _config(state, parse_flags(flags, KNOWN, GUIDED))
        wanted = unfilled(lambda: Classifier(config))
        check_fits(_renamed(state, config, legacy=False), wanted, "such a classifier, under our names")
        weights = _renamed(state, config, legacy=True)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    check_finite(path, weights)
    with memory_for(path, 4 * sum(value.numel() for value in weights.values())):
        classifier = Classifier(config)
        classifier.load_state_dict(weights)
    return classifier.eval()


def _config(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> ClassifierConfig:
    """The config that the shapes and the flags say. Raises InputError where they contradict each other."""
    width, stem = shape_of(state, "time_embed.0.weight", 2)[1], shape_of(state, "input_blocks.0.0.weight", 4)
    size, depth = _size(state, width, stem[0])
    multiples, stages = CHANNEL_MULT[size], depth + 1
    attends = [f"input_blocks.{1 + level * stages}.1.qkv.weight" in state for level in range(len(multiples))]
    heights = tuple(size >> level for level, here in enumerate(attends) if here)
    rows = shape_of(state, "middle_block.0.emb_layers.1.weight", 2)[0]
    scale_shift = rows == 2 * shape_of(state, "middle_block.0.out_layers.0.weight", 1)[0]
    updown = f"input_blocks.{stages}.0.op.weight" not in state
    pool = next((pool for pool, names in _POOLS.items() if f"out.{next(iter(names))}" in state), None)
    if pool is None:
        raise InputError("its layers called out are those of no pool of guided-diffusion's classifiers")
    head = next(theirs for theirs, ours in _POOLS[pool].items() if ours == "head.bias")
    said = {
        "image_size": size,
        "classifier_width": width,
        "classifier_depth": depth,
        "classifier_use_scale_shift_norm": scale_shift,
        "classifier_resblock_updown": updown,
        "classifier_pool": pool,
    }
    for flag, value in said.items():
        if given.get(flag, value) != value:
            raise InputError(f"--{flag} {given[flag]} contradicts the weights, which are those of --{flag} {value}")
    _check_attention(given.get("classifier_attention_resolutions"), size, heights)
    steps = given.get("diffusion_steps", DIFFUSION_FLAGS["diffusion_steps"])
    if steps < 1:
        raise InputError(f"--diffusion_steps is {steps}; expected the number of timesteps, such as 1000")
    return ClassifierConfig(
        unet=UNetConfig(
            image_size=size,
            in_channels=stem[1],
            model_channels=width,
            channel_mult=multiples,
            num_res_blocks=depth,
            attention_resolutions=heights,
            head_channels=_HEAD_CHANNELS,
            scale_shift=scale_shift,
            resample="resblock" if updown else "conv",
            stem_channels=0 if stem[0] == width else stem[0],
            timestep_scale=1000 / steps if given.get("rescale_timesteps", False) else 1.0,
        ),
        num_classes=shape_of(state, f"out.{head}", 1)[0],
        pool=pool,
    )


def _size(state: Mapping[str, Tensor], width: int, stem: int) -> tuple[int, int]:
    """The size of the images, and how many residual blocks a level has: those whose levels have the stages' channels.

    Raises:
        InputError: If there are none.
    """
    found = [stem]
    while (name := f"input_blocks.{len(found)}.0.") + "op.weight" in state or name + "out_layers.0.weight" in state:
        # A convolution that resamples keeps the channels.
        resamples = name + "op.weight" in state
        found.append(found[-1] if resamples else shape_of(state, name + "out_layers.0.weight", 1)[0])
    for size in _SIZES:
        channels = [int(multiple * width) for multiple in CHANNEL_MULT[size]]
        depth, rest = divmod(len(found) - 1 - (len(channels) - 1), len(channels))
        expected = [channel for channel in channels for _ in range(depth + 1)][:-1]
        if depth > 0 and not rest and found == [channels[0], *expected]:
            return size, depth
    sizes = "; ".join(f"{size}: {', '.join(f'{m:g}' for m in CHANNEL_MULT[size])}" for size in _SIZES)
    raise InputError(
        f"its stages have {found[:40]} channels, which are those of none of guided-diffusion's classifiers (images of "
        f"{', '.join(map(str, _SIZES))} pixels, with levels of these multiples of {width}: {sizes})"
    )


def _check_attention(text: str | None, size: int, heights: tuple[int, ...]) -> None:
    if text is None:
        return
    try:
        asked = {size // int(word) for word in text.split(",") if word}
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"--classifier_attention_resolutions is {text!r:.200}; expected heights such as 32,16,8"
        ) from None
    if {size // height for height in heights} != asked:
        raise InputError(
            f"--classifier_attention_resolutions {text} contradicts the weights, which have attention at "
            f"{', '.join(map(str, heights)) or 'no level'}"
        )


def _renamed(state: Mapping[str, Tensor], config: ClassifierConfig, legacy: bool) -> dict[str, Tensor]:
    """Their weights under our names and in our layouts. Raises InputError for a name that they do not have.

    Args:
        state: Their weights.
        config: The classifier's.
        legacy: Whether to reorder queries, keys and values, which takes weights that fit.
    """
    out = {f"out.{theirs}": ours for theirs, ours in _POOLS[config.pool].items()}
    rest = {name: value for name, value in state.items() if name not in out}
    renamed = from_theirs(rest, config.unet.heads, legacy)
    for theirs, ours in out.items():
        if theirs in state:
            value = state[theirs]
            is_convolution = ours in ("pool.qkv.weight", "head.weight") and value.ndim > 2
            # Of one pixel: a matrix.
            renamed[ours] = value.flatten(1) if is_convolution else value
    if "pool.position" in renamed and renamed["pool.position"].ndim == 2:
        renamed["pool.position"] = renamed["pool.position"].t()
    return renamed
