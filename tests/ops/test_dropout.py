"""dropout on every backend: masks by an independent Philox from counters written by hand, the statistics of the masks,
gradients with the mask given, and what does not depend on the batch."""

import math

import numpy as np
import pytest
import torch

from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import use_backend

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
STREAM = 8
WORD = 0xFFFFFFFF
FORMATS = ("contiguous", "channels_last")


def in_format(x: torch.Tensor, memory_format: str) -> torch.Tensor:
    if memory_format == "contiguous":
        return x
    return x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim])


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 of Salmon et al. 2011 in Python's integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k0, q & WORD, (p >> 32) ^ d ^ k1, p & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return a, b, c, d


def bits_by_hand(seed: int, sample_id: int, layer: int, channels: int, pixels: int) -> np.ndarray:
    """[channels, pixels]: the 16 bits of each element of a sample."""
    bits = np.empty((channels, pixels), dtype=np.int64)
    key = seed & WORD, seed >> 32 & WORD
    for pixel in range(pixels):
        for channel in range(channels):
            element = pixel * channels + channel
            words = philox((element // 8, sample_id & WORD, layer, sample_id >> 32 << 8 | STREAM), key)
            word = words[element % 8 // 2]
            bits[channel, pixel] = word >> 16 if element % 2 else word & 0xFFFF
    return bits


def test_philox_by_hand_gives_the_known_answers():
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((WORD,) * 4, (WORD, WORD)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_mask_by_hand(backend, memory_format):
    seed, ids, layer, share = -(2**40) - 5, [2**55 + 3, 2**31], 2**32 - 2, 0.3
    dropped = 19661  # round(0.3 * 65536)
    key = NoiseKey(torch.tensor(seed), torch.tensor(ids), torch.tensor(99), stream=1)
    x = in_format(torch.randn(2, 3, 5, 7), memory_format)
    bits = np.stack([bits_by_hand(seed % 2**64, each, layer, 3, 35) for each in ids]).reshape(2, 3, 5, 7)
    scale = np.float32(65536 / (65536 - dropped))
    expected = np.where(bits >= dropped, x.numpy() * scale, np.float32(0))
    found = ops.dropout(x, key, layer, share)
    assert np.array_equal(found.numpy(), expected)
    assert found.stride() == x.stride()


# Shapes with a word each, for what may go wrong at them.
SHAPES = {
    "one element": (1, 1, 1, 1),
    "several blocks of bits": (2, 40, 5, 5),
    "whole accesses": (2, 16, 4, 4),
    "more channels than a run": (1, 300, 2, 1),
    "a vector": (3, 17),
    "a sequence": (2, 6, 11),
    "a volume": (2, 3, 2, 3, 5),
    "three pixels, as colour has channels": (2, 8, 3, 1),
    "no sample": (0, 3, 4, 4),
    "no pixel": (2, 3, 0, 4),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("word", SHAPES)
def test_the_same_bits_on_every_backend(backend, word, dtype):
    shape = SHAPES[word]
    key = NoiseKey.of(11, shape[0], first_sample_id=2**33 - 1)
    for memory_format in FORMATS if len(shape) in (4, 5) else ["contiguous"]:
        x = in_format(torch.randn(shape).to(dtype), memory_format)
        found = ops.dropout(x, key, 3, 0.4)
        with use_backend("reference"):
            expected = ops.dropout(x, key, 3, 0.4)
        assert torch.equal(found, expected) and found.dtype == dtype and found.stride() == expected.stride()


def test_the_same_bits_by_every_instruction_set(isa):
    x, key = torch.randn(3, 72, 9, 9), NoiseKey.of(5, 3)
    expected = {}
    for memory_format in FORMATS:
        image = in_format(x, memory_format)
        found = ops.dropout(image, key, 1, 0.2)
        with use_backend("reference"):
            expected[memory_format] = ops.dropout(image, key, 1, 0.2)
        assert torch.equal(found, expected[memory_format])
    assert torch.equal(*expected.values())


def test_what_is_kept_is_rounded_once(backend):
    x, key = torch.randn(2, 8, 4, 4), NoiseKey.of(0, 2)
    for dtype in (F32, BF16, F16):
        image = x.to(dtype)
        found = ops.dropout(image, key, 0, 0.1)
        kept = found != 0
        expected = torch.from_numpy(image.float().numpy() * np.float32(65536 / (65536 - 6554))).to(dtype)
        assert 200 < kept.sum() < 256 and torch.equal(found[kept], expected[kept])


def test_nothing_and_everything_dropped(backend):
    x, key = torch.randn(2, 8, 4, 4), NoiseKey.of(0, 2)
    assert torch.equal(ops.dropout(x, key, 0, 0.0), x)
    assert torch.equal(ops.dropout(x, key, 0, 1.0), torch.zeros_like(x))


def test_an_infinity_is_dropped_to_zero(backend):
    found = ops.dropout(torch.full((1, 64), math.inf), NoiseKey.of(0, 1), 0, 0.5)
    assert set(found.flatten().tolist()) == {0.0, math.inf}


def test_a_batch_of_eight_is_two_of_four(backend):
    x = torch.randn(8, 24, 3, 3).contiguous(memory_format=torch.channels_last)
    whole = ops.dropout(x, NoiseKey.of(1, 8, first_sample_id=100), 2, 0.3)
    parts = [ops.dropout(x[i : i + 4], NoiseKey.of(1, 4, first_sample_id=100 + i), 2, 0.3) for i in (0, 4)]
    assert torch.equal(whole, torch.cat(parts))


def test_threads_change_nothing():
    x, key, before = torch.randn(4, 64, 16, 16), NoiseKey.of(1, 4), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(ops.dropout(x, key, 2, 0.3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_ids_that_are_not_side_by_side_and_advance_in_place():
    x, every = torch.randn(3, 8, 2, 2), torch.arange(10, 16)
    key = NoiseKey(torch.tensor(4), every[::2], torch.tensor(0))
    for step in range(2):
        ids = range(10 + 6 * step, 16 + 6 * step, 2)
        each = [
            ops.dropout(x[i : i + 1], NoiseKey.of(4, 1, first_sample_id=number), 0, 0.5) for i, number in enumerate(ids)
        ]
        assert torch.equal(ops.dropout(x, key, 0, 0.5), torch.cat(each))
        every.add_(6)


# --- statistics


def masks(layers, share, n=64, channels=16, seed=0):
    """Masks of 1 (kept) and 0, fp64 [layers, n, channels * 16 * 16]."""
    x, key = torch.ones(n, channels, 16, 16), NoiseKey.of(seed, n)
    return torch.stack([(ops.dropout(x, key, layer, share) != 0).double().flatten(1) for layer in range(layers)])


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(share):
    kept = masks(2, share)
    deviation = math.sqrt(share * (1 - share) / kept.numel())
    assert abs(1 - kept.mean() - share) < 4 * deviation + 2**-17


def test_the_mean_stays_what_it_was():
    found = ops.dropout(torch.ones(64, 16, 32, 32), NoiseKey.of(0, 64), 0, 0.3).double()
    assert abs(found.mean() - 1) < 4 * math.sqrt(0.3 / 0.7 / found.numel())


def correlation(one, other):
    """In standard deviations of what independent masks have."""
    a, b = one - one.mean(), other - other.mean()
    return ((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt() * math.sqrt(a.numel())).abs().item()


def test_layers_samples_elements_and_seeds_are_independent():
    kept, other_seed = masks(2, 0.3), masks(1, 0.3, seed=1)
    assert correlation(kept[0], kept[1]) < 4.5
    assert correlation(kept[0], other_seed[0]) < 4.5
    for distance in (1, 2, 31):
        assert correlation(kept[0, distance:], kept[0, :-distance]) < 4.5
    image = kept[0].view(64, 16, 256)
    for distance in (1, 2, 4, 7, 8):
        assert correlation(image[:, distance:], image[:, :-distance]) < 4.5  # channels
        assert correlation(image[..., distance:], image[..., :-distance]) < 4.5  # pixels
    counts = kept.sum((0, 1))  # of each element over layers and samples
    assert abs(counts.var() / (2 * 64 * 0.21) - 1) < 5 * math.sqrt(2 / counts.numel())


def test_no_normal_has_a_counter_of_the_mask():
    """The stream is the masks' own: 16 bits of a word of another stream would drop other elements."""
    ones = torch.ones(1, 64)
    found = [ops.dropout(ones, NoiseKey.of(0, 1, stream=stream), 0, 0.5) for stream in (0, 8)]
    assert torch.equal(*found)  # the key's own stream does not count
    other = np.array([philox((e // 8, 0, 0, 5), (0, 0))[e % 8 // 2] >> 16 * (e % 2) & 0xFFFF for e in range(64)])
    assert not np.array_equal(other >= 32768, found[0][0].numpy() != 0)


# --- gradients


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_gradient_is_that_of_the_given_mask(backend, dtype):
    x, key = torch.randn(2, 8, 3, 5), NoiseKey.of(2, 2)
    mask = (ops.dropout(torch.ones_like(x), key, 4, 0.25) != 0).double() / 0.75
    wide = x.to(dtype).double().requires_grad_()
    probe = torch.randn(x.shape).to(dtype)
    (expected,) = torch.autograd.grad((wide * mask).pow(2), wide, probe.double())
    leaf = x.to(dtype).requires_grad_()
    (found,) = torch.autograd.grad(ops.dropout(leaf, key, 4, 0.25).pow(2), leaf, probe)
    torch.testing.assert_close(found.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-7)


def test_derivatives_of_any_order_in_float64():
    x, key = torch.randn(2, 4, 3, dtype=F64, requires_grad=True), NoiseKey.of(0, 2)

    def run(x):
        return ops.dropout(x, key, 1, 0.3) ** 3

    assert torch.autograd.gradcheck(run, x) and torch.autograd.gradgradcheck(run, x)


def test_nothing_of_the_images_size_is_kept_for_the_backward():
    kept = []
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
        ops.dropout(x, NoiseKey.of(0, 2), 0, 0.5)
    assert sum(kept) == 1 + 2  # the seed and the ids


# --- what is refused

X, KEY = torch.zeros(2, 3, 4), NoiseKey.of(0, 2)
REFUSED = {
    "a list": (lambda: ops.dropout([1.0], KEY, 0, 0.1), "dropout: x is a list; expected a tensor"),
    "integers": (lambda: ops.dropout(X.long(), KEY, 0, 0.1), "dropout: x is torch.int64; expected one of"),
    "no key": (lambda: ops.dropout(X, 3, 0, 0.1), "dropout: key is a int; expected a NoiseKey"),
    "another batch": (lambda: ops.dropout(X[:1], KEY, 0, 0.1), "names 2 samples and the batch has 1"),
    "another device": (lambda: ops.dropout(X.to("meta"), KEY, 0, 0.1), "NoiseKey is on cpu and the images on meta"),
    "a negative layer": (lambda: ops.dropout(X, KEY, -1, 0.1), r"layer is -1; expected an integer in 0..4294967295"),
    "a share above 1": (lambda: ops.dropout(X, KEY, 0, 1.5), r"share is 1.5; expected a share in \[0, 1\]"),
    "no share": (lambda: ops.dropout(X, KEY, 0, math.nan), "share is nan"),
    "a number of drops": (
        lambda: torch.ops.ddpm_fast.dropout(X, KEY.seed, KEY.sample_id, 0, 65537),
        "dropped is 65537; expected an integer in 0..65536",
    ),
    "a gradient in forward mode": (
        lambda: torch.func.jvp(lambda x: ops.dropout(x, KEY, 0, 0.1), (X,), (X,)),
        "dropout has no derivative in forward mode",
    ),
}


@pytest.mark.parametrize("word", REFUSED)
def test_refused(word):
    call, message = REFUSED[word]
    with pytest.raises(InputError, match=message):
        call()
