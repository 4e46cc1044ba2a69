"""A training step's draws, and the losses that importance sampling remembers: see csrc/draws.h and csrc/cuda/draws.cu,
which do the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.noise import Stream
from ddpm_fast.ops import tensors
from ddpm_fast.ops.backends.triton.layout import device_of, noise_arguments
from ddpm_fast.ops.backends.triton.noise import philox4x32_10
from ddpm_fast.ops.tensors import Draw, Drawn

BLOCK = 128  # samples of a program, or timesteps
_NUMBERS = ("stream", "label_stream", "samples", "timesteps", "parts", "dropped", "null_label", "count")


@triton.jit
def _words(sample_id, step, stream, seed):
    """The first two random words of each sample, as int64 in 0..2^32-1."""
    c1 = (sample_id & 0xFFFFFFFF).to(tl.uint32)
    zero = c1 ^ c1
    c2 = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    c3 = (((sample_id >> 32) & 0xFFFFFF) << 8 | stream).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, _, _ = philox4x32_10(zero, c1, c2, c3, k0, k1)
    return w0.to(tl.int64), w1.to(tl.int64)


@triton.jit
def _first_above(values, size, value, HALVINGS: tl.constexpr):
    """The first index of a sorted table whose entry is larger than the value, or `size`."""
    first = (value * 0).to(tl.int64)
    last = first + size
    for _ in range(HALVINGS):
        searching = first < last
        middle = first + (last - first) // 2
        above = tl.load(values + middle, mask=searching, other=0.0) > value
        last = tl.where(searching & above, middle, last)
        first = tl.where(searching & (above == 0), middle + 1, first)
    return first


@triton.jit(do_not_specialize=_NUMBERS)
def _draw_timesteps_kernel(
    seed, sample_id, step_id, stream, samples, timesteps, parts, probabilities, cumulative, network_timesteps, labels,
    label_stream, dropped, null_label, t_out, weights_out, network_out, labels_out,
    HALVINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = sample < samples
    ids, key, step = tl.load(sample_id + sample, mask=mask, other=0), tl.load(seed), tl.load(step_id)
    word0, word1 = _words(ids, step, stream, key)
    total = timesteps.to(tl.int64)
    if cumulative is None:
        t = word0 * total >> 32
        if parts > 0:
            part = ids % parts
            part = tl.where(part < 0, part + parts, part)
            t = (total * part + t) // parts
        tl.store(weights_out + sample, tl.full([BLOCK], 1.0, tl.float32), mask=mask)
    else:
        u = (word0 << 21 | word1 >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
        t = _first_above(cumulative, total, u * tl.load(cumulative + total - 1), HALVINGS)
        t = tl.minimum(t, total - 1)  # the product may round up to the sum itself
        p = tl.load(probabilities + t, mask=mask, other=1.0)
        tl.store(weights_out + sample, (1.0 / (total.to(tl.float64) * p)).to(tl.float32), mask=mask)
    tl.store(t_out + sample, t, mask=mask)
    if network_timesteps is not None:
        tl.store(network_out + sample, tl.load(network_timesteps + t, mask=mask, other=0), mask=mask)
    if labels is not None:
        dice, _ = _words(ids, step, label_stream, key)
        label = tl.load(labels + sample, mask=mask, other=0)
        tl.store(labels_out + sample, tl.where(dice >> 8 < dropped, null_label, label), mask=mask)


def draw_timesteps(draw: Draw, drawn: Drawn) -> None:
    samples = drawn.t.shape[0]
    if samples == 0:
        return
    _, *key = noise_arguments(draw.key)
    with device_of(drawn.t):
        _draw_timesteps_kernel[(triton.cdiv(samples, BLOCK),)](
            *key,
            samples,
            draw.num_timesteps,
            draw.parts,
            draw.probabilities,
            draw.cumulative,
            draw.network_timesteps,
            draw.labels,
            int(Stream.LABEL),
            draw.dropped,
            draw.null_label,
            drawn.t,
            drawn.weights,
            drawn.network_t,
            drawn.labels,
            HALVINGS=draw.num_timesteps.bit_length(),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=_NUMBERS)
def _record_losses_kernel(history, counts, timesteps, count, t, losses, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = own < timesteps
    before = tl.load(counts + own, mask=mask, other=0)
    number = before
    for i in range(count):
        loss = tl.load(losses + i)
        finite = (loss.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000
        mine = mask & (own == tl.where(finite, tl.load(t + i), -1))
        slot = number % SLOTS
        slot = tl.where(slot < 0, slot + SLOTS, slot)
        tl.store(history + own * SLOTS + slot, loss, mask=mine)
        number += mine.to(tl.int64)
    tl.store(counts + own, number, mask=mask & (number != before))


def record_losses(history: Tensor, counts: Tensor, t: Tensor, losses: Tensor) -> None:
    tensors.check_rows("record_losses", "t", history, t)
    if history.shape[0] == 0:
        return
    with device_of(history):
        _record_losses_kernel[(triton.cdiv(history.shape[0], BLOCK),)](
            history,
            counts,
            history.shape[0],
            t.shape[0],
            t,
            losses,
            SLOTS=history.shape[1],
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
