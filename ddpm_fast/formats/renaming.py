"""Weights under another code's names as those of our UNet, for codes whose network is the same layer by layer.

What the codes of w86763777 and pesser share: both follow the network of Ho et al. 2020 closely. Where ours has one
matrix for queries, keys and values, they have three 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files import tensorfile
from ddpm_fast.files.fit import offenders

VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}  # both codes' names of ours


class Levels(NamedTuple):
    """What the shapes of a network say.

    Attributes:
        model_channels: The channels that the first convolution makes.
        channel_mult: Each level's channels as a multiple of these.
        num_res_blocks: The residual blocks of a level on the way down.
        attention: The levels with attention, 0 for the first.
    """

    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[int, ...]


class Naming(Protocol):
    """Another code's names of our layers.

    Attributes:
        ends: Its names of the layers outside the levels, by ours.
        middle: Its names of the middle's two residual blocks, and of the attention between them.
        block: Its names of what is in a residual block, by ours.
        norm, qkv, proj: Its names of what is in an attention.
    """

    ends: Mapping[str, str]
    middle: tuple[str, str, str]
    block: Mapping[str, str]
    norm: str
    qkv: tuple[str, str, str]
    proj: str

    def down(self, level: int, block: int) -> tuple[str, str]:
        """A residual block on the way down, and the attention after it. Block num_res_blocks is what halves."""
        ...

    def up(self, level: int, block: int) -> tuple[str, str]:
        """A residual block on the way up, and the attention after it. Block num_res_blocks + 1 is what doubles."""
        ...


class Weights:
    """Another code's weights, which are taken one by one until none is left."""

    def __init__(self, theirs: Mapping[str, Tensor], code: str) -> None:
        """
        Args:
            theirs: The weights by their names.
            code: Whose network it is, for messages.
        """
        self.theirs, self.code = dict(theirs), code
        self.ours: dict[str, Tensor] = {}

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """The shape of a weight. Raises InputError if it is missing or has not so many dimensions."""
        self._check_has(name)
        shape = tuple(self.theirs[name].shape)
        if len(shape) != ndim:
            raise InputError(f"{name} has shape {list(shape)}; expected {ndim} dimensions, as in {self.code}")
        return shape

    def take(self, ours: str, theirs: str) -> None:
        """Take a layer's weight and bias as they are."""
        for kind in ("weight", "bias"):
            self._check_has(f"{theirs}.{kind}")
            self.ours[f"{ours}.{kind}"] = self.theirs.pop(f"{theirs}.{kind}")

    def take_matrix(self, ours: str, *theirs: str) -> None:
        """Take 1x1 convolutions of the same channels as one matrix, their outputs one after another."""
        for kind in ("weight", "bias"):
            for name in theirs:
                self._check_has(f"{name}.{kind}")
            parts = [self.theirs.pop(f"{name}.{kind}") for name in theirs]
            shape = parts[0].shape[:2]
            for name, part in zip(theirs, parts, strict=True):
                # torch.cat would make one type of several.
                if part.shape[:2] != shape or part.numel() != shape.numel() or part.dtype != parts[0].dtype:
                    raise InputError(
                        f"{name}.{kind} is {tensorfile.kind(part)}; expected a 1x1 convolution of {self.code}, "
                        f"{tensorfile.kind(parts[0])}"
                    )
            joined = [part.reshape(shape) for part in parts]
            self.ours[f"{ours}.{kind}"] = torch.cat(joined) if len(joined) > 1 else joined[0]

    def take_unet(self, naming: Naming, levels: Levels) -> None:
        """Take all layers of a network with these levels.

        Raises:
            InputError: If it lacks a weight, or has others.
        """
        for ours, theirs in naming.ends.items():
            self.take(ours, theirs)
        first, attention, last = naming.middle
        self._take_block("middle.0", first, naming)
        self._take_attention("middle.1", attention, naming)
        self._take_block("middle.2", last, naming)
        count, blocks = len(levels.channel_mult), levels.num_res_blocks
        for level in range(count):
            attends = level in levels.attention
            for block in range(blocks):
                self._take_stage(f"encoder.{level * (blocks + 1) + block}", naming.down(level, block), attends, naming)
            if level < count - 1:
                self.take(f"encoder.{level * (blocks + 1) + blocks}.0.conv", naming.down(level, blocks)[0])
            stage = f"decoder.{(count - 1 - level) * (blocks + 1)}"
            for block in range(blocks + 1):
                stage = f"decoder.{(count - 1 - level) * (blocks + 1) + block}"
                self._take_stage(stage, naming.up(level, block), attends, naming)
            if level:
                self.take(f"{stage}.{2 if attends else 1}.conv", naming.up(level, blocks + 1)[0])
        if self.theirs:
            names = [f"{printable(name):.100} {list(tensor.shape)}" for name, tensor in self.theirs.items()]
            raise InputError(f"it has {offenders('weights that are not in', names)[0]} of {self.code}")

    def _take_stage(self, ours: str, theirs: tuple[str, str], attends: bool, naming: Naming) -> None:
        self._take_block(f"{ours}.0", theirs[0], naming)
        if attends:
            self._take_attention(f"{ours}.1", theirs[1], naming)

    def _take_block(self, ours: str, theirs: str, naming: Naming) -> None:
        for mine, name in naming.block.items():
            if mine != "skip" or f"{theirs}.{name}.weight" in self.theirs:
                self.take(f"{ours}.{mine}", f"{theirs}.{name}")

    def _take_attention(self, ours: str, theirs: str, naming: Naming) -> None:
        self.take(f"{ours}.norm", f"{theirs}.{naming.norm}")
        self.take_matrix(f"{ours}.qkv", *(f"{theirs}.{name}" for name in naming.qkv))
        self.take_matrix(f"{ours}.proj", f"{theirs}.{naming.proj}")

    def _check_has(self, name: str) -> None:
        if name not in self.theirs:
            raise InputError(f"it lacks {name}; expected all weights of {self.code}: give the file that it wrote")


def check_flags(given: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise InputError if a flag contradicts what the shapes say.

    Args:
        given: The flags that were given.
        found: What the shapes say, by the names of the flags; for a flag that is given as a list, a tuple.
    """
    for name, value in found.items():
        if name in given and given[name] != value:
            said, is_so = (" ".join(map(str, v)) if isinstance(v, tuple) else v for v in (given[name], value))
            raise InputError(f"--{name} is {said}, but the weights are those of {is_so}: correct the flag")


def multiples(channels: Sequence[int], first: int) -> tuple[int, ...]:
    """Each level's channels as a multiple of the first convolution's. Raises InputError if they are no multiples."""
    if first < 1 or any(c < first or c % first for c in channels):
        raise InputError(f"its levels have {list(channels)} channels; expected multiples of the {first} of the first")
    return tuple(c // first for c in channels)


def config_fields(levels: Levels, image_size: int) -> dict[str, Any]:
    """The fields of a UNetConfig that the levels say."""
    return {
        "image_size": image_size,
        "model_channels": levels.model_channels,
        "channel_mult": levels.channel_mult,
        "num_res_blocks": levels.num_res_blocks,
        "attention_resolutions": tuple(image_size >> level for level in levels.attention),
    }
