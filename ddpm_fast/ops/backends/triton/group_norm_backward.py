"""The gradient of group norm. With n the normalised image, factor = weight * (1 + scale) and g = dL/du,

    dx = rstd * (factor * g - mean(factor * g) - n * mean(factor * g * n)) + grad_total,

where the means are over a group. Both come from g's and g * n's sums over the pixels of each channel, which the
parameters' gradients need as well. An image whose pixels do not fit a program is read twice: once for these sums of
each chunk, and once for dx.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.backends.triton.layout import device_of, load, sample_of
from ddpm_fast.ops.backends.triton.silu import silu_derivative
from ddpm_fast.ops.backends.triton.slabs import (
    VARYING,
    Slabs,
    affine,
    beside,
    group_sum,
    lanes_of,
    load_two,
    pixels_of,
    rows,
    store_two,
    vector,
)
from ddpm_fast.ops.backends.triton.sums import RowSums, sum_rows_kernel
from ddpm_fast.ops.tensors import Norm

LARGEST = 16384  # elements of a slab: 32 registers a thread for n, and as many for g


@triton.jit
def _means(
    sums, weight, bias, scale, shift, scale_step, shift_step, samples, sample, slice_, count,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(mean(factor * g), mean(factor * g * n)) of each lane's group, from the finished sums of all of its channels."""
    of_g = tl.zeros([TOGETHER * LANES], tl.float32)
    of_gn = tl.zeros([TOGETHER * LANES], tl.float32)
    for part in range(PARTS):
        channel, exists, _ = lanes_of(slice_ // PARTS * PARTS + part, GROUPS, PER_GROUP, LANES, TOGETHER, PARTS)
        factor, _ = affine(weight, bias, scale, shift, scale_step, shift_step, sample, channel, exists)
        of_g += factor * vector(sums, GROUPS * PER_GROUP, sample, channel, exists)
        of_gn += factor * vector(sums, GROUPS * PER_GROUP, samples + sample, channel, exists)
    return (
        group_sum(of_g, LANES, TOGETHER) / count,
        group_sum(of_gn, LANES, TOGETHER) / count,
    )


@triton.jit(do_not_specialize=(*VARYING, "chunks"))
def _group_norm_backward_kernel(
    x, added, joined, weight, bias, scale, shift, grad, grad_total, statistics, dx, djoined, sums, partial,
    added_step, scale_step, shift_step, samples, positions, chunks,
    SILU: tl.constexpr, STAGE: tl.constexpr, SLICES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, STRADDLED: tl.constexpr, PARTIAL: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """STAGE: "whole" where a program has all of its groups' pixels. Otherwise "sums" writes a chunk's of g and of g * n
    to `partial` [2, N, chunks, C], and once they are in `sums` [3, N, C], "dx" writes the image, and the chunk's sum of
    it to `partial` [N, chunks, C]."""
    CHANNELS: tl.constexpr = FIRST + SECOND
    PER_GROUP: tl.constexpr = CHANNELS // GROUPS
    sample = sample_of(samples)
    slice_ = tl.program_id(0) % SLICES
    chunk = tl.program_id(0) // SLICES
    channel, exists, group = lanes_of(slice_, GROUPS, PER_GROUP, LANES, TOGETHER, PARTS)
    pixel, there = pixels_of(chunk, positions, PIXELS, PARTIAL, LARGE)
    mask = there & exists[None, :]
    start = slice_ * (TOGETHER * PER_GROUP)
    base = sample * positions
    x += base * FIRST
    if joined is not None:
        joined += base * SECOND
    value = load_two(x, joined, pixel, channel[None, :], start, mask, FIRST, SECOND, STRADDLED)
    g = load(grad + base * CHANNELS + (pixel * CHANNELS + channel[None, :]), mask)
    kept = statistics + (sample * GROUPS + group) * 3
    centre, rest, rstd = load(kept, exists), load(kept + 1, exists), load(kept + 2, exists)
    factor, offset = affine(weight, bias, scale, shift, scale_step, shift_step, sample, channel, exists)
    if added is not None:
        value += vector(added, added_step, sample, channel, exists & (channel < FIRST))[None, :]
    n = (value - centre[None, :]) * rstd[None, :] - (rest * rstd)[None, :]
    n = tl.where(mask, n, 0.0)
    if SILU:
        g = g * silu_derivative(n * factor[None, :] + offset[None, :])
    g = tl.where(mask, g, 0.0)
    count = positions.to(tl.float32) * PER_GROUP
    to = (sums if STAGE == "whole" else partial) + (sample * chunks + chunk) * CHANNELS + channel
    after = samples.to(tl.int64) * chunks * CHANNELS
    if STAGE == "dx":
        of_g, of_gn = _means(
            sums, weight, bias, scale, shift, scale_step, shift_step, samples, sample, slice_, count,
            GROUPS, PER_GROUP, LANES, TOGETHER, PARTS,
        )  # fmt: skip
    else:
        sum_g, sum_gn = tl.sum(g, 0), tl.sum(g * n, 0)
        tl.store(to, sum_g, mask=exists)
        tl.store(to + after, sum_gn, mask=exists)
        of_g = group_sum(factor * sum_g, LANES, TOGETHER) / count
        of_gn = group_sum(factor * sum_gn, LANES, TOGETHER) / count
    if STAGE != "sums":
        gradient = (factor[None, :] * g - of_g[None, :] - n * of_gn[None, :]) * rstd[None, :]
        if grad_total is not None:
            here = mask & (channel < FIRST)[None, :]
            more = load(grad_total + base * FIRST + (pixel * FIRST + channel[None, :]), here)
            gradient += tl.where(here, more, 0.0)
        if djoined is not None:
            djoined += base * SECOND
        dx += base * FIRST
        store_two(dx, djoined, gradient, pixel, channel[None, :], start, mask, FIRST, SECOND, STRADDLED)
        if STAGE == "whole":
            to += 2 * after
        tl.store(to, tl.sum(tl.where(mask, gradient, 0.0), 0), mask=exists)


def group_norm_backward(
    norm: Norm,
    grad: Tensor,
    grad_total: Tensor | None,
    statistics: Tensor,
    dx: Tensor,
    djoined: Tensor | None,
    sums: Tensor,
) -> None:
    if not grad.numel():
        sums.zero_()
        return
    slabs = Slabs(norm, LARGEST)
    chunks, samples, channels = slabs.chunks, slabs.samples, slabs.channels
    (scale, scale_step), (shift, shift_step), (added, added_step) = map(rows, (norm.scale, norm.shift, norm.added))
    vectors = beside(norm.weight), beside(norm.bias), scale, shift
    partial = None if slabs.whole else sums.new_empty(2, samples, chunks, channels)
    with device_of(grad):
        for stage in ("whole",) if slabs.whole else ("sums", "dx"):
            _group_norm_backward_kernel[slabs.grid(slabs.slices * chunks)](
                norm.x,
                added,
                norm.joined,
                *vectors,
                grad,
                grad_total,
                statistics,
                dx,
                djoined,
                sums,
                partial,
                added_step,
                scale_step,
                shift_step,
                samples,
                slabs.positions,
                chunks,
                SILU=norm.silu,
                STAGE=stage,
                **slabs.choices,
            )
            if partial is not None:
                done = sums[:2] if stage == "sums" else sums[2:]
                launch = RowSums(done.numel(), channels)
                sum_rows_kernel[launch.grid](partial, done, chunks, channels, **launch.choices)
