"""The Triton kernels against the C++ ones, through Triton's interpreter: the same bits wherever something is stored,
whatever the memory formats and dtypes, and losses that agree to fp32's rounding. What the ops compute is tested in
test_ops*.py; here, that the way in which Triton divides a batch makes no difference.

    TRITON_INTERPRET=1 python -m pytest -m interpreter
"""

import itertools
import math
import os

import numpy as np
import pytest
import torch
from support.storage import LOW, SPECIAL, boundaries, exact_values, nearest_even, patterns, same, through

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import (
    diffusion_loss,
    hybrid_loss,
    normal,
    q_sample,
    reverse_step,
    reverse_step_,
    tensors,
    use_backend,
    vlb_terms,
)
from ddpm_fast.ops.backends import cuda
from ddpm_fast.ops.backends import triton as triton_backend

triton = pytest.importorskip("triton", reason="the package triton is not installed: pip install triton")
import triton.language as tl  # noqa: E402

from ddpm_fast.ops.backends.triton import layout  # noqa: E402
from ddpm_fast.ops.backends.triton.sums import sum_of  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run as: TRITON_INTERPRET=1 python -m pytest -m interpreter"
    ),
]
F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
OPS = torch.ops.ddpm_fast
Q_TABLE = torch.tensor([[0.9999, 0.0141], [0.8, 0.6], [0.1, 0.995]])
LOSS_TABLE = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 5.0], [-0.6, 0.8, 0.25]])
STEP_TABLE = torch.tensor(
    [
        [1.25, -0.75, 0.5, 0.4, -0.3, 0.2, 1.0, 0.35],
        [0.9, -0.3, 0.3, 0.7, 0.2, 0.1, math.inf, 0.0],
        [0.9, -0.3, 0.3, 0.7, 0.2, 0.0, 1.5, 0.5],
    ]
)
# Columns: target (2), to_x0, pull, log beta~, delta, slope, kind, clip, and for hybrid_loss two weights.
BOUND_TABLE = torch.tensor(
    [
        [0.3, 0.9, -0.8, 1.7, -2.0, 0.1, 0.6, kind, clip, 0.7, 0.01]
        for kind in (0.0, 1.0, 2.0)
        for clip in (1.0, math.inf)
    ]
)
SHAPES = {
    "no multiple of anything": (3, 3, 17, 19),
    "two blocks a channel": (1, 3, 40, 36),  # of which the second is half empty; and two programs' sums for a loss
    "a block of one warp a channel": (2, 2, 17, 16),
}


def draw(shape, dtype=F32, seed=0, channels_last=False):
    generator = torch.Generator().manual_seed(seed)
    if dtype == U8:
        x = torch.randint(0, 256, shape, generator=generator, dtype=U8)
        x.view(-1)[:256] = torch.arange(256)
    else:
        x = torch.randn(shape, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def stored_and_summed(shape, dtype, formats, noise_kind):
    """What all ops make of such images on the active backend: (what is stored element by element, losses)."""
    n, t = shape[0], torch.arange(shape[0]) % 3
    double = (n, 2 * shape[1], *shape[2:])
    x0 = draw(shape, U8, channels_last=formats[0])
    x, before = draw(shape, dtype, 1, formats[1]), draw(shape, F32, 2, formats[0])
    out, both = draw(shape, dtype, 3, formats[2]), draw(double, dtype, 4, formats[2])
    if noise_kind == "key":
        noise = None, *(NoiseKey.of(7, n, step=3).__dict__[name] for name in ("seed", "sample_id", "step")), 2
    else:
        noise = draw(shape, F32, 5, formats[3]), None, None, None, 0
    stored = [OPS.q_sample(source, t, Q_TABLE, *noise, to) for source in (x0, x) for to in (F32, dtype)]
    loss, residual = OPS.diffusion_loss(out, x0, t, LOSS_TABLE, *noise, True)
    scale = torch.linspace(-2, 3, 2 * n).view(n, 2)
    stored += [residual, OPS.loss_backward(residual, scale[:, :1]), OPS.loss_backward(both, scale)]
    summed = [loss]
    for kind in range(3):
        rows = torch.full((n,), 2 * kind) + torch.arange(n) % 2
        bits, mse, gradient, factors = OPS.vlb_terms(both, x0, rows, BOUND_TABLE[:, :9].contiguous(), *noise, True)
        stored, summed = [*stored, gradient], [*summed, bits, mse, *factors.unbind(1)]
        hybrid, gradient, factors = OPS.hybrid_loss(both, x0, rows, BOUND_TABLE, *noise, True)
        stored, summed = [*stored, gradient], [*summed, hybrid, *factors.unbind(1)]
        bits, _, gradient, factors = OPS.vlb_terms(out, x0, rows, BOUND_TABLE[:, :9].contiguous(), *noise, True)
        stored, summed = [*stored, gradient], [*summed, bits, factors[:, 0]]
    for row, (given, previous) in itertools.product(range(3), ((out, None), (both, before))):
        stored += OPS.reverse_step(x, given, previous, STEP_TABLE, torch.tensor(row), *noise, True, BF16)
    return stored, summed


def same_results(shape, dtype, formats, noise):
    with use_backend("cpu"):
        expected, sums = stored_and_summed(shape, dtype, formats, noise)
    with use_backend("triton"):
        stored, summed = stored_and_summed(shape, dtype, formats, noise)
    for i, (a, b) in enumerate(zip(stored, expected, strict=True)):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        bits = torch.int32 if a.dtype == F32 else torch.int16
        assert torch.equal(a.view(bits), b.view(bits)), f"result {i}: {(a != b).sum()} of {a.numel()} differ"
    for a, b in zip(summed, sums, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-7, atol=0)


FORMATS = {
    "contiguous": (False, False, False, False),
    "channels_last": (True, True, True, True),
    "mixed": (False, True, True, False),
    "mixed the other way": (True, False, False, True),
}


@pytest.mark.parametrize(
    "word, formats, dtype, noise",
    [
        ("no multiple of anything", "contiguous", F32, "key"),
        ("no multiple of anything", "channels_last", BF16, "key"),
        ("no multiple of anything", "mixed", F16, "given"),
        ("two blocks a channel", "contiguous", F16, "given"),
        ("two blocks a channel", "channels_last", F32, "key"),
        ("a block of one warp a channel", "mixed", BF16, "key"),
    ],
    ids=str,
)
def test_the_same_bits_as_cpp(word, formats, dtype, noise):
    same_results(SHAPES[word], dtype, FORMATS[formats], noise)


def test_the_same_bits_as_cpp_in_another_mix():
    same_results((2, 3, 9, 7), BF16, FORMATS["mixed the other way"], "key")


# --- sizes that no test can afford


@pytest.mark.parametrize("formats", ["contiguous", "channels_last"])
def test_the_same_bits_with_64_bit_offsets(formats, monkeypatch):
    monkeypatch.setattr(layout, "WIDE_OFFSETS", 1)
    shape = (2, 2, 17, 16) if formats == "channels_last" else (2, 3, 9, 7)
    same_results(shape, F32, FORMATS[formats], "key")


def test_more_samples_than_a_grids_second_dimension(monkeypatch):
    monkeypatch.setattr(layout, "MAX_GRID_Y", 3)
    x0, t = draw((7, 5)), torch.arange(7) % 3
    expected = q_sample(x0, t, Q_TABLE, x0)
    with use_backend("triton"):
        assert torch.equal(q_sample(x0, t, Q_TABLE, x0), expected)
    # 7 samples on a grid of 3 x 3: the programs too many must not take a step in place twice.
    key, step = NoiseKey.of(3, 7), torch.tensor(0)
    expected = reverse_step(x0, x0, STEP_TABLE, step, key).x
    with use_backend("triton"):
        reverse_step_(x0, x0, STEP_TABLE, step, key)
    assert torch.equal(x0, expected)


@pytest.mark.parametrize("index", [-1, 6, 2**62, -(2**63)])
def test_an_index_outside_the_table_gives_nan(index, monkeypatch):
    # As on a GPU: the interpreter's tensors are on the CPU, where an index is looked at before.
    monkeypatch.setattr(tensors, "check_rows", lambda *_: None)
    x, x0, key = draw((2, 3, 20, 18)), draw((2, 3, 20, 18), U8), NoiseKey.of(0, 2)
    out, t = draw((2, 6, 20, 18)), torch.tensor([1, index])
    with use_backend("triton"):
        made = [
            q_sample(x0, t, torch.ones(6, 2), key).flatten(1)[:, 0],
            diffusion_loss(x, x0, t, torch.ones(6, 3), key),
            hybrid_loss(out, x0, t, BOUND_TABLE, key),
            *vlb_terms(out, x0, t, BOUND_TABLE[:, :9].contiguous(), key),
        ]
        for values in made:
            assert values.isnan().tolist() == [False, True]
        step = reverse_step(x, out, torch.ones(6, 8), t[1], key, return_x0=True)
        assert step.x.isnan().all() and step.x0.isnan().all()


@triton.jit
def _place_kernel(
    places, block, vectors, channels, positions, ORDER: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr
):
    elements = layout.elements_of(vectors, 4, LARGE)
    counter, element, mask, channel, position = layout.place(block, elements, channels, positions, ORDER, LARGE, BLOCK)
    offset = layout.offset_of(element, channel, position, 2 * channels, ORDER != "flat")
    i = tl.arange(0, 4 * BLOCK)
    tl.store(places + i, element.to(tl.int64))
    tl.store(places + 4 * BLOCK + i, tl.where(mask, offset.to(tl.int64), -1))
    tl.store(places + 8 * BLOCK + tl.arange(0, BLOCK), counter.to(tl.int64))


@pytest.mark.parametrize("order", ["flat", "tiled", "scattered"])
def test_places_beyond_2_to_the_32_elements(order):
    # 2^34 elements, the most that a sample may have. The last block of the last channel, as Python's integers have it.
    channels, positions, block_size = 2**10, 2**24, 64
    blocks = channels * positions // (4 * block_size)
    places = torch.empty(9 * block_size, dtype=torch.int64)
    _place_kernel[(1,)](
        places,
        blocks - 1,
        channels * positions // 4,
        channels,
        positions,
        ORDER=order,
        LARGE=True,
        BLOCK=block_size,
    )
    element, offset, counter = places.split([4 * block_size, 4 * block_size, block_size])
    expected = list(range(channels * positions - 4 * block_size, channels * positions))
    assert element.tolist() == expected and counter.tolist() == [e // 4 for e in expected[::4]]
    if order != "flat":  # of an output with twice the channels
        expected = [e % positions * 2 * channels + e // positions for e in expected]
    assert offset.tolist() == expected


@triton.jit
def _sum_kernel(partial, total, count):
    tl.store(total, sum_of(partial, count))


@pytest.mark.parametrize("count", [1, 1023, 1025, 2**14 + 1])
def test_many_partial_sums_keep_their_digits(count):
    # 2^14 of them are a sample of 64 million elements.
    partial, total = draw((count,)).square() + 100, torch.empty(1)
    _sum_kernel[(1,)](partial, total, count)
    assert total.item() == pytest.approx(partial.double().sum().item(), rel=3e-7)


# --- storage


@pytest.mark.parametrize("name", LOW)
def test_every_bit_pattern_is_read_exactly_and_comes_back(name):
    with use_backend("triton"):
        same(through(patterns(name), F32), exact_values(name))
        same(through(patterns(name), LOW[name]), exact_values(name))


@pytest.mark.parametrize("name", LOW)
def test_results_are_rounded_to_nearest_even(name):
    with use_backend("triton"), np.errstate(over="ignore"):
        for x in (boundaries(name)[::3], SPECIAL):
            same(through(torch.from_numpy(x), LOW[name]), nearest_even(x, name))


# --- what there is


def test_there_is_a_kernel_for_every_op():
    assert list(triton_backend.OPS) == list(cuda.OPS)
    assert set(triton_backend.DTYPES) == set(cuda.DTYPES)


def test_an_op_without_a_kernel_says_which_there_are(monkeypatch):
    monkeypatch.setattr(triton_backend, "OPS", {"normal": triton_backend.OPS["normal"]})
    x0 = torch.zeros(1, 2)
    with use_backend("triton"), pytest.raises(InputError, match="it has no kernel for q_sample; it has normal"):
        q_sample(x0, torch.tensor([0]), Q_TABLE, x0)
    with use_backend("triton"):
        assert normal(NoiseKey.of(0, 1), (4,)).shape == (1, 4)
