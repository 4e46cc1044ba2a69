"""The variational bound's term per sample and its gradient in one pass: hybrid_loss and vlb_terms. The formulas, and
what the pass leaves behind, are explained in csrc/bound.h and csrc/cpu/bound.cpp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import tensors
from ddpm_fast.ops.backends.triton.functions import (
    exponential,
    greater,
    lesser,
    logarithm,
    open_exponential,
    rounded_exponential,
    rounded_tanh,
)
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
from ddpm_fast.ops.tensors import VlbTerms

_KL = tl.constexpr(0.0)  # kinds of term, as in a table's row
_PAPER_DECODER = tl.constexpr(1.0)
_LOG2_E = tl.constexpr(1.44269504)


@triton.jit
def _kl_term(pull, e, d):
    """(nats, by_error, by_log_variance) of the KL divergence."""
    shrink = open_exponential(-d)
    p = d * -0.000199794988 + 0.00139821961
    p = p * d + -0.00833312795
    p = p * d + 0.0416657925
    p = p * d + -0.166666672
    p = p * d + 0.5
    spread = tl.where(tl.abs(d) < 0.5, d * d * p, shrink - 1.0 + d)
    pulled = pull * e
    square = pulled * pulled * shrink
    return 0.5 * (spread + square), pulled * pull * shrink, 0.5 * (d - spread - square)


@triton.jit
def _paper_cdf(u):
    """The CDF of OpenAI's code at u, and its density."""
    t = rounded_tanh(0.797884583 * (u + 0.044715 * (u * u * u)))
    density = 0.398942292 * (1.0 - t * t) * (1.0 + 0.13414499 * (u * u))
    return 0.5 * (1.0 + t), density


@triton.jit
def _paper_decoder_term(x0, e, log_variance):
    """Likewise of the discretised Gaussian by the tanh approximation of its CDF."""
    inverse = rounded_exponential(-0.5 * log_variance)
    centred = -e
    above = greater(lesser(inverse * (centred + 0.00392156886), 32.0), -32.0)
    below = greater(lesser(inverse * (centred + -0.00392156886), 32.0), -32.0)
    cdf1, density1 = _paper_cdf(above)
    cdf0, density0 = _paper_cdf(below)
    is_first, is_last = x0 < -0.999, x0 > 0.999
    probability = tl.where(is_last, 1.0, cdf1) - tl.where(is_first, 0.0, cdf0)
    slope1, slope0 = tl.where(is_last, 0.0, density1), tl.where(is_first, 0.0, density0)
    held = greater(probability, 1e-12)
    scale = tl.where(probability < 1e-12, 0.0, tl.div_rn(1.0, held))
    by_centre = inverse * (slope1 - slope0) * scale
    by_spread = 0.5 * (above * slope1 - below * slope0) * scale
    return -logarithm(held), by_centre, by_spread


@triton.jit
def _scaled_log_tail(x):
    """log Q(x) + x^2/2 for x >= 0, with Q the normal's upper tail."""
    t = tl.div_rn(1.0, 1.0 + 0.3 * x)
    g = t * 0.158493116 + -0.803674757
    g = g * t + 1.56264532
    g = g * t + -1.39307547
    g = g * t + 0.601767421
    g = g * t + -0.297768444
    g = g * t + 0.0424854904
    g = g * t + 0.14863041
    g = g * t + 0.410266906
    g = g * t + 0.99999409
    g = g * t + -2.12291121
    return g + logarithm(t)


@triton.jit
def _exact_decoder_term(x0, e, log_variance):
    """Likewise by the normal's CDF itself. csrc/bound.h evaluates four formulas and takes one of their results; here
    the one is chosen before each exp and log, which gives the same bits at half the instructions."""
    log_root = 0.918938533  # log sqrt(2 pi)
    inverse = exponential(-0.5 * log_variance)
    half = inverse * 0.00392156886
    width = 2.0 * half
    m = inverse * tl.abs(e)  # by symmetry, the bin lies above the mean
    a, b = m - half, m + half
    is_first, is_last = x0 < -0.999, x0 > 0.999
    is_open = is_first | is_last
    near, narrow = a < 0.0, width * greater(m, 1.0) < 0.5

    # Narrow bins: the density at the middle times the width, and two more terms of the series.
    m2, w2 = m * m, width * width
    c2 = (m2 - 1.0) * 0.0416666679
    c4 = ((m2 - 6.0) * m2 + 3.0) * 0.000520833360
    series = w2 * (c2 + w2 * c4)
    correction = tl.div_rn(1.0, 1.0 + series)
    bend = 0.0833333358 + w2 * ((m2 - 3.0) * 0.00208333344)
    narrow_by_m = m * w2 * bend * correction - m
    narrow_by_w = tl.div_rn(1.0, width) + width * (2.0 * c2 + 4.0 * (w2 * c4)) * correction

    # Open bins: the CDF at y. Wide ones with the mean inside (near): 1 - Q(-a) - Q(b). Wide ones above the mean (far):
    # Q(a) (1 - Q(b)/Q(a)).
    y = inverse * (tl.where(is_first, -e, e) + 0.00392156886)
    outer = tl.where(is_open, tl.abs(y), b)
    tail_outer, square_outer = _scaled_log_tail(outer), -0.5 * outer * outer
    tail_a, square_a = _scaled_log_tail(tl.abs(a)), -0.5 * a * a
    beyond = exponential(tl.where(is_open | near, tail_outer + square_outer, -(m * width)))
    ratio = exponential(tl.where(near, tail_a + square_a, -(m * width + (tail_a - tail_outer))))
    wide_rest = tl.where(near, 1.0 - ratio - beyond, 1.0 - lesser(ratio, 0.999))
    rest = logarithm(tl.where(is_open, 1.0 - beyond, tl.where(narrow, 1.0 + series, wide_rest)))

    narrow_log = (logarithm(width) + (-0.5 * m2 - log_root)) + rest
    log_bin = tl.where(narrow, narrow_log, tl.where(near, rest, square_a + (tail_a + rest)))
    log_open = tl.where(y < 0.0, tail_outer + square_outer, rest)
    open_density = tl.where(y < 0.0, -(log_root + tail_outer), square_outer - log_root - rest)
    bin_density = tl.where(near, square_a - log_root - rest, -(log_root + (tail_a + rest)))
    density = exponential(tl.where(is_open, open_density, bin_density))
    density_b = tl.where(near, exponential(square_outer - log_root - rest), density * beyond)
    by_m = tl.where(narrow, narrow_by_m, density_b - density)
    by_w = tl.where(narrow, narrow_by_w, 0.5 * (density + density_b))

    by_error_open = density * tl.where(is_first, -inverse, inverse)
    by_error_bin = by_m * tl.where(e < 0.0, -inverse, inverse)
    by_scale = tl.where(is_open, density * y, m * by_m + width * by_w)
    return -tl.where(is_open, log_open, log_bin), -tl.where(is_open, by_error_open, by_error_bin), 0.5 * by_scale


@triton.jit
def _lanes(x):
    """A counter's four elements, apart."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _decoder_term(x0, e, log_variance, PAPER: tl.constexpr):
    """One lane after the other, in a loop: evaluated for all of a thread's elements at once, the formulas take 200
    registers, also in a launch of nothing but the far more frequent KL terms. In each iteration the lanes move up by
    one, and the results take the places that become free."""
    x_0, x_1, x_2, x_3 = _lanes(x0)
    e_0, e_1, e_2, e_3 = _lanes(e)
    v_0, v_1, v_2, v_3 = _lanes(log_variance)
    for _ in range(4):
        if PAPER:
            nats, by_error, by_log_variance = _paper_decoder_term(x_0, e_0, v_0)
        else:
            nats, by_error, by_log_variance = _exact_decoder_term(x_0, e_0, v_0)
        x_0, x_1, x_2, x_3 = x_1, x_2, x_3, nats
        e_0, e_1, e_2, e_3 = e_1, e_2, e_3, by_error
        v_0, v_1, v_2, v_3 = v_1, v_2, v_3, by_log_variance
    return (
        tl.interleave(tl.interleave(x_0, x_2), tl.interleave(x_1, x_3)),
        tl.interleave(tl.interleave(e_0, e_2), tl.interleave(e_1, e_3)),
        tl.interleave(tl.interleave(v_0, v_2), tl.interleave(v_1, v_3)),
    )


@triton.jit
def _error_scale(row):
    """What by_error is divided by before it is stored: its size, up to the error itself."""
    pull = tl.load(row + 3)
    decoder = exponential(-(tl.load(row + 4) + tl.load(row + 5)))
    return tl.where(tl.load(row + 7) == _KL, pull * pull, decoder)


@triton.jit
def _saturated(address, value):
    """fp16 ends at 65504; an untrained network's derivative may not."""
    if address.dtype.element_ty == tl.float16:
        return greater(lesser(value, 65504.0), -65504.0)
    else:
        return value


@triton.jit
def _finish(row, squares, nats, elements, sample, loss, mse_x0, factors, HYBRID: tl.constexpr, GROUPS: tl.constexpr):
    """A sample's results from its sums."""
    count = elements.to(tl.float32)
    bits = tl.div_rn(nats * _LOG2_E, count)
    slope = tl.load(row + 6)
    factor = factors + sample * GROUPS
    if HYBRID:
        mse_weight, vlb_weight = tl.load(row + 9), tl.load(row + 10)
        tl.store(loss + sample, tl.div_rn(mse_weight * squares, count) + vlb_weight * bits)
        tl.store(factor, tl.div_rn(2.0 * mse_weight, count))
        slope *= vlb_weight
    else:
        tl.store(loss + sample, bits)
        tl.store(mse_x0 + sample, tl.div_rn(squares, count))
        tl.store(factor, tl.div_rn(tl.load(row + 2) * _error_scale(row) * _LOG2_E, count))
    if GROUPS == 2:
        tl.store(factor + 1, tl.div_rn(slope * _LOG2_E, count))


@triton.jit(do_not_specialize=(*VARYING, "blocks"))
def _bound_kernel(
    output, x0, t, table, rows, noise, seed, sample_id, step_id, stream, gradient, sums, loss, mse_x0, factors,
    samples, vectors, channels, positions, blocks,
    OUTPUT_LAST: tl.constexpr, X0_LAST: tl.constexpr, NOISE_LAST: tl.constexpr, GRADIENT_LAST: tl.constexpr,
    HYBRID: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr, ORDER: tl.constexpr, LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Without `sums` a program has the whole sample and writes its results; otherwise its part's sums, of squares and
    of nats, to `sums` [2, N, programs]."""
    sample = sample_of(samples)
    elements = elements_of(vectors, VECTOR, LARGE)
    base = sample * elements
    output += GROUPS * base
    row, inside = row_at(table, tl.load(t + sample), rows, 11 if HYBRID else 9)
    c_x0, c_noise = tl.where(inside, tl.load(row), float("nan")), tl.load(row + 1)
    to_x0, pull = tl.load(row + 2), tl.load(row + 3)
    log_beta, delta, slope, kind = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    squares, nats = tl.zeros([4 * BLOCK], tl.float32), tl.zeros([4 * BLOCK], tl.float32)
    first = tl.program_id(0) * (COUNTERS // BLOCK)
    for i in range(tl.minimum(blocks - first, COUNTERS // BLOCK)):
        counter, element, mask, channel, position = place(first + i, elements, channels, positions, ORDER, LARGE, BLOCK)
        output_offset = offset_of(element, channel, position, GROUPS * channels, OUTPUT_LAST)
        out = load(output + output_offset, mask)
        if GROUPS == 2:
            v = load(output + (channels if OUTPUT_LAST else elements) + output_offset, mask)
            d = delta + slope * v
        else:
            d = delta
        x = load(x0 + base + offset_of(element, channel, position, channels, X0_LAST), mask)
        if noise is None:
            z = normal4(counter, tl.load(sample_id + sample), tl.load(step_id), stream, tl.load(seed))
        else:
            z = load(noise + base + offset_of(element, channel, position, channels, NOISE_LAST), mask)

        residual = out - (c_x0 * x + c_noise * z)
        unclipped = to_x0 * residual
        e = unclipped
        if not HYBRID:
            clip = tl.load(row + 8)
            predicted = x + unclipped
            e = tl.where(predicted < -clip, -clip - x, tl.where(predicted > clip, clip - x, unclipped))
        log_variance = tl.zeros([4 * BLOCK], tl.float32) + (log_beta + d)
        # The same for all of a sample: one formula is evaluated.
        if kind == _KL:
            term, by_error, by_log_variance = _kl_term(pull, e, d)
        elif kind == _PAPER_DECODER:
            term, by_error, by_log_variance = _decoder_term(x, e, log_variance, True)
        else:
            term, by_error, by_log_variance = _decoder_term(x, e, log_variance, False)
        if gradient is not None:
            if HYBRID:
                by_output = residual
            else:
                stopped = tl.abs(x + unclipped) > clip
                by_output = tl.where(stopped, 0.0, by_error * tl.div_rn(1.0, _error_scale(row)))
            address = gradient + GROUPS * base
            address += offset_of(element, channel, position, GROUPS * channels, GRADIENT_LAST)
            store(address, _saturated(gradient, by_output), mask)
            if GROUPS == 2:
                address += channels if GRADIENT_LAST else elements
                store(address, _saturated(gradient, by_log_variance), mask)
        error = residual if HYBRID else e
        squares += tl.where(mask, error * error, 0.0)
        nats += tl.where(mask, term, 0.0)
    squares, nats = tl.sum(squares), tl.sum(nats)
    if sums is None:
        _finish(row, squares, nats, elements, sample, loss, mse_x0, factors, HYBRID, GROUPS)
    else:
        slot = sample * tl.num_programs(0) + tl.program_id(0)
        tl.store(sums + slot, squares)
        tl.store(sums + slot + tl.num_programs(0) * samples.to(tl.int64), nats)


@triton.jit(do_not_specialize=("rows", "samples", "count", "elements"))
def _finish_kernel(
    t, table, rows, sums, loss, mse_x0, factors, samples, count, elements, HYBRID: tl.constexpr, GROUPS: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    row, _ = row_at(table, tl.load(t + sample), rows, 11 if HYBRID else 9)
    squares = sum_of(sums + sample * count, count)
    nats = sum_of(sums + (samples + sample) * count, count)
    _finish(row, squares, nats, elements, sample, loss, mse_x0, factors, HYBRID, GROUPS)


def hybrid_loss(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    gradient: Tensor | None,
    loss: Tensor,
    factors: Tensor,
) -> None:
    _bound(output, x0, t, table, noise, gradient, (loss, None), factors)


def vlb_terms(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    gradient: Tensor | None,
    terms: VlbTerms,
    factors: Tensor,
) -> None:
    _bound(output, x0, t, table, noise, gradient, terms, factors)


def _bound(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | NoiseKey,
    gradient: Tensor | None,
    terms: tuple[Tensor, Tensor | None],
    factors: Tensor,
) -> None:
    """terms: the loss and the mean squared error of x0, which hybrid_loss does not give."""
    loss, mse_x0 = terms
    hybrid, groups = mse_x0 is None, factors.shape[1]
    tensors.check_rows("hybrid_loss" if hybrid else "vlb_terms", "t", table, t)
    given, *key = noise_arguments(noise)
    # With two counters a thread the kernel takes 145 registers instead of 62.
    launch = Launch(x0, output, given, gradient, drawn=given is None, counters=1)
    if launch.empty:
        return
    programs = programs_of(launch)
    sums = None if programs == 1 else torch.empty(2, launch.samples, programs, device=loss.device)
    with device_of(output):
        _bound_kernel[launch.grid(programs)](
            output,
            x0,
            t,
            table,
            table.shape[0],
            given,
            *key,
            gradient,
            sums,
            loss,
            mse_x0,
            factors,
            *launch.sizes,
            launch.blocks,
            OUTPUT_LAST=last(output),
            X0_LAST=last(x0),
            NOISE_LAST=last(given),
            GRADIENT_LAST=last(gradient),
            HYBRID=hybrid,
            GROUPS=groups,
            **launch.choices,
        )
        if programs > 1:
            _finish_kernel[(launch.samples,)](
                t,
                table,
                table.shape[0],
                sums,
                loss,
                mse_x0,
                factors,
                launch.samples,
                programs,
                launch.elements,
                HYBRID=hybrid,
                GROUPS=groups,
                enable_fp_fusion=False,
            )
