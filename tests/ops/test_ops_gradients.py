"""Gradients: of the loss against autograd through the formula in float64, of the others by finite differences."""

import math

import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import diffusion_loss, normal, q_sample, reverse_step, use_backend

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LOSS_TABLE = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 5.0], [-0.6, 0.8, 0.25]])
STEP_TABLE = torch.tensor(
    [
        [1.25, -0.75, 0.5, 0.4, -0.3, 0.2, 1.0, 0.0],
        [1.25, -0.75, 0.6, 0.7, 0.1, 0.0, math.inf, 0.0],
        [1.25, -0.75, 0.5, 0.4, -0.3, 0.2, 1.0, 0.35],
        [1.25, -0.75, 0.6, 0.7, 0.1, 0.0, math.inf, 0.5],
    ]
)


def randn(*shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_gradient(output, x0, t, table, z, incoming):
    """d sum(incoming * loss) / d output by autograd in float64."""
    output = output.double().requires_grad_()
    c_x0, c_noise, weight = (column.view(-1, *[1] * (x0.ndim - 1)) for column in table[t].double().unbind(1))
    pixels = x0.double() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.double()
    squares = weight * (output - (c_x0 * pixels + c_noise * z.double())) ** 2
    (squares.flatten(1).mean(1) * incoming.double()).sum().backward()
    return output.grad


@pytest.mark.pairwise
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    # The C++ kernels have no float64; test_backend.py covers what is said about it.
    [
        (name, dtype)
        for name in ("reference", "cpu")
        for dtype in (F32, BF16, F16, F64)
        if (name, dtype) != ("cpu", F64)
    ],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize("noise", ["key", "given"])
def test_loss_gradient_against_float64_autograd(noise, dtype, memory_format, backend):
    output = randn(6, 3, 17, 9, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    x0 = torch.randint(0, 256, (6, 3, 17, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    t, incoming = torch.arange(6) % 3, randn(6, seed=2)
    key = NoiseKey.of(1, 6)
    z = normal(key, (3, 17, 9)) if noise == "key" else randn(6, 3, 17, 9, seed=3)
    table = LOSS_TABLE.to(F64 if dtype == F64 else F32)
    (diffusion_loss(output, x0, t, table, key if noise == "key" else z) * incoming).sum().backward()
    assert output.grad.dtype == dtype and output.grad.is_contiguous(memory_format=memory_format)
    exact = loss_gradient(output.detach(), x0, t, table, z, incoming)
    # The residual is rounded to the dtype, and so is the gradient; fp32 adds four operations of its own. Where a
    # sum cancels, the residual's error is that of its largest term, about 4.
    eps = torch.finfo(dtype).eps
    per_residual = (2 * LOSS_TABLE[t, 2] * incoming.abs() / exact[0].numel()).view(-1, 1, 1, 1).double()
    allowed = exact.abs() * eps * 1.01 + per_residual * 4 * torch.finfo(F64 if dtype == F64 else F32).eps
    allowed += (
        exact.abs() * 4 * torch.finfo(F64 if dtype == F64 else F32).eps + torch.finfo(dtype).smallest_normal * eps
    )
    assert ((output.grad.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("scale", [2.0**16, 1.0], ids=["scaled as GradScaler begins", "unscaled"])
def test_fp16_gradient_of_a_large_image_does_not_underflow(scale, backend):
    # A mean over 3 x 256 x 256 makes the gradient about 1e-5 a sample, below fp16's smallest normal number, 6e-5.
    output = randn(2, 3, 256, 256, dtype=F16).requires_grad_()
    x0, z, t = randn(2, 3, 256, 256, seed=1), randn(2, 3, 256, 256, seed=2), torch.tensor([0, 1])
    (diffusion_loss(output, x0, t, LOSS_TABLE, z).mean() * scale).backward()
    exact = loss_gradient(output.detach(), x0, t, LOSS_TABLE, z, torch.full((2,), scale / 2))
    # The residual is rounded to fp16, and so is the gradient. A residual that cancels has fp32's error of its terms.
    half_a_place = torch.maximum(exact.abs() * 2.0**-11, torch.tensor(2.0**-25, dtype=F64))
    cancelled = 2 * LOSS_TABLE[t, 2].view(-1, 1, 1, 1) * scale / output.numel() * 2.0**-21
    error = (output.grad.double() - exact).abs()
    assert (error <= half_a_place * 1.01 + exact.abs() * 2.0**-11 * 1.01 + cancelled).all()
    if scale > 1:
        assert (output.grad == 0).double().mean() < 1e-5
        assert float(error.norm() / exact.norm()) < 2.0**-11


def test_no_gradient_wanted_nothing_kept():
    output = randn(2, 3, 4, 4)
    arguments = (randn(2, 3, 4, 4, seed=1), torch.tensor([0, 1]), LOSS_TABLE, NoiseKey.of(0, 2))
    assert not diffusion_loss(output, *arguments).requires_grad
    with torch.no_grad():
        loss = diffusion_loss(output.requires_grad_(), *arguments)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, diffusion_loss(output, *arguments).detach(), rtol=0, atol=0)


def test_gradcheck_q_sample():
    x0, z = (randn(3, 2, 3, seed=i, dtype=F64).requires_grad_() for i in (0, 1))
    table = torch.tensor([[0.9, 0.3], [0.5, 0.8]], dtype=F64)
    t = torch.tensor([0, 1, 0])
    assert torch.autograd.gradcheck(lambda x0, z: q_sample(x0, t, table, z), (x0, z))
    assert torch.autograd.gradcheck(lambda x0: q_sample(x0, t, table, NoiseKey.of(0, 3)), (x0,))


def test_gradcheck_diffusion_loss():
    output, x0, z = (randn(3, 2, 3, seed=i, dtype=F64) for i in range(3))
    t = torch.tensor([0, 1, 2])
    table = LOSS_TABLE.double()
    assert torch.autograd.gradcheck(lambda out: diffusion_loss(out, x0, t, table, z), (output.requires_grad_(),))


@pytest.mark.parametrize("step", [0, 1], ids=["clipped", "not clipped, no noise"])
@pytest.mark.parametrize("outputs", ["x", "x0", "x_model", "all"])
def test_gradcheck_reverse_step(outputs, step):
    x, out, before = (randn(2, 2, 5, seed=i, dtype=F64).requires_grad_() for i in range(3))
    table, z = STEP_TABLE.double(), randn(2, 2, 5, seed=3, dtype=F64)

    def call(x, out, before):
        result = reverse_step(x, out, table, torch.tensor(step), z, x0_previous=before, return_x0=True, model_dtype=F64)
        return tuple(result) if outputs == "all" else getattr(result, outputs)

    assert ((1.25 * x - 0.75 * out).abs() > 1).any()
    assert torch.autograd.gradcheck(call, (x, out, before) if outputs != "x0" else (x, out, before.detach()))


@pytest.mark.pairwise
@pytest.mark.parametrize("step", [0, 2, 3], ids=["fixed", "learned", "learned, no noise"])
@pytest.mark.parametrize("noise", ["given", "key"])
@pytest.mark.parametrize("outputs", ["x", "x0", "all"])
def test_gradcheck_reverse_step_with_a_learned_variance(outputs, noise, step):
    x, before, out = (randn(2, c, 5, seed=c, dtype=F64).requires_grad_() for c in (2, 2, 4))
    z = randn(2, 2, 5, seed=3, dtype=F64) if noise == "given" else NoiseKey.of(5, 2)

    def call(x, out, before):
        result = reverse_step(
            x,
            out,
            STEP_TABLE.double(),
            torch.tensor(step),
            z,
            x0_previous=before,
            return_x0=True,
            model_dtype=F64,
        )
        return tuple(result) if outputs == "all" else getattr(result, outputs)

    assert torch.autograd.gradcheck(call, (x, out, before) if outputs != "x0" else (x, out, before.detach()))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_gradient_of_a_learned_variance_is_its_noise(dtype, backend):
    x, out, z = randn(2, 3, 6, 5), randn(2, 6, 6, 5, seed=1, dtype=dtype), randn(2, 3, 6, 5, seed=2)
    grad, sigma, spread = randn(2, 3, 6, 5, seed=3), 0.2, 0.35
    out = out.contiguous(memory_format=torch.channels_last).requires_grad_()
    reverse_step(x, out, STEP_TABLE, torch.tensor(2), z).x.backward(grad)
    v = out.detach()[:, 3:].double()
    exact = grad.double() * z.double() * spread * sigma * (spread * v).exp()
    error = (out.grad[:, 3:].double() - exact).abs()
    assert (error <= exact.abs() * (torch.finfo(dtype).eps + 1e-6) + torch.finfo(dtype).smallest_normal).all()
    assert out.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("step", [0, 3], ids=["no spread", "no noise"])
def test_what_a_step_does_not_read_gives_no_bad_gradient(step, backend):
    x, z = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    v = torch.full_like(x, math.nan) if step == 0 else x
    out = torch.cat([x, v], 1).requires_grad_()
    noise = torch.full_like(x, math.nan) if step == 3 else z
    reverse_step(x, out, STEP_TABLE, torch.tensor(step), noise).x.sum().backward()
    assert out.grad.isfinite().all() and (out.grad[:, 3:] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_low_precision_gradients_are_computed_in_fp32_and_rounded_once(dtype, backend):
    x0, z = (randn(2, 3, 50, seed=i, dtype=dtype).requires_grad_() for i in range(2))
    grad = randn(2, 3, 50, seed=2, dtype=dtype)
    table, t = torch.tensor([[0.9123456, 0.3123456]]), torch.zeros(2, dtype=torch.int64)
    q_sample(x0, t, table, z).backward(grad)
    assert torch.equal(x0.grad, (grad.double() * table[0, 0].double()).to(dtype))
    assert torch.equal(z.grad, (grad.double() * table[0, 1].double()).to(dtype))


def test_reverse_step_gradient_where_fp16_would_overflow(backend):
    # a_x x alone is beyond fp16's 65504, yet x0 = a_x x + a_out out lies within the clip for the first element.
    row = torch.tensor([[81165.0, -81164.0, 0.0, 1e-3, 0.0, 0.0, 5.0, 0.0]])
    x = torch.tensor([[2.0, 2.0]], dtype=F16, requires_grad=True)
    out = torch.tensor([[2.0, 1.0]], dtype=F16)
    reverse_step(x, out, row, torch.tensor(0), out).x.sum().backward()
    assert x.grad.tolist() == [[float(torch.tensor(81.165).half()), 0.0]]


def test_float64_gradient_needs_the_reference():
    output = randn(2, 3, dtype=F64).requires_grad_()
    with use_backend("cpu"), pytest.raises(InputError, match="reference"):
        diffusion_loss(output, randn(2, 3), torch.tensor([0, 1]), LOSS_TABLE, NoiseKey.of(0, 2))
