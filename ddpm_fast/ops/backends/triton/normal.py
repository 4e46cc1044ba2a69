"""Standard normals from their counters alone."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.backends.triton.layout import (
    VARYING,
    Launch,
    device_of,
    elements_of,
    last,
    noise_arguments,
    offset_of,
    place,
    sample_of,
    store,
)
from ddpm_fast.ops.backends.triton.noise import normal4


@triton.jit(do_not_specialize=VARYING)
def _normal_kernel(
    seed, sample_id, step_id, stream, out, samples, vectors, channels, positions,
    OUT_LAST: tl.constexpr, VECTOR: tl.constexpr, ORDER: tl.constexpr, LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = sample_of(samples)
    elements = elements_of(vectors, VECTOR, LARGE)
    counter, element, mask, channel, position = place(
        tl.program_id(0), elements, channels, positions, ORDER, LARGE, BLOCK
    )
    z = normal4(counter, tl.load(sample_id + sample), tl.load(step_id), stream, tl.load(seed))
    store(out + sample * elements + offset_of(element, channel, position, channels, OUT_LAST), z, mask)


def normal(key: NoiseKey, out: Tensor) -> None:
    launch = Launch(out, drawn=True)
    if launch.empty:
        return
    _, *key_arguments = noise_arguments(key)
    with device_of(out):
        _normal_kernel[launch.grid(launch.blocks)](
            *key_arguments, out, *launch.sizes, OUT_LAST=last(out), **launch.choices
        )
