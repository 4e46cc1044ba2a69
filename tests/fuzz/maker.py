"""A call of an op, and the tensors for it: small, of every dtype, layout and number of dimensions."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.noise import NoiseKey
from tests.fuzz.guard import Guarded

F32, BF16, F16, F64, U8, I64 = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64
)  # fmt: skip
FLOATS = (F32, F32, F32, BF16, F16, F64)
SIZES = (0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 9, 16, 17, 33)
WILD = (float("nan"), float("inf"), float("-inf"), 1e10, -1e10, 3e4, 0.0, -0.0, 1e-40, 1.0)


@dataclass
class Call:
    """A call of an op: the function, its arguments by name, and how they are passed.

    Attributes:
        op: The op's name.
        direct: Whether torch.ops.ddpm_fast.<op> is called, and not the public function.
        arguments: By name, in the order of the registered op's schema or of the public function.
        positional: How many are passed by position; the public functions take the rest by name.
        written: The names of those that the op writes to.
        wild: Whether there are infinities, NaN or large numbers among the values.
        differentiable: The names of those that the op is differentiable in.
    """

    op: str
    direct: bool
    arguments: dict[str, Any]
    positional: int = 99
    written: Sequence[str] = ()
    wild: bool = False
    differentiable: Sequence[str] = ()

    def __call__(self) -> Any:
        function = getattr(torch.ops.ddpm_fast, self.op) if self.direct else getattr(ops, self.op)
        values = list(self.arguments.items())
        return function(*(v for _, v in values[: self.positional]), **dict(values[self.positional :]))

    def __str__(self) -> str:
        said = ", ".join(f"{name}={describe(value)}" for name, value in self.arguments.items())
        return f"{'torch.ops.ddpm_fast' if self.direct else 'ops'}.{self.op}({said}){' with wild values' * self.wild}"


def describe(value: Any) -> str:
    """A tensor by dtype, shape, strides and offset; anything else as it is."""
    if isinstance(value, NoiseKey):
        key = f"{describe(value.seed)}, {describe(value.sample_id)}, {describe(value.step)}, {int(value.stream)}"
        return f"NoiseKey({key})"
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return f"{value!r:.60}"
    if value.ndim == 0 and value.device.type == "cpu":
        return f"{value.item()!r} ({value.dtype})"
    words = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if not value.is_contiguous():
        words += f" strides {list(value.stride())}"
    if value.storage_offset() * value.element_size() != 64 and value.device.type == "cpu":
        words += f" at {value.storage_offset()}"
    if value.device.type != "cpu":
        words += f" on {value.device}"
    if value.dtype == I64 and value.ndim == 1 and value.device.type == "cpu":
        words += f" {value.tolist()[:4]}"
    return words + " requires grad" * value.requires_grad


class Maker:
    """Makes the tensors of one case."""

    def __init__(self, rng: random.Random, guarded: Guarded):
        self.rng, self.guarded = rng, guarded
        self.wild = rng.random() < 0.1
        # torch.manual_seed also notes where it was called from, for CUDA, which takes longer than all the rest.
        torch.default_generator.manual_seed(rng.getrandbits(31))
        self.most = rng.choice((100, 300, 3000))  # elements

    def shape(self) -> tuple[int, ...]:
        """[N, C, ...] of at most self.most elements, seldom without any."""
        rng = self.rng
        dimensions = rng.choice((2, 3, 4, 4, 4, 4, 5))
        while True:
            shape = tuple(rng.choice(SIZES) for _ in range(dimensions))
            elements = functools.reduce(lambda a, b: a * b, shape)
            if elements <= self.most and (elements or rng.random() < 0.3):
                return shape

    def laid_out(self, values: Tensor) -> Tensor:
        """The values in a random layout, between red zones."""
        rng, shape = self.rng, values.shape
        kind = rng.choice(("contiguous", "contiguous", "channels_last", "channels_last", "sliced", "permuted"))
        if not values.numel():
            kind = "contiguous"
        order = list(range(values.ndim))
        if kind == "channels_last" and values.ndim > 2:
            order = [0, *order[2:], 1]
        elif kind == "permuted":
            rng.shuffle(order)
        strides, step = [0] * values.ndim, 2 if kind == "sliced" else 1
        for d in reversed(order):
            strides[d] = step
            step *= max(1, shape[d])
        return self.guarded.tensor(values, strides, offset=rng.choice((0, 0, 0, 1)))

    def image(self, shape: Sequence[int], dtype: torch.dtype | None = None, wild: bool | None = None) -> Tensor:
        """Numbers about the size of an image's, some of them wild."""
        rng = self.rng
        dtype = dtype or rng.choice(FLOATS)
        if dtype == U8:
            return self.laid_out(torch.randint(0, 256, shape, dtype=U8))
        values = torch.randn(tuple(shape))
        if (self.wild if wild is None else wild) and values.numel():
            flat = values.view(-1)
            for _ in range(rng.choice((1, 2, 5))):
                flat[rng.randrange(len(flat))] = rng.choice(WILD)
        return self.laid_out(values.to(dtype))

    def plain(self, values: Tensor) -> Tensor:
        """The values contiguous, between red zones."""
        return self.guarded.tensor(values, values.contiguous().stride())

    def number(self, value: int) -> Tensor:
        return self.plain(torch.tensor(value, dtype=I64))

    def key(self, n: int) -> NoiseKey:
        rng = self.rng
        first = rng.choice((0, 1, 5, 2**32 - 1, 2**33, 2**56 - n, rng.randrange(2**40)))
        ids = torch.arange(first, first + n, dtype=I64)
        if rng.random() < 0.2:
            ids = ids.flip(0)
        sample_id = self.guarded.tensor(ids, (rng.choice((1, 1, 1, 2)),))
        seed = rng.choice((0, 1, -1, 2**63 - 1, -(2**63), rng.getrandbits(62)))
        return NoiseKey(self.number(seed), sample_id, self.number(rng.choice((0, 3, 2**32 - 1))), rng.randrange(256))

    def noise(self, shape: Sequence[int]) -> Tensor | NoiseKey:
        return self.key(shape[0]) if self.rng.random() < 0.4 else self.image(shape)

    def timesteps(self, n: int, rows: int) -> Tensor:
        t = torch.randint(0, rows, (n,))
        return self.guarded.tensor(t, (self.rng.choice((1, 1, 2)),))

    def table(self, values: Tensor) -> Tensor:
        """The table in fp32 or float64, in a random layout."""
        dtype = self.rng.choice((F32, F32, F64))
        return self.laid_out(values.to(dtype)) if self.rng.random() < 0.3 else self.plain(values.to(dtype))
