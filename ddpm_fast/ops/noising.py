"""Standard normals, and the forward process: `normal` and `q_sample`."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.checks import (
    PIXELS,
    check_dtype,
    check_elements,
    check_image,
    check_noise,
    check_tensors,
    check_timesteps,
)
from ddpm_fast.ops.declare import Gradient, declare, kernel_for
from ddpm_fast.ops.direct import on_cpu
from ddpm_fast.ops.tensors import (
    coefficients,
    dense,
    dense_noise,
    like,
    pack_noise,
    per_sample,
    working_dtype,
)

_ops = torch.ops.ddpm_fast


# --- normal


def normal(
    key: NoiseKey,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Standard normals of the samples that `key` names, the same numbers on every device and backend.

    Args:
        key: names the N samples, and is on the device where the normals are wanted.
        shape: of one sample, at most 2^34 elements.
        dtype: any float; the normals are drawn in fp32 and rounded once.
        memory_format: contiguous or channels_last; the numbers do not depend on it.

    Returns:
        [N, *shape] of the dtype.

    Raises:
        InputError: the shape is negative or too large, or the dtype is no float.
    """
    if not isinstance(key, NoiseKey):
        raise InputError(f"normal: key is a {type(key).__name__}; expected a NoiseKey")
    if (direct := on_cpu()) is not None:
        z = direct.normal(key, shape, dtype, memory_format)
        if z is not None:
            return z
    channels_last = memory_format in (torch.channels_last, torch.channels_last_3d)
    full = [key.sample_id.shape[0], *shape]
    return _ops.normal(key.seed, key.sample_id, key.step, key.stream, full, dtype, channels_last)


def _normal_empty(key, shape, dtype, channels_last):
    check_dtype("normal", "dtype", dtype)
    sample, n = tuple(shape[1:]), key.sample_id.shape[0]
    if any(size < 0 for size in sample):
        raise InputError(f"normal: shape {sample} has a negative size")
    if len(shape) < 1 or shape[0] != n:
        raise InputError(f"normal: the NoiseKey names {n} samples and the shape is {tuple(shape)}")
    memory_format = torch.contiguous_format
    if channels_last:
        if len(shape) not in (4, 5):
            raise InputError(f"normal: channels_last needs samples of shape [C, H, W] or [C, D, H, W], not {sample}")
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    check_elements("normal", shape)
    return torch.empty(shape, dtype=dtype, device=key.seed.device, memory_format=memory_format)


def _normal(seed, sample_id, step_id, stream, *rest):
    key = pack_noise(None, seed, sample_id, step_id, stream)
    out = _normal_empty(key, *rest)
    kernel_for("normal", out)(dense_noise(key), out)
    return out


declare(
    "normal(Tensor seed, Tensor sample_id, Tensor step_id, int stream, SymInt[] shape, ScalarType dtype, "
    "bool channels_last) -> Tensor",
    run=_normal,
    shapes=lambda *given: _normal_empty(pack_noise(None, *given[:4]), *given[4:]),
)


# --- q_sample


def q_sample(
    x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey, dtype: torch.dtype | None = None
) -> Tensor:
    """x_t = table[t, 0] x0 + table[t, 1] eps: the forward process in closed form (Ho et al. 2020, eq. 4).

    Differentiable in x0 and in noise that is given as a tensor.

    Args:
        x0: [N, C, ...], uint8 or float.
        t: int64 [N], the timesteps.
        table: fp32 [T, 2], Schedule.q_sample_table().float(), on x0's device.
        noise: eps, shaped like x0, or a NoiseKey of N samples.
        dtype: of the result; by default x0's, or fp32 for uint8.

    Returns:
        x_t, shaped like x0.

    Raises:
        InputError: shapes, dtypes or devices do not fit; on the CPU also for t outside 0..T-1.
    """
    if not (isinstance(x0, Tensor) and isinstance(t, Tensor) and isinstance(table, Tensor)):
        check_tensors("q_sample", x0=x0, t=t, table=table)
    if (direct := on_cpu()) is not None:
        x_t = direct.q_sample(x0, t, table, noise, dtype)
        if x_t is not None:
            return x_t
    dtype = dtype or (torch.float32 if x0.dtype == torch.uint8 else x0.dtype)
    return _call_q_sample(x0, t, table, noise, dtype)


def _q_sample_empty(x0, t, table, noise, dtype):
    check_image("q_sample", "x0", x0, PIXELS)
    check_timesteps("q_sample", x0, t, table, columns=2)
    check_dtype("q_sample", "dtype", dtype)
    check_noise("q_sample", noise, x0)
    return like(x0, dtype)


def _q_sample(x0, t, table, noise, dtype):
    out = _q_sample_empty(x0, t, table, noise, dtype)
    run = kernel_for("q_sample", out, x0, noise)
    run(dense(x0), t.contiguous(), coefficients(table, x0, out), dense_noise(noise), out)
    return out


def _q_sample_save(ctx, inputs, output):
    ctx.save_for_backward(inputs.t, inputs.table)
    ctx.dtypes = inputs.x0.dtype, None if inputs.noise is None else inputs.noise.dtype


def _q_sample_backward(ctx, grad):
    t, table = ctx.saved_tensors
    signal, sigma = (per_sample(column, grad) for column in table[t].to(working_dtype(grad)).unbind(1))
    x0_dtype, noise_dtype = ctx.dtypes
    needs_x0, _, _, needs_noise, *_ = ctx.needs_input_grad
    return {
        "x0": (grad * signal).to(x0_dtype) if needs_x0 else None,
        "noise": (grad * sigma).to(noise_dtype) if needs_noise else None,
    }


_call_q_sample = declare(
    "q_sample(Tensor x0, Tensor t, Tensor table, NOISE, ScalarType dtype) -> Tensor",
    run=_q_sample,
    shapes=_q_sample_empty,
    gradient=Gradient(("x0", "noise"), _q_sample_save, _q_sample_backward),
)
