"""Dropout by sample, forward and backward alike: see csrc/dropout.h, which says which elements are dropped."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.ops.backends.triton.layout import (
    WIDE_OFFSETS,
    device_of,
    elements_of,
    grid_over,
    last,
    load,
    sample_of,
    store,
)
from ddpm_fast.ops.backends.triton.noise import random_words
from ddpm_fast.ops.tensors import kept_scale

_BLOCK = 256  # counters of a program at most, two a thread: 16 elements
_VARYING = ("samples", "vectors", "channels", "positions", "layer", "stream", "dropped")


@triton.jit
def _offset(element, channels, positions, PLANAR: tl.constexpr):
    """Where elements, which are counted in the order of channels_last memory, lie in that of a sample."""
    if PLANAR:
        position = element // channels
        return (element - position * channels) * positions + position
    else:
        return element


@triton.jit(do_not_specialize=_VARYING)
def _dropout_kernel(
    x, seed, sample_id, layer, stream, dropped, out, samples, vectors, channels, positions,
    SCALE: tl.constexpr, X_PLANAR: tl.constexpr, OUT_PLANAR: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = sample_of(samples)
    elements = elements_of(vectors, VECTOR, LARGE)
    block = tl.program_id(0)
    if LARGE:
        block = block.to(tl.int64)
    element = block * (8 * BLOCK) + tl.arange(0, 8 * BLOCK)
    mask = element < elements
    value = load(x + sample * elements + _offset(element, channels, positions, X_PLANAR), mask)
    counter = block * BLOCK + tl.arange(0, BLOCK)
    step = layer.to(tl.int64)
    w0, w1, w2, w3 = random_words(counter, tl.load(sample_id + sample), step, stream, tl.load(seed))
    # All eight stay in the thread that drew them, side by side: it reads and writes 16 bytes of bf16 at once.
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    bits = tl.interleave(words & 0xFFFF, words >> 16)
    kept = bits.to(tl.int32) >= dropped
    value = tl.where(kept, value * SCALE, 0.0)
    store(out + sample * elements + _offset(element, channels, positions, OUT_PLANAR), value, mask)


def dropout(x: Tensor, key: NoiseKey, layer: int, dropped: int, out: Tensor) -> None:
    samples, elements = x.shape[0], math.prod(x.shape[1:])
    if not samples * elements:
        return
    channels = x.shape[1]
    planar = channels > 1 and elements > channels  # otherwise both memory formats are the same
    vector = math.gcd(elements, 8)
    block = min(_BLOCK, max(32, triton.next_power_of_2(triton.cdiv(elements, 8))))
    with device_of(x):
        _dropout_kernel[grid_over(samples, triton.cdiv(elements, 8 * block))](
            x,
            key.seed,
            key.sample_id,
            layer,
            int(Stream.DROPOUT),
            dropped,
            out,
            samples,
            elements // vector,
            channels,
            elements // channels,
            SCALE=kept_scale(dropped),
            X_PLANAR=planar and not last(x),
            OUT_PLANAR=planar and not last(out),
            VECTOR=vector,
            LARGE=elements >= WIDE_OFFSETS,
            BLOCK=block,
            num_warps=max(1, block // 64),
            enable_fp_fusion=False,
        )
