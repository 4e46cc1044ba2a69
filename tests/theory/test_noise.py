"""The noise contract: Philox4x32-10's known answers, an independent float64 Box-Muller, one set of bits everywhere.

The oracle below is written from the contract's text in Python's integers and NumPy's float64; it shares no code with
the package.
"""

import math

import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.noise import MAX_SAMPLE_ID, NoiseKey, Stream, normal_pair, normals, philox4x32_10, uniform_integers
from ddpm_fast.ops import normal, q_sample, reverse_step, use_backend

# Random123's kat_vectors, philox4x32 10: counter, key, output.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi digits": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
PRECISION = 1e-6  # largest error of a normal against float64


def philox_oracle(counter, key):
    """Salmon et al. 2011, section 3.3, on four words; NumPy uint64 arrays or Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(10):
        bump0, bump1 = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ bump0, low1, high0 ^ c3 ^ bump1, low0
    return c0, c1, c2, c3


def box_muller_oracle(word0, word1):
    """Float64: radius from the top 24 bits of word0, angle from the top 26 of word1, the quadrant first."""
    radius = np.sqrt(-2 * np.log((word0 // 256 + 1) / 2.0**24))
    within = (word1 // 2**6 % 2**24).astype(np.int64)
    within = np.where(within >= 2**23, within - 2**24, within)
    angle = (word1 // 2**30).astype(np.float64) * (math.pi / 2) + (2 * within + 1) * (math.pi / 4 / 2**24)
    return radius * np.cos(angle), radius * np.sin(angle)


def normals_oracle(seed, sample_id, step, stream, elements):
    """Float64 normals of elements 0..elements-1 of one sample."""
    counters = np.arange((elements + 3) // 4, dtype=np.uint64)
    constant = [np.uint64(word) for word in (sample_id % 2**32, step, stream + (sample_id >> 32 << 8))]
    words = philox_oracle((counters, *constant), (seed % 2**32, seed % 2**64 >> 32))
    return np.stack([*box_muller_oracle(*words[:2]), *box_muller_oracle(*words[2:])], axis=1).ravel()[:elements]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    different = bits(actual) != bits(expected)
    where = different.nonzero()
    assert not len(where), (
        f"{len(where)} of {actual.numel()} differ, first at {where[0].tolist()}: "
        f"{actual[tuple(where[0])]} and {expected[tuple(where[0])]}"
    )


@pytest.mark.parametrize("word", KNOWN_ANSWERS)
def test_philox_known_answers(word):
    counter, key, expected = KNOWN_ANSWERS[word]
    assert philox_oracle(counter, key) == expected
    words = philox4x32_10(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == expected


@pytest.mark.parametrize(
    "counter",
    [0, 1, 2**29, 2**30 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1],
    ids=lambda c: f"elements from {4 * c}",
)
def test_philox_at_counters_of_large_samples(counter):
    key = (0x12345678, 0x9ABCDEF0)
    rest = (7, 2**32 - 1, 2**31)
    words = philox4x32_10(tuple(map(torch.tensor, (counter, *rest))), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == philox_oracle((counter, *rest), key)


LAYOUT = {
    "all zero: the first known answer": (0, 0, 0, 0),
    "seed, low word": (0x9E3779B9, 0, 0, 0),
    "seed, high word": (0x85EBCA6B << 32, 0, 0, 0),
    "seed, all ones": (2**64 - 1, 0, 0, 0),
    "negative seed": (-2, 0, 0, 0),
    "sample id": (1, 12345, 0, 0),
    "sample id, all 32 bits": (1, 2**32 - 1, 0, 0),
    "sample id beyond 2^32": (1, 2**32 + 3, 0, 0),
    "largest sample id": (1, MAX_SAMPLE_ID - 1, 0, 0),
    "step": (1, 0, 999, 0),
    "largest step": (1, 0, 2**32 - 1, 0),
    "stream": (1, 0, 0, Stream.TRAINING),
    "largest stream, beside high id bits": (1, 0xABCDEF << 32, 0, 255),
    "everything": (0xFEDCBA9876543210, 0x123456789ABCDE, 0x89ABCDEF, 5),
}


@pytest.mark.parametrize("word", LAYOUT)
def test_key_and_counter_layout(word, backend):
    seed, sample_id, step, stream = LAYOUT[word]
    z = normal(NoiseKey.of(seed, 1, first_sample_id=sample_id, step=step, stream=stream), (1003,))
    expected = normals_oracle(seed, sample_id, step, stream, 1003)
    assert np.abs(z[0].double().numpy() - expected).max() <= PRECISION


def test_ids_that_cross_the_word_boundary_inside_a_batch(backend):
    z = normal(NoiseKey.of(3, 4, first_sample_id=2**32 - 2, step=1, stream=2), (50,))
    for i in range(4):
        expected = normals_oracle(3, 2**32 - 2 + i, 1, 2, 50)
        assert np.abs(z[i].double().numpy() - expected).max() <= PRECISION


def test_normals_of_a_million_elements_against_float64(isa):
    z = normal(NoiseKey.of(2024, 1, step=17), (10**6 + 3,))[0].double().numpy()
    assert np.abs(z - normals_oracle(2024, 0, 17, Stream.USER, 10**6 + 3)).max() <= PRECISION


def test_every_radius_and_every_angle_is_accurate():
    every = torch.arange(2**24)
    for part in every.split(2**21):
        # Radius from `part`; the angle takes the same 24 bits, shuffled, so that every one of both occurs.
        angle = (part * 0x9E3779B1 % 2**24 << 6) + (part % 4 << 30)
        z = normal_pair(part << 8, angle)
        expected = box_muller_oracle((part << 8).numpy(), angle.numpy())
        for actual, wanted in zip(z, expected, strict=True):
            assert np.abs(actual.double().numpy() - wanted).max() <= PRECISION


SHAPES = {
    "one element": (1,),
    "fewer than a counter": (3,),
    "one counter": (4,),
    "no multiple of 4": (61,),
    "1-D, one run": (256,),
    "1-D, a run and a tail": (259,),
    "1-D, a chunk and a tail": (4096 + 77,),
    "empty sample": (0,),
    "channels and length": (3, 100),
    "one channel": (1, 28, 28),
    "rows of odd length": (3, 5, 7),
    "a CIFAR image": (3, 32, 32),
    "no multiple of 64 or 256": (3, 17, 19),
    "many channels, one pixel": (700, 1, 1),
    "many channels": (130, 3, 3),
    "planes just over a run": (5, 1, 257),
    "volume": (2, 3, 5, 7),
    "volume over a run": (3, 7, 8, 9),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("word", SHAPES)
def test_cpp_equals_plain_torch_bit_for_bit(word, dtype, isa):
    shape = SHAPES[word]
    key = NoiseKey.of(-77, 5, first_sample_id=2**32 - 3, step=40, stream=Stream.REVERSE)
    expected = normals(key, math.prod(shape)).view(5, *shape).to(dtype)
    same_bits(normal(key, shape, dtype=dtype), expected)
    with use_backend("reference"):
        same_bits(normal(key, shape, dtype=dtype), expected)
    if len(shape) in (3, 4):
        memory_format = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
        z = normal(key, shape, dtype=dtype, memory_format=memory_format)
        assert z.is_contiguous(memory_format=memory_format)
        same_bits(z, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_changes_nothing(threads):
    key = NoiseKey.of(5, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        z = normal(key, (3, 65, 67)), normal(key, (3, 65, 67), memory_format=torch.channels_last)
    finally:
        torch.set_num_threads(before)
    expected = normals(key, 3 * 65 * 67).view(3, 3, 65, 67)
    same_bits(z[0], expected)
    same_bits(z[1], expected)


def test_an_empty_batch_has_no_noise(backend):
    assert normal(NoiseKey.of(0, 0), (3, 4, 4)).shape == (0, 3, 4, 4)


def test_float64_normals_are_the_same_numbers():
    key = NoiseKey.of(1, 2)
    assert torch.equal(normal(key, (7,), dtype=torch.float64), normal(key, (7,)).double())


def _noisy_calls(key: NoiseKey, memory_format: torch.memory_format) -> dict[str, torch.Tensor]:
    """One image repeated over the batch that `key` names, through every op that draws noise and returns images."""
    n = len(key.sample_id)
    image = (
        torch.linspace(-1, 1, 3 * 9 * 11).view(1, 3, 9, 11).repeat(n, 1, 1, 1).contiguous(memory_format=memory_format)
    )
    row = torch.tensor([[1.5, -0.5, 0.3, 0.7, 0.0, 0.4, 1.0, 0.0]])
    return {
        "normal": normal(key, (3, 9, 11), memory_format=memory_format),
        "q_sample": q_sample(image, torch.zeros(n, dtype=torch.int64), torch.tensor([[0.6, 0.8]]), key),
        "reverse_step": reverse_step(image, image, row, torch.tensor(0), key).x,
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_sample_is_the_same_wherever_it_is_drawn(memory_format, backend):
    step = torch.tensor(3)
    n, i = (16, 9) if backend == "triton" else (64, 37)  # the interpreter takes 10 ms a sample
    ids = torch.arange(n) + 1000
    alone = _noisy_calls(NoiseKey(torch.tensor(8), ids[i : i + 1], step), torch.contiguous_format)
    among_all = _noisy_calls(NoiseKey(torch.tensor(8), ids, step), memory_format)
    moved = _noisy_calls(NoiseKey(torch.tensor(8), ids.flip(0)[n - i - 7 : n - i + 13], step), memory_format)
    strided = _noisy_calls(NoiseKey(torch.tensor(8), ids[1::2], step), memory_format)
    for op, expected in alone.items():
        same_bits(among_all[op][i : i + 1], expected)
        same_bits(moved[op][6:7], expected)
        same_bits(strided[op][i // 2 : i // 2 + 1], expected)


@pytest.mark.slow
def test_large_sample_has_64_bit_addresses():
    # More than 2^31 elements in one sample: 4.3 GB of fp16, of which the last ones are compared.
    elements = 2**31 + 1027
    z = normal(NoiseKey.of(6, 1), (elements,), dtype=torch.float16)[0, -1027:].double().numpy()
    counters = np.arange(2**29, (elements + 3) // 4, dtype=np.uint64)
    words = philox_oracle((counters, *map(np.uint64, (0, 0, Stream.USER))), (6, 0))
    expected = np.stack([*box_muller_oracle(*words[:2]), *box_muller_oracle(*words[2:])], axis=1).ravel()[:1027]
    assert np.abs(z - expected).max() <= 2.0**-9  # half a place of fp16 below 4


def test_uniform_integers_are_the_first_word_scaled():
    key = NoiseKey.of(9, 1000, step=5, stream=Stream.TIMESTEP)
    expected = [philox_oracle((0, i, 5, int(Stream.TIMESTEP)), (9, 0))[0] * 1000 // 2**32 for i in range(1000)]
    assert uniform_integers(key, 1000).tolist() == expected


def test_streams_are_a_contract():
    names = {
        "INITIAL": 0,
        "REVERSE": 1,
        "TRAINING": 2,
        "TIMESTEP": 3,
        "LABEL": 4,
        "USER": 5,
        "KNOWN": 6,
        "EVALUATION": 7,
        "DROPOUT": 8,
    }
    assert {stream.name: stream.value for stream in Stream} == names


def test_a_key_for_each_step():
    keys = [key for _, key in zip(range(3), NoiseKey.each_step(7, 2, first_step=5, first_sample_id=4), strict=False)]
    for i, key in enumerate(keys):
        assert torch.equal(normals(key, 8), normals(NoiseKey.of(7, 2, step=5 + i, first_sample_id=4), 8))
    assert [int(key.step) for key in keys] == [5, 6, 7]  # a new one each, so that a backward can draw its noise again
    with pytest.raises(InputError, match="n is -1"):
        NoiseKey.each_step(0, -1)
    last = NoiseKey.each_step(0, 1, first_step=2**32 - 1)
    next(last)
    with pytest.raises(InputError, match="step is 4294967296"):
        next(last)


ERRORS = {
    "seed of 65 bits": (lambda: NoiseKey.of(2**64, 1), ["seed is 18446744073709551616", "-2^63..2^64-1"]),
    "seed below int64": (lambda: NoiseKey.of(-(2**63) - 1, 1), ["seed is -9223372036854775809", "-2^63..2^64-1"]),
    "negative batch": (lambda: NoiseKey.of(0, -1), ["n is -1", "0..2^56"]),
    "negative sample id": (lambda: NoiseKey.of(0, 1, first_sample_id=-1), ["first_sample_id is -1", "0..2^56"]),
    "sample id beyond 2^56": (
        lambda: NoiseKey.of(0, 2, first_sample_id=2**56 - 1),
        ["samples 72057594037927935..72057594037927936", "0..72057594037927935"],
    ),
    "negative step": (lambda: NoiseKey.of(0, 1, step=-1), ["step is -1", "0..4294967295"]),
    "step of 33 bits": (lambda: NoiseKey.of(0, 1, step=2**32), ["step is 4294967296", "0..4294967295"]),
    "negative stream": (lambda: NoiseKey.of(0, 1, stream=-1), ["stream is -1", "0..255"]),
    "stream of 9 bits": (lambda: NoiseKey.of(0, 1, stream=256), ["stream is 256", "0..255"]),
    "seed that is no tensor": (
        lambda: NoiseKey(1, torch.arange(2), torch.tensor(0)),
        ["NoiseKey.seed is a int", "int64 tensor", "NoiseKey.of"],
    ),
    "seed that is no scalar": (
        lambda: NoiseKey(torch.tensor([1]), torch.arange(2), torch.tensor(0)),
        ["NoiseKey.seed", "(1,)", "dense int64 with 0 dimensions", "NoiseKey.of"],
    ),
    "float step": (
        lambda: NoiseKey(torch.tensor(1), torch.arange(2), torch.tensor(0.0)),
        ["NoiseKey.step", "torch.float32", "dense int64 with 0 dimensions"],
    ),
    "scalar sample id": (
        lambda: NoiseKey(torch.tensor(1), torch.tensor(2), torch.tensor(0)),
        ["NoiseKey.sample_id", "()", "dense int64 with 1 dimensions"],
    ),
    "int32 sample ids": (
        lambda: NoiseKey(torch.tensor(1), torch.arange(2, dtype=torch.int32), torch.tensor(0)),
        ["NoiseKey.sample_id", "torch.int32"],
    ),
    "two devices": (
        lambda: NoiseKey(torch.tensor(1), torch.arange(2, device="meta"), torch.tensor(0)),
        ["NoiseKey.sample_id is on meta", "seed on cpu", "one device"],
    ),
}


@pytest.mark.parametrize("word", ERRORS)
def test_noise_key_errors(word):
    call, fragments = ERRORS[word]
    with pytest.raises(InputError) as error:
        call()
    for fragment in fragments:
        assert fragment in str(error.value)
