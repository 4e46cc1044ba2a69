"""Gradients of hybrid_loss and vlb_terms: against autograd through the bound as the papers write it in float64, by
finite differences, and where derivatives are as large or as small as they get.
"""

import itertools
import math

import pytest
import torch
from support.bound_formulas import F64, batch, bits_per_dim, bound, bound_table, hybrid_table, pixels

from ddpm_fast.noise import NoiseKey
from ddpm_fast.objective import Objective
from ddpm_fast.ops import diffusion_loss, hybrid_loss, normal, vlb_terms
from ddpm_fast.schedule import Schedule

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
SCHEDULES = {"linear": Schedule.linear(1000), "cosine": Schedule.cosine(1000)}
PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
LEARNED = ("learned", "learned_range")


INCOMING = torch.tensor([1.0, -0.5, 2.0, 0.1, 3.0])


def gradient(loss, output):
    """d sum(INCOMING * loss(output)) / d output."""
    leaf = output.detach().clone().requires_grad_()
    (loss(leaf) * INCOMING.to(leaf.dtype if leaf.dtype == F64 else F32)).sum().backward()
    return leaf.grad


def close(actual, exact, channels, rtol, per_element=0.0, absolute=0.0):
    """Within rtol of the largest derivative of a sample's group of channels, plus per_element of the element's own and
    an absolute error."""
    assert actual.shape == exact.shape
    for one, other in zip(actual.double().split(channels, 1), exact.split(channels, 1), strict=True):
        scale = other.flatten(1).abs().amax(1).view(-1, *[1] * (other.ndim - 1))
        excess = ((one - other).abs() - per_element * other.abs() - absolute) / scale.clamp(min=1e-300)
        assert (excess <= rtol).all(), f"per sample, relative: {excess.flatten(1).amax(1).tolist()}"


@pytest.mark.pairwise
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("chain", SCHEDULES)
def test_vlb_gradient_against_float64_autograd(chain, prediction, variance, some_of):
    schedule = SCHEDULES[chain]
    output, x0, t, z = batch(schedule, prediction, variance)
    for clip, decoder in some_of(itertools.product((False, True), ("paper", "exact")), step=3):
        table = bound_table(schedule, prediction, variance, clip, decoder)
        actual = gradient(lambda out, table=table: vlb_terms(out, x0, t, table, z).bits_per_dim, output)

        def exact(out, clip=clip, decoder=decoder):
            return bits_per_dim(bound(schedule, prediction, variance, out, x0, t, z, clip, decoder))

        # With the paper's decoder a tail's bin is a difference of two CDFs in fp32, and its derivative is over that.
        # With the exact one, x_0 itself has 6e-8, which of the decoder's deviation of 0.006 is 1e-5.
        close(actual, gradient(exact, output.double()), 3, 2e-4 if decoder == "paper" else 2e-5)
        if clip:
            beyond = bound(schedule, prediction, variance, output, x0, t, z).pred_x0.abs() > 1
            assert beyond.any() and (actual[:, :3][beyond] == 0).all()


@pytest.mark.pairwise
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_gradient_against_float64_autograd(prediction, variance, dtype, memory_format, backend):
    schedule = SCHEDULES["linear"]
    output, x0, t, z = batch(schedule, prediction, variance, dtype=dtype)
    output = output.contiguous(memory_format=memory_format)
    table = hybrid_table(schedule, prediction, variance)
    actual = gradient(lambda out: hybrid_loss(out, x0, t, table, z), output)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=memory_format)

    def exact(out):
        detached = torch.cat([out[:, :3].detach(), out[:, 3:]], 1)
        bits = bits_per_dim(bound(schedule, prediction, variance, detached, x0, t, z))
        target = Objective(prediction).loss_table(schedule)[t]
        residual = out[:, :3] - (
            target[:, 0].view(-1, 1, 1, 1) * pixels(x0) + target[:, 1].view(-1, 1, 1, 1) * z.double()
        )
        return residual.square().flatten(1).mean(1) + 0.001 * 1000 * bits

    # Half precision rounds what the forward leaves and what the backward makes of it; fp16 ends at 2^-24.
    eps = 0 if dtype == F32 else torch.finfo(dtype).eps * 1.01
    close(actual, gradient(exact, output.double()), 3, 2e-4, eps, 2.0**-25 if dtype == F16 else 0.0)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("variance", VARIANCES)
def test_vlb_gradient_in_half_precision(variance, dtype, backend):
    schedule = SCHEDULES["cosine"]
    output, x0, t, z = batch(schedule, "v", variance, dtype=dtype)
    table = bound_table(schedule, "v", variance)
    actual = gradient(lambda out: 1000 * vlb_terms(out, x0, t, table, z).bits_per_dim, output)
    assert actual.dtype == dtype

    def exact(out):
        return 1000 * bits_per_dim(bound(schedule, "v", variance, out, x0, t, z, decoder="exact"))

    absolute = 2.0**-25 if dtype == F16 else 0.0
    close(actual, gradient(exact, output.double()), 3, 2e-5, torch.finfo(dtype).eps * 1.01, absolute)


# --- the mean is detached in hybrid_loss


@pytest.mark.pairwise
@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_gradient_of_hybrids_mean_is_the_mses_exactly(prediction, weighting, backend):
    schedule = SCHEDULES["cosine"]
    output, x0, t, z = batch(schedule, prediction, "learned_range", (5, 2, 8, 4))  # 64 elements: division is exact
    objective = Objective(prediction, "learned_range", "hybrid", loss_weighting=weighting)
    loss_table, table = objective.loss_table(schedule).float(), objective.hybrid_table(schedule).float()
    both, mean = output.clone().requires_grad_(), output[:, :2].clone().requires_grad_()
    hybrid_loss(both, x0, t, table, z).sum().backward()
    diffusion_loss(mean, x0, t, loss_table, z).sum().backward()
    assert torch.equal(both.grad[:, :2], mean.grad)


def test_the_gradient_of_hybrids_variance_is_the_bounds(backend):
    schedule = SCHEDULES["cosine"]
    output, x0, t, z = batch(schedule, "eps", "learned_range")
    table = bound_table(schedule, "eps", "learned_range", decoder="paper")
    of_bound = gradient(lambda out: vlb_terms(out, x0, t, table, z).bits_per_dim, output)
    hybrid = hybrid_table(schedule, "eps", "learned_range", vlb_weight=0.002)
    of_hybrid = gradient(lambda out: hybrid_loss(out, x0, t, hybrid, z), output)
    torch.testing.assert_close(of_hybrid[:, 3:], 2 * of_bound[:, 3:], rtol=1e-6, atol=0)


# --- finite differences


@pytest.mark.pairwise
@pytest.mark.parametrize("noise", ["given", "key"])
@pytest.mark.parametrize("decoder", ["paper", "exact"])
@pytest.mark.parametrize("prediction, variance", [("eps", "fixed_small"), ("v", "learned"), ("x0", "learned_range")])
def test_gradcheck_vlb_terms(prediction, variance, decoder, noise):
    schedule = Schedule.cosine(8)  # variances of about 1: finite differences are of use
    generator = torch.Generator().manual_seed(1)
    x0, error, v = torch.randn(3, 3, 2, 3, generator=generator, dtype=F64)
    x0, key, t = x0.tanh(), NoiseKey.of(1, 3), torch.tensor([0, 3, 7])
    z = key if noise == "key" else normal(key, (2, 3)).double()
    objective = Objective(prediction, variance, "vlb")
    c_x0, c_noise, _ = objective.loss_table(schedule)[t][:, :, None, None].unbind(1)
    output = c_x0 * x0 + c_noise * normal(key, (2, 3)) + 0.3 * error
    output = (torch.cat([output, v - 2], 1) if variance in LEARNED else output).requires_grad_()
    table = objective.bound_table(schedule, False, decoder)
    assert torch.autograd.gradcheck(lambda out: vlb_terms(out, x0, t, table, z).bits_per_dim, (output,))


def test_gradcheck_hybrid_loss_in_the_variance():
    # In the mean, what finite differences see is not the gradient: it is detached there.
    schedule = Schedule.cosine(8)
    generator = torch.Generator().manual_seed(1)
    x0, z, mean, v = torch.randn(4, 3, 2, 3, generator=generator, dtype=F64)
    table = Objective("eps", "learned_range", "hybrid", vlb_weight=0.1).hybrid_table(schedule)
    t = torch.tensor([0, 3, 7])
    assert torch.autograd.gradcheck(
        lambda v: hybrid_loss(torch.cat([mean, v], 1), x0.tanh(), t, table, z), (v.requires_grad_(),)
    )


# --- where derivatives are large or small


@pytest.mark.pairwise
@pytest.mark.parametrize("decoder", ["paper", "exact"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("chain", SCHEDULES)
def test_gradients_are_finite_at_every_t(chain, variance, decoder, some_of):
    """Black and white pixels, predictions far beyond them, log variances as an untrained network gives them."""
    schedule = SCHEDULES[chain]
    t = torch.tensor(some_of(range(len(schedule)), step=111, emulated=7))
    n = len(t)
    x0 = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.2, 0.0]).expand(n, 6).contiguous()
    far = torch.tensor([-50.0, 50.0, 50.0, -50.0, 50.0, 0.0]).expand(n, 6)
    z = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    for prediction, clip, v in some_of(itertools.product(PREDICTIONS, (False, True), (0.0, 5.0, -5.0)), step=5):
        output = torch.cat([far, torch.full_like(far, v)], 1) if variance in LEARNED else far.clone()
        leaf = output.clone().requires_grad_()
        bits = vlb_terms(leaf, x0, t, bound_table(schedule, prediction, variance, clip, decoder), z).bits_per_dim
        bits.sum().backward()
        assert bits.isfinite().all() and leaf.grad.isfinite().all()
        if variance in LEARNED and not clip and decoder == "paper":
            leaf = output.clone().requires_grad_()
            loss = hybrid_loss(leaf, x0, t, hybrid_table(schedule, prediction, variance), z)
            loss.sum().backward()
            assert loss.isfinite().all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("deviations", [6, 40, 1000])
def test_the_exact_decoder_pulls_from_any_distance(deviations, backend):
    # The paper's gradient is 0 once its probability is at the floor; the exact one is that of the quadratic there.
    s = 0.01
    x0, t = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    output = torch.tensor([[deviations * s, math.log(s)]])
    grads = {}
    for decoder, kind in (("paper", 1.0), ("exact", 2.0)):
        row = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0, kind, math.inf]])
        leaf = output.clone().requires_grad_()
        (vlb_terms(leaf, x0, t, row, x0).bits_per_dim.sum() * math.log(2)).backward()
        grads[decoder] = leaf.grad[0]
    assert (grads["paper"] == 0).all()
    by_mean, by_log_scale = grads["exact"].double().tolist()
    # Nearly all of the bin's probability is at its near edge, half a bin closer.
    edge = (deviations * s - 1 / 255) / s
    assert by_mean == pytest.approx(edge / s, rel=0.2 if deviations == 6 else 2e-3)
    assert by_log_scale == pytest.approx(-(edge**2), rel=0.2 if deviations == 6 else 2e-3)


def test_a_late_gradient_of_the_variance_does_not_vanish_in_fp16(backend):
    # By v it is 1e-7 and less there, below fp16's smallest number, were it not scaled by the loss's factor at the end.
    schedule = Schedule.cosine(4000)
    t = torch.arange(3000, 3850, 37)
    generator = torch.Generator().manual_seed(0)
    x0, z, v = torch.randn(3, len(t), 16, generator=generator)
    output = torch.cat([z, v.clamp(-1, 1)], 1).to(F16).requires_grad_()
    scale = 2.0**24
    table = bound_table(schedule, "eps", "learned_range")
    (vlb_terms(output, x0, t, table, z).bits_per_dim.sum() * scale).backward()
    leaf = output.detach().double().requires_grad_()
    bits_per_dim(bound(schedule, "eps", "learned_range", leaf, x0, t, z)).sum().backward()
    exact = leaf.grad[:, 16:]
    assert exact.abs().max() < 1e-6 and (exact.abs().amax(1) < 2.0**-25).any()
    error = (output.grad[:, 16:].double() / scale - exact).abs().amax(1) / exact.abs().amax(1)
    assert error.max() < 2e-3


def test_an_fp16_gradient_saturates_instead_of_becoming_infinite(backend):
    # A variance that is far too small: the derivative by its logarithm is -(error/deviation)^2 / 2 = -5e5.
    row = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, math.inf]])
    t, elements = torch.zeros(1, dtype=torch.int64), 256
    x0 = torch.zeros(1, elements)
    output = torch.cat([torch.full((1, elements), 100.0), torch.full((1, elements), -4.605)], 1).to(F16)
    leaf = output.requires_grad_()
    vlb_terms(leaf, x0, t, row, x0).bits_per_dim.sum().backward()
    per_element = 1 / (elements * math.log(2))
    assert leaf.grad.isfinite().all()
    # pull^2 error e^-d = 1e4 is within fp16's range, the other derivative is held at its end.
    assert leaf.grad[0, 0].item() == pytest.approx(1e4 * per_element, rel=2e-3)
    assert leaf.grad[0, -1].item() == pytest.approx(-65504 * per_element, rel=1e-3)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "prediction, variance, decoder", [("eps", "fixed_small", "paper"), ("v", "learned_range", "exact")]
)
def test_a_bad_output_gives_a_bad_gradient(prediction, variance, decoder, dtype, backend):
    # A loss scaler looks for it there; a number instead would be stepped upon.
    output, x0, t, z = batch(SCHEDULES["cosine"], prediction, variance, dtype=dtype)
    output[:, 0, 0, 0] = math.nan
    table = bound_table(SCHEDULES["cosine"], prediction, variance, decoder=decoder)
    grad = gradient(lambda out: vlb_terms(out, x0, t, table, z).bits_per_dim, output)
    assert grad[:, 0, 0, 0].isnan().all()


def test_no_gradient_wanted_nothing_kept(backend):
    schedule = SCHEDULES["cosine"]
    output, x0, t, z = batch(schedule, "eps", "learned_range")
    table, hybrid = bound_table(schedule, "eps", "learned_range"), hybrid_table(schedule, "eps", "learned_range")
    assert not vlb_terms(output, x0, t, table, z).bits_per_dim.requires_grad
    assert not hybrid_loss(output, x0, t, hybrid, z).requires_grad
    leaf = output.clone().requires_grad_()
    terms = vlb_terms(leaf, x0, t, table, z)
    assert terms.bits_per_dim.requires_grad and not terms.mse_x0.requires_grad
    with torch.no_grad():
        assert not hybrid_loss(leaf, x0, t, hybrid, z).requires_grad
    torch.testing.assert_close(terms.bits_per_dim.detach(), vlb_terms(output, x0, t, table, z).bits_per_dim)


@pytest.mark.pairwise
@pytest.mark.parametrize("channels", [3, 40, 70], ids=["few channels", "at the pattern's end", "more than the pattern"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_each_group_of_channels_has_its_own_factor(memory_format, channels, backend):
    stored = torch.randn(2, 2 * channels, 9, 31, generator=torch.Generator().manual_seed(0))
    stored = stored.contiguous(memory_format=memory_format)
    scale = torch.tensor([[2.0, -3.0], [0.5, 7.0]])
    grad = torch.ops.ddpm_fast.loss_backward(stored, scale)
    assert grad.is_contiguous(memory_format=memory_format)
    assert torch.equal(grad, stored * scale.repeat_interleave(channels, 1)[:, :, None, None])
