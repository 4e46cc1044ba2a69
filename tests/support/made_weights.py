"""Weights and inputs that are made up, the same wherever they are made: golden files then hold outputs alone."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def made_state(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A weight for each name, float32: a function of the name, its shape and the seed alone.

    Their spread is such that activations neither vanish nor grow, and scales of norms are around 1.
    """
    return {name: _weight(name, tuple(shape), seed) for name, shape in shapes.items()}


def made_input(name: str, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Normal numbers, float32: a function of the name, the shape and the seed alone."""
    return torch.from_numpy(_normal(name, tuple(shape), seed))


def _normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    return generator.standard_normal(shape, dtype=np.float32)


def _weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = _normal(name, shape, seed)
    if len(shape) > 1:
        values *= np.float32(np.prod(shape[1:]) ** -0.5)
    elif name.endswith("weight"):  # of a norm
        values = np.float32(1) + np.float32(0.1) * values
    else:
        values *= np.float32(0.1)
    return torch.from_numpy(values)
