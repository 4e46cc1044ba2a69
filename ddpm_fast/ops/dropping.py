"""`dropout`: elements of a network's images that are set to 0 in training (Srivastava et al. 2014), by a mask that is a
function of (seed, sample id, layer, element) and of nothing else. So it depends neither on the batch nor on how many
processes share it, and the backward computes it again instead of storing it."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.errors import InputError, check_integer, check_number
from ddpm_fast.noise import MASK32, NoiseKey, Stream
from ddpm_fast.ops.checks import check_image, check_noise, check_tensors
from ddpm_fast.ops.declare import Gradient, declare, kernel_for
from ddpm_fast.ops.tensors import dense, dense_noise, like

_ops = torch.ops.ddpm_fast


def dropout(x: Tensor, key: NoiseKey, layer: int, share: float) -> Tensor:
    """x with a share of its elements set to 0, and the others divided by the share that is kept.

    The same elements on every device and backend, in every batch and memory format: ddpm_fast/noise.py says which.
    Computed in fp32 (float64 for float64) and rounded once. Differentiable as often as you like.

    Args:
        x: float [N, C, ...], at most 2^34 elements a sample.
        key: names the seed and the N samples, on x's device. Its step and its stream are not used.
        layer: which of a network's layers this is, 0..2^32-1. Each has a mask of its own.
        share: what is dropped, in [0, 1], to the nearest 1/65536.

    Returns:
        The image, of x's shape, dtype and memory format.

    Raises:
        InputError: shapes, dtypes, devices or numbers do not fit.
    """
    check_tensors("dropout", x=x)
    if not isinstance(key, NoiseKey):
        raise InputError(f"dropout: key is a {type(key).__name__}; expected a NoiseKey")
    layer = check_integer("dropout: layer", layer, 0, MASK32)
    share = check_number("dropout: share", share, lambda v: 0 <= v <= 1, "a share in [0, 1]")
    return _call_dropout(x, key.seed, key.sample_id, layer, round(share * 2**16))


def _key_of(seed: Tensor, sample_id: Tensor) -> NoiseKey:
    return NoiseKey(seed, sample_id, step=seed, stream=Stream.DROPOUT)  # the layer takes the place of the step


def _dropout_empty(x, seed, sample_id, layer, dropped):
    check_image("dropout", "x", x)
    check_noise("dropout", _key_of(seed, sample_id), x)
    check_integer("dropout: layer", layer, 0, MASK32)
    check_integer("dropout: dropped", dropped, 0, 2**16)
    return like(x)


def _dropout(x, seed, sample_id, layer, dropped):
    out = _dropout_empty(x, seed, sample_id, layer, dropped)
    kernel_for("dropout", x)(dense(x), dense_noise(_key_of(seed, sample_id)), layer, dropped, out)
    return out


def _dropout_save(ctx, inputs, output):
    ctx.save_for_backward(inputs.seed, inputs.sample_id)
    ctx.mask = inputs.layer, inputs.dropped


_call_dropout = declare(
    "dropout(Tensor x, Tensor seed, Tensor sample_id, int layer, int dropped) -> Tensor",
    run=_dropout,
    shapes=_dropout_empty,
    gradient=Gradient(
        ("x",), _dropout_save, lambda ctx, grad: {"x": _ops.dropout(grad, *ctx.saved_tensors, *ctx.mask)}
    ),
)
