"""The network's ops on a GPU at the sizes of real networks, on both of its backends: float64, the same bits in any
batch, CUDA graphs, no waiting for the device, and more samples and elements than a grid's dimension or 32 bits hold.
"""

import importlib

import pytest
import torch
from support import norm_runs, norms
from support.norms import MEANS, Norms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EVERYTHING = frozenset({"scale", "added", "residual", "silu", "grad_total"})
CASES = {
    "128 channels 32x32": Norms((4, 128, 32, 32), 32, options=EVERYTHING, dtype=BF16),
    "128 channels 32x32, far from zero": Norms((4, 128, 32, 32), 32, options={"silu"}, dtype=BF16, mean=MEANS[BF16]),
    "128 channels 32x32 in fp32, far from zero": Norms((4, 128, 32, 32), 32, options={"silu"}, mean=MEANS[F32]),
    "128 channels 32x32 in fp32, around zero": Norms((4, 128, 32, 32), 32, options={"silu", "grad_total"}),
    "256 channels 16x16 in fp16": Norms((4, 256, 16, 16), 32, options=EVERYTHING, dtype=F16, mean=MEANS[F16]),
    "256 channels 8x8": Norms((4, 256, 8, 8), 32, options={"silu", "added"}, dtype=BF16),
    "256 channels 4x4": Norms((4, 256, 4, 4), 32, options={"silu", "added", "scale"}, dtype=BF16),
    "256 + 256 channels 4x4": Norms((4, 256, 4, 4), 32, 256, {"silu", "grad_total"}, BF16),
    "256 + 128 channels 32x32": Norms((4, 256, 32, 32), 32, 128, {"silu", "grad_total"}, BF16),
    "a group across the border": Norms((4, 100, 12, 11), 5, 25, EVERYTHING, BF16),
    "8 groups of 256 channels": Norms((4, 256, 32, 32), 8, options={"silu"}, dtype=BF16),
    "64x64": Norms((2, 128, 64, 64), 32, options=EVERYTHING, dtype=BF16, mean=MEANS[BF16]),
    "256x256 in fp32": Norms((1, 32, 256, 256), 8, options=EVERYTHING, mean=MEANS[F32]),
    "one group of 1100 channels": Norms((2, 1100, 4, 3), 1, options={"silu"}, dtype=BF16),
    "groups of one value": Norms((300, 64, 1, 1), 64, options={"silu"}, dtype=BF16),
}


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    return importlib.import_module(f"ddpm_fast.ops.backends.{request.param}").OPS


def there(case):
    """(norm, grad, grad_total) on the GPU"""
    return [moved(value) for value in norms.operands(case)]


def moved(value, device="cuda"):
    if isinstance(value, torch.Tensor):
        return value.to(device, memory_format=torch.preserve_format)
    return value._make(moved(part, device) for part in value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("word", CASES)
def test_the_error_is_at_most_twice_that_of_plain_torch(kernels, word):
    keep_total = "residual" in CASES[word].options
    _, grad, grad_total = norms.operands(CASES[word])
    norm, found, statistics = norm_runs.run(kernels, *there(CASES[word]), keep_total)
    norm = moved(norm, "cpu")
    exact = norms.in_float64(norm, grad, grad_total)
    norms.check(found, exact, norms.in_fp32(norm, grad, grad_total))
    if norm.added is None:
        norms.check_statistics(statistics, exact)


@pytest.mark.parametrize("word", ["128 channels 32x32", "256 + 256 channels 4x4", "64x64"])
def test_a_sample_has_the_same_bits_in_any_batch_and_every_time(kernels, word):
    case = CASES[word]
    norm, grad, grad_total = there(Norms((67, *case.shape[1:]), case.groups, case.joined, case.options, case.dtype))
    keep_total = norm.residual is not None
    _, found, statistics = norm_runs.run(kernels, norm, grad, grad_total, keep_total)
    _, again, _ = norm_runs.run(kernels, norm, grad, grad_total, keep_total)
    assert all(torch.equal(found[name], again[name]) for name in found)
    rows = {name: getattr(norm, name) for name in ("x", "scale", "shift", "added", "residual", "joined")}
    alone = norm._replace(**{name: None if v is None else v[5:6] for name, v in rows.items()})
    _, one, its_statistics = norm_runs.run(kernels, alone, grad[5:6], grad_total[5:6], keep_total)
    assert torch.equal(its_statistics, statistics[5:6])
    for name in set(one) - {"dweight", "dbias"}:
        assert torch.equal(one[name], found[name][5:6]), name


def test_a_graph_holds_them_and_nothing_waits(kernels):
    norm, grad, grad_total = there(CASES["64x64"])
    total, y = torch.empty_like(norm.x), torch.empty_like(norm.x)
    statistics, sums = (torch.empty(shape, device="cuda") for shape in ((2, 32, 3), (3, 2, 128)))

    def run():
        kernels["group_norm"](norm, y, total, statistics)
        dx = torch.empty_like(total)
        kernels["group_norm_backward"](norms.of_total(norm, total), grad, grad_total, statistics, dx, None, sums)
        kernels["add_bias"](dx, total, norm.added, total)
        kernels["channel_sums"](total, out := torch.empty(128, device="cuda"))
        return dx, out

    run()  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    norm.x.add_(1)
    graph.replay()
    for one, other in zip(captured, run(), strict=True):
        assert torch.equal(one, other)


def test_more_samples_than_a_grid_has_rows(kernels):
    case = Norms((70_001, 8, 2, 1), 2, options={"added", "silu"}, dtype=BF16)
    norm, grad, _ = norms.operands(case)
    _, found, _ = norm_runs.run(kernels, *there(case), False)
    norms.check(found, norms.in_float64(norm, grad), norms.in_fp32(norm, grad))


@pytest.mark.parametrize(
    "options", [{"residual"}, {"added"}, {"residual", "added"}], ids=lambda options: "+".join(sorted(options))
)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_add_bias_is_the_rounded_sum(kernels, dtype, options):
    for shape in ((64, 128, 32, 32), (3, 5, 7, 9), (70_001, 3, 2, 1)):
        norm, *_ = there(Norms(shape, 1, options=options, dtype=dtype, mean=1.0))
        out = torch.full_like(norm.x, torch.nan)
        kernels["add_bias"](norm.x, norm.residual, norm.added, out)
        assert torch.equal(out, norm_runs.composed_total(norm))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(128, 128, 32, 32), (128, 3, 32, 32), (5, 1000, 3, 3), (1, 4, 300, 301)], ids=str)
def test_channel_sums(kernels, shape, dtype):
    norm, *_ = there(Norms(shape, 1, dtype=dtype, mean=1.0))
    out = torch.full((shape[1],), torch.nan, device="cuda")
    kernels["channel_sums"](norm.x, out)
    torch.testing.assert_close(out.double(), norm.x.double().sum((0, 2, 3)), rtol=1e-6, atol=0)


def test_more_than_2_to_the_31_elements(kernels):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    shape = (1, 8, 16384, 16400)
    x = torch.zeros(shape, dtype=F16, device="cuda").contiguous(memory_format=torch.channels_last)
    x[0, :, -1, -1] = torch.arange(8)
    y, statistics = torch.empty_like(x), torch.empty(1, 2, 3, device="cuda")
    weight, bias = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    norm = norms.Norm(x, weight, bias, None, None, None, None, None, 2, 1e-5, False)
    kernels["group_norm"](norm, y, None, statistics)
    pixels = shape[2] * shape[3]
    mean = torch.tensor([6.0, 22.0], dtype=torch.float64) / (4 * pixels)
    # To a millionth of a standard deviation, which is 10,000 times the mean here.
    torch.testing.assert_close(statistics[0, :, :2].sum(1).double().cpu(), mean, rtol=0, atol=1e-6 * 1e-4)
    torch.testing.assert_close(y[0, :, -1, -1].cpu().float(), torch.arange(8) * 1e-5**-0.5, rtol=1e-2, atol=1e-2)
    sums = torch.full((8,), torch.nan, device="cuda")
    kernels["channel_sums"](x, sums)
    assert sums.tolist() == list(range(8))
    kernels["add_bias"](x, x, None, y)
    assert y[0, :, -1, -1].tolist() == list(range(0, 16, 2)) and y[0, :, 0, 0].count_nonzero() == 0
