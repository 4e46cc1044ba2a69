"""Products in a precision that a CPU lacks: computed in fp32, rounded once, and differentiable as torch's are."""

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast.nn import products
from ddpm_fast.nn.convolution import Conv2d

BF16 = torch.bfloat16


@pytest.fixture(params=[False, True], ids=["without bf16 instructions", "with them"])
def native(request, monkeypatch):
    """Whether the CPU is said to have the instructions."""
    monkeypatch.setitem(products._IS_NATIVE, BF16, request.param)
    return request.param


def draw(*shape, seed=0, dtype=BF16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conv(x, weight, bias):
    layer = Conv2d(12, 5, stride=2)
    return layer._conv_forward(x, weight, bias)


CASES = {
    "linear": (F.linear, [draw(7, 12), draw(5, 12, seed=1), draw(5, seed=2)]),
    "convolution": (conv, [draw(2, 12, 6, 6), draw(5, 12, 3, 3, seed=1), draw(5, seed=2)]),
    "no bias": (F.linear, [draw(7, 12), draw(5, 12, seed=1), None]),
    "attention": (F.scaled_dot_product_attention, [draw(2, 3, 9, 4, seed=i) for i in range(3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_widened_product_is_the_exact_one_rounded_once(name, monkeypatch):
    monkeypatch.setitem(products._IS_NATIVE, BF16, False)
    function, operands = CASES[name]
    found = products.computed(function, *operands)
    exact = function(*(None if v is None else v.double() for v in operands))
    assert found.dtype == BF16
    # Half a unit in the last place of bf16, and what fp32 may be off by where that decides.
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() * 1.001 + 1e-6).all()


def test_the_instructions_that_there_are_decide(native, monkeypatch):
    seen = []

    def function(x):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return x

    monkeypatch.setitem(products._IS_NATIVE, torch.float16, False)
    low = BF16 if native else torch.float32
    assert products.computed(function, draw(3)).dtype == BF16
    assert products.computed(function, draw(3, dtype=torch.float16)).dtype == torch.float16
    for dtype in (torch.float32, torch.float64):
        assert products.computed(function, draw(3, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", BF16):
        products.computed(function, draw(3, dtype=torch.float32))
        products.computed(function, draw(3, dtype=torch.float64))
    products.computed(function, torch.empty(3, dtype=BF16, device="meta"))
    plain = (torch.float32, torch.float32, torch.float64)
    assert [dtype for dtype, _ in seen] == [low, *plain, torch.float32, torch.float64, BF16]
    assert [on for _, on in seen] == [False] * 4 + [native, True, False]


def test_dtypes_that_do_not_fit_are_refused_as_ever(native):
    with pytest.raises(RuntimeError, match="dtype"):
        products.computed(F.linear, draw(7, 12), draw(5, 12, dtype=torch.float32))


def test_under_autocast_a_layer_has_autocasts_dtype_and_exact_gradients(native):
    layer, x = products.Linear(12, 5), draw(7, 12, dtype=torch.float32).requires_grad_()
    probe = draw(7, 5, seed=3)
    with torch.autocast("cpu", BF16):
        y = layer(x)
    assert y.dtype == BF16
    leaves = (x, layer.weight, layer.bias)
    found = torch.autograd.grad(y, leaves, probe)
    exact = torch.autograd.grad(
        F.linear(x.double(), layer.weight.double(), layer.bias.double()), leaves, probe.double()
    )
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2 if native else 1e-5, atol=5e-2 if native else 1e-5)


def test_compiled_it_is_one_graph(native):
    layer = products.Linear(12, 5).to(BF16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(draw(7, 12)), layer(draw(7, 12)))
