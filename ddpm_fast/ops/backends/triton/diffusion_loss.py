"""The regression losses and their gradient in one pass over the network's output and x_0: what it leaves behind is
output - target, as csrc/cpu/diffusion_loss.cpp explains.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import tensors
from ddpm_fast.ops.backends.triton.layout import (
    VARYING,
    Launch,
    device_of,
    elements_of,
    last,
    load,
    noise_arguments,
    offset_of,
    place,
    row_at,
    sample_of,
    store,
)
from ddpm_fast.ops.backends.triton.noise import normal4
from ddpm_fast.ops.backends.triton.sums import COUNTERS, programs_of, sum_of


@triton.jit(do_not_specialize=(*VARYING, "blocks"))
def _diffusion_loss_kernel(
    output, x0, t, table, rows, noise, seed, sample_id, step_id, stream, residual, sums,
    samples, vectors, channels, positions, blocks,
    OUTPUT_LAST: tl.constexpr, X0_LAST: tl.constexpr, NOISE_LAST: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr, ORDER: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WHOLE: a program has the whole sample, and writes its loss to `sums` [N]; otherwise its part's sum of squares to
    `sums` [N, programs]."""
    sample = sample_of(samples)
    elements = elements_of(vectors, VECTOR, LARGE)
    base = sample * elements
    row, inside = row_at(table, tl.load(t + sample), rows, 3)
    c_x0, c_noise = tl.where(inside, tl.load(row), float("nan")), tl.load(row + 1)
    squares = tl.zeros([4 * BLOCK], tl.float32)
    first = tl.program_id(0) * (COUNTERS // BLOCK)
    for i in range(tl.minimum(blocks - first, COUNTERS // BLOCK)):
        counter, element, mask, channel, position = place(first + i, elements, channels, positions, ORDER, LARGE, BLOCK)
        out = load(output + base + offset_of(element, channel, position, channels, OUTPUT_LAST), mask)
        x = load(x0 + base + offset_of(element, channel, position, channels, X0_LAST), mask)
        if noise is None:
            z = normal4(counter, tl.load(sample_id + sample), tl.load(step_id), stream, tl.load(seed))
        else:
            z = load(noise + base + offset_of(element, channel, position, channels, NOISE_LAST), mask)
        difference = out - (c_x0 * x + c_noise * z)
        if residual is not None:
            store(residual + base + offset_of(element, channel, position, channels, RESIDUAL_LAST), difference, mask)
        squares += tl.where(mask, difference * difference, 0.0)
    total = tl.sum(squares)
    if WHOLE:
        tl.store(sums + sample, _mean(tl.load(row + 2), total, elements))
    else:
        tl.store(sums + sample * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def _mean(weight, total, elements):
    return tl.div_rn(weight * total, elements.to(tl.float32))


@triton.jit(do_not_specialize=("rows", "count", "elements"))
def _finish_kernel(sums, t, table, rows, loss, count, elements):
    sample = tl.program_id(0).to(tl.int64)
    total = sum_of(sums + sample * count, count)
    row, _ = row_at(table, tl.load(t + sample), rows, 3)  # outside of the table the sum is NaN already
    tl.store(loss + sample, _mean(tl.load(row + 2), total, elements))


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    residual: Tensor | None,
    loss: Tensor,
) -> None:
    tensors.check_rows("diffusion_loss", "t", table, t)
    given, *key = noise_arguments(noise)
    launch = Launch(output, x0, given, residual, drawn=given is None)
    if launch.empty:
        return
    programs = programs_of(launch)
    sums = loss if programs == 1 else torch.empty(launch.samples, programs, device=loss.device)
    with device_of(output):
        _diffusion_loss_kernel[launch.grid(programs)](
            output,
            x0,
            t,
            table,
            table.shape[0],
            given,
            *key,
            residual,
            sums,
            *launch.sizes,
            launch.blocks,
            OUTPUT_LAST=last(output),
            X0_LAST=last(x0),
            NOISE_LAST=last(given),
            RESIDUAL_LAST=last(residual),
            WHOLE=programs == 1,
            **launch.choices,
        )
        if programs > 1:
            _finish_kernel[(launch.samples,)](
                sums, t, table, table.shape[0], loss, programs, launch.elements, enable_fp_fusion=False
            )
