"""The CUDA kernels of the network's ops against float64, with their source compiled for the CPU
(support/emulated_cuda.py): data far from zero, every way to cut an image, each option, the same bits in any batch, and
no byte outside an operand. At real sizes, on a GPU: test_gpu_group_norm.py.
"""

import pytest
import torch
from support import norm_runs, norms
from support.emulated_cuda import COMPILER, emulated_cuda
from support.guarded import Guarded
from support.norms import MEANS, Norms

from ddpm_fast.ops.backends import cuda

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to compile the CUDA sources for the CPU with")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPS = cuda.OPS
EVERYTHING = frozenset({"scale", "added", "residual", "silu", "grad_total"})
WITHOUT_TOTAL = frozenset({"scale", "added", "silu"})
SIZES = {  # a sample's shape, groups, channels of a joined image
    "one pixel": ((8, 1, 1), 2, 0),
    "streamed: groups of one value": ((4, 1, 1), 4, 0),
    "one pixel a thread": ((12, 4, 4), 3, 12),
    "one pixel a thread, no whole warp": ((8, 5, 3), 3, 4),
    "four pixels a thread": ((16, 8, 8), 4, 0),
    "four pixels a thread, the last lanes have three": ((8, 9, 11), 2, 8),
    "16 pixels a thread": ((16, 16, 16), 4, 0),
    "16 pixels a thread, lanes of 15": ((8, 17, 17), 3, 4),
    "three columns a group, over the border": ((20, 8, 8), 2, 4),
    "more groups than a slice has": ((80, 4, 4), 20, 0),
    "streamed: odd groups over the border": ((7, 5, 3), 3, 5),
    "streamed: one channel a group": ((5, 9, 9), 5, 0),
    "streamed: several chunks": ((8, 53, 61), 1, 4),
    "streamed: a group wider than a block": ((1030, 3, 2), 1, 10),
    "streamed: a group of many columns": ((300, 2, 2), 1, 0),
}


@pytest.fixture(autouse=True)
def on_emulated_cuda():
    with emulated_cuda():
        yield


def is_streamed(norm, total=None):
    """Whether the kernels read the image twice, for which they need memory."""
    y = torch.empty(len(norm.x), len(norm.weight), *norm.x.shape[2:])
    statistics = torch.empty(len(norm.x), norm.groups, 3)
    return cuda._kernels.group_norm_workspace(*cuda.group_norm_of(norm, y, total, statistics)) > 0


@pytest.mark.parametrize("word", SIZES)
@pytest.mark.parametrize(
    ("options", "dtype"),
    [(EVERYTHING, F32), (WITHOUT_TOTAL, F32), (frozenset(), F32), (EVERYTHING, BF16), (WITHOUT_TOTAL, F16)],
    ids=["everything fp32", "without total fp32", "nothing fp32", "everything bf16", "without total fp16"],
)
def test_the_error_is_at_most_twice_that_of_plain_torch(word, options, dtype):
    shape, groups, joined = SIZES[word]
    alone = shape[1:] == (1, 1) and groups == shape[0]  # a group of one value has no variance to be far from
    operands = norms.operands(Norms((2, *shape), groups, joined, options, dtype, mean=0.0 if alone else MEANS[dtype]))
    assert is_streamed(operands[0]._replace(residual=None)) == word.startswith("streamed")
    norm, found, statistics = norm_runs.run(OPS, *operands, keep_total="residual" in options)
    exact = norms.in_float64(norm, *operands[1:])
    norms.check(found, exact, norms.in_fp32(norm, *operands[1:]))
    if norm.added is None:  # otherwise what is normalised was rounded first
        norms.check_statistics(statistics, exact)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_residual_whose_sum_nobody_asks_for(dtype):
    case = Norms((2, 8, 5, 4), 2, 4, {"residual", "added", "silu"}, dtype, mean=MEANS[dtype])
    norm, grad, _ = norms.operands(case)
    _, found, _ = norm_runs.run(OPS, norm, grad, None, keep_total=False)
    norms.check(found, norms.in_float64(norm, grad), norms.in_fp32(norm, grad))


@pytest.mark.parametrize("shape", [(3, 8, 5, 4), (3, 6, 5, 4)], ids=["in fours", "streamed"])
def test_vectors_of_any_dtype_and_stride(shape):
    case = Norms(shape, 2, options=EVERYTHING, dtype=BF16, vectors=F16, mean=3.0)
    norm, grad, grad_total = norms.operands(case)
    backwards = torch.arange(shape[1], 0, -1, dtype=F32)[:, None].repeat(1, 2)[:, 0]  # of stride 2
    norm = norm._replace(
        weight=backwards,
        added=norm.added[:1].expand(3, shape[1]),
        scale=norm.scale.bfloat16()[:1].expand(3, shape[1]),
        shift=norm.shift.t().contiguous().t(),
    )
    norm, found, _ = norm_runs.run(OPS, norm, grad, grad_total, keep_total=True)
    norms.check(found, norms.in_float64(norm, grad, grad_total), norms.in_fp32(norm, grad, grad_total))


@pytest.mark.parametrize("shape", [(256, 4, 4), (64, 9, 5), (66, 9, 5), (8, 53, 61)], ids=str)
def test_a_sample_has_the_same_bits_in_any_batch(shape):
    # Where samples are many, a block handles several groups: of 20 samples of 64 groups two.
    n, groups = (20, shape[0] // 4) if shape[0] % 4 == 0 else (3, 2)
    norm, grad, grad_total = norms.operands(Norms((n, *shape), groups, 0, EVERYTHING, mean=5.0))
    _, found, statistics = norm_runs.run(OPS, norm, grad, grad_total, keep_total=True)
    alone = norm._replace(**{name: getattr(norm, name)[1:2] for name in ("x", "scale", "shift", "added", "residual")})
    _, one, its_statistics = norm_runs.run(OPS, alone, grad[1:2], grad_total[1:2], keep_total=True)
    assert torch.equal(its_statistics, statistics[1:2])
    for name in ("y", "dx", "sum_g", "sum_gn", "sum_dx", "dscale", "dshift"):
        assert torch.equal(one[name], found[name][1:2]), name


@pytest.mark.parametrize("shape", [(2, 12, 0, 4), (0, 12, 3, 4)], ids=str)
def test_images_without_pixels(shape):
    norm, grad, _ = norms.operands(Norms(shape, 3, options={"scale"}))
    _, found, statistics = norm_runs.run(OPS, norm, grad, None, keep_total=False)
    assert statistics.isnan().all()
    assert all(found[name].count_nonzero() == 0 for name in ("sum_g", "sum_gn", "sum_dx", "dweight", "dbias"))


@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (2, 6, 4, 4)], ids=["in fours", "streamed"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_what_is_not_finite_spoils_its_group_alone(shape, value):
    norm, grad, _ = norms.operands(Norms(shape, 2, options={"silu"}))
    norm.x[1, 1, 2, 3] = value
    _, found, statistics = norm_runs.run(OPS, norm, grad, None, keep_total=False)
    for name in ("y", "dx"):
        by_group = found[name].unflatten(1, (2, -1)).isnan().flatten(2)
        assert by_group.all(2).tolist() == by_group.any(2).tolist() == [[False, False], [True, False]], name
    assert statistics.isnan().any(2).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("word", ["one pixel a thread, no whole warp", "streamed: odd groups over the border"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nothing_outside_an_operand_is_touched(word, dtype):
    shape, groups, joined = SIZES[word]
    guard = Guarded()
    norm, grad, grad_total = norms.operands(Norms((2, *shape), groups, joined, EVERYTHING, dtype))
    norm = norm._replace(**{name: guard(getattr(norm, name)) for name in ("x", "residual", "joined", "weight", "bias")})
    norm = norm._replace(**{name: guard(getattr(norm, name).contiguous()) for name in ("scale", "shift", "added")})
    y, total, dx = guard(grad), guard(norm.x), guard(norm.x)
    statistics, sums = guard(torch.empty(2, groups, 3)), guard(torch.empty(3, 2, len(norm.weight)))
    OPS["group_norm"](norm, y, total, statistics)
    gradients = guard(grad), guard(grad_total), statistics, dx, guard(norm.joined), sums
    OPS["group_norm_backward"](norms.of_total(norm, total), *gradients)
    rows = [guard(torch.empty_like(norm.weight)) for _ in range(2)] + [guard(norm.scale) for _ in range(2)]
    OPS["group_norm_parameters"](sums, norm.weight, norm.bias, norm.scale, *rows)
    OPS["add_bias"](norm.x, total, norm.added, dx)
    OPS["channel_sums"](norm.x, guard(norm.added[0]))
    assert guard.untouched()


@pytest.mark.parametrize("scale", [False, True])
def test_the_parameters_gradients_of_many_samples(scale):
    generator = torch.Generator().manual_seed(0)
    sums, rows = torch.randn(3, 70, 40, generator=generator), torch.randn(70, 80, generator=generator)
    weight, bias = torch.randn(2, 40, generator=generator)
    spread = rows[:, 40:] if scale else None
    found = [torch.full((40,), torch.nan) for _ in range(2)]
    found += [torch.full((70, 40), torch.nan) for _ in range(2)] if scale else [None, None]
    OPS["group_norm_parameters"](sums, weight, bias, spread, *found)
    sum_g, sum_gn = sums[:2].double()
    factor = 1 + spread.double() if scale else 1.0
    exact = [(factor * sum_gn).sum(0), (factor * sum_g).sum(0)]
    exact += [weight.double() * sum_gn + bias.double() * sum_g, sum_g] if scale else []
    for one, other in zip(found, exact, strict=False):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("shape", [(3, 24, 9, 11), (2, 5, 3, 7)], ids=["in fours", "one by one"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", [("residual",), ("added",), ("residual", "added")], ids="+".join)
def test_add_bias_is_the_rounded_sum(options, dtype, shape):
    norm, _, _ = norms.operands(Norms(shape, 1, options=options, dtype=dtype, mean=1.0))
    norm = norm if norm.added is None else norm._replace(added=norm.added[:1].expand(shape[:2]))
    out = torch.full_like(norm.x, torch.nan)
    OPS["add_bias"](norm.x, norm.residual, norm.added, out)
    assert torch.equal(out, norm_runs.composed_total(norm))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 5, 7), (2, 4, 45, 41), (1, 1, 1, 1), (0, 4, 2, 2), (300, 8, 8, 8)], ids=str)
def test_channel_sums(shape, dtype):
    norm, _, _ = norms.operands(Norms(shape, 1, dtype=dtype, mean=1.0))
    out = torch.full((shape[1],), torch.nan)
    OPS["channel_sums"](norm.x, out)
    exact = norm.x.double().sum((0, 2, 3))
    torch.testing.assert_close(out.double(), exact, rtol=5e-7, atol=0)
