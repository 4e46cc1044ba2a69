"""The networks that are measured.

The sizes are published ones: the shipped digit model, the CIFAR-10 and 256x256 networks of Ho et al. 2020 (appendix B),
and the CelebA 64x64 network of Song et al. 2020 ("Denoising Diffusion Implicit Models", appendix D.1).
"""

from typing import NamedTuple

import ddpm_fast as df
from ddpm_fast.errors import InputError
from tests.support.networks import random_unet

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


def config(size: str) -> df.UNetConfig:
    """How the network of a size is built. Raises InputError for a size that there is not."""
    if size not in SIZES:
        raise InputError(f"size {size!r} is unknown; there are {', '.join((DIGITS, *SIZES))}")
    return SIZES[size]


def network(size: str) -> Network:
    """The network of a size: the shipped weights of the digits', random ones of the others'."""
    if size == DIGITS:
        loaded = df.load_model("mnist")
        return Network(loaded.model, loaded.diffusion)
    made = random_unet(0.02, **config(size).to_dict())
    diffusion = df.GaussianDiffusion(df.Schedule.linear(1000), variance="fixed_small")
    return Network(made, diffusion)
