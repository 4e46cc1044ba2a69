"""What a network answers to three made inputs: the check that a converted model carries, and the inputs of others.

The inputs are the package's own noise, the same bits on every machine, so that the numbers that are kept are enough to
tell whether a file still holds the network that it was made from, and whether another machine or version computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.nn.unet import UNet
from ddpm_fast.nn.unet_config import UNetConfig
from ddpm_fast.noise import NoiseKey, normals

N = 3
_LONGEST_SIDE = 64  # what the sides of larger samples are halved to: the network is the same, and 16 times faster
_KEPT = 16  # values of each output
# How far outputs may be apart, relative to their root mean square: fp32 convolutions of different machines and
# libraries differ by 1e-6 to 1e-5 at the end of a U-Net.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Inputs:
    """What a network is called with.

    Attributes:
        x: float32 [3, C, H, W].
        t: int64 [3]: the first, the middle and the last timestep.
        labels: int64 [3], or None for an unconditional network.
        condition: float32 [3, condition_channels, H, W], or None.
    """

    x: Tensor
    t: Tensor
    labels: Tensor | None
    condition: Tensor | None

    @classmethod
    def of(cls, config: UNetConfig, timesteps: int, longest_side: int | None = _LONGEST_SIDE) -> Inputs:
        """Make the inputs of a network.

        Args:
            config: The network's.
            timesteps: T.
            longest_side: What the sides are halved to, as far as the levels allow; None keeps the config's.
        """
        sides = [config.height, config.width]
        halvings = 2 ** (len(config.channel_mult) - 1)
        while longest_side and max(sides) > longest_side and all(side % (2 * halvings) == 0 for side in sides):
            sides = [side // 2 for side in sides]
        classes = config.num_classes
        return cls(
            x=_noise(0, config.in_channels, sides),
            t=torch.tensor([0, timesteps // 2, timesteps - 1]),
            labels=torch.tensor([0, classes // 2, classes - 1]) if classes else None,
            condition=_noise(1, config.condition_channels, sides) if config.condition_channels else None,
        )


def _noise(seed: int, channels: int, sides: list[int]) -> Tensor:
    shape = (channels, *sides)
    return normals(NoiseKey.of(seed, N), math.prod(shape)).view(N, *shape)


def answer(model: UNet, timesteps: int) -> Tensor:
    """The network's outputs for the made inputs, float32 [3, C', H, W]."""
    inputs = Inputs.of(model.config, timesteps)
    with torch.inference_mode():
        return model(inputs.x, inputs.t, inputs.labels, condition=inputs.condition).float()


def recorded(outputs: Tensor) -> dict[str, Any]:
    """What is kept of outputs, in JSON's types: of each its root mean square and values at even distances."""
    flat = outputs.double().flatten(1)
    places = _places(flat.shape[1])
    return {"rms": flat.square().mean(dim=1).sqrt().tolist(), "values": flat[:, places].tolist()}


def difference(record: object, outputs: Tensor) -> float:
    """How far outputs are from those that were recorded: the largest difference, relative to their root mean square.

    Raises:
        InputError: If the record is none.
    """
    own = recorded(outputs)
    rms, values = _numbers(record, "rms", [N]), _numbers(record, "values", [N, len(own["values"][0])])
    own_rms, own_values = (torch.tensor(own[name], dtype=torch.float64) for name in ("rms", "values"))
    apart = torch.maximum((values - own_values).abs().amax(dim=1), (rms - own_rms).abs())
    return float((apart / own_rms.clamp(min=torch.finfo(torch.float32).tiny)).max())  # a new network's outputs are 0


def check(loaded: LoadedModel) -> float | None:
    """How far a model's outputs are from those that its file has recorded, as `difference` says; None without a record.

    Raises:
        InputError: If the network is another library's, or the record is damaged.
    """
    record = loaded.config.get("check")
    return None if record is None else difference(record, answer(loaded.unet, loaded.diffusion.num_timesteps))


def _places(elements: int) -> Tensor:
    return torch.linspace(0, elements - 1, min(_KEPT, elements)).long()


def _numbers(record: object, name: str, shape: list[int]) -> Tensor:
    found = record.get(name) if isinstance(record, Mapping) else None
    try:
        tensor = torch.tensor(found, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        tensor = torch.empty(0)
    if list(tensor.shape) != shape or not tensor.isfinite().all():
        raise InputError(
            f"the check of this file has no {name} of {shape} finite numbers: it was changed; convert the model again"
        )
    return tensor
