"""Pictures to begin with, from the data sets that ship."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from ddpm_fast.data import load_dataset

DIGITS, EMOJI = "a digit", "an emoji"
PICTURES = {DIGITS: "mnist5k", EMOJI: "emoji32"}
_EVERY = 557  # neighbours of a data set are of one class: 500 digits are


def example(name: str, number: int) -> Tensor:
    """A picture uint8 [C, H, W]. name: one of PICTURES. number: any; another one is another picture."""
    images = _images(PICTURES[name])
    return images[number * _EVERY % len(images)]


def for_channels(channels: int) -> str:
    """The name of the pictures that suit a model of so many channels."""
    return DIGITS if channels == 1 else EMOJI


@cache
def _images(data: str) -> Tensor:
    return load_dataset(data).images
