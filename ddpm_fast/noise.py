"""Noise as a pure function: a standard normal value depends on (seed, stream, sample, step, element) and nothing else.

Philox4x32-10 (Salmon et al. 2011) turns a counter into random bits, and a portable Box-Muller transform turns the bits
into standard normals. csrc/philox.h does the same in C++ for the CPU and the GPU; this file does it in plain torch. All
give the same bits on every device, because each operation is an integer operation or a single correctly rounded fp32
multiplication, addition or square root.

    key     = seed, low word first
    counter = (element // 4, sample id low 32 bits, step, stream | sample id high 24 bits << 8)
    lane    = element % 4, where element is the logical NCHW index inside the sample

A dropout mask has a stream of its own, DROPOUT, and 16 bits for each element, so that one counter serves eight. Its
elements are counted as they lie in channels_last memory. The layer's number stands in the place of the step, because
every training step has samples of its own already: training examples are numbered through.

    element = pixel * C + channel, where pixel is the index over the trailing dimensions
    counter = (element // 8, sample id low 32 bits, layer, stream | sample id high 24 bits << 8)
    bits    = the lower (element even) or upper half of word element % 8 // 2
    dropped = bits < round(share * 2^16); what is kept is divided by the share that is kept
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import count

import torch
from torch import Tensor

from ddpm_fast.errors import InputError, check_integer
from ddpm_fast.wide import wide

MASK32 = 0xFFFFFFFF
MAX_ELEMENTS = 2**34  # per sample, because element // 4 is one 32-bit word of the counter
MAX_SAMPLE_ID = 2**56


class Stream(IntEnum):
    """What a random number is for. Draws for different purposes never share a counter. The values must never change."""

    INITIAL = 0  # x_T, where sampling starts
    REVERSE = 1  # the noise z that a sampler row adds
    TRAINING = 2  # eps of the training loss
    TIMESTEP = 3  # t of the training loss
    LABEL = 4  # which training labels are dropped, and which classes are sampled
    USER = 5  # q_sample and the losses when a user calls them
    KNOWN = 6  # eps that inpainting adds to the known pixels
    EVALUATION = 7  # eps of the variational bound
    DROPOUT = 8  # which elements a network's layers drop in training


@dataclass(frozen=True)
class NoiseKey:
    """Identifies the noise of a batch: everything that a standard normal depends on, except the element.

    The tensors live on the device where the noise is wanted. So nothing is copied when the noise is generated, and a
    CUDA graph can advance `step` in place.

    Attributes:
        seed: int64 scalar tensor. All 64 bits are used.
        sample_id: int64 [N], each in 0..2^56-1. The ids are global; they are not positions in the batch.
        step: int64 scalar tensor, in 0..2^32-1, such as the training step or the sampler row.
        stream: An int in 0..255; see Stream.
        made_of: The integers (seed, step, first sample id) that `of` made the key from, or None for a key that was made
            from tensors. They stay what they were if a loop advances `step` in place.

    Raises:
        InputError: If a field has another type, dtype, number of dimensions, device or range.
    """

    seed: Tensor
    sample_id: Tensor
    step: Tensor
    stream: int = Stream.USER
    made_of: tuple[int, int, int] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value, ndim in (("seed", self.seed, 0), ("step", self.step, 0), ("sample_id", self.sample_id, 1)):
            if not isinstance(value, Tensor):
                raise InputError(
                    f"NoiseKey.{name} is a {type(value).__name__}; expected an int64 tensor. NoiseKey.of(seed, n) "
                    "makes a key from integers."
                )
            if value.dtype != torch.int64 or value.ndim != ndim or value.layout is not torch.strided:
                raise InputError(
                    f"NoiseKey.{name} is {value.dtype} of shape {tuple(value.shape)}; expected dense int64 with {ndim} "
                    "dimensions. NoiseKey.of(seed, n) makes one from integers."
                )
            if value.device != self.seed.device:
                raise InputError(
                    f"NoiseKey.{name} is on {value.device} but its seed on {self.seed.device}: put both on one device"
                )
        if not isinstance(self.stream, int) or isinstance(self.stream, bool) or not 0 <= self.stream < 256:
            object.__setattr__(self, "stream", check_integer("NoiseKey.stream", self.stream, 0, 255))

    @classmethod
    def of(
        cls,
        seed: int,
        n: int,
        *,
        first_sample_id: int = 0,
        step: int = 0,
        stream: int = Stream.USER,
        device: torch.device | str = "cpu",
    ) -> NoiseKey:
        """The key of samples first_sample_id .. first_sample_id + n - 1, from plain integers.

        The same numbers give the same noise. A training loop needs a key for each of its steps: see each_step.

        Args:
            seed: Any integer of 64 bits, signed or unsigned.
            n: The number of samples, 0 or more.
            first_sample_id: The id of the first sample.
            step: In 0..2^32-1. Pass another one at each iteration to get other noise.
            stream: See Stream.
            device: Where the noise will be generated.

        Raises:
            InputError: If a number is no integer or out of range.
        """
        seed = check_integer("seed", seed, -(2**63), 2**64 - 1)
        n = check_integer("n", n, 0, MAX_SAMPLE_ID)
        first_sample_id = check_integer("first_sample_id", first_sample_id, 0, MAX_SAMPLE_ID)
        step = check_integer("step", step, 0, MASK32)
        if first_sample_id + n > MAX_SAMPLE_ID:
            raise InputError(
                f"samples {first_sample_id}..{first_sample_id + n - 1}: ids must lie in 0..{MAX_SAMPLE_ID - 1}"
            )
        signed = seed - 2**64 if seed >= 2**63 else seed
        key = cls(
            # torch.full fills on the device. torch.tensor would copy from the host and wait for the copy.
            seed=torch.full((), signed, dtype=torch.int64, device=device),
            sample_id=torch.arange(first_sample_id, first_sample_id + n, dtype=torch.int64, device=device),
            step=torch.full((), step, dtype=torch.int64, device=device),
            stream=check_integer("stream", stream, 0, 255),
        )
        object.__setattr__(key, "made_of", (signed, step, first_sample_id))
        return key

    @classmethod
    def each_step(
        cls,
        seed: int,
        n: int,
        *,
        first_step: int = 0,
        first_sample_id: int = 0,
        stream: int = Stream.USER,
        device: torch.device | str = "cpu",
    ) -> Iterator[NoiseKey]:
        """A key for each step of a loop, without end: those of first_step, first_step + 1 and so on.

            for images, key in zip(batches, NoiseKey.each_step(seed=0, n=64)):
                ...  # one training step, with noise of its own

        A loop that is resumed after k steps goes on with first_step=k. Every key is new, so that the noise of a step
        can still be drawn again in its backward.

        Args:
            seed: As in `of`, and so are n, first_sample_id, stream and device.
            n: The number of samples in each batch.
            first_step: The step of the first key.
            first_sample_id: The id of the first sample of each batch.
            stream: See Stream.
            device: Where the noise will be generated.

        Raises:
            InputError: Where `of` does.
        """

        def at(step: int) -> NoiseKey:
            return cls.of(seed, n, first_sample_id=first_sample_id, step=step, stream=stream, device=device)

        at(first_step)  # so that what is wrong shows here, and not in the middle of a zip
        return map(at, count(first_step))


def philox4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words for each counter.

    Args:
        counter: Four int64 tensors that hold 0..2^32-1 and broadcast with each other and the key.
        key: Two int64 tensors that hold 0..2^32-1.

    Returns:
        Four int64 tensors that hold 0..2^32-1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words may overflow int64, but its 64 bits are right if they are read as unsigned.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK32) ^ c1 ^ k0,
            p1 & MASK32,
            ((p0 >> 32) & MASK32) ^ c3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def random_words(key: NoiseKey, counters: int) -> Tensor:
    """The random words of counters 0..counters-1 for each sample: int64 [N, counters, 4] in 0..2^32-1."""
    first = torch.arange(counters, dtype=torch.int64, device=key.seed.device)[None, :]
    ids = key.sample_id[:, None]
    words = philox4x32_10(
        (first, ids & MASK32, (key.step & MASK32).expand(1, 1), (ids >> 32 & 0xFFFFFF) << 8 | key.stream),
        (key.seed & MASK32, key.seed >> 32 & MASK32),
    )
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def dropout_bits(key: NoiseKey, layer: int, elements: int) -> Tensor:
    """16 random bits for each element of a layer's image: int64 [N, elements] in 0..65535, in the order of a dropout
    mask. Of the key, seed and sample ids count."""
    step = torch.full((), layer, dtype=torch.int64, device=key.seed.device)
    words = random_words(replace(key, step=step, stream=Stream.DROPOUT), (elements + 7) // 8)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, :elements]


def uniform_integers(key: NoiseKey, high: int) -> Tensor:
    """One integer in 0..high-1 for each sample: int64 [N].

    high is at most 2^31. The probability of each integer is off by at most high / 2^32, relatively.
    """
    return random_words(key, 1)[:, 0, 0] * high >> 32


# The coefficients, after the first, of the polynomial for -2 ln(1 + f) / f.
_LOGARITHM = (0.286895365, -0.297421604, 0.331324518, -0.399321407, 0.500034630, -0.666676760, 1.0, -2.0)


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u) with u = (word // 256 + 1) / 2^24 in (0, 1]. See box_muller_radius in csrc/philox.h."""
    bits = ((word >> 8) + 1).to(torch.float32).view(torch.int32) + (0x3F800000 - 0x3F3504F3)
    n = (24 + 127 - (bits >> 23)).to(torch.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    q = torch.full_like(f, -0.178547591)
    for coefficient in _LOGARITHM:
        q = q * f + coefficient
    # torch.sqrt in fp32 is not correctly rounded on every CPU (MKL's is off by one unit in the last place in 0.6% of
    # cases). The square root in float64, rounded to fp32, is. A device without float64 may be off by that one unit.
    return torch.sqrt((n * 1.38629436 + q * f).to(wide(word.device))).float()


def normal_pair(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals, fp32, from two random words by Box-Muller. csrc/philox.h has the same function in C++."""
    radius = _radius(word0)
    # The 24 bits below the two bits of the quadrant, as a signed number.
    steps = ((word1 >> 6 & 0xFFFFFF) ^ 0x800000) - 0x800000
    x = (2 * steps + 1).to(torch.float32) * 4.681338e-08
    x2 = x * x
    sine = (x2 * -0.000195175919 + 0.00833218079) * x2 + -0.166666552
    sine = sine * x2 * x + x
    cosine = (x2 * 2.44385519e-05 + -0.00138873688) * x2 + 0.0416666456
    cosine = (cosine * x2 + -0.5) * x2 + 1.0
    quadrant = word1 >> 30
    odd = (quadrant & 1).bool()
    z0 = radius * torch.where(odd, sine, cosine)
    z1 = radius * torch.where(odd, cosine, sine)
    return torch.where((quadrant ^ quadrant >> 1).bitwise_and(1).bool(), -z0, z0), torch.where(quadrant > 1, -z1, z1)


def normals(key: NoiseKey, elements: int) -> Tensor:
    """Standard normals, fp32 [N, elements], in plain torch. Every backend is tested against this function."""
    words = random_words(key, (elements + 3) // 4)
    z0, z1 = normal_pair(words[..., 0], words[..., 1])
    z2, z3 = normal_pair(words[..., 2], words[..., 3])
    return torch.stack((z0, z1, z2, z3), dim=-1).flatten(1)[:, :elements]
