"""What is particular to the CUDA kernels, tested with their source compiled for the CPU (support/emulated_cuda.py):
every memory access pattern gives the same bits, sums are taken in parts, an index outside a table gives NaN, and no
byte outside an operand is touched. Their numbers are tested with the other backends', in test_ops*.py and
test_noise*.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from support.emulated_cuda import COMPILER, emulated_cuda, kernels
from support.guarded import Guarded

from ddpm_fast.noise import NoiseKey, normals
from ddpm_fast.objective import Objective
from ddpm_fast.ops import (
    ReverseStep,
    VlbTerms,
    diffusion_loss,
    hybrid_loss,
    normal,
    q_sample,
    reverse_step,
    use_backend,
    vlb_terms,
)
from ddpm_fast.ops.backends import cuda
from ddpm_fast.schedule import Schedule

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to compile the CUDA sources for the CPU with")
F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
Q_TABLE = torch.tensor([[0.9999, 0.0141], [0.8, 0.6], [0.1, 0.995]])
LOSS_TABLE = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 5.0], [-0.6, 0.8, 0.25]])
STEP_TABLE = torch.tensor(
    [[1.25, -0.75, 0.5, 0.4, 0.0, 0.2, 1.0, 0.35], [0.9, -0.3, 0.3, 0.7, 0.2, 1.0, math.inf, 0.5]]
)
SCHEDULE = Schedule.linear(1000)
HYBRID_TABLE = Objective("v", "learned_range", "hybrid").hybrid_table(SCHEDULE).float()
BOUND_TABLE = Objective("v", "learned_range", "vlb").bound_table(SCHEDULE, True, "exact").float()
# Sizes that each way of access takes: a sample of whole 8s, colour of whole quads a channel, and neither.
SHAPES = {"flat": (3, 3, 16, 16), "colour": (3, 3, 6, 6), "latents": (2, 4, 6, 6), "odd": (2, 3, 5, 7)}


@pytest.fixture(autouse=True)
def on_emulated_cuda():
    with emulated_cuda():
        yield


def image(shape, dtype=F32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == U8:
        return torch.randint(0, 256, shape, generator=generator, dtype=U8)
    return torch.randn(shape, generator=generator).to(dtype)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def elementwise(output_dtype, x0_dtype, shape, lay_out) -> list[torch.Tensor]:
    """Results that do not sum: bit for bit the same on every backend, in every memory format."""
    x, x0 = image(shape, seed=1), image(shape, x0_dtype, seed=2)
    out = image((shape[0], 2 * shape[1], *shape[2:]), output_dtype, seed=3)
    before, z, t = image(shape, seed=4), image(shape, seed=5), torch.arange(shape[0]) % 3
    key = NoiseKey.of(7, shape[0], first_sample_id=2**33)
    a, b, c, d = lay_out
    leaf = c(out[:, : shape[1]].contiguous()).requires_grad_()
    results = [normal(key, shape[1:]), normal(key, shape[1:], dtype=BF16, memory_format=torch.channels_last)]
    for noise in (key, d(z)):
        results += [q_sample(b(x0), t, Q_TABLE, noise, dtype) for dtype in (F32, BF16, F16)]
        for row, output in itertools.product((0, 1), (c(out), c(out[:, : shape[1]].contiguous()))):
            step = torch.tensor(row)
            results += reverse_step(
                a(x),
                output,
                STEP_TABLE,
                step,
                noise,
                x0_previous=d(before),
                return_x0=True,
                model_dtype=output_dtype,
            )
        losses = diffusion_loss(leaf, b(x0), t, LOSS_TABLE, noise)
        results += torch.autograd.grad(losses.sum(), leaf)
    return results


@pytest.mark.pairwise
@pytest.mark.parametrize("word", SHAPES)
@pytest.mark.parametrize("output", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("x0", [U8, F32, BF16, F16], ids=str)
def test_the_same_bits_as_the_cpu_kernels_in_every_memory_format(x0, output, word):
    keep = torch.Tensor.contiguous
    with use_backend("cpu"):
        expected = elementwise(output, x0, SHAPES[word], (keep,) * 4)
    for lay_out in itertools.product((keep, channels_last), repeat=4):
        for actual, one in zip(elementwise(output, x0, SHAPES[word], lay_out), expected, strict=True):
            assert actual.dtype == one.dtype
            assert torch.equal(actual, one) and torch.equal(actual.signbit(), one.signbit())


@pytest.mark.parametrize("elements", [8 * 1024, 8 * 1024 + 8, 8 * 1024 - 4, 4096 * 3 + 1, 12 * 1024 * 3])
@pytest.mark.parametrize("x0", [U8, F32], ids=str)
def test_samples_in_several_parts(x0, elements):
    # Above 8,192 elements (4,096 of an odd number, 12,288 in colour) a sample is summed in parts, by a second launch.
    shape = (2, 3, elements // 3, 1) if elements % 36 == 0 else (2, 1, elements, 1)
    wide = (2, 2 * shape[1], *shape[2:])
    out, x, z, t = image(wide, seed=1), image(shape, x0), image(shape, seed=9), torch.tensor([0, 700])
    pixels = x.double() / 127.5 - 1 if x0 == U8 else x.double()
    narrow = out[:, : shape[1]].contiguous()
    for lay_out in (torch.Tensor.contiguous, channels_last):
        loss = diffusion_loss(lay_out(narrow), x, torch.tensor([0, 2]), LOSS_TABLE, z)
        exact = torch.stack(
            [
                w * (narrow[i].double() - (a * pixels[i] + b * z[i].double())).square().mean()
                for i, (a, b, w) in enumerate(LOSS_TABLE[[0, 2]].double().tolist())
            ]
        )
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        for op, table in ((hybrid_loss, HYBRID_TABLE), (vlb_terms, BOUND_TABLE)):
            found = op(lay_out(out), x, t, table, z)
            with use_backend("cpu"):
                expected = op(out, x, t, table, z)
            for one, other in zip(*((made,) if op is hybrid_loss else made for made in (found, expected)), strict=True):
                torch.testing.assert_close(one, other, rtol=2e-6, atol=0)


def test_a_loss_has_the_same_bits_in_any_batch():
    shape = (5, 3, 64, 48)  # two parts
    out, x, t, key = image(shape, seed=1), image(shape, U8), torch.arange(5) % 3, NoiseKey.of(3, 5)
    together = diffusion_loss(out, x, t, LOSS_TABLE, key)
    for i in range(5):
        alone = diffusion_loss(
            out[i : i + 1], x[i : i + 1], t[i : i + 1], LOSS_TABLE, NoiseKey.of(3, 1, first_sample_id=i)
        )
        assert torch.equal(alone, together[i : i + 1])


@pytest.mark.parametrize("samples", [65535 + 3])
def test_more_samples_than_a_grid_has_rows(samples):
    key = NoiseKey.of(1, samples)
    x, t = torch.ones(samples, 2), torch.zeros(samples, dtype=torch.int64)
    x_t = q_sample(x, t, torch.tensor([[2.0, 1.0]]), key)
    assert torch.equal(x_t, 2.0 + normals(key, 2))
    loss = diffusion_loss(x_t, x, t, torch.tensor([[2.0, 1.0, 1.0]]), key)
    assert torch.equal(loss, torch.zeros(samples))


@pytest.mark.parametrize("t", [-1, 3, 2**62, -(2**63)])
def test_an_index_outside_the_table_gives_nan(t):
    # The CPU refuses it; a GPU would have to be waited for to be asked.
    x, key, t = torch.ones(2, 3, 4, 4), NoiseKey.of(0, 2), torch.tensor([1, t])
    out = torch.zeros(2, 6, 4, 4)
    made = [
        q_sample(x, t, Q_TABLE, key).flatten(1)[:, 0],
        diffusion_loss(x, x, t, LOSS_TABLE, key),
        hybrid_loss(out, x, t, HYBRID_TABLE[:3], key),
        *vlb_terms(out, x, t, BOUND_TABLE[:3], key),
    ]
    for values in made:
        assert values.isnan().tolist() == [False, True]
    assert reverse_step(x, x, STEP_TABLE, t[1], key).x.isnan().all()


@pytest.mark.pairwise
@pytest.mark.parametrize("lay_out", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 5, 7), (2, 4, 3, 2), (1, 1, 1, 1), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nothing_outside_an_operand_is_touched(dtype, shape, lay_out):
    guard = Guarded()
    n = shape[0]
    x, x0 = (guard(lay_out(image(shape, kind, seed=1))) for kind in (dtype, U8))
    out, z = (guard(lay_out(image((n, c * shape[1], *shape[2:]), dtype, seed=2))) for c in (2, 1))
    narrow = guard(lay_out(image(shape, dtype, seed=3)))
    t, step = guard(torch.arange(n) % 3), guard(torch.tensor([1]))[0]
    seed, ids = guard(torch.tensor([5]))[0], guard(torch.arange(n))
    key = NoiseKey(seed, ids, step)
    tables = {name: guard(table) for name, table in (("q", Q_TABLE), ("loss", LOSS_TABLE), ("step", STEP_TABLE))}
    tables |= {"hybrid": guard(HYBRID_TABLE[:3].contiguous()), "bound": guard(BOUND_TABLE[:3].contiguous())}
    empty = lambda like, kind: guard(torch.empty_like(like, dtype=kind))  # noqa: E731
    run = cuda.OPS
    for noise in (key, z):
        run["q_sample"](x0, t, tables["q"], noise, empty(x0, dtype))
        loss, residual = guard(torch.empty(n)), empty(narrow, dtype)
        run["diffusion_loss"](narrow, x0, t, tables["loss"], noise, residual, loss)
        run["loss_backward"](residual, guard(torch.ones(n, 1)), empty(residual, dtype))
        for op in ("hybrid_loss", "vlb_terms"):
            loss = guard(torch.empty(n))
            results = loss if op == "hybrid_loss" else VlbTerms(loss, guard(torch.empty(n)))
            gradient = empty(out, dtype)
            table = tables["hybrid" if op == "hybrid_loss" else "bound"]
            run[op](out, x0, t, table, noise, gradient, results, guard(torch.empty(n, 2)))
            run["loss_backward"](gradient, guard(torch.ones(n, 2)), empty(gradient, dtype))
        for output in (narrow, out):
            run["reverse_step"](
                x,
                output,
                empty(x, F32).fill_(0.5),
                tables["step"],
                step,
                noise,
                ReverseStep(empty(x, dtype), empty(x, F32), empty(x, BF16)),
            )
    run["normal"](key, empty(x, dtype))
    assert guard.untouched()


def test_workspace_grows_with_the_parts_of_a_sample():
    assert kernels().workspace((7, 3, 1024)) == 0
    assert kernels().workspace((7, 1, 4097)) == 7 * 2 * 2
    assert kernels().workspace((1, 1, 2**34)) == 2 * 2**22


def test_every_pixel_is_divided_exactly():
    # On a GPU the quotient is a product and one correction (csrc/storage.h); the same in exact arithmetic, rounded.
    reciprocal = np.float32(0.00784313772)
    for pixel in range(256):
        quotient = np.float32(np.float64(pixel) * np.float64(reciprocal))
        # 24 + 24 bits fit into float64's 53: the product is exact, and so is the difference.
        rest = np.float32(np.float64(pixel) - np.float64(quotient) * 127.5)
        corrected = np.float32(np.longdouble(rest) * np.longdouble(reciprocal) + np.longdouble(quotient))
        assert corrected == np.float32(pixel) / np.float32(127.5)
