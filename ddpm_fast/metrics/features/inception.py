"""The Inception network of 2015 by which the papers' FID, KID and inception score are defined, as a network of ours.

Its weights are those that pytorch-fid and torch-fidelity load, converted from TensorFlow's graph of 2015-12-05, in the
file pt_inception-2015-12-05-6726825d.pth, which the user has. The network differs from torchvision's Inception v3
(Szegedy et al. 2016): averages of 3x3 pixels leave out those beyond the edge, the last block takes a maximum instead of
an average, and there are 1008 classes. Batch norms are folded into the convolutions; activations are channels_last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.errors import InputError
from ddpm_fast.files.digest import sha256_of
from ddpm_fast.metrics.feature_set import Kind
from ddpm_fast.metrics.features.extractor import Extractor
from ddpm_fast.metrics.features.network import NORM, Convolution, check_names, extractor_of, folded
from ddpm_fast.metrics.features.resizing import as_rgb, as_tensorflow

NAME = "inception-2015-12-05"
FILE = "pt_inception-2015-12-05-6726825d.pth"
SIZE = 299
FEATURES = 2048
CLASSES = 1008
_EPS = 1e-3  # of the batch norms


class _Conv(NamedTuple):
    """A convolution without a bias, a batch norm and a ReLU; with stride 1 it keeps the size, if `same`."""

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True


class _Fork(NamedTuple):
    """Branches that begin with the same input, and whose outputs are put side by side."""

    name: str
    branches: tuple[Steps, ...]


Steps = Sequence["_Conv | _Fork | str"]  # a text is a pooling of 3x3 pixels, see _POOLINGS

_POOLINGS = {
    "mean": lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "max": lambda: nn.MaxPool2d(3, stride=1, padding=1),
    "half": lambda: nn.MaxPool2d(3, stride=2),
}


def _fives(name: str, pool: int) -> _Fork:
    """A block of 35x35 pixels."""
    double = (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3)))
    five = (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5)))
    return _Fork(name, ((_Conv("branch1x1", 64),), five, double, ("mean", _Conv("branch_pool", pool))))


def _sevens(name: str, wide: int) -> _Fork:
    """A block of 17x17 pixels, where 7x7 is 1x7 and 7x1."""
    seven = (_Conv("branch7x7_1", wide), _Conv("branch7x7_2", wide, (1, 7)), _Conv("branch7x7_3", 192, (7, 1)))
    double = (
        _Conv("branch7x7dbl_1", wide),
        _Conv("branch7x7dbl_2", wide, (7, 1)),
        _Conv("branch7x7dbl_3", wide, (1, 7)),
        _Conv("branch7x7dbl_4", wide, (7, 1)),
        _Conv("branch7x7dbl_5", 192, (1, 7)),
    )
    return _Fork(name, ((_Conv("branch1x1", 192),), seven, double, ("mean", _Conv("branch_pool", 192))))


def _threes(name: str, pooling: str) -> _Fork:
    """A block of 8x8 pixels, where 1x3 and 3x1 stand side by side."""

    def both(first: str, second: str) -> _Fork:
        return _Fork("", ((_Conv(first, 384, (1, 3)),), (_Conv(second, 384, (3, 1)),)))

    three = (_Conv("branch3x3_1", 384), both("branch3x3_2a", "branch3x3_2b"))
    double = (
        _Conv("branch3x3dbl_1", 448),
        _Conv("branch3x3dbl_2", 384, (3, 3)),
        both("branch3x3dbl_3a", "branch3x3dbl_3b"),
    )
    return _Fork(name, ((_Conv("branch1x1", 320),), three, double, (pooling, _Conv("branch_pool", 192))))


def _halved(name: str, out: int, stride: int = 2, kernel: tuple[int, int] = (3, 3)) -> _Conv:
    """A convolution that uses no pixels beyond the edge."""
    return _Conv(name, out, kernel, stride, same=False)


_LAYERS: Steps = (
    _halved("Conv2d_1a_3x3", 32),
    _halved("Conv2d_2a_3x3", 32, stride=1),
    _Conv("Conv2d_2b_3x3", 64, (3, 3)),
    "half",
    _Conv("Conv2d_3b_1x1", 80),
    _halved("Conv2d_4a_3x3", 192, stride=1),
    "half",
    _fives("Mixed_5b", 32),
    _fives("Mixed_5c", 64),
    _fives("Mixed_5d", 64),
    _Fork(
        "Mixed_6a",
        (
            (_halved("branch3x3", 384),),
            (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _halved("branch3x3dbl_3", 96)),
            ("half",),
        ),
    ),
    _sevens("Mixed_6b", 128),
    _sevens("Mixed_6c", 160),
    _sevens("Mixed_6d", 160),
    _sevens("Mixed_6e", 192),
    _Fork(
        "Mixed_7a",
        (
            (_Conv("branch3x3_1", 192), _halved("branch3x3_2", 320)),
            (
                _Conv("branch7x7x3_1", 192),
                _Conv("branch7x7x3_2", 192, (1, 7)),
                _Conv("branch7x7x3_3", 192, (7, 1)),
                _halved("branch7x7x3_4", 192),
            ),
            ("half",),
        ),
    ),
    _threes("Mixed_7b", "mean"),
    _threes("Mixed_7c", "max"),
)


def shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the weights by the names that they have in the file."""
    found: dict[str, tuple[int, ...]] = {}
    _add_shapes(_LAYERS, 3, "", found)
    return found | {"fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}


def _add_shapes(steps: Steps, channels: int, prefix: str, found: dict[str, tuple[int, ...]]) -> int:
    """Add the shapes of steps that begin with so many channels. Returns with how many they end."""
    for step in steps:
        if isinstance(step, _Conv):
            found[f"{prefix}{step.name}.conv.weight"] = (step.out, channels, *step.kernel)
            for each in NORM:
                found[f"{prefix}{step.name}.bn.{each}"] = (step.out,)
            channels = step.out
        elif isinstance(step, _Fork):
            inner = _inner(prefix, step)
            channels = sum(_add_shapes(branch, channels, inner, found) for branch in step.branches)
    return channels


def _inner(prefix: str, fork: _Fork) -> str:
    return f"{prefix}{fork.name}." if fork.name else prefix


class _ConvReLU(Convolution):
    """A convolution and a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class _Branches(nn.Module):
    """The branches of a fork."""

    def __init__(self, branches: Iterator[nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def _built(steps: Steps, prefix: str, state: Mapping[str, Tensor]) -> nn.Sequential:
    made: list[nn.Module] = []
    for step in steps:
        if isinstance(step, str):
            made.append(_POOLINGS[step]())
        elif isinstance(step, _Fork):
            inner = _inner(prefix, step)
            made.append(_Branches(_built(branch, inner, state) for branch in step.branches))
        else:
            name = prefix + step.name
            norm = {each: state[f"{name}.bn.{each}"] for each in NORM}
            weight, bias = folded(state[f"{name}.conv.weight"], norm, _EPS)
            made.append(_ConvReLU(weight, bias, stride=step.stride, same=step.same))
    return nn.Sequential(*made)


class FIDInceptionV3(nn.Module):
    """The network, for inference."""

    weight: Tensor

    def __init__(self, state: Mapping[str, Tensor]):
        """Take weights of the names and shapes that shapes() says."""
        super().__init__()
        self.layers = _built(_LAYERS, "", state)
        self.register_buffer("weight", state["fc.weight"].float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images.

        Args:
            x: fp32 [n, 3, 299, 299]: (RGB - 128) / 128 with RGB in 0..255.

        Returns:
            fp32 [n, 2048], the mean of the last block over the pixels, and fp32 [n, 1008], the logits without the bias,
            as the inception score is defined by them.
        """
        features = self.layers(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return features, F.linear(features, self.weight)


def load(path: Path, state: Mapping[str, Tensor], device: torch.device, resize: int | None) -> Extractor:
    """The Inception network of 2015 from a file of the user's.

    Args:
        path: Where the weights are from.
        state: The weights.
        device: Where it computes.
        resize: None or 299: the features are defined by that size.

    Raises:
        InputError: The weights are not this network's, or another size is asked for.
    """
    if resize not in (None, SIZE):
        raise InputError(f"resize is {resize!r:.50}; {NAME} takes images of {SIZE} pixels: leave it out")
    check_names(path, state, shapes(), f"the Inception network of 2015 for FID ({FILE})")
    network = FIDInceptionV3(state).to(device).eval()

    def compute(images: Tensor) -> tuple[Tensor, Tensor | None]:
        # The grey level is resized once, not three times.
        return network(as_rgb(as_tensorflow(images, SIZE)).sub(128).div_(128))

    kind = Kind(NAME, f"bilinear as in TensorFlow 1, to {SIZE}x{SIZE}", sha256_of(path))
    return extractor_of(kind, FEATURES, device, compute)
