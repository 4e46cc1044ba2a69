"""Group norm with what surrounds it in a U-Net: sums before it, a second image joined to its channels, scale, shift and
SiLU.

The mean is taken twice: m, the sum over the count, and then the mean of the differences from m, which loses no digits
however large m is. The variance is that of the same differences. An image whose pixels do not fit a program has such
statistics of each chunk first, then of all, and is read a second time.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.backends.triton.functions import two_sum
from ddpm_fast.ops.backends.triton.layout import device_of, load, sample_of, store, store_and_read
from ddpm_fast.ops.backends.triton.silu import silu
from ddpm_fast.ops.backends.triton.slabs import (
    VARYING,
    Slabs,
    affine,
    beside,
    lanes_of,
    of_lanes,
    pixels_of,
    rows,
    slab_sum,
    vector,
)
from ddpm_fast.ops.tensors import Norm

LARGEST = 16384  # elements of a slab: 32 registers a thread
STATISTICS = tl.constexpr(3)
_CHUNKS = tl.constexpr(128)  # whose statistics are added at once


@triton.jit
def _sum_of(x, residual, added, added_step, total, sample, pixel, channel, mask, FIRST: tl.constexpr):
    """x + residual + added of a slab, which is written to total and rounded as it is there. channel: [1, lanes]."""
    at = pixel * FIRST + channel
    value = load(x + at, mask)
    if residual is not None:
        value += load(residual + at, mask)
    if added is not None:
        value += vector(added, added_step, sample, channel, channel < FIRST)
    if total is not None:
        value = store_and_read(total + at, value, mask)
    return value


@triton.jit
def _joined_sum(
    x, residual, added, added_step, joined, total, sample, pixel, channel, start, mask,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STRADDLED: tl.constexpr,
):  # fmt: skip
    """_sum_of where the slab lies in x, and joined elsewhere."""
    if joined is None:
        value = _sum_of(x, residual, added, added_step, total, sample, pixel, channel, mask, FIRST)
    elif STRADDLED:
        here = mask & (channel < FIRST)
        one = _sum_of(x, residual, added, added_step, total, sample, pixel, channel, here, FIRST)
        other = load(joined + (pixel * SECOND + (channel - FIRST)), mask & (channel >= FIRST))
        value = tl.where(channel < FIRST, one, other)
    else:
        if start < FIRST:
            value = _sum_of(x, residual, added, added_step, total, sample, pixel, channel, mask, FIRST)
        else:
            value = load(joined + (pixel * SECOND + (channel - FIRST)), mask)
    return value


@triton.jit
def _applied(difference, missed, rstd, factor, offset, SILU: tl.constexpr):
    """y of differences from the mean which all miss it by as much."""
    gain = rstd * factor
    u = difference * gain[None, :] + (offset - missed * gain)[None, :]
    if SILU:
        u = silu(u)
    return u


@triton.jit
def _reciprocal_deviation(variance, EPS: tl.constexpr):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.maximum(variance, 0.0) + EPS))


@triton.jit(do_not_specialize=VARYING)
def _group_norm_kernel(
    x, residual, added, joined, weight, bias, scale, shift, y, total, statistics,
    added_step, scale_step, shift_step, samples, positions,
    EPS: tl.constexpr, SILU: tl.constexpr, WHOLE: tl.constexpr, SLICES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, STRADDLED: tl.constexpr, PARTIAL: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """WHOLE: a program has all of its groups. Otherwise it writes the statistics of its chunk, with the variance's sum
    in the place of rstd, to `statistics` [N, groups, chunks * parts, 3], and `total`."""
    CHANNELS: tl.constexpr = FIRST + SECOND
    PER_GROUP: tl.constexpr = CHANNELS // GROUPS
    sample = sample_of(samples)
    slice_ = tl.program_id(0) % SLICES
    chunk = tl.program_id(0) // SLICES
    channel, exists, _ = lanes_of(slice_, GROUPS, PER_GROUP, LANES, TOGETHER, PARTS)
    pixel, there = pixels_of(chunk, positions, PIXELS, PARTIAL, LARGE)
    mask = there & exists[None, :]
    start = slice_ * (TOGETHER * PER_GROUP)
    base = sample * positions
    if residual is not None:
        residual += base * FIRST
    if joined is not None:
        joined += base * SECOND
    if total is not None:
        total += base * FIRST
    value = _joined_sum(
        x + base * FIRST, residual, added, added_step, joined, total, sample, pixel, channel[None, :], start, mask,
        FIRST, SECOND, STRADDLED,
    )  # fmt: skip
    held = tl.minimum(positions - chunk * PIXELS, PIXELS)
    count = (held * tl.minimum(PER_GROUP - slice_ % PARTS * LANES, LANES)).to(tl.float32)
    mean = slab_sum(tl.where(mask, value, 0.0), PIXELS, LANES, TOGETHER) / count
    difference = tl.where(mask, value - of_lanes(mean, LANES, TOGETHER)[None, :], 0.0)
    missed = slab_sum(difference, PIXELS, LANES, TOGETHER) / count
    squares = slab_sum(difference * difference, PIXELS, LANES, TOGETHER) - count * missed * missed
    centre, rest = two_sum(mean, missed)
    group = slice_ // PARTS * TOGETHER + tl.arange(0, TOGETHER)
    if WHOLE:
        kept = statistics + (sample * GROUPS + group) * STATISTICS
        third = _reciprocal_deviation(squares / count, EPS)
        factor, offset = affine(weight, bias, scale, shift, scale_step, shift_step, sample, channel, exists)
        missed, rstd = of_lanes(missed, LANES, TOGETHER), of_lanes(third, LANES, TOGETHER)
        applied = _applied(difference, missed, rstd, factor, offset, SILU)
        store(y + base * CHANNELS + (pixel * CHANNELS + channel[None, :]), applied, mask)
    else:
        parts = tl.num_programs(0) // SLICES * PARTS
        kept = statistics + ((sample * GROUPS + group) * parts + chunk * PARTS + slice_ % PARTS) * STATISTICS
        third = squares
    tl.store(kept, centre, mask=group < GROUPS)
    tl.store(kept + 1, rest, mask=group < GROUPS)
    tl.store(kept + 2, third, mask=group < GROUPS)


@triton.jit
def _statistics_of(partial, i, chunks, positions, PER_GROUP: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
                   PIXELS: tl.constexpr):  # fmt: skip
    """(counts, centres, rests, sums of squares) of a group's chunks i: 0 where there is none."""
    exists = i < chunks * PARTS
    count = tl.minimum(positions - i // PARTS * PIXELS, PIXELS) * tl.minimum(PER_GROUP - i % PARTS * LANES, LANES)
    at = partial + i * STATISTICS
    centre, rest = tl.load(at, mask=exists, other=0.0), tl.load(at + 1, mask=exists, other=0.0)
    return tl.where(exists, count, 0).to(tl.float32), centre, rest, tl.load(at + 2, mask=exists, other=0.0)


@triton.jit(do_not_specialize=("chunks", "positions"))
def _statistics_kernel(
    partial, statistics, chunks, positions,
    EPS: tl.constexpr, PER_GROUP: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A group's statistics from those of its chunks, in the way in which these were made from values."""
    program = tl.program_id(0).to(tl.int64)
    partial += program * chunks * PARTS * STATISTICS
    lane = tl.arange(0, _CHUNKS)
    count = positions.to(tl.float32) * PER_GROUP
    total = tl.zeros([_CHUNKS], tl.float32)
    for i in range(0, chunks * PARTS, _CHUNKS):
        held, centre, _, _ = _statistics_of(partial, i + lane, chunks, positions, PER_GROUP, LANES, PARTS, PIXELS)
        total += held * centre
    mean = tl.sum(total) / count
    missed = tl.zeros([_CHUNKS], tl.float32)
    squares = tl.zeros([_CHUNKS], tl.float32)
    for i in range(0, chunks * PARTS, _CHUNKS):
        held, centre, rest, square = _statistics_of(
            partial, i + lane, chunks, positions, PER_GROUP, LANES, PARTS, PIXELS
        )
        difference = (centre - mean) + rest
        missed += held * difference
        squares += square + held * difference * difference
    miss = tl.sum(missed) / count
    centre, rest = two_sum(mean, miss)
    kept = statistics + program * STATISTICS
    tl.store(kept, centre)
    tl.store(kept + 1, rest)
    tl.store(kept + 2, _reciprocal_deviation(tl.sum(squares) / count - miss * miss, EPS))


@triton.jit(do_not_specialize=VARYING)
def _apply_kernel(
    x, residual, added, joined, weight, bias, scale, shift, y, statistics,
    added_step, scale_step, shift_step, samples, positions,
    SILU: tl.constexpr, SLICES: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, STRADDLED: tl.constexpr, PARTIAL: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """A chunk's y, once its groups' statistics are there."""
    CHANNELS: tl.constexpr = FIRST + SECOND
    sample = sample_of(samples)
    slice_ = tl.program_id(0) % SLICES
    channel, exists, group = lanes_of(slice_, GROUPS, CHANNELS // GROUPS, LANES, TOGETHER, PARTS)
    pixel, there = pixels_of(tl.program_id(0) // SLICES, positions, PIXELS, PARTIAL, LARGE)
    mask = there & exists[None, :]
    start = slice_ * (TOGETHER * (CHANNELS // GROUPS))
    base = sample * positions
    if residual is not None:
        residual += base * FIRST
    if joined is not None:
        joined += base * SECOND
    value = _joined_sum(
        x + base * FIRST, residual, added, added_step, joined, None, sample, pixel, channel[None, :], start, mask,
        FIRST, SECOND, STRADDLED,
    )  # fmt: skip
    kept = statistics + (sample * GROUPS + group) * STATISTICS
    centre, rest, rstd = load(kept, exists), load(kept + 1, exists), load(kept + 2, exists)
    factor, offset = affine(weight, bias, scale, shift, scale_step, shift_step, sample, channel, exists)
    applied = _applied(value - centre[None, :], rest, rstd, factor, offset, SILU)
    store(y + base * CHANNELS + (pixel * CHANNELS + channel[None, :]), applied, mask)


def group_norm(norm: Norm, y: Tensor, total: Tensor | None, statistics: Tensor) -> None:
    if not y.numel():
        statistics.fill_(math.nan)
        return
    slabs = Slabs(norm, LARGEST)
    x, joined, parts = norm.x, norm.joined, slabs.chunks * slabs.parts
    weight, bias = beside(norm.weight), beside(norm.bias)
    (scale, scale_step), (shift, shift_step), (added, added_step) = map(rows, (norm.scale, norm.shift, norm.added))
    steps = added_step, scale_step, shift_step
    sizes = slabs.samples, slabs.positions
    grid = slabs.grid(slabs.slices * slabs.chunks)
    partial = statistics if slabs.whole else statistics.new_empty(slabs.samples, slabs.groups, parts, 3)
    vectors = weight, bias, scale, shift
    with device_of(x):
        _group_norm_kernel[grid](
            x,
            norm.residual,
            added,
            joined,
            *vectors,
            y,
            total,
            partial,
            *steps,
            *sizes,
            EPS=norm.eps,
            SILU=norm.silu,
            WHOLE=slabs.whole,
            **slabs.choices,
        )
        if slabs.whole:
            return
        _statistics_kernel[(slabs.samples * slabs.groups,)](
            partial,
            statistics,
            slabs.chunks,
            slabs.positions,
            EPS=norm.eps,
            PER_GROUP=slabs.per_group,
            LANES=slabs.lanes,
            PARTS=slabs.parts,
            PIXELS=slabs.pixels,
            enable_fp_fusion=True,
        )
        kept = total is not None
        _apply_kernel[grid](
            total if kept else x,
            None if kept else norm.residual,
            None if kept else added,
            joined,
            *vectors,
            y,
            statistics,
            *steps,
            *sizes,
            SILU=norm.silu,
            **slabs.choices,
        )
