"""Standard normals from their counters alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...noise import NoiseKey
from ..registry import is_channels_last
from .noise import normal4

BLOCK = 256  # counters a program: 1024 normals, 8 a thread at 4 warps


@triton.jit
def _normal_kernel(
    out, seed, sample_id, step, elements, channels, positions, counter_blocks, stream,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // counter_blocks
    counter = (program % counter_blocks) * BLOCK + tl.arange(0, BLOCK)
    z = normal4(counter.to(tl.uint32), tl.load(sample_id + sample), tl.load(step), stream, tl.load(seed))
    base = out + sample * elements
    for lane in tl.static_range(4):
        element = counter * 4 + lane
        offset = element
        if CHANNELS_LAST:
            offset = (element % positions) * channels + element // positions
        tl.store(base + offset, z[lane].to(out.dtype.element_ty), mask=element < elements)


def normal(key: NoiseKey, out: Tensor) -> None:
    samples, elements = out.shape[0], out[:1].numel()
    if samples == 0 or elements == 0:
        return
    channels = out.shape[1] if out.ndim > 1 else 1
    counter_blocks = triton.cdiv(elements, 4 * BLOCK)
    with torch.cuda.device(out.device if out.is_cuda else -1):
        _normal_kernel[(samples * counter_blocks,)](
            *(out, key.seed, key.sample_id, key.step, elements, channels, elements // channels),
            *(counter_blocks, key.stream),
            CHANNELS_LAST=is_channels_last(out),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
