"""Sums over a sample that have the same bits every time: each program adds up its own blocks, lane by lane and then as
a tree, and a second kernel adds the programs' sums in a fixed order. There are no atomics.
"""

import triton
import triton.language as tl

from ddpm_fast.ops.backends.triton.layout import Launch

COUNTERS = tl.constexpr(1024)  # that a program adds up: a sample of at most 4096 elements needs no second kernel


def programs_of(launch: Launch) -> int:
    """Programs, and so sums, of a sample."""
    return triton.cdiv(launch.blocks, COUNTERS.value // launch.block)


@triton.jit
def sum_of(partial, count):
    """The sum of `count` consecutive fp32 numbers."""
    lanes = tl.arange(0, 1024)
    total = tl.zeros([1024], tl.float32)
    for first in range(0, count, 1024):
        total += tl.load(partial + first + lanes, mask=lanes < count - first, other=0.0)
    return tl.sum(total)
