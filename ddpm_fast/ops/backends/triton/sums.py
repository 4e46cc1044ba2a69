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


class RowSums:
    """The launch of sum_rows_kernel that makes so many numbers, in rows of so many columns."""

    def __init__(self, numbers: int, columns: int):
        self.width = min(32, triton.next_power_of_2(columns))
        self.grid = (numbers // columns * triton.cdiv(columns, self.width),)

    @property
    def choices(self) -> dict[str, int]:
        return {"WIDTH": self.width, "HEIGHT": 1024 // self.width, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=("count", "columns"))
def sum_rows_kernel(partial, total, count, columns, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    """total [rows, columns], the sums over `count` of partial [rows, count, columns]."""
    blocks = tl.cdiv(columns, WIDTH)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    height = tl.arange(0, HEIGHT).to(tl.int64)[:, None]
    at = partial + row * count * columns + column[None, :]
    sums = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for first in range(0, count, HEIGHT):
        mask = (height < count - first) & (column < columns)[None, :]
        sums += tl.load(at + (height + first) * columns, mask=mask, other=0.0)
    tl.store(total + row * columns + column, tl.sum(sums, 0), mask=column < columns)
