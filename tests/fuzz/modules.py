"""Layers of the network whose attributes were edited: they compute what torch's own layers do, or refuse."""

from __future__ import annotations

import random
import traceback

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast.errors import InputError
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.nn.layers import GroupNorm
from tests.fuzz.supervise import Failed, Notes


def run(rng: random.Random, notes: Notes) -> int:
    torch.default_generator.manual_seed(rng.getrandbits(31))
    make = rng.choice((_norm, _convolution))
    layer, x, edits = make(rng)
    notes(lambda: f"{layer} edited: {edits}; x {list(x.shape)} {x.dtype}")
    said = f"{layer} edited: {edits}; x {list(x.shape)} {x.dtype}"
    name = type(layer).__name__
    plain = getattr(nn, name).forward
    try:
        with torch.no_grad():
            expected = plain(layer, x)
            if name == "GroupNorm" and layer.silu:
                expected = F.silu(expected)
    except Exception as error:
        expected = error
    try:
        with torch.no_grad():
            found = layer(x)
    except Exception as error:
        if isinstance(error, InputError) or not isinstance(expected, torch.Tensor):
            return 1
        what = f"{said}\n{''.join(traceback.format_exception(error)[-3:])}"
        raise Failed(f"{name}: {type(error).__name__} where torch computes", what) from error
    if not isinstance(expected, torch.Tensor):
        if "mixed dtype" in str(expected):
            return 1  # ours takes them
        raise Failed(f"{name}: computes what torch refuses", f"{said}\n{expected}")
    if found.shape != expected.shape or not torch.allclose(
        found.double(), expected.double(), rtol=2e-2, atol=2e-2, equal_nan=True
    ):
        raise Failed(f"{name}: another value than torch's", f"{said}\n{found.flatten()[:4]} {expected.flatten()[:4]}")
    return 1


def _norm(rng: random.Random) -> tuple[nn.Module, torch.Tensor, list[str]]:
    groups = rng.choice((1, 2, 4))
    channels = groups * rng.choice((1, 2, 3))
    layer = GroupNorm(groups, channels, 1e-5, rng.random() < 0.5)
    x = torch.randn(rng.choice((1, 2)), channels, 3, rng.choice((1, 4)))
    edits = rng.sample(("groups", "weight", "bias", "eps", "dtype", "affine"), rng.choice((0, 1, 1, 2)))
    for edit in edits:
        if edit == "groups":
            layer.num_groups = rng.choice((0, -1, 1, 2, 3, channels, 10**9))
        elif edit in ("weight", "bias"):
            size = rng.choice(((channels + 1,), (channels - 1,), (1,), (channels, 1), ()))
            setattr(layer, edit, nn.Parameter(torch.randn(size)))
        elif edit == "eps":
            layer.eps = rng.choice((0.0, -1.0, 1.0, float("nan")))
        elif edit == "dtype" and layer.weight is not None:
            layer.weight = nn.Parameter(layer.weight.detach().to(rng.choice((torch.bfloat16, torch.float64))))
        elif edit == "affine":
            layer.weight = layer.bias = None
    return layer, x, edits


def _convolution(rng: random.Random) -> tuple[nn.Module, torch.Tensor, list[str]]:
    c_in, c_out = rng.choice(((32, 32), (33, 40), (4, 8)))
    layer = Conv2d(c_in, c_out).eval()
    x = torch.randn(rng.choice((1, 2)), c_in, rng.choice((8, 9)), rng.choice((8, 12)))
    if rng.random() < 0.5:
        layer(x)  # the transformed filters are kept from now on
    edits = rng.sample(
        ("stride", "padding", "dilation", "groups", "weight", "bias", "padding_mode", "out_channels", "in_channels"),
        rng.choice((0, 1, 1, 2)),
    )
    for edit in edits:
        if edit in ("stride", "padding", "dilation"):
            setattr(layer, edit, rng.choice(((2, 2), (1, 2), (1, 1))))
        elif edit == "groups":
            layer.groups = rng.choice((1, 2, c_in))
        elif edit == "weight":
            shape = rng.choice(
                ((c_out, c_in, 1, 1), (c_out + 1, c_in, 3, 3), (c_out, c_in - 1, 3, 3), (c_out, c_in, 5, 5))
            )
            layer.weight = nn.Parameter(torch.randn(shape) / 10)
        elif edit == "bias":
            layer.bias = rng.choice((None, nn.Parameter(torch.randn(c_out + 1)), nn.Parameter(torch.randn(1))))
        elif edit == "padding_mode":
            layer.padding_mode = rng.choice(("circular", "reflect", "zeros"))
            layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
        else:
            setattr(layer, edit, rng.choice((1, 31, 64, 10**6)))
    return layer, x, edits
