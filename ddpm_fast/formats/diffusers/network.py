"""The weights of our UNet as those of diffusers' UNet2DModel, and back; and both of its objects with what ours hold.

Both are the network of Ho et al. 2020 with the same options, under other names; where ours has one matrix for queries,
keys and values, diffusers has three. The names need only the state dicts; a UNet2DModel itself needs diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files.tensorfile import kind
from ddpm_fast.formats.diffusers.config import unet_fields
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel


def peer_network(config: UNetConfig) -> UNet2DModel:
    """Makes diffusers' network of the same architecture as UNet(config), without dropout.

    Args:
        config: The options of our network.

    Returns:
        A UNet2DModel with random weights.

    Raises:
        InputError: UNet2DModel cannot be this network: see unet_fields.
    """
    from diffusers import UNet2DModel  # an optional dependency
    from diffusers.utils import logging

    fields = unet_fields(config)
    fields["dropout"] = 0.0
    logging.set_verbosity_error()  # it warns of a list of modules even where that is empty
    return UNet2DModel(**fields)


def same_weights(model: UNet) -> UNet2DModel:
    """Makes diffusers' network with the weights of ours, on its device and in its dtype, in eval mode.

    Raises:
        InputError: UNet2DModel cannot be this network.
    """
    peer = peer_network(model.config)
    peer.load_state_dict(to_diffusers(model.state_dict(), peer.state_dict(), model.config))
    weight = model.conv_in.weight
    return peer.to(weight.device, weight.dtype).eval()


def from_diffusers(state: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Renames the state dict of a UNet2DModel for UNet(config), and joins its queries, keys and values.

    Raises:
        InputError: The network of the config has no such parameter, or queries, keys and values are of several shapes.
    """
    parts: dict[str, list[Tensor]] = {}
    for theirs, ours in our_names(state, config).items():
        parts.setdefault(ours, []).append(state[theirs])
    return {name: _joined(name, tensors) for name, tensors in parts.items()}


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """One parameter of several, which must be of one shape."""
    if len(parts) == 1:
        return parts[0]
    kinds = sorted({kind(part) for part in parts})
    if len(kinds) > 1 or not parts[0].ndim:  # torch.cat would make one type of several
        raise InputError(f"the parts of {name} are {' and '.join(kinds)}; expected one type and shape")
    return torch.cat(parts)


def to_diffusers(state: dict[str, Tensor], names: Iterable[str], config: UNetConfig) -> dict[str, Tensor]:
    """Renames the state dict of a UNet(config) for a UNet2DModel, and splits its queries, keys and values.

    Args:
        state: The parameters of our network.
        names: The names of the UNet2DModel's parameters.
        config: The options of our network.

    Raises:
        InputError: One network has a parameter that the other lacks.
    """
    theirs: dict[str, list[str]] = {}
    for name, ours in our_names(names, config).items():
        theirs.setdefault(ours, []).append(name)
    if theirs.keys() != state.keys():
        raise InputError(f"the two networks differ in {', '.join(sorted(theirs.keys() ^ state.keys()))}")
    return {
        name: part
        for ours, group in theirs.items()
        for name, part in zip(group, state[ours].chunk(len(group)), strict=True)
    }


def our_names(names: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """Our name of each parameter of a UNet2DModel; to_q, to_k and to_v all have that of our qkv, in this order."""
    names = sorted(names, key=lambda name: "qkv".find(name.rpartition(".to_")[2][:1]))
    prefixes = _prefixes(config)
    return {name: translated(name, prefixes, _SUFFIXES) for name in names}


def their_names(names: Iterable[str], config: UNetConfig) -> list[str]:
    """The names of the parameters of the UNet2DModel that is UNet(config), whose own have these names.

    Raises:
        InputError: If one is no name of a parameter of UNet(config).
    """
    prefixes = {ours: theirs for theirs, ours in _prefixes(config).items()}
    suffixes = {ours: theirs for theirs, ours in _SUFFIXES.items() if ours != "qkv"} | {"qkv": "qkv"}
    found = [translated(name, prefixes, suffixes) for name in names]
    return [name.replace(".qkv.", f".{part}.") for name in found for part in _parts(name)]


def _parts(name: str) -> tuple[str, ...]:
    return ("to_q", "to_k", "to_v") if ".qkv." in name else ("",)


# Our names of what is inside a layer of a UNet2DModel.
_SUFFIXES = {
    "": "",
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv": "conv",
    "conv_shortcut": "skip",
    "time_emb_proj": "emb",
    "group_norm": "norm",
    "to_out.0": "proj",
    "linear_1": "linear1",
    "linear_2": "linear2",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
}


def _prefixes(config: UNetConfig) -> dict[str, str]:
    """Our names of the layers of the UNet2DModel that is UNet(config)."""
    levels, blocks = len(config.channel_mult), config.num_res_blocks
    up_heights = config.attention_resolutions if config.decoder_attention is None else config.decoder_attention
    last = 1 if config.middle_attention == "none" else 2
    prefixes = {name: name for name in ("conv_in", "conv_out", "time_embedding")}
    prefixes |= {"conv_norm_out": "norm_out", "class_embedding": "label_embedding"}
    prefixes |= {"mid_block.resnets.0": "middle.0", "mid_block.resnets.1": f"middle.{last}"}
    if last == 2:
        prefixes["mid_block.attentions.0"] = "middle.1"
    for level, height in enumerate(config.resolutions):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        first = level * (blocks + 1)
        for j in range(blocks):
            prefixes[f"{down}.resnets.{j}"] = f"encoder.{first + j}.0"
            if height in config.attention_resolutions:
                prefixes[f"{down}.attentions.{j}"] = f"encoder.{first + j}.1"
        prefixes[f"{down}.downsamplers.0"] = f"encoder.{first + blocks}.0"
        first = (levels - 1 - level) * (blocks + 1)
        for j in range(blocks + 1):
            prefixes[f"{up}.resnets.{j}"] = f"decoder.{first + j}.0"
            if height in up_heights:
                prefixes[f"{up}.attentions.{j}"] = f"decoder.{first + j}.1"
        prefixes[f"{up}.upsamplers.0"] = f"decoder.{first + blocks}.{2 if height in up_heights else 1}"
    return prefixes


def translated(name: str, prefixes: dict[str, str], suffixes: dict[str, str]) -> str:
    """Translates a parameter's name in two parts.

    Args:
        name: Such as "down_blocks.0.resnets.1.conv1.weight".
        prefixes: Our names of the layers, such as "down_blocks.0.resnets.1"; the longest that fits is taken.
        suffixes: Our names of what is inside a layer, such as "conv1".

    Raises:
        InputError: The network of the prefixes and suffixes has no such parameter.
    """
    parts = name.split(".", 9)  # there are at most seven, and a file may have any name
    begun = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
    prefix = next((begin for begin in begun if begin in prefixes), "")
    module, _, kind = name[len(prefix) + 1 :].rpartition(".")
    if not prefix or module not in suffixes:
        raise InputError(
            f"{name:.200} is no parameter of the UNet2DModel of this config: give the config of these weights"
        )
    return ".".join(filter(None, (prefixes[prefix], suffixes[module], kind)))


def scheduler(diffusion: GaussianDiffusion, timesteps: Sequence[int] | None = None) -> DDPMScheduler:
    """Makes diffusers' scheduler of a diffusion with the variance fixed_small, which clips the predicted x_0.

    Args:
        diffusion: Whose betas and prediction it gets.
        timesteps: Those that a chain visits, the largest first; all of them by default.
    """
    from diffusers import DDPMScheduler  # an optional dependency

    made = DDPMScheduler(
        num_train_timesteps=diffusion.num_timesteps,
        trained_betas=diffusion.schedule.betas.numpy(),
        variance_type="fixed_small",
        clip_sample=True,
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[diffusion.objective.prediction],
        timestep_spacing="linspace",
    )
    if timesteps is None:
        made.set_timesteps(diffusion.num_timesteps)
    else:
        made.set_timesteps(timesteps=list(timesteps))
    return made
