"""What a reader of another code's checkpoint gives: the model in this package's terms, and where it is from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.nn.unet_config import UNetConfig


@dataclass(frozen=True)
class Imported:
    """A network that is a UNet of ours under other names.

    Attributes:
        state: Its weights under our names, on the CPU, in the dtypes of the file. They have not been checked against
            the config yet.
        unet: The UNet's config.
        diffusion: What it was trained with.
        label_names: One name for each class, or None.
        origin: Where it is from, in JSON's types: {"format": "improved-diffusion", "flags": "--image_size 64"}.
    """

    state: dict[str, Tensor]
    unet: UNetConfig
    diffusion: GaussianDiffusion
    label_names: list[str] | None = None
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wrapped:
    """A network that is none of ours: the code that made it runs it.

    Attributes:
        model: With its weights, in eval mode.
        diffusion: What it was trained with.
        origin: As in Imported.
    """

    model: nn.Module
    diffusion: GaussianDiffusion
    origin: dict[str, Any] = field(default_factory=dict)
