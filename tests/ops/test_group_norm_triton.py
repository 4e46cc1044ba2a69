"""The Triton kernels of the network's ops against float64, through Triton's interpreter: data far from zero, sizes that
fill no slab, images that fit a program and images that do not, each option, and the same bits in any batch.

    TRITON_INTERPRET=1 python -m pytest -m interpreter
"""

import os

import pytest
import torch
from support import norm_runs, norms
from support.guarded import Guarded
from support.norm_runs import composed_total
from support.norms import MEANS, Norms

from ddpm_fast.ops.backends import triton as triton_backend

pytest.importorskip("triton", reason="the package triton is not installed: pip install triton")

from ddpm_fast.ops.backends.triton import slabs

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run as: TRITON_INTERPRET=1 python -m pytest -m interpreter"
    ),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # e^-u of lanes that no channel has
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPS = triton_backend.OPS
EVERYTHING = {"scale", "added", "residual", "silu", "grad_total"}
WITHOUT_TOTAL = {"scale", "added", "silu"}
SIZES = {  # a sample's shape, groups, channels of a joined image
    "a group across the border of x and joined": ((12, 5, 4), 3, 6),
    "slabs that end at the border": ((16, 5, 4), 4, 16),
    "12 channels a group": ((24, 3, 7), 2, 0),
    "one channel a group": ((5, 5, 4), 5, 0),
    "groups of one value": ((4, 1, 1), 4, 0),
    "a group in parts": ((19, 3, 4), 1, 2),
}


def run(norm, grad, grad_total, keep_total):
    return norm_runs.run(OPS, norm, grad, grad_total, keep_total)


@pytest.fixture
def cut(monkeypatch):
    """Has images cut into chunks of 8 or 16 pixels, of which the last is not full, and groups into parts of at most 16
    channels."""
    for name in ("group_norm", "group_norm_backward"):
        monkeypatch.setitem(OPS[name].__globals__, "LARGEST", 128)
    monkeypatch.setattr(slabs, "LEAST_SLAB", 1)
    monkeypatch.setattr(slabs, "MAX_LANES", 16)


def check_against_float64(samples, word, options, dtype, mean):
    shape, groups, joined = SIZES[word]
    operands = norms.operands(Norms((samples, *shape), groups, joined, options, dtype, mean=mean))
    norm, found, statistics = run(*operands, keep_total="residual" in options)
    exact = norms.in_float64(norm, *operands[1:])
    norms.check(found, exact, norms.in_fp32(norm, *operands[1:]))
    if norm.added is None:  # otherwise what is normalised was rounded first
        norms.check_statistics(statistics, exact)


@pytest.mark.parametrize(
    "word, options, dtype, mean",
    [
        ("a group across the border of x and joined", EVERYTHING, F32, MEANS[F32]),
        ("a group across the border of x and joined", WITHOUT_TOTAL, BF16, MEANS[BF16]),
        ("slabs that end at the border", EVERYTHING, BF16, MEANS[BF16]),
        ("slabs that end at the border", {"silu"}, F32, 0.0),
        ("12 channels a group", set(), F32, MEANS[F32]),
        ("12 channels a group", EVERYTHING, F16, MEANS[F16]),
        ("one channel a group", {"scale", "grad_total"}, F32, MEANS[F32]),
        ("groups of one value", EVERYTHING, F32, 0.0),
    ],
)
def test_the_error_is_at_most_twice_that_of_plain_torch(word, options, dtype, mean):
    check_against_float64(2, word, options, dtype, mean)


# An interpreted program of a norm takes up to 40 ms, so there are few of them.
@pytest.mark.parametrize(
    "word, options, dtype",
    [
        ("a group across the border of x and joined", EVERYTHING, F32),
        ("slabs that end at the border", {"silu", "grad_total"}, BF16),
        ("12 channels a group", EVERYTHING, F16),
        ("one channel a group", {"silu"}, F32),
        ("a group in parts", {"scale", "silu", "grad_total"}, F32),
    ],
)
def test_so_is_that_of_images_in_chunks(word, options, dtype, cut):
    check_against_float64(1, word, options, dtype, MEANS[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_residual_whose_sum_nobody_asks_for(dtype, request):
    if dtype == F32:
        request.getfixturevalue("cut")
    case = Norms((1, 8, 5, 4), 2, 4, {"residual", "added", "silu"}, dtype, mean=MEANS[dtype])
    norm, grad, _ = norms.operands(case)
    _, found, _ = run(norm, grad, None, keep_total=False)
    norms.check(found, norms.in_float64(norm, grad), norms.in_fp32(norm, grad))


def test_vectors_of_any_dtype_and_stride():
    norm, grad, grad_total = norms.operands(Norms((3, 8, 5, 4), 4, options=EVERYTHING, dtype=BF16, vectors=F16))
    norm = norm._replace(
        weight=torch.arange(8, 0, -1, dtype=F32)[:, None].repeat(1, 2)[:, 0],  # two numbers from one to the next
        added=norm.added[:1].expand(3, 8),
        scale=norm.scale.bfloat16()[:1].expand(3, 8),
        shift=norm.shift.t().contiguous().t(),
    )
    norm, found, _ = run(norm, grad, grad_total, keep_total=True)
    norms.check(found, norms.in_float64(norm, grad, grad_total), norms.in_fp32(norm, grad, grad_total))


@pytest.mark.parametrize("chunks", [False, True])
def test_a_sample_has_the_same_bits_in_any_batch(chunks, request):
    if chunks:
        request.getfixturevalue("cut")
    norm, grad, grad_total = norms.operands(Norms((2, 8, 5, 4), 2, 4, EVERYTHING, mean=5.0))
    _, found, statistics = run(norm, grad, grad_total, keep_total=True)
    alone = norm._replace(
        **{name: getattr(norm, name)[1:] for name in ("x", "scale", "shift", "added", "residual", "joined")}
    )
    _, one, its_statistics = run(alone, grad[1:], grad_total[1:], keep_total=True)
    assert torch.equal(its_statistics, statistics[1:])
    for name in ("y", "dx", "djoined", "sum_g", "sum_gn", "sum_dx", "dscale", "dshift"):
        assert torch.equal(one[name], found[name][1:]), name


@pytest.mark.parametrize("shape", [(2, 12, 0, 4), (0, 12, 3, 4)], ids=str)
def test_images_without_pixels(shape):
    norm, grad, _ = norms.operands(Norms(shape, 3, options={"scale"}))
    _, found, statistics = run(norm, grad, None, keep_total=False)
    assert statistics.isnan().all()
    assert all(found[name].count_nonzero() == 0 for name in ("sum_g", "sum_gn", "sum_dx", "dweight", "dbias"))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_what_is_not_finite_spoils_its_group_alone(value):
    norm, grad, _ = norms.operands(Norms((2, 16, 4, 4), 2, options={"silu"}))
    norm.x[1, 1, 2, 3] = value
    _, found, statistics = run(norm, grad, None, keep_total=False)
    for name in ("y", "dx"):
        by_group = found[name].unflatten(1, (2, -1)).isnan().flatten(2)
        assert by_group.all(2).tolist() == by_group.any(2).tolist() == [[False, False], [True, False]], name
    assert statistics.isnan().any(2).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("word", ["a group across the border of x and joined", "12 channels a group"])
def test_nothing_outside_an_operand_is_touched(word, request):
    shape, groups, joined = SIZES[word]
    if joined:
        request.getfixturevalue("cut")
    guard = Guarded()
    norm, grad, grad_total = norms.operands(Norms((1, *shape), groups, joined, EVERYTHING, BF16))
    norm = norm._replace(
        **{name: guard(getattr(norm, name)) for name in ("x", "residual", "weight", "bias")},
        **{name: guard(getattr(norm, name).contiguous()) for name in ("scale", "shift", "added")},
        joined=guard(norm.joined) if joined else None,
    )
    y, total, dx, djoined = guard(grad), guard(norm.x), guard(norm.x), guard(norm.joined) if joined else None
    statistics, sums = guard(torch.empty(1, groups, 3)), guard(torch.empty(3, 1, len(norm.weight)))
    OPS["group_norm"](norm, y, total, statistics)
    gradients = guard(grad), guard(grad_total), statistics, dx, djoined, sums
    OPS["group_norm_backward"](norms.of_total(norm, total), *gradients)
    rows = [guard(torch.empty_like(norm.weight)) for _ in range(2)] + [guard(norm.scale) for _ in range(2)]
    OPS["group_norm_parameters"](sums, norm.weight, norm.bias, norm.scale, *rows)
    OPS["add_bias"](norm.x, norm.residual, norm.added, dx)
    OPS["channel_sums"](norm.x, guard(torch.empty(norm.x.shape[1])))
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
    if scale:
        exact += [weight.double() * sum_gn + bias.double() * sum_g, sum_g]
    for one, other in zip(found, exact, strict=False):
        torch.testing.assert_close(one.double() if one is not None else one, other, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "options", [{"residual"}, {"added"}, {"residual", "added"}], ids=lambda options: "+".join(sorted(options))
)
def test_add_bias_is_the_rounded_sum(options, dtype):
    norm, _, _ = norms.operands(Norms((3, 24, 9, 11), 1, options=options, dtype=dtype, mean=1.0))
    norm = norm if norm.added is None else norm._replace(added=norm.added[:1].expand(3, 24))
    out = torch.full_like(norm.x, torch.nan)
    OPS["add_bias"](norm.x, norm.residual, norm.added, out)
    assert torch.equal(out, composed_total(norm))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 5, 7), (2, 3, 45, 41), (1, 1, 1, 1), (0, 4, 2, 2)], ids=str)
def test_channel_sums(shape, dtype, monkeypatch):
    # 2,048 pixels of one channel, or 16 of 70, are as few as a program adds up: several parts, the last not full.
    monkeypatch.setitem(OPS["channel_sums"].__globals__, "_ROWS", 1)
    norm, _, _ = norms.operands(Norms(shape, 1, dtype=dtype, mean=1.0))
    out = torch.full((shape[1],), torch.nan)
    OPS["channel_sums"](norm.x, out)
    exact = norm.x.double().sum((0, 2, 3))
    torch.testing.assert_close(out.double(), exact, rtol=5e-7, atol=0)
