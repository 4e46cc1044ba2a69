"""How much work a pass of a U-Net is, counted from its shapes: what its time is compared with."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig
from ddpm_fast.ops import use_backend


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Work(NamedTuple):
    """What one pass of a network does at least, for one image.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions, forward.
        training_flops: The same, forward and backward.
        activations: Elements that layers read and write when each reads its input and writes its output once.
        parameters: Elements that are read once a pass, whatever the batch.
    """

    flops: int
    training_flops: int
    activations: int
    parameters: int

    def bytes(self, n: int, itemsize: int) -> int:
        """Bytes that a forward pass of n images moves.

        Backward moves twice as much: each layer's input, the gradient of its output and its weights are read once for
        the gradient of the input, and once for that of the weights.
        """
        return itemsize * (n * self.activations + self.parameters)


@functools.cache
def work(config: UNetConfig) -> Work:
    """Counted on the meta device, where nothing is computed and attention is two matrix products, for plain torch's
    layers."""
    with torch.device("meta"), use_backend("reference"):
        model = UNet(config).to("meta").eval()
        x = torch.empty(1, *config.shape)
        t = torch.zeros(1, dtype=torch.int64)
        given = {"labels": t} if config.num_classes else {}
        if config.condition_channels:
            given["condition"] = torch.empty(1, config.condition_channels, config.height, config.width)
        moved = []
        for layer in model.modules():
            if not list(layer.children()):
                layer.register_forward_hook(lambda _, inputs, output: moved.append(inputs[0].numel() + output.numel()))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, **given)
        activations = sum(moved)
        with FlopCounterMode(display=False) as training:
            model(x, t, **given).sum().backward()
    return Work(counter.get_total_flops(), training.get_total_flops(), activations, parameters(model))
