"""One step of any sampler: x_t, the network's output and (for multi-step samplers) the previous x_0 in; x_{t-1} out,
with the copy of it that the network will read and the prediction of x_0 where they are wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import tensors
from ddpm_fast.ops.backends.triton.functions import greater, lesser, open_exponential
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
    spare,
    store,
)
from ddpm_fast.ops.backends.triton.noise import normal4
from ddpm_fast.ops.tensors import ReverseStep


@triton.jit(do_not_specialize=VARYING)
def _reverse_step_kernel(
    x_t, output, x0_previous, table, rows, step, noise, seed, sample_id, step_id, stream, x_out, x0_out, model_out,
    samples, vectors, channels, positions,
    X_LAST: tl.constexpr, OUTPUT_LAST: tl.constexpr, PREVIOUS_LAST: tl.constexpr, NOISE_LAST: tl.constexpr,
    X_OUT_LAST: tl.constexpr, X0_OUT_LAST: tl.constexpr, MODEL_OUT_LAST: tl.constexpr, GROUPS: tl.constexpr,
    VECTOR: tl.constexpr, ORDER: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = sample_of(samples)
    elements = elements_of(vectors, VECTOR, LARGE)
    counter, element, mask, channel, position = place(
        tl.program_id(0), elements, channels, positions, ORDER, LARGE, BLOCK
    )
    mask &= not spare(samples)
    base = sample * elements
    x = load(x_t + base + offset_of(element, channel, position, channels, X_LAST), mask)
    output += GROUPS * base
    output_offset = offset_of(element, channel, position, GROUPS * channels, OUTPUT_LAST)
    out = load(output + output_offset, mask)
    if x0_previous is not None:
        previous = load(x0_previous + base + offset_of(element, channel, position, channels, PREVIOUS_LAST), mask)

    row, inside = row_at(table, tl.load(step), rows, 8)
    a_x, a_out, b_x, b_x0 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    a_x, b_x = tl.where(inside, a_x, float("nan")), tl.where(inside, b_x, float("nan"))
    b_previous, sigma, clip, spread = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    # A row without sigma draws no noise. Drawn before what was loaded is used, it hides the loads' latency.
    shift = tl.zeros([4 * BLOCK], tl.float32)
    if sigma != 0.0:
        if noise is None:
            z = normal4(counter, tl.load(sample_id + sample), tl.load(step_id), stream, tl.load(seed))
        else:
            z = load(noise + base + offset_of(element, channel, position, channels, NOISE_LAST), mask)
        shift = sigma * z
        if GROUPS == 2:  # noqa: SIM102 (decided when compiled, the other when run)
            if spread != 0.0:
                second = output + (channels if OUTPUT_LAST else elements)
                shift = sigma * open_exponential(spread * load(second + output_offset, mask)) * z

    x0 = greater(lesser(a_x * x + a_out * out, clip), -clip)
    following = b_x * x + b_x0 * x0
    if x0_previous is not None:
        following += b_previous * previous
    if sigma != 0.0:
        following += shift
    store(x_out + base + offset_of(element, channel, position, channels, X_OUT_LAST), following, mask)
    if x0_out is not None:
        store(x0_out + base + offset_of(element, channel, position, channels, X0_OUT_LAST), x0, mask)
    if model_out is not None:
        store(model_out + base + offset_of(element, channel, position, channels, MODEL_OUT_LAST), following, mask)


def reverse_step(
    x_t: Tensor,
    output: Tensor,
    x0_previous: Tensor | None,
    table: Tensor,
    step: Tensor,
    noise: Tensor | NoiseKey,
    results: ReverseStep,
) -> None:
    x_out, x0_out, model_out = results
    tensors.check_rows("reverse_step", "step", table, step)
    given, *key = noise_arguments(noise)
    launch = Launch(x_t, output, x0_previous, given, x_out, x0_out, model_out, drawn=given is None)
    if launch.empty:
        return
    with device_of(x_t):
        _reverse_step_kernel[launch.grid(launch.blocks)](
            x_t,
            output,
            x0_previous,
            table,
            table.shape[0],
            step,
            given,
            *key,
            x_out,
            x0_out,
            model_out,
            *launch.sizes,
            X_LAST=last(x_t),
            OUTPUT_LAST=last(output),
            PREVIOUS_LAST=last(x0_previous),
            NOISE_LAST=last(given),
            X_OUT_LAST=last(x_out),
            X0_OUT_LAST=last(x0_out),
            MODEL_OUT_LAST=last(model_out),
            GROUPS=2 if output.shape[1] > x_t.shape[1] else 1,
            **launch.choices,
        )
