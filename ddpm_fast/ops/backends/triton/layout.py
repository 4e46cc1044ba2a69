"""How the kernels go over a batch of images: which elements a program has, where they lie, and how they are stored.

A program has a block of counters of one sample. A counter stands for four consecutive elements in the logical NCHW
order, so that Philox runs once for four normals. The four are in one thread: contiguous operands are read and written
16 bytes at a time where the sample's size allows. Offsets within a sample are 32-bit where they fit and 64-bit
otherwise; those of samples are always 64-bit.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops.tensors import is_channels_last, unpack_noise

WARPS = 4
LEAST_TILE = 64  # counters of a channel from which it gets programs of its own
WIDE_OFFSETS = 2**29  # elements of a sample from which the last offset, of two groups of channels, may need 64 bits
MAX_GRID_Y = 65535
# Arguments that vary without a difference to the code: no kernel is compiled anew for a batch of one.
VARYING = ("samples", "vectors", "channels", "positions", "stream", "rows")
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Launch:
    """A launch over images [N, C, ...] that have the shape of the first one.

    `order` says which elements a block has: "flat", consecutive ones, where all images are contiguous; "tiled",
    consecutive positions of one channel, where some are channels_last; "scattered", consecutive elements whose channels
    and positions are found by division, where channels are small or not a multiple of 4 positions.

    Args:
        image: gives the shape.
        others: the other operands; None for one that the call does not have.
        drawn: whether the kernel draws noise.
        counters: how many counters a thread has.
    """

    def __init__(self, image: Tensor, *others: Tensor | None, drawn: bool, counters: int = 2):
        images = [image, *(x for x in others if x is not None)]
        self.samples, self.elements = image.shape[0], math.prod(image.shape[1:])
        self.channels = image.shape[1] if image.ndim > 1 else 1
        self.positions = self.elements // max(1, self.channels)
        self.order, self.block, self._warp = "flat", 32 * WARPS * counters, 32 * counters
        if any(is_channels_last(x) for x in images):
            self.order = "scattered"
            if self.positions % 4 == 0 and self.positions >= 4 * LEAST_TILE:
                self.order = "tiled"
                self.block = min(self.block, triton.next_power_of_2(self.positions // 4))
        # What a thread reads at once must divide a sample. A counter gives it four elements; without one it takes as
        # many as fill 16 bytes of the largest type.
        self.vector = math.gcd(self.elements, 4 if drawn else 16 // max(x.itemsize for x in images))

    @property
    def empty(self) -> bool:
        return self.samples == 0 or self.elements == 0

    @property
    def blocks(self) -> int:
        """Blocks of a sample."""
        if self.order == "tiled":
            return self.channels * triton.cdiv(self.positions, 4 * self.block)
        return triton.cdiv(self.elements, 4 * self.block)

    def grid(self, per_sample: int) -> tuple[int, int, int]:
        """Programs [per_sample, samples]."""
        return grid_over(self.samples, per_sample)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The kernels' `samples, vectors, channels, positions`."""
        return self.samples, self.elements // self.vector, self.channels, self.positions

    @property
    def choices(self) -> dict[str, object]:
        """The kernels' constexpr arguments, and how they are launched."""
        return {
            "VECTOR": self.vector,
            "ORDER": self.order,
            "LARGE": self.elements >= WIDE_OFFSETS,
            "BLOCK": self.block,
            "num_warps": self.block // self._warp,
            "enable_fp_fusion": False,
        }


def grid_over(samples: int, per_sample: int) -> tuple[int, int, int]:
    """Programs [per_sample, samples], the samples over two dimensions of at most 65535. See sample_of."""
    third = triton.cdiv(samples, MAX_GRID_Y)
    return per_sample, triton.cdiv(samples, third), third


def last(image: Tensor | None) -> bool:
    return image is not None and is_channels_last(image)


def device_of(image: Tensor) -> AbstractContextManager:
    """The context to launch in: Triton takes the current device, which may be another one than the image's."""
    return torch.cuda.device(image.device if image.is_cuda else -1)


def noise_arguments(noise: Tensor | NoiseKey) -> tuple:
    """The kernels' `noise, seed, sample_id, step_id, stream`: what is not there is None, and no code is made for it."""
    *tensors, stream = unpack_noise(noise)
    return *tensors, int(stream)


@triton.jit
def sample_of(samples):
    """The program's sample (int64). Where the grid has a few programs too many, these do the last sample again."""
    sample = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    return tl.minimum(sample, samples - 1)


@triton.jit
def spare(samples):
    """Whether the program is one too many. A kernel that works in place must not do the last sample twice."""
    return tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * tl.num_programs(1) >= samples


@triton.jit
def row_at(table, index, rows, COLUMNS: tl.constexpr):
    """(where row `index` of a table starts, whether there is such a row)

    For an index outside of the table the CPU raises an error. On a GPU a check would have to wait for it, so a kernel
    makes NaN of the other row that it gets here."""
    inside = (index >= 0) & (index < rows)
    return table + COLUMNS * tl.where(inside, index, 0), inside


@triton.jit
def elements_of(vectors, VECTOR: tl.constexpr, LARGE: tl.constexpr):
    """The elements of a sample, as a product, so that the compiler sees what divides them."""
    if LARGE:
        return vectors.to(tl.int64) * VECTOR
    else:
        return vectors * VECTOR


@triton.jit
def place(block, elements, channels, positions, ORDER: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr):
    """(a block's counters [BLOCK], its elements [4 BLOCK], whether these exist, their channels, their positions)

    Channels and positions are right where some operand may be channels_last, and not used elsewhere."""
    if LARGE:
        block = block.to(tl.int64)
    if ORDER == "tiled":
        # Neighbouring programs have neighbouring channels, so together they use whole cache lines.
        tile = block // channels
        channel = block - tile * channels
        quads = positions // 4
        counter = channel * quads + tile * BLOCK + tl.arange(0, BLOCK)
        position = tile * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
        return counter, channel * (quads * 4) + position, position < quads * 4, channel, position
    else:
        counter = block * BLOCK + tl.arange(0, BLOCK)
        element = block * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
        channel, position = element, element
        if ORDER == "scattered":
            channel = element // positions
            position = element - channel * positions
        return counter, element, element < elements, channel, position


@triton.jit
def offset_of(element, channel, position, channels, LAST: tl.constexpr):
    """Where elements of a sample of so many channels lie in its memory."""
    if LAST:
        return position * channels + channel
    else:
        return element


@triton.jit
def load(address, mask):
    """In fp32; uint8 pixels 0..255 become -1..1."""
    value = tl.load(address, mask=mask)
    if address.dtype.element_ty == tl.uint8:
        value = value.to(tl.float32)
        # The same bits as value / 127.5 - 1 for each of the 256, without a division: the first product is exact.
        return value * 0.0078125 + value * 3.06372573e-05 - 1.0
    elif INTERPRETED and address.dtype.element_ty == tl.bfloat16:  # the interpreter would take subnormals for 0
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _bf16_bits(value):
    """Those of the nearest bf16 number, for the interpreter, whose conversion truncates."""
    bits = value.to(tl.uint32, bitcast=True)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest).to(tl.uint16)


@triton.jit
def store(address, value, mask):
    """Rounded once, to nearest even."""
    dtype = address.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        tl.store(address, _bf16_bits(value).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(address, value.to(dtype), mask=mask)


@triton.jit
def store_and_read(address, value, mask):
    """store(), and the fp32 value of what was stored."""
    dtype = address.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        store(address, value, mask)
        return (_bf16_bits(value).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        stored = value.to(dtype)
        tl.store(address, stored, mask=mask)
        return stored.to(tl.float32)
