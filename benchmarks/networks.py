"""The networks that are measured, the same weights in diffusers' UNet2DModel, and what a network's work amounts to.

The sizes are published ones: the shipped digit model, the CIFAR-10 and 256x256 networks of Ho et al. 2020 (appendix B),
and the CelebA 64x64 network of Song et al. 2020 ("Denoising Diffusion Implicit Models", appendix D.1).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ddpm_fast as df
from ddpm_fast import peers
from ddpm_fast.errors import InputError

_HO = {"downsample_padding": "asymmetric", "norm_eps": 1e-6, "time_denominator": "half-1", "time_order": "sin|cos"}
CIFAR10 = df.UNetConfig(**_HO)
CELEBA64 = df.UNetConfig(image_size=64, channel_mult=(1, 2, 2, 2, 4), **_HO)
HO256 = df.UNetConfig(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), **_HO)
QUICK = df.UNetConfig(
    image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), **_HO
)
DIGITS = "digits"
SIZES = {"cifar10": CIFAR10, "64x64": CELEBA64, "256x256": HO256, "quick": QUICK}
# denoising-diffusion-pytorch's own Unet at each size: that of its README, which at CIFAR-10's size has the 35.7 million
# parameters of Ho et al.'s network, and smaller ones beside smaller ones.
LUCIDRAINS = {DIGITS: {"dim": 32, "dim_mults": (1, 2, 4)}, "quick": {"dim": 32, "dim_mults": (1, 2)}}
LUCIDRAINS_README = {"dim": 64, "dim_mults": (1, 2, 4, 8), "flash_attn": True}


class Network(NamedTuple):
    """A network of ours and the diffusion that it is of."""

    model: df.UNet
    diffusion: df.GaussianDiffusion


def network(size: str) -> Network:
    """The network of a size: the shipped weights of the digits', random ones of the others'."""
    if size == DIGITS:
        loaded = df.load_model("mnist")
        return Network(loaded.model, loaded.diffusion)
    if size not in SIZES:
        raise InputError(f"size {size!r} is unknown; there are {', '.join((DIGITS, *SIZES))}")
    torch.manual_seed(0)
    diffusion = df.GaussianDiffusion(df.Schedule.linear(1000), variance="fixed_small")
    return Network(without_zeros(df.UNet(SIZES[size])).eval(), diffusion)


@torch.no_grad()
def without_zeros(model: nn.Module) -> nn.Module:
    """The model with random values where its layers start at zero: they would make the network's output 0."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- diffusers' network


def peer_network(config: df.UNetConfig) -> nn.Module:
    """diffusers' network of the same architecture as UNet(config), dropout aside.

    Raises InputError for what UNet2DModel cannot be: levels with attention whose heads are of different widths, and
    resampling inside residual blocks, where its blocks are others.
    """
    from diffusers import UNet2DModel
    from diffusers.utils import logging

    if config.resample != "conv":
        raise InputError(f"UNet2DModel resamples by convolutions; this network's resample is {config.resample!r}")

    logging.set_verbosity_error()  # it warns of a list of modules even where that is empty
    attends = [height in config.attention_resolutions for height in config.resolutions]
    with_attention = [*(c for c, here in zip(config.level_channels, attends, strict=True) if here)]
    widths = {channels // config.num_heads for channels in (*with_attention, config.level_channels[-1])}
    if len(widths) > 1 and config.num_heads > 1:
        raise InputError(f"UNet2DModel has heads of one width; this network's are of {sorted(widths)} channels")
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=config.num_res_blocks,
        block_out_channels=config.level_channels,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        downsample_padding=0 if config.downsample_padding == "asymmetric" else 1,
        flip_sin_to_cos=config.time_order == "cos|sin",
        freq_shift=1 if config.time_denominator == "half-1" else 0,
        norm_num_groups=config.norm_groups,
        attn_norm_num_groups=config.norm_groups,  # without it, scale_shift takes the norm out of the middle's attention
        norm_eps=config.norm_eps,
        attention_head_dim=None if config.num_heads == 1 else widths.pop(),
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        num_class_embeds=config.num_classes + 1 if config.num_classes else None,
    )


def same_weights(model: df.UNet) -> nn.Module:
    """diffusers' network with the weights of ours, on its device and in its dtype, in eval mode."""
    peer = peer_network(model.config)
    peer.load_state_dict(to_diffusers(model.state_dict(), peer.state_dict(), model.config))
    weight = model.conv_in.weight
    return peer.to(weight.device, weight.dtype).eval()


def translated(name: str, prefixes: dict[str, str], suffixes: dict[str, str]) -> str:
    """A parameter's name with its prefix (a stage's layer) and suffix (a parameter in it) translated; both must be
    known."""
    prefix = next(p for p in sorted(prefixes, key=len, reverse=True) if name.startswith(p + "."))
    module, kind = name[len(prefix) + 1 :].rpartition(".")[::2]
    return ".".join(filter(None, (prefixes[prefix], suffixes[module], kind)))


def diffusers_names(names: Iterable[str], config: df.UNetConfig) -> dict[str, str]:
    """The names of UNet2DModel's parameters under ours; those of to_q, to_k and to_v have the name of our qkv."""
    names = sorted(names, key=lambda name: "qkv".find(name.rpartition(".to_")[2][:1]))  # as qkv joins them
    levels, blocks = len(config.channel_mult), config.num_res_blocks
    prefixes = {name: name for name in ("conv_in", "conv_out", "time_embedding")}
    prefixes |= {"conv_norm_out": "norm_out", "class_embedding": "label_embedding"}
    prefixes |= {f"mid_block.resnets.{j}": f"middle.{2 * j}" for j in (0, 1)}
    prefixes |= {"mid_block.attentions.0": "middle.1"}
    for level in range(levels):
        first = level * (blocks + 1)
        for j in range(blocks):
            prefixes[f"down_blocks.{level}.resnets.{j}"] = f"encoder.{first + j}.0"
            prefixes[f"down_blocks.{level}.attentions.{j}"] = f"encoder.{first + j}.1"
        prefixes[f"down_blocks.{level}.downsamplers.0"] = f"encoder.{first + blocks}.0"
        for j in range(blocks + 1):
            prefixes[f"up_blocks.{level}.resnets.{j}"] = f"decoder.{first + j}.0"
            prefixes[f"up_blocks.{level}.attentions.{j}"] = f"decoder.{first + j}.1"
        attends = f"up_blocks.{level}.attentions.0.to_q.weight" in names
        prefixes[f"up_blocks.{level}.upsamplers.0"] = f"decoder.{first + blocks}.{2 if attends else 1}"
    suffixes = {name: name for name in ("", "norm1", "conv1", "norm2", "conv2", "conv")}
    suffixes |= {"conv_shortcut": "skip", "time_emb_proj": "emb", "group_norm": "norm", "to_out.0": "proj"}
    suffixes |= {"linear_1": "linear1", "linear_2": "linear2", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv"}
    return {name: translated(name, prefixes, suffixes) for name in names}


def from_diffusers(state: dict[str, Tensor], config: df.UNetConfig) -> dict[str, Tensor]:
    """The state dict of a diffusers UNet2DModel under our names."""
    parts: dict[str, list[Tensor]] = {}
    for theirs, ours in diffusers_names(state, config).items():
        parts.setdefault(ours, []).append(state[theirs])
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in parts.items()}


def to_diffusers(state: dict[str, Tensor], names: Iterable[str], config: df.UNetConfig) -> dict[str, Tensor]:
    """The state dict of a UNet(config) under UNet2DModel's names, which are given. Raises InputError for a parameter
    that only one of them has."""
    theirs: dict[str, list[str]] = {}
    for name, ours in diffusers_names(names, config).items():
        theirs.setdefault(ours, []).append(name)
    if theirs.keys() != state.keys():
        raise InputError(f"the two networks differ in {', '.join(sorted(theirs.keys() ^ state.keys()))}")
    return {
        name: part
        for ours, group in theirs.items()
        for name, part in zip(group, state[ours].chunk(len(group)), strict=True)
    }


# --- denoising-diffusion-pytorch's network


def lucidrains_network(size: str, channels: int) -> nn.Module:
    """denoising-diffusion-pytorch's own Unet for a size: it cannot hold our weights."""
    from denoising_diffusion_pytorch import Unet

    return Unet(channels=channels, **LUCIDRAINS.get(size, LUCIDRAINS_README))


def lucidrains_note(size: str, config: df.UNetConfig) -> str:
    """What is to be said of a row with denoising-diffusion-pytorch's network beside ours."""
    with torch.device("meta"):
        model = lucidrains_network(size, config.in_channels)
    options = ", ".join(f"{name}={value}" for name, value in LUCIDRAINS.get(size, LUCIDRAINS_README).items())
    return (
        f"{peers.LUCIDRAINS}: another network, its own Unet({options}) with {1e-6 * parameters(model):.1f} million "
        f"parameters beside {1e-6 * work(config).parameters:.1f}"
    )


# --- what there is to do


class Work(NamedTuple):
    """What one pass of a network does at least, counted from its shapes, for one image. flops: of matrix products and
    convolutions, forward; training_flops: forward and backward. activations: elements that layers read and write when
    each reads its input and writes its output once. parameters: elements read once a pass, whatever the batch."""

    flops: int
    training_flops: int
    activations: int
    parameters: int

    def bytes(self, n: int, itemsize: int) -> int:
        """Moved by a forward pass of n images; backward moves twice as much: each layer's input, the gradient of its
        output and its weights are read once for the gradient of the input, and once for that of the weights."""
        return itemsize * (n * self.activations + self.parameters)


@functools.cache
def work(config: df.UNetConfig) -> Work:
    """Counted on the meta device, where nothing is computed and attention is two matrix products."""
    with torch.device("meta"):
        model = df.UNet(config).to("meta").eval()
        x = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        t = torch.zeros(1, dtype=torch.int64)
        moved = []
        for layer in model.modules():
            if not list(layer.children()):
                layer.register_forward_hook(lambda _, inputs, output: moved.append(inputs[0].numel() + output.numel()))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t)
        activations = sum(moved)
        with FlopCounterMode(display=False) as training:
            model(x, t).sum().backward()
    return Work(counter.get_total_flops(), training.get_total_flops(), activations, parameters(model))
