"""add_group_norm and add_bias, with what they are made of, are compared with float64 on the CPU's backends: values,
gradients, PyTorch's own checks of a registered op, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from ddpm_fast import ops, use_backend
from ddpm_fast.errors import InputError
from ddpm_fast.ops import Addends

F32, F64 = torch.float32, torch.float64
_ops = torch.ops.ddpm_fast
PARTS = {
    "a residual": ("residual",),
    "a bias": ("added",),
    "rows of each sample": ("rows",),
    "a joined image": ("joined",),
    "everything": ("residual", "rows", "joined", "scale", "silu"),
}


def draw(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def operands(parts, dtype=F32):
    """By name: groups of 5 channels, the second of which has channels of both images where one is joined."""
    width = 15 if "joined" in parts else 10
    found = {"image": 3 + draw(2, 10, 4, 3), "weight": draw(width, seed=1), "bias": draw(width, seed=2)}
    if "residual" in parts:
        found["residual"] = draw(2, 10, 4, 3, seed=3)
    if "added" in parts or "rows" in parts:
        found["added"] = draw(2 if "rows" in parts else 1, 10, seed=4)
    if "joined" in parts:
        found["joined"] = 5 + draw(2, 5, 4, 3, seed=5)
    if "scale" in parts:
        found |= {"scale": draw(2, width, seed=6), "shift": draw(2, width, seed=7)}
    return {name: value.to(dtype).requires_grad_() for name, value in found.items()}


def ours(given, silu):
    addends = Addends(given["image"], given.get("residual"), given.get("added"))
    pair = (given["scale"], given["shift"]) if "scale" in given else None
    groups = given["weight"].shape[0] // 5
    return ops.add_group_norm(
        addends, given["weight"], given["bias"], groups, 1e-5, scale_shift=pair, joined=given.get("joined"), silu=silu
    )


def composed(given, silu):
    total = given["image"] + given.get("residual", 0)
    if "added" in given:
        total = total + given["added"][:, :, None, None]
    whole = torch.cat([total, given["joined"]], 1) if "joined" in given else total
    y = F.group_norm(whole, given["weight"].shape[0] // 5, given["weight"], given["bias"], 1e-5)
    if "scale" in given:
        y = y * (1 + given["scale"][:, :, None, None]) + given["shift"][:, :, None, None]
    return total, F.silu(y) if silu else y


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_add_group_norm_against_float64(parts, name):
    given, exactly = operands(parts), operands(parts, F64)
    with use_backend(name):
        total, y = ours(given, "silu" in parts)
        loss = (total * draw(*total.shape, seed=8)).sum() + (y * draw(*y.shape, seed=9)).sum()
        found = torch.autograd.grad(loss, list(given.values()))
    expected = composed(exactly, "silu" in parts)
    wanted = torch.autograd.grad(
        (expected[0] * draw(*total.shape, seed=8)).sum() + (expected[1] * draw(*y.shape, seed=9)).sum(),
        list(exactly.values()),
    )
    for one, other in zip((total, y), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)
    for key, one, other in zip(given, found, wanted, strict=True):
        assert one.shape == other.shape, key
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-4, msg=key)


@pytest.mark.parametrize("used", ["the sum", "the norm"])
def test_the_gradient_of_one_result_alone(used):
    given, exactly = operands(PARTS["everything"]), operands(PARTS["everything"], F64)
    i = 0 if used == "the sum" else 1
    found = torch.autograd.grad(ours(given, True)[i].sum(), list(given.values()), allow_unused=True)
    wanted = torch.autograd.grad(composed(exactly, True)[i].sum(), list(exactly.values()), allow_unused=True)
    for key, one, other in zip(given, found, wanted, strict=True):
        zeros = torch.zeros_like(exactly[key])
        one, other = (zeros if v is None else v.double() for v in (one, other))
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-4, msg=key)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_normalised_is_the_rounded_sum(dtype):
    given = {name: value.detach().to(dtype) for name, value in operands(("residual", "rows", "joined")).items()}
    total, y = ours(given, True)
    assert total.dtype == y.dtype == dtype
    assert torch.equal(total, (given["image"].float() + given["residual"] + given["added"][..., None, None]).to(dtype))
    again = ours({**given, "image": total, "residual": torch.zeros_like(total), "added": 0 * given["added"]}, True)
    assert torch.equal(again[1], y)


def test_registered_ops_keep_what_they_promise():
    given = operands(PARTS["everything"])
    vectors = [given[name] for name in ("weight", "bias", "scale", "shift", "added")]
    call = (given["image"], *vectors, given["residual"], given["joined"], 3, 1e-5, True, True)
    torch.library.opcheck(_ops.group_norm.default, call)
    y, total, statistics = (x.detach() for x in _ops.group_norm(*call))
    plain = [v.detach() for v in vectors]
    backward = (y, total, total, given["joined"].detach(), *plain[:4], None, statistics, True)
    torch.library.opcheck(_ops.group_norm_backward.default, backward)
    sums = _ops.group_norm_backward(*backward)[2]
    for scale in (plain[2], None):
        torch.library.opcheck(_ops.group_norm_parameters.default, (sums, *plain[:2], scale))
    x = given["image"]
    for residual in (given["residual"], None):
        for bias in (draw(10).requires_grad_(), None):
            torch.library.opcheck(_ops.add_bias.default, (x, residual, bias))
    torch.library.opcheck(_ops.channel_sums.default, (x,))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_add_bias_against_float64(residual, bias):
    x, r, b = (v.requires_grad_() for v in (draw(2, 5, 4, 3), draw(2, 5, 4, 3, seed=1), draw(5, seed=2)))
    given = [x, b if bias else None, r if residual else None]
    doubles = [None if v is None else v.double() for v in given]
    expected = doubles[0] + (doubles[2] if residual else 0) + (doubles[1][:, None, None] if bias else 0)
    for found in (ops.add_bias(*given), _ops.add_bias(given[0], given[2], given[1])):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        assert found.is_contiguous(memory_format=torch.channels_last) or found.is_contiguous()
        wanted = [v for v in given if v is not None]
        grad = draw(2, 5, 4, 3, seed=3)
        gradients = torch.autograd.grad(found, wanted, grad)
        for one, v in zip(gradients, wanted, strict=True):
            exactly = grad.double().sum((0, 2, 3)) if v is b else grad.double()
            torch.testing.assert_close(one.double(), exactly, rtol=1e-6, atol=1e-6)


X, W = draw(2, 10, 4, 3), draw(10)
REFUSED = {
    "no Addends": (lambda: ops.add_group_norm(X, W, W, 2, 1e-5), "addends is a Tensor; expected an Addends"),
    "a residual of another size": (
        lambda: ops.add_group_norm(Addends(X, X[:, :5]), W, W, 2, 1e-5),
        "residual has shape",
    ),
    "a residual of another dtype": (
        lambda: ops.add_group_norm(Addends(X, X.bfloat16()), W, W, 2, 1e-5),
        "residual is torch.bfloat16",
    ),
    "a joined image of another size": (
        lambda: ops.add_group_norm(Addends(X, X), draw(15), draw(15), 3, 1e-5, joined=draw(2, 5, 4, 4)),
        "joined has shape",
    ),
    "weights without the joined channels": (
        lambda: ops.add_group_norm(Addends(X, X), W, W, 2, 1e-5, joined=draw(2, 5, 4, 3)),
        r"weight has shape \(10,\) and x 15 channels",
    ),
    "what is added": (
        lambda: ops.add_group_norm(Addends(X, None, draw(3, 10)), W, W, 2, 1e-5),
        r"added has shape \(3, 10\)",
    ),
    "a residual that is not kept": (
        lambda: _ops.group_norm(X, W, W, None, None, None, X, None, 2, 1e-5, False, False),
        "residual and joined need keep=True",
    ),
    "a bias of other channels": (lambda: ops.add_bias(X, draw(9)), r"bias has shape \(9,\) and x 10 channels"),
    "a list": (lambda: ops.add_bias(X, [1.0]), "add_bias: bias is a list"),
    "no image": (lambda: ops.add_bias(W, W), r"x has shape \(10,\); expected \[N, C, H, W\]"),
}


@pytest.mark.parametrize("word", REFUSED)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_refused(word, name):
    call, message = REFUSED[word]
    with use_backend(name), pytest.raises(InputError, match=message):
        call()
