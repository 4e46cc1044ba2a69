"""hybrid_loss and vlb_terms against the bound as the papers write it, in float64: every prediction, variance, storage,
memory format and instruction set; the decoder against scipy and against the papers' code. Gradients: see
test_ops_bound_gradients.py.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from support.bound_formulas import F64, batch, bits_per_dim, bound, bound_table, column, hybrid_table, pixels

from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import hybrid_loss, normal, use_backend, vlb_terms
from ddpm_fast.ops.backends import cpu
from ddpm_fast.schedule import Schedule

F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
GOLDEN = Path(__file__).parents[1] / "golden"
SCHEDULES = {"linear": Schedule.linear(1000), "cosine": Schedule.cosine(1000)}
PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
SHAPES = {
    "one element": (5, 1),
    "1-D samples": (5, 301),
    "channels and length": (5, 3, 65),
    "one channel": (5, 1, 28, 28),
    "no multiple of the block": (5, 3, 17, 19),
    "many channels": (5, 70, 5, 3),
    "one wide row": (5, 3, 1, 1031),
    "volume": (5, 3, 5, 7, 9),
}
LAYOUTS = ("contiguous", "channels_last", "sliced")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":  # every other element of a larger tensor
        spaced = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        spaced[..., ::2] = x
        return spaced[..., ::2]
    return x


def hybrid_formula(schedule, prediction, variance, output, x0, t, z, vlb_weight=0.001):
    """MSE + vlb_weight T bits, in float64."""
    made = bound(schedule, prediction, variance, output, x0, t, z)
    ab = column(schedule.alphas_cumprod, t, x0)
    x, eps = pixels(x0), z.double()
    target = {"eps": eps, "x0": x, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x}[prediction]
    squares = (output[:, : x.shape[1]].double() - target) ** 2
    return squares.flatten(1).mean(1) + vlb_weight * len(schedule) * bits_per_dim(made)


def close(actual, exact, rtol):
    assert actual.shape == exact.shape
    worst = ((actual.double() - exact).abs() / exact.abs()).max()
    assert worst <= rtol, f"worst relative error {worst:.3g}, allowed {rtol:.3g}"


# --- against the formulas


@pytest.mark.pairwise
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("chain", SCHEDULES)
def test_vlb_terms_are_the_formula(chain, prediction, variance, some_of):
    schedule = SCHEDULES[chain]
    output, x0, t, z = batch(schedule, prediction, variance)
    for clip, decoder in some_of(itertools.product((False, True), ("paper", "exact")), step=3):
        made = bound(schedule, prediction, variance, output, x0, t, z, clip, decoder)
        bits, mse_x0 = vlb_terms(output, x0, t, bound_table(schedule, prediction, variance, clip, decoder), z)
        assert bits.dtype == mse_x0.dtype == F32
        # The tanh of a tail loses digits: in fp32 it is part of the definition.
        close(bits, bits_per_dim(made), 1e-5 if decoder == "paper" else 3e-6)
        close(mse_x0, ((made.pred_x0 - pixels(x0)) ** 2).flatten(1).mean(1), 3e-6)
        if clip and prediction != "x0":
            assert (made.pred_x0.abs() == 1).any()


@pytest.mark.pairwise
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("chain", SCHEDULES)
def test_hybrid_loss_is_the_formula(chain, prediction, variance, backend):
    schedule = SCHEDULES[chain]
    output, x0, t, z = batch(schedule, prediction, variance)
    for vlb_weight in (0.001, 0.2):
        table = hybrid_table(schedule, prediction, variance, vlb_weight=vlb_weight)
        exact = hybrid_formula(schedule, prediction, variance, output, x0, t, z, vlb_weight)
        close(hybrid_loss(output, x0, t, table, z), exact, 1e-5)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float64_is_exact(prediction, variance):
    schedule = SCHEDULES["linear"]
    output, x0, t, z = (x.double() if x.dtype == F32 else x for x in batch(schedule, prediction, variance))
    for clip, decoder in itertools.product((False, True), ("paper", "exact")):
        table = bound_table(schedule, prediction, variance, clip, decoder, F64)
        made = bound(schedule, prediction, variance, output, x0, t, z, clip, decoder)
        bits = vlb_terms(output, x0, t, table, z).bits_per_dim
        assert bits.dtype == F64
        close(bits, bits_per_dim(made), 1e-9)  # the formula itself loses digits: KLs of 1e-7 from terms of 1
    if variance.startswith("learned"):
        table = hybrid_table(schedule, prediction, variance, F64)
        exact = hybrid_formula(schedule, prediction, variance, output, x0, t, z)
        close(hybrid_loss(output, x0, t, table, z), exact, 1e-9)


@pytest.mark.pairwise
@pytest.mark.parametrize("noise", ["key", F32, BF16, F16], ids=str)
@pytest.mark.parametrize("x0_dtype", [U8, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_dtype(dtype, x0_dtype, noise, backend):
    schedule = SCHEDULES["linear"]
    for prediction, variance in (("v", "fixed_small"), ("eps", "learned_range")):
        if noise == "key":
            given = NoiseKey.of(11, 5, first_sample_id=5)
            z = normal(given, (3, 9, 7))
        else:
            given = z = torch.randn((5, 3, 9, 7), generator=torch.Generator().manual_seed(9)).to(noise)
        output, x0, t, _ = batch(schedule, prediction, variance, dtype=dtype, x0_dtype=x0_dtype, z=z)
        made = bound(schedule, prediction, variance, output, x0, t, z, decoder="exact")
        bits, mse_x0 = vlb_terms(output, x0, t, bound_table(schedule, prediction, variance), given)
        close(bits, bits_per_dim(made), 5e-6)
        close(mse_x0, ((made.pred_x0 - pixels(x0)) ** 2).flatten(1).mean(1), 5e-6)
        if variance == "learned_range":
            loss = hybrid_loss(output, x0, t, hybrid_table(schedule, prediction, variance), given)
            close(loss, hybrid_formula(schedule, prediction, variance, output, x0, t, z), 1e-5)


@pytest.mark.parametrize("word", SHAPES)
def test_every_shape_and_format(word, some_of):
    schedule, shape = SCHEDULES["cosine"], SHAPES[word]
    layouts = LAYOUTS if len(shape) in (4, 5) else ("contiguous", "sliced")
    cases = itertools.product(("fixed_small", "learned_range"), *[layouts] * 3)
    for variance, *mix in some_of(cases, step=11):
        output, x0, t, z = batch(schedule, "v", variance, shape)
        made = bits_per_dim(bound(schedule, "v", variance, output, x0, t, z, decoder="exact"))
        out, x, noise = (laid_out(x, layout) for x, layout in zip((output, x0, z), mix, strict=True))
        close(vlb_terms(out, x, t, bound_table(schedule, "v", variance), noise).bits_per_dim, made, 5e-6)
        if variance == "learned_range":
            # Of a single element the MSE may be a small difference.
            hybrid = hybrid_formula(schedule, "v", variance, output, x0, t, z)
            close(hybrid_loss(out, x, t, hybrid_table(schedule, "v", variance), noise), hybrid, 1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (0, 5), (0, 3, 0)], ids=str)
def test_empty_batch(shape, backend):
    schedule = SCHEDULES["cosine"]
    x, t = torch.zeros(shape), torch.zeros(0, dtype=torch.int64)
    both = torch.cat([x, x], 1).requires_grad_()
    loss = hybrid_loss(both, x, t, hybrid_table(schedule, "eps", "learned"), NoiseKey.of(0, 0))
    terms = vlb_terms(both, x, t, bound_table(schedule, "eps", "learned"), x)
    assert loss.shape == terms.bits_per_dim.shape == terms.mse_x0.shape == (0,)
    (loss.sum() + terms.bits_per_dim.sum()).backward()
    assert both.grad.shape == both.shape


# --- the same bits


def losses_of(output, x0, t, noise):
    schedule = SCHEDULES["cosine"]
    leaf = output.clone().requires_grad_()
    hybrid = hybrid_loss(leaf, x0, t, hybrid_table(schedule, "eps", "learned_range"), noise)
    results = [hybrid]
    for decoder in ("paper", "exact"):
        table = bound_table(schedule, "eps", "learned_range", True, decoder)
        results += vlb_terms(leaf, x0, t, table, noise)
    sum(x.sum() for x in results if x.requires_grad).backward()
    return [*results, leaf.grad]


def same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_on_any_instruction_set_and_number_of_threads(layout, isa):
    output, x0, t, _ = batch(SCHEDULES["cosine"], "eps", "learned_range", (5, 3, 70, 69))
    output, key, before = laid_out(output, layout), NoiseKey.of(0, 5), torch.get_num_threads()
    actual = losses_of(output, x0, t, key)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            same_bits(losses_of(output, x0, t, key), actual)
    finally:
        torch.set_num_threads(before)
    cpu.use_isa("generic")
    same_bits(losses_of(output, x0, t, key), actual)


def test_a_key_stands_for_the_normals_it_names(backend):
    output, x0, t, _ = batch(SCHEDULES["cosine"], "eps", "learned_range")
    key = NoiseKey.of(4, 5, first_sample_id=2**33)
    same_bits(losses_of(output, x0, t, key), losses_of(output, x0, t, normal(key, x0.shape[1:])))


# --- the decoder


def one_element_samples(x0, mean, log_scale, decoder):
    """-log p(x_0) in nats of normals with that mean and log deviation, each a sample of its own, through vlb_terms."""
    row = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0, {"paper": 1.0, "exact": 2.0}[decoder], math.inf]])
    x0, mean, log_scale = (torch.as_tensor(x, dtype=F32).reshape(-1, 1) for x in (x0, mean, log_scale))
    output, t = torch.cat([mean, log_scale], 1), torch.zeros(len(x0), dtype=torch.int64)
    return vlb_terms(output, x0, t, row, x0).bits_per_dim.double().numpy() * math.log(2)


def check_golden_decoder():
    with np.load(GOLDEN / "decoder.npz") as file:
        golden = {key: file[key].reshape(-1) for key in file.files}
    nats = one_element_samples(golden["x"], golden["mean"], golden["log_scale"], "paper")
    np.testing.assert_allclose(nats, -golden["log_likelihood"].astype(np.float64), rtol=1e-5)


def test_the_paper_decoder_is_that_of_the_papers_code(isa):
    # In the tails too, where a bin's probability is a few units of the CDF's last place in fp32.
    check_golden_decoder()


def test_the_reference_decoder_is_that_of_the_papers_code():
    with use_backend("reference"):
        check_golden_decoder()


def test_the_exact_decoder_is_the_normal_distribution(some_of):
    levels = np.array([-1, -253 / 255, -0.2, 1 / 255, 0.6, 1.0]).astype(np.float32)
    scales = np.exp(np.linspace(-9, 2, 23))
    deviations = np.concatenate([np.linspace(-12, 12, 97), [-1000, -300, -100, -40, 40, 100, 300, 1000]])
    x0, scale, k = np.array(
        some_of(zip(*(a.ravel() for a in np.meshgrid(levels, scales, deviations)), strict=True), step=499)
    ).T
    mean, log_scale = (x0 + k * scale).astype(np.float32), np.log(scale).astype(np.float32)
    nats = one_element_samples(x0, mean, log_scale, "exact")
    s = np.exp(log_scale.astype(np.float64))
    centred = x0.astype(np.float64) - mean
    low, high = (centred - 1 / 255) / s, (centred + 1 / 255) / s
    near_tail = np.where(low + high > 0, -high, low), np.where(low + high > 0, -low, high)
    log_low, log_high = (norm.logcdf(a) for a in near_tail)
    with np.errstate(divide="ignore"):
        inside = log_high + np.log(-np.expm1(log_low - log_high))
    exact = -np.where(x0 == -1, norm.logcdf(high), np.where(x0 == 1, norm.logsf(low), inside))
    # A bin that holds nearly everything has a logarithm of nearly 0.
    np.testing.assert_allclose(nats, exact, rtol=5e-6, atol=2e-7)


def test_the_paper_decoder_saturates_at_27_63_nats_and_the_exact_one_does_not(backend):
    # Six deviations of 0.01 away: the bin's probability is 1.0e-8, which fp32 tanh cannot tell from 0.
    x0, mean, log_scale = [0.0], [0.06], [math.log(0.01)]
    expected = -math.log(norm.cdf((-0.06 + 1 / 255) / 0.01) - norm.cdf((-0.06 - 1 / 255) / 0.01))
    assert round(expected, 1) == 18.4
    assert one_element_samples(x0, mean, log_scale, "paper")[0] == pytest.approx(-math.log(1e-12), rel=1e-6)
    assert one_element_samples(x0, mean, log_scale, "exact")[0] == pytest.approx(expected, rel=1e-6)


def test_the_papers_cdf_is_off_by_1_8e_4(some_of):
    # The first bin is open, so its probability is the CDF itself: at y, of a normal of deviation 1.
    y = np.array(some_of(np.linspace(-3, 3, 601), step=61))
    arguments = (np.full_like(y, -1.0), -1 + 1 / 255 - y, np.zeros_like(y))
    paper, exact = (np.exp(-one_element_samples(*arguments, decoder)) for decoder in ("paper", "exact"))
    np.testing.assert_allclose(exact, norm.cdf(y), rtol=1e-5)
    assert abs(paper - norm.cdf(y)).max() == pytest.approx(1.8e-4, rel=0.05)


# --- where it goes wrong


def test_late_steps_keep_their_digits_where_fp32_formulas_lose_them(backend):
    schedule = Schedule.cosine(4000)
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1500, 4000, 50)
    x0, z, error, v = (torch.randn(len(t), 64, generator=generator) for _ in range(4))
    output = torch.cat([z + 1e-3 * error, v.clamp(-1, 1)], 1)
    exact = bits_per_dim(bound(schedule, "eps", "learned_range", output, x0, t, z))
    assert 1e-10 < exact.min() * math.log(2) < 1e-6 and exact.max() < 1e-3
    bits = vlb_terms(output, x0, t, bound_table(schedule, "eps", "learned_range"), z).bits_per_dim
    close(bits, exact, 1e-4)
    naive = bits_per_dim(bound(schedule, "eps", "learned_range", output, x0, t, z, dtype=F32))
    assert ((naive - exact).abs() / exact).max() > 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("decoder", ["paper", "exact"])
def test_a_bad_output_is_not_hidden(decoder, bad, backend):
    # A NaN must come out as one at every t; an infinite prediction must not look better than a far one.
    schedule = SCHEDULES["cosine"]
    output, x0, t, z = batch(schedule, "eps", "fixed_small", (5, 3, 4))
    output[:, 0, 0] = bad
    bits = vlb_terms(output, x0, t, bound_table(schedule, "eps", "fixed_small", False, decoder), z).bits_per_dim
    if math.isnan(bad):
        assert bits.isnan().all()
    else:
        assert not (bits[1:].isfinite()).any()
        assert not bits[0] < 27 / 12  # the floor, for one of twelve elements
