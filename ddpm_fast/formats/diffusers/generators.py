"""The noise of a sampling loop that is given torch's generators: a NoiseKey for each of its steps.

Other libraries say which noise they want by a torch.Generator, and draw from it as they go, so that their noise depends
on the batch and on the device. Here the generator's seed alone counts: sample i of the batch at row k of the loop has
the noise of (seed, sample id i, step k), as in this package's own loops. From a list of generators each sample has a
seed of its own, and the sample id 0, as if it were alone.

A loop that draws noise moves the generator on to another seed, since somebody who draws again from the same generator
expects other images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor

from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.ops.tensors import is_channels_last

Generators = Generator | Sequence[Generator] | None

# 2^64 / golden ratio, made odd: from seed to seed. Seeds that people choose are never a few such steps apart.
_TO_NEXT_SEED = 0x9E3779B97F4A7C15


@dataclass
class _Source:
    """A seed, and how often each row asked for its noise. left: the seed that its generator was moved on to."""

    seed: int
    left: int | None = None
    key: NoiseKey | None = None
    visits: Counter[int] = field(default_factory=Counter)


class LoopNoise:
    """The noise of one loop of `rows` sampling steps.

    Without a generator, a seed is drawn from torch's global generator of the CPU at the first step that wants noise.
    A row that is taken again gets new noise: the step number of its k-th time is row + k * rows.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._sources: WeakKeyDictionary[Generator, _Source] = WeakKeyDictionary()
        self._own: _Source | None = None
        self._silence = _Source(0)

    def __reduce__(self) -> tuple[type[LoopNoise], tuple[int]]:
        """A copy starts afresh: generators are not copied."""
        return LoopNoise, (self._rows,)

    def draw(self, generator: Generators, row: int, x: Tensor) -> Tensor | NoiseKey:
        """The noise of a step, for ops.reverse_step.

        Args:
            generator: A generator, one for each sample, or None.
            row: The number of the step, in 0..rows-1.
            x: The state [N, C, ...]: its shape, device and memory format count.

        Raises:
            InputError: For another number of generators than samples, and for what is no generator.
        """
        if isinstance(generator, Sequence):
            if len(generator) != 1 and len(generator) != len(x):
                raise InputError(
                    f"{len(generator)} generators for a batch of {len(x)}: give one generator, or one for each sample"
                )
            if len(generator) != 1:
                return self._each(generator, row, x)
            (generator,) = generator
        return self._key(generator, row, len(x), x.device)

    def _each(self, generators: Sequence[Generator], row: int, x: Tensor) -> Tensor:
        """fp32, shaped like x: each sample's noise of its own seed."""
        memory_format = torch.contiguous_format
        if is_channels_last(x):
            memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        shape = tuple(x.shape[1:])
        keys = [self._key(generator, row, 1, x.device) for generator in generators]
        return torch.cat([ops.normal(key, shape, memory_format=memory_format) for key in keys])

    def none(self, x: Tensor) -> NoiseKey:
        """A key for a step that adds no noise, of as many samples as x has."""
        return self._on(self._silence, len(x), x.device)

    def _key(self, generator: Generator | None, row: int, n: int, device: torch.device) -> NoiseKey:
        source = self._source(generator)
        step = row + source.visits[row] * self._rows
        source.visits[row] += 1
        key = self._on(source, n, device)
        # Filled on the device: a number of the host's would be copied, and waited for.
        return replace(key, step=torch.full((), step, dtype=torch.int64, device=device))

    def _on(self, source: _Source, n: int, device: torch.device) -> NoiseKey:
        """The key of n samples of a seed. The latest one is kept, whose tensors all steps share."""
        key = source.key
        if key is None or len(key.sample_id) != n or key.seed.device != device:
            with torch.inference_mode(False):  # kept for calls that need a gradient
                key = source.key = NoiseKey.of(source.seed, n, stream=Stream.REVERSE, device=device)
        return key

    def _source(self, generator: Generator | None) -> _Source:
        if generator is None:
            if self._own is None:
                self._own = _Source(int(torch.randint(2**63 - 1, (), device="cpu")))
            return self._own
        if not isinstance(generator, Generator):
            raise InputError(
                f"generator is a {type(generator).__name__}; expected a torch.Generator, or a list of them"
            )
        seed = generator.initial_seed()
        source = self._sources.get(generator)
        if source is None or source.left != seed:  # another seed: somebody has set it anew
            left = (seed + _TO_NEXT_SEED) % 2**64
            source = self._sources[generator] = _Source(seed, left)
            generator.manual_seed(left)
        return source
