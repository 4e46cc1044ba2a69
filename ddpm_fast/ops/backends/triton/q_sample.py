"""Noising, Ho et al. 2020, eq. 4: one read of x_0, one write of x_t; the noise is drawn on the way."""

from __future__ import annotations

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


@triton.jit(do_not_specialize=VARYING)
def _q_sample_kernel(
    x0, t, table, rows, noise, seed, sample_id, step_id, stream, out, samples, vectors, channels, positions,
    X0_LAST: tl.constexpr, NOISE_LAST: tl.constexpr, OUT_LAST: tl.constexpr,
    VECTOR: tl.constexpr, ORDER: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = sample_of(samples)
    elements = elements_of(vectors, VECTOR, LARGE)
    counter, element, mask, channel, position = place(
        tl.program_id(0), elements, channels, positions, ORDER, LARGE, BLOCK
    )
    base = sample * elements
    row, inside = row_at(table, tl.load(t + sample), rows, 2)
    signal, sigma = tl.where(inside, tl.load(row), float("nan")), tl.load(row + 1)
    x = load(x0 + base + offset_of(element, channel, position, channels, X0_LAST), mask)
    if noise is None:
        z = normal4(counter, tl.load(sample_id + sample), tl.load(step_id), stream, tl.load(seed))
    else:
        z = load(noise + base + offset_of(element, channel, position, channels, NOISE_LAST), mask)
    store(out + base + offset_of(element, channel, position, channels, OUT_LAST), signal * x + sigma * z, mask)


def q_sample(x0: Tensor, t: Tensor, table: Tensor, noise: Tensor | NoiseKey, out: Tensor) -> None:
    tensors.check_rows("q_sample", "t", table, t)
    given, *key = noise_arguments(noise)
    launch = Launch(x0, given, out, drawn=given is None)
    if launch.empty:
        return
    with device_of(x0):
        _q_sample_kernel[launch.grid(launch.blocks)](
            x0,
            t,
            table,
            table.shape[0],
            given,
            *key,
            out,
            *launch.sizes,
            X0_LAST=last(x0),
            NOISE_LAST=last(given),
            OUT_LAST=last(out),
            **launch.choices,
        )
