"""The .ckpt files of pesser's pytorch_diffusion, which have the weights that Ho et al. 2020 published, as ours.

A file is a state dict alone, and the files of averaged weights have the same names. The networks that were published
are known by their shapes, and with them the size of their images and the variance. For others the flags say it; their
names are those of the arguments of pesser's Model and Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.files.pickles import state_dict
from ddpm_fast.formats.flags import parse_flags
from ddpm_fast.formats.imported import Imported
from ddpm_fast.formats.known_schedules import schedule_of
from ddpm_fast.formats.renaming import VARIANCES, Levels, Weights, check_flags, config_fields, multiples
from ddpm_fast.nn.unet_config import UNetConfig

CODE = "pesser's pytorch_diffusion"
_CLAIMED = ("temb.dense.0.weight", "conv_in.weight", "down.0.block.0.conv1.weight", "mid.attn_1.proj_out.weight")
_SCHEDULES = ("linear", "quad", "const")


class _Published(NamedTuple):
    """What the shapes of a published network do not tell."""

    resolution: int
    dropout: float
    model_var_type: str


_PUBLISHED = {
    Levels(128, (1, 2, 2, 2), 2, (1,)): _Published(32, 0.1, "fixedlarge"),  # CIFAR-10
    Levels(128, (1, 1, 2, 2, 4, 4), 2, (4,)): _Published(256, 0.0, "fixedsmall"),  # LSUN bedrooms, cats, churches
}
_FLAGS: dict[str, Any] = {
    "resolution": 32,
    "ch": 128,
    "ch_mult": (1, 2, 2, 2),
    "num_res_blocks": 2,
    "attn_resolutions": (16,),
    "in_channels": 3,
    "out_ch": 3,
    "dropout": 0.0,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_diffusion_timesteps": 1000,
    "model_var_type": "fixedsmall",
}


class _Naming:
    """Names with the level's number in them, which counts from the largest image on both sides."""

    ends: Mapping[str, str] = {
        "time_embedding.linear1": "temb.dense.0",
        "time_embedding.linear2": "temb.dense.1",
        "conv_in": "conv_in",
        "norm_out": "norm_out",
        "conv_out": "conv_out",
    }
    middle = ("mid.block_1", "mid.attn_1", "mid.block_2")
    block: Mapping[str, str] = {
        "norm1": "norm1",
        "conv1": "conv1",
        "emb": "temb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "nin_shortcut",
    }
    norm, qkv, proj = "norm", ("q", "k", "v"), "proj_out"

    def __init__(self, levels: Levels) -> None:
        self.blocks = levels.num_res_blocks

    def down(self, level: int, block: int) -> tuple[str, str]:
        if block == self.blocks:
            return f"down.{level}.downsample.conv", ""
        return f"down.{level}.block.{block}", f"down.{level}.attn.{block}"

    def up(self, level: int, block: int) -> tuple[str, str]:
        if block > self.blocks:
            return f"up.{level}.upsample.conv", ""
        return f"up.{level}.block.{block}", f"up.{level}.attn.{block}"


def claims(content: object) -> bool:
    """Whether what a file holds is a network of this code. It never raises."""
    state = state_dict(content)
    return all(name in state for name in _CLAIMED)


def read(content: object, path: Path, flags: str | None) -> Imported:
    """The network of a file, and its diffusion.

    Args:
        content: What the file holds.
        path: The file, for messages.
        flags: None for a published network. Otherwise such as "--resolution 64 --model_var_type fixedlarge". What is
            left out is what the shapes say, or pesser's default: a linear schedule of 1,000 timesteps from 1e-4 to
            0.02, and fixedsmall.

    Raises:
        InputError: For weights of another network, for one that was not published if the flags do not say the
            resolution, and for flags that are unknown or contradict the shapes.
    """
    try:
        return _read(Weights(state_dict(content), CODE), flags)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(weights: Weights, flags: str | None) -> Imported:
    given = parse_flags(flags, _FLAGS, CODE)
    levels = _levels(weights)
    known = _PUBLISHED.get(levels)
    if known is None and "resolution" not in given:
        raise InputError(
            f"its network is none of those that {CODE} published, and its weights do not tell the size of its images: "
            "give it as a flag, such as --flags '--resolution 64'"
        )
    chosen = {**_FLAGS, **(known._asdict() if known else {}), **given}
    resolution = check_integer("--resolution", chosen["resolution"], 1, 2**14)
    config = UNetConfig(
        **config_fields(levels, resolution),
        in_channels=weights.shape("conv_in.weight", 4)[1],
        dropout=chosen["dropout"],
        downsample_padding="asymmetric",
        time_denominator="half-1",
        time_order="sin|cos",
        norm_eps=1e-6,
    )
    found = {"ch": levels.model_channels, "ch_mult": levels.channel_mult, "num_res_blocks": levels.num_res_blocks}
    found |= {"in_channels": config.in_channels, "out_ch": weights.shape("conv_out.weight", 4)[0]}
    if "attn_resolutions" in given:
        given["attn_resolutions"] = tuple(sorted(given["attn_resolutions"], reverse=True))
    check_flags(given, {**found, "attn_resolutions": config.attention_resolutions})
    weights.take_unet(_Naming(levels), levels)
    return Imported(weights.ours, config, _diffusion(chosen), origin={"format": CODE, "flags": flags or ""})


def _levels(weights: Weights) -> Levels:
    """What the shapes say of the levels."""
    channels: list[int] = []
    blocks: list[int] = []
    attention: list[int] = []
    for level in count():
        if f"down.{level}.block.0.conv1.weight" not in weights.theirs:
            break
        channels.append(weights.shape(f"down.{level}.block.0.conv1.weight", 4)[0])
        names = (f"down.{level}.block.{block}.conv1.weight" for block in count())
        blocks.append(next(i for i, name in enumerate(names) if name not in weights.theirs))
        if f"down.{level}.attn.0.proj_out.weight" in weights.theirs:
            attention.append(level)
    if len(set(blocks)) != 1:
        raise InputError(f"its levels have {blocks} residual blocks; expected as many in each, as in {CODE}")
    first = weights.shape("conv_in.weight", 4)[0]
    return Levels(first, multiples(channels, first), blocks[0], tuple(attention))


def _diffusion(chosen: dict[str, Any]) -> GaussianDiffusion:
    if chosen["model_var_type"] not in VARIANCES:
        raise InputError(f"--model_var_type is {chosen['model_var_type']!r:.50}; expected {' or '.join(VARIANCES)}")
    schedule = schedule_of(_betas(chosen))
    return GaussianDiffusion(schedule, variance=VARIANCES[chosen["model_var_type"]])


def _betas(chosen: dict[str, Any]) -> Tensor:
    kind, first, last = chosen["beta_schedule"], chosen["beta_start"], chosen["beta_end"]
    T = check_integer("--num_diffusion_timesteps", chosen["num_diffusion_timesteps"], 1, 1_000_000)
    if kind not in _SCHEDULES:
        raise InputError(f"--beta_schedule is {kind!r:.50}; supported are {', '.join(_SCHEDULES)}")
    if kind == "const":
        first = last
    if kind == "quad" and min(first, last) > 0:
        return torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
    return torch.linspace(first, last, T, dtype=torch.float64)
