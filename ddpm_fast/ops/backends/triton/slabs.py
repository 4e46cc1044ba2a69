"""How the group norm's kernels cut channels_last images into slabs, and how they read and write these.

A slab is [pixels, lanes] of one sample, and one program has it in its registers. Its lanes are channels: those of a few
whole groups, or of a part of a group that has more than 1024. A group's channels are padded to a power of two. Where
all pixels fit, a program finishes its groups alone; otherwise an image is cut into chunks of pixels. The sizes depend
on the shape of a sample alone and not on the batch, and so do the orders of all sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.backends.triton.layout import grid_over, load, store
from ddpm_fast.ops.tensors import Norm

MAX_LANES = 1024
SECTOR = 32  # bytes: what a GPU fetches at least
LEAST_SLAB = 2048  # elements: small images have several groups in a program
# Elements up to which two programs or more run on a multiprocessor at once, so that one computes while another reads.
# Half a sector of each pixel is better than a slab twice as large: the program beside it finds the other half in L2.
SHARED = 8192
A_THREAD = 32  # elements: as many registers for each image that is kept
# Arguments that vary without a difference to the code.
VARYING = ("samples", "positions", "added_step", "scale_step", "shift_step")


class Slabs:
    """The launches over a norm's images.

    Args:
        norm: what the norm is of.
        largest: elements of a slab at most.
    """

    def __init__(self, norm: Norm, largest: int):
        x = norm.x
        self.samples, self.positions = x.shape[0], x.shape[2] * x.shape[3]
        self.first = x.shape[1]
        self.second = 0 if norm.joined is None else norm.joined.shape[1]
        self.groups = norm.groups
        self.channels = self.first + self.second
        self.per_group = self.channels // self.groups
        self.lanes = min(triton.next_power_of_2(self.per_group), MAX_LANES)
        self.pixels = triton.next_power_of_2(self.positions)
        self.together = _groups_of_slab(self.groups, self.lanes, self.pixels, largest, x.itemsize)
        slab = self.together * self.lanes * self.pixels
        self.parts = triton.cdiv(self.per_group, self.lanes)
        self.whole = self.parts == 1 and slab <= largest
        if not self.whole:
            self.pixels = min(self.pixels, max(1, min(largest, SHARED) // (self.together * self.lanes)))
        self.chunks = triton.cdiv(self.positions, self.pixels)
        self.slices = triton.cdiv(self.groups, self.together) * self.parts

    def grid(self, a_sample: int) -> tuple[int, int, int]:
        """Programs [a_sample, samples]."""
        return grid_over(self.samples, a_sample)

    @property
    def choices(self) -> dict[str, object]:
        """The kernels' constexpr arguments, and how many warps they are launched with."""
        elements = self.pixels * self.together * self.lanes
        width = self.together * self.per_group  # channels of a slab of whole groups
        return {
            "FIRST": self.first,
            "SECOND": self.second,
            "GROUPS": self.groups,
            "LANES": self.lanes,
            "TOGETHER": self.together,
            "PARTS": self.parts,
            "PIXELS": self.pixels,
            "SLICES": self.slices,
            "STRADDLED": bool(self.second) and (self.parts > 1 or self.first % width != 0),
            "PARTIAL": self.chunks * self.pixels != self.positions,
            "LARGE": self.positions * self.channels >= 2**31,
            "enable_fp_fusion": True,
            "num_warps": min(16, max(1, elements // (32 * A_THREAD))),
        }


def _groups_of_slab(groups: int, lanes: int, pixels: int, largest: int, itemsize: int) -> int:
    """How many groups of an image a program has: a power of two."""
    together = 1
    while together < groups:
        read, slab = together * lanes * itemsize, together * lanes * pixels  # bytes of a pixel, elements
        enough = SECTOR // 2 if SHARED < 2 * slab <= 2 * largest else SECTOR
        if read >= enough and slab >= LEAST_SLAB:
            break
        together *= 2
    return together


def rows(values: Tensor | None) -> tuple[Tensor | None, int]:
    """(vectors [N, C] with neighbouring channels side by side, elements from a sample's to the next one's)"""
    if values is None:
        return None, 0
    values = beside(values)
    return values, values.stride(0)


def beside(values: Tensor) -> Tensor:
    """The values with neighbouring channels side by side, which they nearly always are."""
    return values if values.stride(-1) == 1 else values.contiguous()


@triton.jit
def lanes_of(
    slice_, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """(channels [lanes], whether they exist, their groups)"""
    lane = tl.arange(0, TOGETHER * LANES)
    group = slice_ // PARTS * TOGETHER + lane // LANES
    inside = slice_ % PARTS * LANES + lane % LANES
    # Written so that the compiler sees which channels are side by side.
    channel = slice_ * (TOGETHER * LANES) + lane if PER_GROUP == LANES else group * PER_GROUP + inside
    if PER_GROUP == LANES and GROUPS % TOGETHER == 0:
        exists = tl.full([TOGETHER * LANES], True, tl.int1)
    else:
        exists = (group < GROUPS) & (inside < PER_GROUP)
    return channel, exists, group


@triton.jit
def pixels_of(chunk, positions, PIXELS: tl.constexpr, PARTIAL: tl.constexpr, LARGE: tl.constexpr):
    """(the pixels of a chunk [pixels, 1], whether they exist)"""
    pixel = tl.arange(0, PIXELS)
    if LARGE:
        pixel = pixel.to(tl.int64)
    pixel = (chunk * PIXELS + pixel)[:, None]
    if PARTIAL:
        return pixel, pixel < positions
    else:
        return pixel, tl.full([PIXELS, 1], True, tl.int1)


@triton.jit
def load_two(
    first, second, pixel, channel, start, mask, FIRST: tl.constexpr, SECOND: tl.constexpr, STRADDLED: tl.constexpr
):
    """A slab of two images whose channels follow each other, in fp32. Both start at the sample; the second may be
    None. start: the slab's first channel."""
    if second is None:
        return load(first + (pixel * FIRST + channel), mask)
    elif STRADDLED:
        here = channel < FIRST
        one = load(first + (pixel * FIRST + channel), mask & here)
        other = load(second + (pixel * SECOND + (channel - FIRST)), mask & (channel >= FIRST))
        return tl.where(here, one, other)
    else:
        if start < FIRST:
            value = load(first + (pixel * FIRST + channel), mask)
        else:
            value = load(second + (pixel * SECOND + (channel - FIRST)), mask)
        return value


@triton.jit
def store_two(
    first, second, value, pixel, channel, start, mask, FIRST: tl.constexpr, SECOND: tl.constexpr,
    STRADDLED: tl.constexpr,
):  # fmt: skip
    """The opposite of load_two."""
    if second is None:
        store(first + (pixel * FIRST + channel), value, mask)
    elif STRADDLED:
        store(first + (pixel * FIRST + channel), value, mask & (channel < FIRST))
        store(second + (pixel * SECOND + (channel - FIRST)), value, mask & (channel >= FIRST))
    else:
        if start < FIRST:
            store(first + (pixel * FIRST + channel), value, mask)
        else:
            store(second + (pixel * SECOND + (channel - FIRST)), value, mask)


@triton.jit
def of_lanes(values, LANES: tl.constexpr, TOGETHER: tl.constexpr):
    """[groups] as [lanes]"""
    return tl.reshape(tl.broadcast_to(values[:, None], [TOGETHER, LANES]), [TOGETHER * LANES])


@triton.jit
def group_sum(values, LANES: tl.constexpr, TOGETHER: tl.constexpr):
    """Each lane's group's sum of [lanes]."""
    return of_lanes(tl.sum(tl.reshape(values, [TOGETHER, LANES]), 1), LANES, TOGETHER)


@triton.jit
def slab_sum(values, PIXELS: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr):
    """The groups' sums of [pixels, lanes]. The lanes go first, since a thread has several of a group."""
    return tl.sum(tl.sum(tl.reshape(values, [PIXELS, TOGETHER, LANES]), 2), 0)


@triton.jit
def vector(address, step, sample, channel, mask):
    """Numbers of a sample's channels, in fp32; 0 where the mask is false."""
    return tl.where(mask, load(address + (sample * step + channel), mask), 0.0)


@triton.jit
def affine(weight, bias, scale, shift, scale_step, shift_step, sample, channel, exists):
    """(factor, offset) of u = n * factor + offset"""
    factor = vector(weight, 0, sample, channel, exists)
    offset = vector(bias, 0, sample, channel, exists)
    if scale is not None:
        spread = 1.0 + vector(scale, scale_step, sample, channel, exists)
        factor = factor * spread
        offset = offset * spread + vector(shift, shift_step, sample, channel, exists)
    return factor, offset
