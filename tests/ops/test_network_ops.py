"""group_norm and winograd as ops: their plain-torch versions against torch's own layers, the C++ kernels against these,
who runs them, images without pixels, and what they refuse.
"""

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.ops import active_backend, use_backend
from ddpm_fast.ops.backends import cpu

needs_kernels = pytest.mark.skipif(not cpu.isas(), reason=cpu.unavailable)
OPS = torch.ops.ddpm_fast
F32, F64 = torch.float32, torch.float64


def draw(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def norm_inputs(shape=(2, 12, 5, 3), rows=True, dtype=F32):
    """x, weight, bias, scale, shift, added"""
    n, c = shape[:2]
    vectors = draw(c, seed=1, dtype=dtype), draw(c, seed=2, dtype=dtype)
    extra = [draw(n, c, seed=3 + i, dtype=dtype) if rows else None for i in range(3)]
    return [2 + draw(*shape, dtype=dtype), *vectors, *extra]


def forward_and_backward(inputs, groups=3, silu=True):
    y, _, statistics = OPS.group_norm(*inputs, None, None, groups, 1e-5, silu, False)
    x, *vectors = inputs
    dx, _, sums = OPS.group_norm_backward(torch.cos(3 * x), None, x, None, *vectors, statistics, silu)
    return y, statistics, dx, sums


# --- group_norm


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "no silu"])
@pytest.mark.parametrize("rows", [True, False], ids=["scale, shift and added", "plain"])
def test_the_reference_group_norm_is_torchs(rows, silu):
    inputs = [None if v is None else v.requires_grad_() for v in norm_inputs(rows=rows, dtype=F64)]
    x, weight, bias, scale, shift, added = inputs
    expected = F.group_norm(x if added is None else x + added[..., None, None], 3, weight, bias)
    if rows:
        expected = expected * (1 + scale[..., None, None]) + shift[..., None, None]
    expected = F.silu(expected) if silu else expected
    y, _, dx, sums = forward_and_backward([None if v is None else v.detach() for v in inputs], silu=silu)
    torch.testing.assert_close(y, expected)
    wanted = [x] if scale is None else [x, shift, added]
    found = [dx] if scale is None else [dx, sums[0], sums[2]]
    for one, other in zip(found, torch.autograd.grad(expected, wanted, torch.cos(3 * x)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-6)  # statistics and sums are fp32


@needs_kernels
@pytest.mark.parametrize("rows", [True, False], ids=["scale, shift and added", "plain"])
@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (3, 6, 1, 1), (1, 96, 4, 9)], ids=str)
def test_the_group_norm_kernel_agrees_with_the_reference(shape, rows):
    inputs = norm_inputs(shape, rows)
    found = forward_and_backward(inputs)
    with use_backend("reference"):
        expected = forward_and_backward(inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 12, 0, 4), (2, 12, 3, 0), (0, 12, 3, 4)], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_images_without_pixels(backend, shape):
    inputs = norm_inputs(shape)
    with use_backend(backend):
        y, statistics, dx, sums = forward_and_backward(inputs)
        made = ops.group_norm(*inputs[:3], 3, 1e-5, scale_shift=(inputs[3], inputs[4]), added=inputs[5], silu=True)
    assert y.shape == dx.shape == made.shape == shape and statistics.shape == (shape[0], 3, 3)
    assert statistics.isnan().all() and sums.count_nonzero() == 0


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 12, 0, 4), (0, 12, 3, 4)], ids=str)
def test_images_without_pixels_have_gradients_of_zero(shape):
    # Of torch's own norm the weight's gradient is then NaN.
    leaves = x, weight, bias, scale, shift, added = [v.requires_grad_() for v in norm_inputs(shape)]
    made = ops.group_norm(x, weight, bias, 3, 1e-5, scale_shift=(scale, shift), added=added, silu=True)
    gradients = torch.autograd.grad(made.sum(), leaves)
    assert [v.shape for v in gradients] == [v.shape for v in leaves]
    assert all(v.count_nonzero() == 0 for v in gradients)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_one_scale_and_shift_for_all_samples(backend):
    x, weight, bias, scale, shift, added = norm_inputs()
    with use_backend(backend):
        one = ops.group_norm(x, weight, bias, 3, 1e-5, scale_shift=(scale[:1], shift[:1]), added=added[:1])
        each = [v[:1].repeat(2, 1) for v in (scale, shift, added)]
        assert torch.equal(one, ops.group_norm(x, weight, bias, 3, 1e-5, scale_shift=(each[0], each[1]), added=each[2]))


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 7), (2, 6, 3, 2, 2)], ids=str)
def test_group_norm_of_images_that_are_not_two_dimensional(shape):
    x, weight, bias, scale, shift, _ = norm_inputs(shape)
    expected = F.group_norm(x, 3, weight, bias)
    ones = [1] * (len(shape) - 2)
    expected = expected * (1 + scale.view(*shape[:2], *ones)) + shift.view(*shape[:2], *ones)
    torch.testing.assert_close(ops.group_norm(x, weight, bias, 3, 1e-5, scale_shift=(scale, shift)), expected)


def test_a_second_derivative_in_plain_torch():
    with use_backend("reference"):
        inputs = [v.requires_grad_() for v in norm_inputs((2, 4, 2, 2), dtype=F64)]

        def run(x, weight, bias, scale, shift, added):
            return ops.group_norm(x, weight, bias, 2, 1e-5, scale_shift=(scale, shift), added=added, silu=True)

        assert torch.autograd.gradgradcheck(run, inputs)


# --- winograd


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (5, 7), (1, 1)], ids=str)
def test_the_reference_winograd_is_the_convolution(size, bias):
    x, weight = draw(2, 3, *size, dtype=F64), draw(35, 3, 3, 3, seed=1, dtype=F64)
    b = draw(35, seed=2, dtype=F64) if bias else None
    with use_backend("reference"):
        y = ops.winograd(x, ops.winograd_filters(weight), b, 35)
    # The filters are fp32, and so is the bias.
    torch.testing.assert_close(y, F.conv2d(x, weight, b, padding=1), rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
def test_the_winograd_kernel_agrees_with_the_reference():
    x, filters, bias = draw(2, 40, 9, 10), ops.winograd_filters(draw(33, 40, 3, 3, seed=1)), draw(33, seed=2)
    y = ops.winograd(x, filters, bias, 33)
    with use_backend("reference"):
        torch.testing.assert_close(y, ops.winograd(x, filters, bias, 33), rtol=1e-4, atol=1e-4)


# --- who runs them


@needs_kernels
@pytest.mark.parametrize("op", ["group_norm", "group_norm_backward", "winograd"])
def test_plain_torch_runs_what_no_backend_has(op):
    assert active_backend(op, "cpu", F32) == "cpu"
    assert active_backend(op, "cpu", F64) == "reference"
    assert active_backend(op, "meta", F32) == "reference"
    with use_backend("cpu"):
        assert active_backend(op, "cpu", F64) == "reference"  # where the diffusion's ops are refused
    with use_backend("reference"):
        assert active_backend(op, "cpu", F32) == "reference"


# --- what they refuse

X, W, FILTERS = draw(2, 12, 4, 4), draw(12), ops.winograd_filters(draw(5, 12, 3, 3))
REFUSED = {
    "integer images": (lambda: ops.group_norm(X.long(), W, W, 3, 1e-5), "group_norm: x is torch.int64; expected one"),
    "no channels": (lambda: ops.group_norm(W, W, W, 3, 1e-5), r"x has shape \(12,\); expected \[N, C, ...\]"),
    "weight": (lambda: ops.group_norm(X, W[:11], W, 3, 1e-5), r"weight has shape \(11,\) and x 12 channels"),
    "bias": (lambda: ops.group_norm(X, W, W[None], 3, 1e-5), r"bias has shape \(1, 12\) and x 12 channels"),
    "groups": (lambda: ops.group_norm(X, W, W, 5, 1e-5), "5 groups do not divide x's 12 channels"),
    "no groups": (lambda: ops.group_norm(X, W, W, 0, 1e-5), "0 groups do not divide"),
    "added": (
        lambda: ops.group_norm(X, W, W, 3, 1e-5, added=draw(3, 12)),
        r"added has shape \(3, 12\).*expected \(2, 12\), or \(1, 12\) for all samples",
    ),
    "device": (lambda: ops.group_norm(X, W.to("meta"), W, 3, 1e-5), "weight is on meta and x on cpu"),
    "filters' channels": (lambda: ops.winograd(X[:, :11], FILTERS, None, 5), r"float32 \(1, 36, 11, 32\)"),
    "filters' panels": (lambda: ops.winograd(X, FILTERS, None, 33), r"float32 \(2, 36, 12, 32\)"),
    "filters' dtype": (lambda: ops.winograd(X, FILTERS.double(), None, 5), "filters are torch.float64"),
    "one image": (lambda: ops.winograd(X[0], FILTERS, None, 5), r"expected \[N, C, H, W\]"),
    "winograd's bias": (lambda: ops.winograd(X, FILTERS, W, 5), r"bias has shape \(12,\); expected \[5\]"),
    "a gradient": (
        lambda: ops.winograd(X, FILTERS, draw(5).requires_grad_(), 5),
        r"winograd has no gradient: use convolve, or torch.no_grad\(\)",
    ),
    "a 5x5 convolution": (lambda: ops.winograd_filters(draw(4, 3, 5, 5)), r"expected \[K, C, 3, 3\]"),
}


@pytest.mark.parametrize("word", REFUSED)
def test_refused(word):
    call, message = REFUSED[word]
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("start", [1, 4, 17])
def test_winograds_filters_may_begin_anywhere(start):
    x, filters = draw(1, 3, 8, 8), ops.winograd_filters(draw(5, 3, 3, 3))
    moved = torch.zeros(filters.numel() + start)[start:].view(filters.shape).copy_(filters)
    assert torch.equal(ops.winograd(x, moved, None, 5), ops.winograd(x, filters, None, 5))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ops.winograd_filters([[1.0]]), "winograd_filters: weight is a list; expected a tensor"),
        (lambda: ops.winograd_filters(draw(3, 0, 3, 3)), "at least one channel"),
        (lambda: ops.winograd_filters(draw(3, 3, 3, 3).to_sparse()), "sparse_coo tensor; expected a dense one"),
        (lambda: ops.winograd(draw(1, 3, 8, 8), [1.0], None, 5), "winograd: filters is a list"),
        (lambda: ops.winograd(draw(1, 3, 8, 8), draw(1, 36, 3, 32), [1.0], 5), "winograd: bias is a list"),
        (
            lambda: ops.winograd(draw(1, 3, 8, 8), draw(1, 36, 3, 32), None, 2**64),
            "out_channels is 18446744073709551616",
        ),
        (lambda: ops.group_norm(*norm_inputs()[:3], 2.0, 1e-5), "groups is 2.0, a float"),
        (lambda: ops.group_norm(*norm_inputs()[:3], 2, ()), r"eps is \(\); expected a number"),
        (lambda: ops.group_norm(*norm_inputs()[:3], 2, 1e-5, added=[[1.0]]), "added is a list"),
        (lambda: ops.group_norm(*norm_inputs()[:3], 2, 1e-5, scale_shift=draw(2, 12)), "scale_shift is a Tensor"),
        (lambda: ops.group_norm([1.0], *norm_inputs()[1:3], 2, 1e-5), "group_norm: x is a list"),
    ],
)
def test_what_is_no_tensor_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
