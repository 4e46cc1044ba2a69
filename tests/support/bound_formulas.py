"""The variational bound as the papers write it (Ho et al. 2020, eq. 5-7, 12-13; Nichol & Dhariwal 2021, eq. 15), for
the tests of the fused ops: x_t, both means and both log variances are formed, then the KL divergence between them. The
ops form none of these. In float64 by default; every step follows from alpha_bar and beta alone.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.objective import Objective

F64 = torch.float64


class Bound(NamedTuple):
    """Per element, in nats, and what it was made of."""

    nats: Tensor
    pred_x0: Tensor
    x_t: Tensor


def column(values: Tensor, t: Tensor, like: Tensor, dtype: torch.dtype = F64) -> Tensor:
    """values[t] to multiply an image [N, C, ...]."""
    return values[t].to(dtype).view(-1, *[1] * (like.ndim - 1))


def pixels(x0: Tensor, dtype: torch.dtype = F64) -> Tensor:
    return x0.to(dtype) / 127.5 - 1 if x0.dtype == torch.uint8 else x0.to(dtype)


def paper_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def paper_decoder(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x_0 | x_1) with the tanh approximation of the CDF and a floor of 1e-12."""
    inverse = torch.exp(-0.5 * log_variance)
    above, below = paper_cdf(inverse * (x0 - mean + 1 / 255)), paper_cdf(inverse * (x0 - mean - 1 / 255))
    p = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return -p.clamp(min=1e-12).log()


def exact_decoder(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log p(x_0 | x_1) by the normal's own CDF; of a bin between the ends, taken in the nearer tail."""
    log_cdf, inverse = torch.special.log_ndtr, torch.exp(-0.5 * log_variance)
    below, above = inverse * (x0 - mean - 1 / 255), inverse * (x0 - mean + 1 / 255)
    flip = below + above > 0
    low, high = torch.where(flip, -above, below), torch.where(flip, -below, above)
    log_bin = log_cdf(high) + torch.log(-torch.expm1(log_cdf(low) - log_cdf(high)))
    return -torch.where(x0 < -0.999, log_cdf(above), torch.where(x0 > 0.999, log_cdf(-below), log_bin))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    difference = log_variance1 - log_variance2
    return 0.5 * (-1 - difference + difference.exp() + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def bound(
    schedule,
    prediction: str,
    variance: str,
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    z: Tensor,
    clip: bool = False,
    decoder: str = "paper",
    dtype: torch.dtype = F64,
) -> Bound:
    """The term at t for the network's output at x_t. Differentiable in output."""
    x, eps = pixels(x0, dtype), z.to(dtype)
    out, v = output[:, : x.shape[1]].to(dtype), output[:, x.shape[1] :].to(dtype)
    ab_all, beta_all = schedule.alphas_cumprod, schedule.betas
    prev_all = torch.cat([torch.ones(1, dtype=F64), ab_all[:-1]])
    tilde_all = (1 - prev_all) / (1 - ab_all) * beta_all
    tilde_all = torch.cat([tilde_all[1:2], tilde_all[1:]])  # at t = 0 the next one, for its logarithm
    large_all = torch.cat([tilde_all[:1], beta_all[1:]])

    def at(values: Tensor) -> Tensor:
        return column(values, t, x, dtype)

    x_t = at(ab_all.sqrt()) * x + at((1 - ab_all).sqrt()) * eps
    if prediction == "eps":
        pred_x0 = at((1 / ab_all).sqrt()) * x_t - at((1 / ab_all - 1).sqrt()) * out
    elif prediction == "v":
        pred_x0 = at(ab_all.sqrt()) * x_t - at((1 - ab_all).sqrt()) * out
    else:
        pred_x0 = out
    if clip:
        pred_x0 = pred_x0.clamp(-1, 1)
    of_x0, of_x_t = prev_all.sqrt() * beta_all / (1 - ab_all), (1 - beta_all).sqrt() * (1 - prev_all) / (1 - ab_all)
    true_mean, mean = (at(of_x0) * start + at(of_x_t) * x_t for start in (x, pred_x0))
    if variance == "learned":
        log_variance = v
    elif variance == "learned_range":
        fraction = (v + 1) / 2
        log_variance = fraction * at(beta_all.log()) + (1 - fraction) * at(tilde_all.log())
    else:
        chosen = tilde_all if variance == "fixed_small" else large_all
        log_variance = at(chosen.log()).expand_as(x)
    kl = normal_kl(true_mean, at(tilde_all.log()).expand_as(x), mean, log_variance)
    nll = (paper_decoder if decoder == "paper" else exact_decoder)(x, mean, log_variance)
    return Bound(torch.where(at(torch.arange(len(ab_all))) == 0, nll, kl), pred_x0, x_t)


def bits_per_dim(made: Bound) -> Tensor:
    return made.nats.flatten(1).mean(1) / math.log(2)


# --- what the ops are given


def timesteps(schedule, n: int = 5) -> torch.Tensor:
    T = len(schedule)
    return torch.tensor([0, 1, 2, T // 2, T - 1])[torch.arange(n) % 5]


def batch(
    schedule, prediction, variance, shape=(5, 3, 9, 7), seed=0, dtype=torch.float32, x0_dtype=torch.uint8, z=None
):
    """(output, x0, t, z): pixels with black and white among them, and the output of a network half as good as it could
    be, whose log variance is off by a few tenths."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(-40, 296, shape, generator=generator).clamp(0, 255).to(torch.uint8)
    drawn, error, v = torch.randn(3, *shape, generator=generator, dtype=F64)
    z = drawn if z is None else z.double()
    t = timesteps(schedule, shape[0])
    ab = column(schedule.alphas_cumprod, t, x0)
    x = pixels(x0)
    target = {"eps": z, "x0": x, "v": ab.sqrt() * z - (1 - ab).sqrt() * x}[prediction]
    output = target + 0.5 * error * ((1 / ab - 1).sqrt().clamp(max=1) if prediction == "x0" else 1)
    if variance == "learned":
        log_beta = column(schedule.posterior_log_variance_clipped, t, x0)
        output = torch.cat([output, log_beta + 0.3 * v], 1)
    elif variance == "learned_range":
        output = torch.cat([output, v], 1)
    return output.to(dtype), x0 if x0_dtype == torch.uint8 else pixels(x0).to(x0_dtype), t, z.float()


def bound_table(schedule, prediction, variance, clip=False, decoder="exact", dtype=torch.float32):
    return Objective(prediction, variance, "vlb").bound_table(schedule, clip, decoder).to(dtype)


def hybrid_table(schedule, prediction, variance, dtype=torch.float32, **choices):
    return Objective(prediction, variance, "hybrid", **choices).hybrid_table(schedule).to(dtype)
