"""The networks that are measured, and how much work a network is.

The sizes are published ones: the shipped digit model, the CIFAR-10 and 256x256 networks of Ho et al. 2020 (appendix B),
and the CelebA 64x64 network of Song et al. 2020 ("Denoising Diffusion Implicit Models", appendix D.1).
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
