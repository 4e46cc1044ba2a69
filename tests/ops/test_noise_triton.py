"""The Triton kernels of the noise, run through Triton's interpreter: the same bits as plain torch, on a machine without
a GPU. Triton reads TRITON_INTERPRET when it is imported, so the variable is set from outside:

    TRITON_INTERPRET=1 python -m pytest -m interpreter
"""

import math
import os

import pytest
import torch

from ddpm_fast import noise
from ddpm_fast.noise import NoiseKey, Stream, normals
from ddpm_fast.ops import normal, use_backend

triton = pytest.importorskip("triton", reason="the package triton is not installed: pip install triton")
import triton.language as tl  # noqa: E402

from ddpm_fast.ops.backends.triton.noise import normal_pair  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run as: TRITON_INTERPRET=1 python -m pytest -m interpreter"
    ),
]

SHAPES = {
    "one element": (1,),
    "no multiple of 4": (61,),
    "1-D, over a block": (1024 + 7,),
    "one channel": (1, 9, 7),
    "no multiple of the block": (3, 17, 23),
    "many channels, one pixel": (70, 1, 1),
    "volume": (2, 3, 5, 7),
    "channels of more than a block, no multiple of it": (3, 40, 36),
    "channels of a block of one warp": (2, 17, 16),
    "a volume of the same": (3, 5, 8, 8),
}


def int32_bits(z: torch.Tensor) -> torch.Tensor:
    return z.contiguous().view(torch.int32)


@pytest.mark.parametrize("word", SHAPES)
def test_triton_equals_plain_torch_bit_for_bit(word):
    shape = SHAPES[word]
    key = NoiseKey.of(-77, 3, first_sample_id=2**32 - 2, step=2**31 + 5, stream=Stream.REVERSE)
    expected = int32_bits(normals(key, math.prod(shape)).view(3, *shape))
    with use_backend("triton"):
        assert torch.equal(int32_bits(normal(key, shape)), expected)
        if len(shape) in (3, 4):
            memory_format = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
            z = normal(key, shape, memory_format=memory_format)
            assert z.is_contiguous(memory_format=memory_format)
            assert torch.equal(int32_bits(z), expected)


@pytest.mark.parametrize(
    ("seed", "sample_id", "step", "stream"),
    [
        pytest.param(0, 0, 0, 0, id="all zero"),
        pytest.param(2**64 - 1, 2**56 - 1, 2**32 - 1, 255, id="all ones"),
        pytest.param(0x85EBCA6B << 32, 0, 0, 0, id="seed, high word"),
        pytest.param(1, 0xABCDEF << 32, 0, 7, id="sample id, high bits beside the stream"),
    ],
)
def test_key_and_counter_layout(seed, sample_id, step, stream):
    key = NoiseKey.of(seed, 1, first_sample_id=sample_id, step=step, stream=stream)
    with use_backend("triton"):
        assert torch.equal(int32_bits(normal(key, (64,))), int32_bits(normals(key, 64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(dtype):
    key = NoiseKey.of(5, 2)
    with use_backend("triton"):
        z = normal(key, (3, 8, 8), dtype=dtype)
    assert z.dtype == dtype and torch.equal(z, normals(key, 192).view(2, 3, 8, 8).to(dtype))


@triton.jit
def _pairs_kernel(words, z, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    word0 = tl.load(words + i).to(tl.uint32, bitcast=True)
    word1 = tl.load(words + BLOCK + i).to(tl.uint32, bitcast=True)
    z0, z1 = normal_pair(word0, word1)
    tl.store(z + i, z0)
    tl.store(z + BLOCK + i, z1)


def test_the_ends_of_the_radius_in_every_quadrant():
    # All ones: a radius of 0, whose normals are zeros of either sign. All zeros: the largest one, 5.77.
    radii, angles = [0xFFFFFFFF, 0xFFFFFF00, 0xFFFFFEFF, 0], [0, 0x20000000, 0x3FFFFFFF, 0x1FFFFFC0]
    words = torch.tensor([[r, q << 30 | a] for r in radii for a in angles for q in range(4)]).T.contiguous()
    z = torch.empty(2, words.shape[1])
    _pairs_kernel[(1,)](torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), z, words.shape[1])
    expected = torch.stack(noise.normal_pair(*words))
    assert (expected == 0).any() and expected.abs().max() > 5
    assert torch.equal(int32_bits(z), int32_bits(expected))


def test_an_empty_batch_launches_nothing():
    with use_backend("triton"):
        assert normal(NoiseKey.of(0, 0), (3, 4, 4)).shape == (0, 3, 4, 4)
