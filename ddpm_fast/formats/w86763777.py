"""ckpt.pt of w86763777's pytorch-ddpm, a PyTorch version of Ho et al. 2020, as ours.

The file has the network (net_model) and its average (ema_model), which is what is read. Its shapes tell the network and
T. The flags are those of its main.py, as its flagfile.txt has them; those that are left out have its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

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

CODE = "w86763777's pytorch-ddpm"
_TABLE = "time_embedding.timembedding.0.weight"  # the sinusoids of all timesteps
_CLAIMED = (_TABLE, "head.weight", "tail.2.weight")
_WHAT_IS_LEARNED = {"epsilon": "eps", "xstart": "x0"}

# Of the network and the diffusion, with the defaults of main.py.
_MODEL_FLAGS: dict[str, Any] = {
    "ch": 128,
    "ch_mult": (1, 2, 2, 2),
    "attn": (1,),
    "num_res_blocks": 2,
    "dropout": 0.1,
    "beta_1": 1e-4,
    "beta_T": 0.02,
    "T": 1000,
    "mean_type": "epsilon",
    "var_type": "fixedlarge",
    "img_size": 32,
}
# The others of flagfile.txt, which say nothing about what the file holds.
_OTHER_FLAGS: dict[str, Any] = {
    **dict.fromkeys(("train", "eval", "parallel", "fid_use_torch"), False),
    **dict.fromkeys(("total_steps", "warmup", "batch_size", "num_workers", "sample_size", "sample_step"), 0),
    **dict.fromkeys(("save_step", "eval_step", "num_images"), 0),
    **dict.fromkeys(("lr", "grad_clip", "ema_decay"), 0.0),
    **dict.fromkeys(("logdir", "fid_cache"), ""),
}


class _Naming:
    """Names in flat lists: the blocks of a level, then what halves or doubles the image."""

    ends: Mapping[str, str] = {
        "time_embedding.linear1": "time_embedding.timembedding.1",
        "time_embedding.linear2": "time_embedding.timembedding.3",
        "conv_in": "head",
        "norm_out": "tail.0",
        "conv_out": "tail.2",
    }
    middle = ("middleblocks.0", "middleblocks.0.attn", "middleblocks.1")
    block: Mapping[str, str] = {
        "norm1": "block1.0",
        "conv1": "block1.2",
        "emb": "temb_proj.1",
        "norm2": "block2.0",
        "conv2": "block2.3",
        "skip": "shortcut",
    }
    norm, qkv, proj = "group_norm", ("proj_q", "proj_k", "proj_v"), "proj"

    def __init__(self, levels: Levels) -> None:
        self.blocks, self.levels = levels.num_res_blocks, len(levels.channel_mult)

    def down(self, level: int, block: int) -> tuple[str, str]:
        place = f"downblocks.{level * (self.blocks + 1) + block}"
        return (f"{place}.main" if block == self.blocks else place), f"{place}.attn"

    def up(self, level: int, block: int) -> tuple[str, str]:
        place = f"upblocks.{(self.levels - 1 - level) * (self.blocks + 2) + block}"
        return (f"{place}.main" if block > self.blocks else place), f"{place}.attn"


def claims(content: object) -> bool:
    """Whether what a file holds is a network of this code. It never raises."""
    state = state_dict(content, "ema_model", "net_model")
    return all(name in state for name in _CLAIMED)


def read(content: object, path: Path, flags: str | None) -> Imported:
    """The network of a file, and the diffusion that its flags make.

    Args:
        content: What the file holds.
        path: The file, for messages.
        flags: The flags of main.py or the text of flagfile.txt, such as "--beta_T 0.01 --var_type fixedsmall". What is
            left out is what the shapes say, or main.py's default.

    Raises:
        InputError: For weights of another network, and flags that are unknown, contradict the shapes, or ask for what
            is not supported.
    """
    try:
        return _read(Weights(state_dict(content, "ema_model", "net_model"), CODE), flags)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(weights: Weights, flags: str | None) -> Imported:
    given = parse_flags(flags, {**_MODEL_FLAGS, **_OTHER_FLAGS}, f"{CODE} (main.py)", switches=True)
    levels = _levels(weights)
    timesteps, _ = weights.shape(_TABLE, 2)
    channels, multiple = levels.model_channels, levels.channel_mult
    found = {"ch": channels, "ch_mult": multiple, "num_res_blocks": levels.num_res_blocks, "T": timesteps}
    if "attn" in given:
        given["attn"] = tuple(sorted(given["attn"]))
    check_flags(given, {**found, "attn": levels.attention})
    chosen = {**_MODEL_FLAGS, **given, "T": timesteps}
    in_channels = weights.shape("head.weight", 4)[1]
    _take_times(weights, timesteps, channels)
    weights.take_unet(_Naming(levels), levels)
    config = UNetConfig(
        **config_fields(levels, check_integer("--img_size", chosen["img_size"], 1, 2**14)),
        in_channels=in_channels,
        dropout=chosen["dropout"],
        time_order="sin|cos",
    )
    _interleaved_to_halves(weights.ours)
    origin = {"format": CODE, "flags": flags or ""}
    return Imported(weights.ours, config, _diffusion(chosen), origin=origin)


def _levels(weights: Weights) -> Levels:
    """What the shapes say of the levels."""
    channels: list[int] = []
    blocks: list[int] = [0]
    attention: set[int] = set()
    for place in (f"downblocks.{i}" for i in count()):
        if f"{place}.main.weight" in weights.theirs:
            blocks.append(0)
        elif f"{place}.block1.2.weight" in weights.theirs:
            if not blocks[-1]:
                channels.append(weights.shape(f"{place}.block1.2.weight", 4)[0])
            blocks[-1] += 1
            if f"{place}.attn.proj.weight" in weights.theirs:
                attention.add(len(blocks) - 1)
        else:
            break
    if 0 in blocks or len(set(blocks)) > 1:
        raise InputError(f"its levels have {blocks} residual blocks; expected as many in each, as in {CODE}")
    first = weights.shape("head.weight", 4)[0]
    return Levels(first, multiples(channels, first), blocks[0], tuple(sorted(attention)))


def _take_times(weights: Weights, timesteps: int, channels: int) -> None:
    """Take the table of sinusoids, which our network computes. Raises InputError if it holds other numbers."""
    check_integer("T", timesteps, 1, 1_000_000)
    table = weights.theirs.pop(_TABLE)
    places = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    last = (timesteps - 1) * 10000.0**-places
    expected = torch.stack([last.sin(), last.cos()], dim=1).flatten()
    # An angle of 1000 has an error of 6e-5 in float32.
    fits = table.is_floating_point() and table.shape[1] == channels
    if not fits or not torch.allclose(table[-1].double(), expected, rtol=0, atol=1e-3):
        raise InputError(f"{_TABLE} does not hold the sinusoids of {timesteps} timesteps; expected those of {CODE}")


def _interleaved_to_halves(state: dict[str, Tensor]) -> None:
    """Reorder the columns that the time embedding is multiplied by: there sines and cosines alternate."""
    weight = state["time_embedding.linear1.weight"]
    if weight.ndim == 2:
        state["time_embedding.linear1.weight"] = torch.cat([weight[:, 0::2], weight[:, 1::2]], dim=1)


def _diffusion(chosen: dict[str, Any]) -> GaussianDiffusion:
    if chosen["mean_type"] not in _WHAT_IS_LEARNED:
        raise InputError(f"--mean_type is {chosen['mean_type']!r:.50}; supported are {', '.join(_WHAT_IS_LEARNED)}")
    if chosen["var_type"] not in VARIANCES:
        raise InputError(f"--var_type is {chosen['var_type']!r:.50}; expected {' or '.join(VARIANCES)}")
    T, first, last = chosen["T"], chosen["beta_1"], chosen["beta_T"]
    schedule = schedule_of(torch.linspace(first, last, T, dtype=torch.float64))
    return GaussianDiffusion(schedule, _WHAT_IS_LEARNED[chosen["mean_type"]], VARIANCES[chosen["var_type"]])
