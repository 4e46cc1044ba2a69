"""`convolve` and its gradients: against the definition in float64, and against F.conv2d wherever that has to answer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.errors import InputError
from ddpm_fast.ops.backends import cpu

needs_kernels = pytest.mark.skipif(not cpu.isas(), reason=cpu.unavailable)
OPS = torch.ops.ddpm_fast
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def image(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return draw(*shape, seed=seed, dtype=dtype).contiguous(memory_format=torch.channels_last)


def layer(k: int, c: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """Weight and bias, as large as those of a new layer."""
    return (draw(k, c, 3, 3, seed=1) / (9 * c) ** 0.5).to(dtype), draw(k, seed=2, dtype=dtype)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def all_of(function, inputs, grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of the inputs."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


SHAPES = {
    "square": (2, 64, 64, 16, 16),
    "channels of no panel's and no vector's length": (2, 33, 47, 16, 16),
    "channels of two strips and a rest; not square": (1, 130, 65, 12, 20),
    "7x7": (8, 96, 32, 7, 7),
    "9x9": (3, 40, 56, 9, 9),
    "5x5": (2, 32, 96, 5, 5),
    "13x31: three rows unused": (1, 32, 32, 13, 31),
    "one tile an image": (9, 64, 64, 4, 4),
    "smaller than a tile": (2, 1, 3, 3, 2),
    "one pixel": (1, 2, 1, 1, 1),
}


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(isa, shape):
    n, c, k, h, w = SHAPES[shape]
    inputs, grad = (image(n, c, h, w), *layer(k, c)), image(n, k, h, w, seed=3)
    expected = all_of(plain, [value.double() for value in inputs], grad)
    found = all_of(ops.convolve, inputs, grad)
    theirs = all_of(plain, inputs, grad)
    for value, wanted, other in zip(found, expected, theirs, strict=True):
        assert value.shape == wanted.shape and value.dtype == F32
        assert error(value, wanted) <= max(1.2e-6, 2 * error(other, wanted))
        # By value: an edge that is wrong would be lost in the norm of many.
        scale = wanted.std(unbiased=False).clamp_min(1e-2)
        assert (value - wanted).abs().max() <= 2 * (other - wanted).abs().max() + 3e-5 * scale
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in found[:2])


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_halves_are_rounded_once(isa, dtype):
    """The weights stay in fp32, and so do their gradients."""
    inputs, grad = (image(3, 40, 14, 14, dtype=dtype), *layer(47, 40)), image(3, 47, 14, 14, seed=3, dtype=dtype)
    y, by_x, *by_parameters = all_of(ops.convolve, inputs, grad)
    expected = all_of(plain, [value.double() for value in inputs], grad)
    for value, wanted in zip((y, by_x), expected, strict=False):
        assert value.dtype == dtype and error(value, wanted) <= 1.001 * error(wanted.to(dtype), wanted)
    for value, wanted in zip(by_parameters, expected[2:], strict=True):
        assert value.dtype == F32 and error(value, wanted) < 1e-6


@needs_kernels
@pytest.mark.parametrize(("of_weight", "of_bias"), [(BF16, BF16), (F16, F32), (F64, F64)])
def test_gradients_have_their_parameters_dtype(of_weight, of_bias):
    (weight, bias), grad = layer(32, 33), image(2, 32, 8, 8, seed=3)
    inputs = image(2, 33, 8, 8), weight.to(of_weight), bias.to(of_bias)
    found = all_of(ops.convolve, inputs, grad)
    expected = all_of(plain, [value.double() for value in inputs], grad)
    assert [value.dtype for value in found] == [F32, F32, of_weight, of_bias]
    for value, wanted in zip(found, expected, strict=True):
        assert error(value, wanted) < (5e-3 if value.dtype in (BF16, F16) else 2e-6)


@needs_kernels
def test_any_strides_of_images_weights_and_gradients():
    whole, (weight, bias) = draw(4, 64, 16, 12), layer(64, 32)
    grads = draw(2, 32, 16, 6), draw(4, 64, 16, 12)[::2, ::2, :, ::2], draw(1).expand(2, 32, 16, 6)
    strided = weight.transpose(2, 3)[::2]
    for x in (whole[:2, ::2, :, ::2], whole[::2, 32:, :, 6:]):
        for grad in grads:
            inputs = [value.clone(memory_format=torch.preserve_format) for value in (x, strided, bias[::2])]
            expected = all_of(plain, [value.double() for value in inputs], grad)
            leaves = [value.detach().requires_grad_() for value in (x, strided, bias[::2])]
            y = ops.convolve(*leaves)
            for value, wanted in zip((y, *torch.autograd.grad(y, leaves, grad)), expected, strict=True):
                assert error(value, wanted) < 2e-6


@needs_kernels
def test_the_gradient_of_a_sum():
    """It is one number, expanded to the image's shape."""
    inputs = image(2, 32, 9, 9), *layer(40, 32)
    leaves = [value.double().requires_grad_() for value in inputs]
    expected = torch.autograd.grad(plain(*leaves).sum(), leaves)
    leaves = [value.requires_grad_() for value in inputs]
    for value, wanted in zip(torch.autograd.grad(ops.convolve(*leaves).sum(), leaves), expected, strict=True):
        assert error(value, wanted) < 2e-6


@needs_kernels
def test_no_images_have_gradients_of_zero():
    inputs = image(0, 32, 8, 8), *layer(40, 32)
    y, by_x, by_weight, by_bias = all_of(ops.convolve, inputs, image(0, 40, 8, 8))
    assert y.shape == (0, 40, 8, 8) and by_x.shape == (0, 32, 8, 8)
    assert by_weight.shape == inputs[1].shape and by_bias.shape == (40,)
    assert not by_weight.any() and not by_bias.any()


@pytest.fixture
def ran(monkeypatch):
    """The names of the kernels that ran."""
    names = []

    def counted(name, original):
        return lambda *arguments: names.append(name) or original(*arguments)

    for name in ("winograd", "winograd_filters", "winograd_weight_gradient"):
        monkeypatch.setitem(cpu.OPS, name, counted(name, cpu.OPS[name]))
    return names


@needs_kernels
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_the_gradients_that_are_needed_are_computed_and_prepared(wanted, ran):
    inputs = [image(1, 32, 8, 8), *layer(32, 32)]
    for i in wanted:
        inputs[i].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        y = ops.convolve(*inputs)
    assert {value.data_ptr() for value in kept} == {inputs[1 - i].data_ptr() for i in wanted if i < 2}
    assert ran == ["winograd_filters", "winograd"]
    y.square().sum().backward()
    of_x, of_weight = ["winograd_filters", "winograd"] * (0 in wanted), ["winograd_weight_gradient"] * (1 in wanted)
    assert ran[2:] == of_x + of_weight
    assert [value.grad is not None for value in inputs] == [i in wanted for i in range(3)]


@needs_kernels
def test_without_a_bias():
    (weight, _), x, grad = layer(40, 33), image(2, 33, 9, 9), image(2, 40, 9, 9, seed=3)
    expected = all_of(plain, (x.double(), weight.double()), grad)
    for value, wanted in zip(all_of(ops.convolve, (x, weight), grad), expected, strict=True):
        assert error(value, wanted) < 2e-6


@needs_kernels
@pytest.mark.parametrize("changed", [0, 1], ids=["the image", "the weight"])
def test_a_change_before_the_backward_is_torchs_error(changed):
    inputs = [value.requires_grad_() for value in (image(1, 32, 8, 8), *layer(32, 32))]
    y = ops.convolve(*inputs)
    with torch.no_grad():
        inputs[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_kernels
@pytest.mark.parametrize("of_weight", [F32, F64], ids=["one dtype", "a float64 weight"])
def test_a_second_derivative(of_weight):
    inputs = image(2, 32, 8, 8), *layer(33, 32)

    def penalty(function, dtypes):
        leaves = [value.detach().to(dtype).requires_grad_() for value, dtype in zip(inputs, dtypes, strict=True)]
        found = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(value.square().mean() for value in found), leaves)

    expected = penalty(plain, (F64, F64, F64))
    found = penalty(ops.convolve, (F32, of_weight, F32))
    for value, wanted in zip(found, expected, strict=True):
        assert error(value, wanted) < 5e-6


@needs_kernels
def test_within_the_reference_backend_it_is_torchs_own_forward_and_backward(ran):
    inputs, grad = (image(2, 32, 8, 8), *layer(32, 32)), image(2, 32, 8, 8, seed=3)
    leaves = [value.clone().requires_grad_() for value in inputs]
    with ops.use_backend("reference"):
        y = ops.convolve(*leaves)
    found = y, *torch.autograd.grad(y, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, all_of(plain, inputs, grad), strict=True)) and not ran
    y = ops.convolve(*leaves)
    made = len(ran)
    with ops.use_backend("reference"):
        y.backward(grad)
    assert len(ran) == made + 3  # what began on the kernels ends there


@needs_kernels
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda f, x, w: torch.func.vmap(f, (0, None))(x[:, None], w), id="vmap"),
        pytest.param(lambda f, x, w: torch.func.grad(lambda w: f(x, w).sin().sum())(w), id="grad"),
        pytest.param(lambda f, x, w: torch.func.jvp(lambda x: f(x, w), (x,), (x.cos(),))[1], id="jvp"),
        pytest.param(lambda f, x, w: f(x.double(), w), id="float64"),
        pytest.param(lambda f, x, w: torch.compile(f, backend="eager", fullgraph=True)(x, w), id="compiled"),
    ],
)
def test_plain_torch_computes_the_rest(run, ran):
    x, weight = image(2, 32, 8, 8), layer(32, 32)[0]
    expected = run(lambda x, weight: plain(x, weight.to(x.dtype)), x, weight)
    torch.testing.assert_close(run(ops.convolve, x, weight), expected, rtol=1e-5, atol=1e-5)
    assert not ran


@needs_kernels
def test_opcheck():
    x, grad, (weight, bias) = image(2, 33, 8, 8), image(2, 40, 8, 8, dtype=BF16, seed=3), layer(40, 33)
    torch.library.opcheck(OPS.winograd_weight_gradient.default, (x.to(BF16), grad))
    torch.library.opcheck(OPS.winograd_filters.default, (weight.to(BF16), True))
    torch.library.opcheck(OPS.convolve.default, [value.requires_grad_() for value in (x, weight, bias)])


# --- winograd_filters


@needs_kernels
@pytest.mark.parametrize("flipped", [False, True], ids=["as it is", "flipped"])
@pytest.mark.parametrize("shape", [(64, 32), (33, 47), (1, 5), (130, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_filters(isa, shape, dtype, flipped):
    weight = draw(*shape, 3, 3, dtype=dtype)
    layouts = weight, weight.contiguous(memory_format=torch.channels_last), weight.transpose(2, 3), weight.mT.flip(0)
    for laid_out in layouts:
        found = OPS.winograd_filters(laid_out, flipped)
        with ops.use_backend("reference"):
            taken = laid_out.double()
            exact = OPS.winograd_filters(taken.transpose(0, 1).flip(2, 3) if flipped else taken, False)
        assert found.shape == exact.shape and found.dtype == F32
        assert error(found, exact.double()) < 2e-7
        assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
        assert not found[-1, :, :, shape[flipped] % 32 or 32 :].any()


# --- winograd_weight_gradient


@needs_kernels
def test_every_pair_of_pixels_reaches_its_tap(isa):
    """One pixel of each image at a time: exact small numbers that no average hides."""
    x, grad = torch.zeros(1, 2, 9, 10), torch.zeros(1, 3, 9, 10)
    for row, column in [(0, 0), (3, 4), (4, 3), (7, 8), (8, 0), (8, 9)]:
        for down in (-1, 0, 1):
            for right in (-2, -1, 0, 1):
                if not (0 <= row + down < 9 and 0 <= column + right < 10):
                    continue
                x.zero_()[0, 1, row + down, column + right] = 3
                grad.zero_()[0, 2, row, column] = 5
                expected = torch.zeros(3, 2, 3, 3)
                if right >= -1:
                    expected[2, 1, down + 1, right + 1] = 15
                torch.testing.assert_close(OPS.winograd_weight_gradient(x, grad), expected, rtol=0, atol=1e-4)


REFUSED = {
    "no tensor": (lambda: ops.convolve([1.0], *layer(3, 4)), "convolve: x is a list; expected a tensor"),
    "a bias that is none": (lambda: ops.convolve(draw(1, 4, 5, 5), layer(3, 4)[0], 1.0), "bias is a float"),
    "integers": (lambda: ops.convolve(draw(1, 4, 5, 5).long(), *layer(3, 4)), "x is torch.int64"),
    "one image": (lambda: ops.convolve(draw(4, 5, 5), *layer(3, 4)), r"expected \[N, 4, H, W\] for this weight"),
    "channels": (lambda: ops.convolve(draw(1, 5, 5, 5), *layer(3, 4)), r"expected \[N, 4, H, W\] for this weight"),
    "no pixels": (lambda: ops.convolve(draw(1, 4, 0, 5), *layer(3, 4)), "expected .* with pixels"),
    "a 1x1 weight": (lambda: ops.convolve(draw(1, 4, 5, 5), draw(3, 4, 1, 1)), r"expected \[K, C, 3, 3\]"),
    "the bias": (lambda: ops.convolve(draw(1, 4, 5, 5), layer(3, 4)[0], draw(4)), r"bias has shape \(4,\).*\[3\]"),
    "devices": (lambda: ops.convolve(draw(1, 4, 5, 5), layer(3, 4)[0].to("meta")), "weight is on meta and x on cpu"),
    "the gradient's size": (
        lambda: OPS.winograd_weight_gradient(draw(1, 4, 5, 5), draw(1, 3, 5, 6)),
        r"grad has shape \(1, 3, 5, 6\) and x \(1, 4, 5, 5\)",
    ),
    "the gradient's dtype": (
        lambda: OPS.winograd_weight_gradient(draw(1, 4, 5, 5), draw(1, 3, 5, 5, dtype=BF16)),
        "grad is torch.bfloat16; expected one of torch.float32",
    ),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("word", REFUSED)
def test_refused(word, backend):
    call, message = REFUSED[word]
    with ops.use_backend(backend), pytest.raises(InputError, match=message):
        call()
