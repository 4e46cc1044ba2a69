"""The networks that are measured.

The sizes are published ones: the shipped digit model, the CIFAR-10 and 256x256 networks of Ho et al. 2020 (appendix B),
and the CelebA 64x64 network of Song et al. 2020 ("Denoising Diffusion Implicit Models", appendix D.1).
"""

from typing import NamedTuple

import torch
from torch import nn

import ddpm_fast as df
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
