"""Small ops over the channels of channels_last images: a residual and a bias added, sums over all but the channels, and
the gradients of a group norm's parameters.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.backends.triton.layout import device_of, grid_over, load, sample_of, spare, store
from ddpm_fast.ops.backends.triton.slabs import beside, rows, vector
from ddpm_fast.ops.backends.triton.sums import RowSums, sum_rows_kernel

_BLOCK = 2048  # elements that a program of add_bias writes: 16 a thread
_ROWS = 1024  # pixels that a program of channel_sums adds up at least
_PARTS = 512  # programs of channel_sums for a block of channels at most


@triton.jit(do_not_specialize=("bias_step", "samples", "positions"))
def _add_bias_kernel(
    x, residual, bias, out, bias_step, samples, positions,
    CHANNELS: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = sample_of(samples)
    block = tl.program_id(0)
    if LARGE:
        block = block.to(tl.int64)
    element = block * BLOCK + tl.arange(0, BLOCK)
    mask = (element < positions * CHANNELS) & (not spare(samples))  # out may be x
    at = sample * positions * CHANNELS + element
    value = load(x + at, mask)
    if residual is not None:
        value += load(residual + at, mask)
    if bias is not None:
        value += vector(bias, bias_step, sample, element % CHANNELS, mask)
    store(out + at, value, mask)


def add_bias(x: Tensor, residual: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    if not x.numel():
        return
    bias, step = rows(bias)
    samples, channels, height, width = x.shape
    elements = channels * height * width
    with device_of(x):
        _add_bias_kernel[grid_over(samples, triton.cdiv(elements, _BLOCK))](
            x,
            residual,
            bias,
            out,
            step,
            samples,
            height * width,
            CHANNELS=channels,
            LARGE=elements >= 2**31 - _BLOCK,
            BLOCK=_BLOCK,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize=("pixels", "each", "parts"))
def _channel_sums_kernel(
    image, sums, pixels, each, parts, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr
):
    """The sums [parts, C] over `each` pixels of all samples' [pixels, C]."""
    part = tl.program_id(0) % parts
    column = tl.program_id(0) // parts * WIDTH + tl.arange(0, WIDTH)
    exists = column < CHANNELS
    height = tl.arange(0, HEIGHT)[:, None]
    begin = part.to(tl.int64) * each
    held = tl.minimum(pixels - begin, each)
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for first in range(0, each, HEIGHT):
        mask = (height < held - first) & exists[None, :]
        value = load(image + (begin + first) * CHANNELS + (height * CHANNELS + column[None, :]), mask)
        total += tl.where(mask, value, 0.0)
    tl.store(sums + part.to(tl.int64) * CHANNELS + column, tl.sum(total, 0), mask=exists)


def channel_sums(image: Tensor, out: Tensor) -> None:
    if not image.numel():
        out.zero_()
        return
    channels = image.shape[1]
    pixels = image.numel() // channels
    width = min(triton.next_power_of_2(channels), 64)
    height = 2048 // width
    each = max(_ROWS, triton.cdiv(pixels, _PARTS))
    each = triton.cdiv(each, height) * height
    parts = triton.cdiv(pixels, each)
    partial = out if parts == 1 else out.new_empty(parts, channels)
    with device_of(image):
        _channel_sums_kernel[(parts * triton.cdiv(channels, width),)](
            image,
            partial,
            pixels,
            each,
            parts,
            CHANNELS=channels,
            WIDTH=width,
            HEIGHT=height,
            enable_fp_fusion=True,
        )
        if parts > 1:
            launch = RowSums(channels, channels)
            sum_rows_kernel[launch.grid](partial, out, parts, channels, **launch.choices)


@triton.jit(do_not_specialize=("scale_step", "samples", "channels"))
def _group_norm_parameters_kernel(
    sums, weight, bias, scale, dweight, dbias, dscale, dshift, scale_step, samples, channels,
    WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    channel = (tl.program_id(0) * WIDTH + tl.arange(0, WIDTH))[None, :]
    exists = channel < channels
    row = tl.arange(0, HEIGHT).to(tl.int64)[:, None]
    after = samples.to(tl.int64) * channels
    total_g = tl.zeros([HEIGHT, WIDTH], tl.float32)
    total_gn = tl.zeros([HEIGHT, WIDTH], tl.float32)
    if scale is not None:
        factor, offset = vector(weight, 0, 0, channel, exists), vector(bias, 0, 0, channel, exists)
    for first in range(0, samples, HEIGHT):
        sample = first + row
        mask = (sample < samples) & exists
        sum_g = vector(sums, channels, sample, channel, mask)
        sum_gn = vector(sums + after, channels, sample, channel, mask)
        if scale is not None:
            at = sample * channels + channel
            tl.store(dscale + at, factor * sum_gn + offset * sum_g, mask=mask)
            tl.store(dshift + at, sum_g, mask=mask)
            spread = 1.0 + vector(scale, scale_step, sample, channel, mask)
            sum_g, sum_gn = spread * sum_g, spread * sum_gn
        total_g += sum_g
        total_gn += sum_gn
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(dweight + at, tl.sum(total_gn, 0), mask=at < channels)
    tl.store(dbias + at, tl.sum(total_g, 0), mask=at < channels)


def group_norm_parameters(
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    dscale: Tensor | None,
    dshift: Tensor | None,
) -> None:
    _, samples, channels = sums.shape
    if not channels:
        return
    scale, step = rows(scale)
    width = min(triton.next_power_of_2(channels), 32)
    with device_of(sums):
        _group_norm_parameters_kernel[(triton.cdiv(channels, width),)](
            sums,
            beside(weight),
            beside(bias),
            scale,
            dweight,
            dbias,
            dscale,
            dshift,
            step,
            samples,
            channels,
            WIDTH=width,
            HEIGHT=1024 // width,
            enable_fp_fusion=True,
        )
