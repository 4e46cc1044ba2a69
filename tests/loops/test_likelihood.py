"""The bound summed over the chain equals the sum written out in float64 and the closed form, and its estimate has no
bias."""

import math
import typing

import pytest
import scipy.stats
import torch

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.likelihood import LikelihoodKeywords, LikelihoodOptions, bits_per_dim
from ddpm_fast.noise import NoiseKey, Stream, normals
from ddpm_fast.schedule import Schedule

SHAPE = (2, 3, 4)


class Stub(torch.nn.Module):
    """A smooth function of x, t and the label: no sample sees another."""

    def __init__(self, groups=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.6))
        self.groups = groups
        self.told = []

    def forward(self, x, t, labels=None):
        self.told.append(t.tolist())
        t = t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        out = self.weight.to(x.dtype) * x + 0.1 * torch.sin(3 * x + 0.05 * t)
        if labels is not None:
            out = out + 0.2 * labels.view(-1, *[1] * (x.ndim - 1))
        return torch.cat([out, torch.tanh(x - 0.3)], 1) if self.groups == 2 else out


def pixels(n, seed=0):
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def kl(mean1, log_variance1, mean2, log_variance2):
    """Of two diagonal Gaussians, per element, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1
        + (log_variance1 - log_variance2).exp()
        + (mean1 - mean2) ** 2 / log_variance2.exp()
    )


def bin_log_probability(x0, mean, deviation):
    """By the normal's CDF in float64, from the side on which both ends are small."""
    norm = scipy.stats.norm
    above, below = (x0 + 1 / 255 - mean) / deviation, (x0 - 1 / 255 - mean) / deviation
    flip = above + below > 0
    high, low = torch.where(flip, -below, above), torch.where(flip, -above, below)
    probability = torch.from_numpy(norm.cdf(high.numpy()) - norm.cdf(low.numpy())).log()
    first, last = torch.from_numpy(norm.logcdf(above.numpy())), torch.from_numpy(norm.logsf(below.numpy()))
    return torch.where(x0 < -0.999, first, torch.where(x0 > 0.999, last, probability))


def written_out(diffusion, model, x0, labels, seed, first, clip=True):
    """(prior, terms [N, T], mse_x0, mse_eps) of the whole chain in float64, from the papers' equations."""
    s = diffusion.schedule
    x = x0.double() / 127.5 - 1
    n, elements = x.shape[0], math.prod(SHAPE)

    def bits(nats):
        return nats.flatten(1).mean(1) / math.log(2)

    ab = float(s.alphas_cumprod[-1])
    zero = torch.zeros_like(x)
    prior = bits(kl(math.sqrt(ab) * x, torch.full_like(x, 1 - ab).log(), zero, zero))
    terms, mse_x0, mse_eps = [], [], []
    for t in range(len(s)):
        key = NoiseKey.of(seed, n, first_sample_id=first, step=t, stream=Stream.EVALUATION)
        eps = normals(key, elements).view(x.shape).double()
        x_t = s.alphas_cumprod[t].sqrt() * x + (1 - s.alphas_cumprod[t]).sqrt() * eps
        p = diffusion.p_mean_variance(model(x_t, s.timesteps[t].expand(n), labels), x_t, torch.full((n,), t), clip=clip)
        if t == 0:
            terms.append(bits(-bin_log_probability(x, p.mean, (0.5 * p.log_variance).exp())))
        else:
            q = diffusion.q_posterior(x, x_t, torch.full((n,), t))
            terms.append(bits(kl(q.mean, q.log_variance, p.mean, p.log_variance)))
        mse_x0.append((p.pred_x0 - x).square().flatten(1).mean(1))
        eps_hat = (x_t - s.alphas_cumprod[t].sqrt() * p.pred_x0) / (1 - s.alphas_cumprod[t]).sqrt()
        mse_eps.append((eps_hat - eps).square().flatten(1).mean(1))
    return prior, *(torch.stack(column, 1) for column in (terms, mse_x0, mse_eps))


@torch.no_grad()
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "noclip"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range", "learned"])
@pytest.mark.parametrize(
    "schedule", [Schedule.cosine(12), Schedule.linear(500).respace(9)], ids=["cosine", "respaced linear"]
)
def test_the_whole_bound_is_the_chain_written_out_in_float64(schedule, variance, clip):
    learned = variance.startswith("learned")
    diffusion = GaussianDiffusion(schedule, "v", variance, loss="hybrid" if learned else "simple")
    x0, labels = pixels(3), torch.tensor([0, 1, 2])
    found = bits_per_dim(
        diffusion, Stub(1 + learned), x0, labels=labels, seed=4, first_sample_id=7, clip=clip, decoder="exact"
    )
    prior, terms, mse_x0, mse_eps = written_out(diffusion, Stub(1 + learned), x0, labels, 4, 7, clip)
    assert not found.is_estimate
    assert torch.equal(found.timesteps, torch.arange(len(schedule)).expand(3, -1))
    torch.testing.assert_close(found.prior.double(), prior, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.terms.double(), terms, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(found.mse_x0.double(), mse_x0, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(found.mse_eps.double(), mse_eps, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(found.total.double(), prior + terms.sum(1), rtol=2e-5, atol=0)


class Knows(torch.nn.Module):
    """Predicts x_0 without error."""

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0

    def forward(self, x, t):
        return self.x0


def test_a_network_that_knows_x0_pays_for_the_last_bin_alone():
    # Then every KL divergence of fixed_small is 0, and L_0 is the bin at the middle of a normal of beta~_1.
    schedule = Schedule.linear(100)
    diffusion = GaussianDiffusion(schedule, "x0", "fixed_small")
    x0 = pixels(4).clamp(1, 254)
    found = diffusion.bits_per_dim(Knows(x0 / 127.5 - 1), x0, decoder="exact")
    deviation = float(schedule.posterior_variance[1]) ** 0.5
    l_0 = -math.log2(2 * scipy.stats.norm.cdf(1 / 255 / deviation) - 1)
    assert found.terms[:, 1:].abs().max() < 1e-12
    torch.testing.assert_close(found.terms[:, 0], torch.full((4,), l_0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.total, found.prior + found.terms[:, 0])


def test_the_prior_vanishes_at_zero_terminal_snr():
    diffusion = GaussianDiffusion(Schedule.cosine(20).zero_terminal_snr(), "v")
    found = diffusion.bits_per_dim(Stub(), pixels(2))
    assert (found.prior == 0).all() and found.total.isfinite().all()


def test_an_estimate_says_so_and_has_no_bias():
    diffusion = GaussianDiffusion(Schedule.cosine(60), "v", "fixed_small")
    x0 = pixels(1).repeat(4000, 1, 1, 1)
    truth = bits_per_dim(diffusion, Stub(), x0)
    found = bits_per_dim(diffusion, Stub(), x0, steps=6)
    assert found.is_estimate and not truth.is_estimate
    assert found.counts.sum() == 60 and found.timesteps.shape == (4000, 6)
    spread = (found.total.var() + truth.total.var()).div(4000).sqrt()
    assert (found.total.mean() - truth.total.mean()).abs() < 5 * spread
    assert spread / truth.total.mean() < 0.01, "an estimate this vague would pass with a bias"


def test_each_stretch_of_the_chain_is_drawn_from_evenly():
    diffusion = GaussianDiffusion(Schedule.cosine(60), "v")
    found = bits_per_dim(diffusion, Stub(), pixels(1).repeat(3000, 1, 1, 1), steps=5)
    start = 0
    for column, count in zip(found.timesteps.unbind(1), found.counts.int().tolist(), strict=True):
        drawn = column.bincount(minlength=60)
        assert drawn[start : start + count].sum() == 3000
        expected = 3000 / count
        assert (drawn[start : start + count] - expected).abs().max() <= 5 * expected**0.5
        start += count
    assert start == 60


def test_all_the_steps_are_no_estimate():
    diffusion = GaussianDiffusion(Schedule.cosine(9), "v")
    whole, counted = (bits_per_dim(diffusion, Stub(), pixels(3), steps=steps) for steps in (None, 9))
    assert not counted.is_estimate
    assert torch.equal(whole.total, counted.total)


@pytest.mark.parametrize("steps", [None, 4])
def test_an_image_has_the_same_bound_in_any_batch(steps):
    diffusion = GaussianDiffusion(Schedule.cosine(15), "v")
    x0 = pixels(6)
    together = bits_per_dim(diffusion, Stub(), x0, steps=steps, first_sample_id=100)
    apart = bits_per_dim(diffusion, Stub(), x0[4:], steps=steps, first_sample_id=104)
    assert torch.equal(together.total[4:], apart.total) and torch.equal(together.timesteps[4:], apart.timesteps)
    other = bits_per_dim(diffusion, Stub(), x0, steps=steps, first_sample_id=100, seed=1)
    assert not torch.equal(together.total, other.total)


def test_the_network_is_told_the_original_timesteps_and_left_in_its_mode():
    diffusion = GaussianDiffusion(Schedule.cosine(100).respace([0, 40, 99]), "v")
    model, done = Stub().train(), []
    bits_per_dim(diffusion, model, pixels(2), on_step=lambda step, of: done.append((step, of)))
    assert model.told == [[0, 0], [40, 40], [99, 99]]
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert model.training


def test_a_bf16_network_is_close():
    diffusion = GaussianDiffusion(Schedule.cosine(20), "v")
    exact, rough = (bits_per_dim(diffusion, Stub().to(dtype), pixels(4)) for dtype in (torch.float32, torch.bfloat16))
    assert rough.total.dtype == torch.float32
    torch.testing.assert_close(rough.total, exact.total, rtol=0.02, atol=0)
    assert not torch.equal(rough.total, exact.total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, r"steps is 1; expected an integer in 2..12"),
        ({"steps": 13}, r"steps is 13; expected an integer in 2..12"),
        ({"decoder": "tanh"}, "decoder = 'tanh' does not exist: choose one of 'paper', 'exact'"),
        ({"x0": pixels(2).long()}, "x0 is torch.int64: expected a floating dtype or uint8"),
        ({"model": Stub(2)}, "A network of twice the channels learns its variance"),
    ],
)
def test_bad_input(options, message):
    diffusion = GaussianDiffusion(Schedule.cosine(12), "v")
    keywords = {"model": Stub(), "x0": pixels(2)} | options
    with pytest.raises(InputError, match=message):
        bits_per_dim(diffusion, **keywords)


def test_the_keywords_are_the_options():
    assert typing.get_type_hints(LikelihoodKeywords) == typing.get_type_hints(LikelihoodOptions)
