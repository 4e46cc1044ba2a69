"""Classifiers of guided-diffusion and chains that they guide: what tests compare with their own code's numbers, and the
script that made these (tests/golden/make_guidance.py) computes them for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.made_weights import made_input, made_state

# Their flags, which make small classifiers: of one block a level, whose last level alone has attention, of two heads.
_SMALL = "--image_size 64 --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 8"
CLASSIFIERS = {
    "attention": f"{_SMALL} --classifier_pool attention",
    "adaptive": f"{_SMALL} --classifier_pool adaptive --classifier_resblock_updown False",
    "spatial": f"{_SMALL} --classifier_pool spatial --classifier_use_scale_shift_norm False",
    "spatial_v2": f"{_SMALL} --classifier_pool spatial_v2",
}
# What their README samples with, and the defaults.
PUBLISHED = {
    64: "--image_size 64 --classifier_depth 4",
    128: "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 "
    "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True "
    "--classifier_scale 1.0 --classifier_use_fp16 True",
    256: "--image_size 256",
    512: "--image_size 512",
}
N = 2


def classifier_inputs(name: str) -> tuple[Tensor, Tensor]:
    """x [2, 3, 64, 64] and t [2] for a small classifier."""
    return made_input(name, (N, 3, 64, 64)), torch.tensor([3, 900])


@dataclass(frozen=True)
class Chain:
    """A short chain that a classifier guides, of 4 timesteps of 100.

    Attributes:
        ddim: Whether it is DDIM's, or ancestral sampling.
        eta: DDIM's.
        learned: Whether the variance is learned, or fixed.
        small: Whether a fixed variance is the smaller one.
        scale: The classifier's.
        clip: Whether the predicted x_0 is clipped.
        rescale: Whether the networks are told t * 1000 / 100.
    """

    ddim: bool = False
    eta: float = 0.0
    learned: bool = False
    small: bool = False
    scale: float = 3.0
    clip: bool = True
    rescale: bool = False


CHAINS = {
    "ddpm": Chain(),
    "ddpm of the small variance": Chain(small=True),
    "ddpm of a learned variance": Chain(learned=True, scale=1.5),
    "ddpm unclipped, rescaled": Chain(clip=False, rescale=True),
    "ddim": Chain(ddim=True),
    "ddim with noise": Chain(ddim=True, eta=0.7, learned=True),
    "ddim unclipped, rescaled": Chain(ddim=True, clip=False, rescale=True, scale=0.5),
}
STEPS, T, CHANNELS, SIZE, CLASSES = 4, 100, 2, 4, 3
LABELS = (2, 0)


class Network(torch.nn.Module):
    """A tiny network of (x, t): an affine function of the pixels of x, and a wave of t. It is plain torch, so that
    theirs and ours have the same rounding.

    Args:
        outputs: How many numbers it answers with for each sample.
        seed: Of its weights.
    """

    def __init__(self, outputs: int, seed: int):
        super().__init__()
        inputs = CHANNELS * SIZE * SIZE
        self.load(made_state({"in.weight": (16, inputs), "out.weight": (outputs, 16), "out.bias": (outputs,)}, seed))

    def load(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = torch.nn.ParameterDict({name.replace(".", "_"): value for name, value in weights.items()})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(x.flatten(1) @ self.weights["in_weight"].t() + torch.sin(t.float() * 0.3)[:, None])
        return h @ self.weights["out_weight"].t() + self.weights["out_bias"]


class Images(Network):
    """The same with images for answers: of one or two groups of channels."""

    def __init__(self, learned: bool):
        self.channels = CHANNELS * (1 + learned)
        super().__init__(self.channels * SIZE * SIZE, seed=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).view(-1, self.channels, SIZE, SIZE)


def chain_noise(name: str) -> Tensor:
    """The normals of a chain: x_T and those of each step, [1 + STEPS, 2, C, H, W]."""
    return made_input(name, (1 + STEPS, N, CHANNELS, SIZE, SIZE))


def thinned(values: Tensor, count: int = 64) -> Tensor:
    """Some of the numbers, evenly spread over all."""
    flat = values.flatten()
    return flat[:: max(1, len(flat) // count)]


def shapes_of(module: torch.nn.Module) -> dict[str, Sequence[int]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
