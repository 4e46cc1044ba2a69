"""The backward of every loss: what its forward left behind, times a factor per sample and group of channels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.backends.triton.layout import (
    VARYING,
    Launch,
    device_of,
    elements_of,
    last,
    load,
    offset_of,
    place,
    sample_of,
    store,
)


@triton.jit(do_not_specialize=VARYING)
def _loss_backward_kernel(
    stored, scale, grad, samples, vectors, channels, positions,
    GROUPS: tl.constexpr, STORED_LAST: tl.constexpr, GRAD_LAST: tl.constexpr,
    VECTOR: tl.constexpr, ORDER: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = sample_of(samples)
    elements = elements_of(vectors, VECTOR, LARGE)
    _, element, mask, channel, position = place(tl.program_id(0), elements, channels, positions, ORDER, LARGE, BLOCK)
    base = sample * elements
    value = load(stored + base + offset_of(element, channel, position, channels, STORED_LAST), mask)
    factor = tl.load(scale + sample * GROUPS)
    if GROUPS > 1:
        if ORDER == "flat":  # the memory of channels_last images
            channel = element % channels
        for group in tl.static_range(1, GROUPS):
            factor = tl.where(channel >= group * (channels // GROUPS), tl.load(scale + sample * GROUPS + group), factor)
    store(grad + base + offset_of(element, channel, position, channels, GRAD_LAST), value * factor, mask)


def loss_backward(stored: Tensor, scale: Tensor, grad: Tensor) -> None:
    groups = scale.shape[1]
    channels = stored.shape[1]
    if last(stored) and last(grad):  # in the order of their memory
        stored, grad = (x.movedim(1, -1).flatten(1) for x in (stored, grad))
    elif not last(stored) and not last(grad):  # a group of a contiguous sample is as good as a sample
        stored, grad = (x.view(x.shape[0] * groups, -1) if x.numel() else x for x in (stored, grad))
        groups = 1
    launch = Launch(stored, grad, drawn=False)
    if launch.empty:
        return
    samples, vectors, _, positions = launch.sizes
    with device_of(stored):
        _loss_backward_kernel[launch.grid(launch.blocks)](
            stored,
            scale,
            grad,
            samples,
            vectors,
            channels,
            positions,
            GROUPS=groups,
            STORED_LAST=last(stored),
            GRAD_LAST=last(grad),
            **launch.choices,
        )
