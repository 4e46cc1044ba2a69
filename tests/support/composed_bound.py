"""The variational bound as the reference codes compose it (openai/improved-diffusion and those that follow it), for an
eps network with the learned range of variances.

Every table's entries are spread over the whole batch, x_t and the noise are kept from the forward process, both
Gaussians are formed, and the decoder's likelihood is computed for every sample and used where t is 0. An oracle of the
fused ops, and what they are timed against.
"""

import math

import torch
from torch import Tensor

TABLES = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped")
TABLES += ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")


def tables_of(schedule, device: torch.device) -> dict[str, Tensor]:
    """The schedule's tables that the formulas read, float64 [T] each."""
    tables = {name: getattr(schedule, name).to(device) for name in TABLES}
    return tables | {"log_betas": schedule.betas.log().to(device)}


def per_sample_mean(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(1, x.ndim)))


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    spread = -1.0 + log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2)
    return 0.5 * (spread + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def decoder_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    centred, inverse = x - mean, torch.exp(-log_scale)
    above = normal_cdf(inverse * (centred + 1.0 / 255.0))
    below = normal_cdf(inverse * (centred - 1.0 / 255.0))
    first, last = torch.log(above.clamp(min=1e-12)), torch.log((1.0 - below).clamp(min=1e-12))
    middle = torch.log((above - below).clamp(min=1e-12))
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, middle))


def spread(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """A table's entries at t, one value an element."""
    values = table[t].to(torch.promote_types(like.dtype, torch.float32))
    return values.view(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def bound_terms(tables: dict, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    """(the bound's term in bits/dim [N], the predicted x_0) of an eps network with the learned range of variances."""

    def at(name: str) -> Tensor:
        return spread(tables[name], t, x_t)

    eps, v = output.chunk(2, dim=1)
    posterior_mean = at("posterior_mean_coef1") * x0 + at("posterior_mean_coef2") * x_t
    posterior_log_variance = at("posterior_log_variance_clipped")
    low, high, fraction = at("posterior_log_variance_clipped"), at("log_betas"), (v + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    pred_x0 = at("sqrt_recip_alphas_cumprod") * x_t - at("sqrt_recipm1_alphas_cumprod") * eps
    if clip:
        pred_x0 = pred_x0.clamp(-1, 1)
    mean = at("posterior_mean_coef1") * pred_x0 + at("posterior_mean_coef2") * x_t
    kl = per_sample_mean(gaussian_kl(posterior_mean, posterior_log_variance, mean, log_variance)) / math.log(2.0)
    nll = per_sample_mean(-decoder_log_likelihood(x0, mean, 0.5 * log_variance)) / math.log(2.0)
    return torch.where(t == 0, nll, kl), pred_x0


def composed_hybrid(tables: dict, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    eps, v = output.chunk(2, dim=1)
    bits, _ = bound_terms(tables, torch.cat([eps.detach(), v], dim=1), x0, x_t, t, clip=False)
    return per_sample_mean((noise - eps) ** 2) + bits * (tables["log_betas"].shape[0] / 1000.0)


def composed_terms(tables: dict, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> tuple:
    """(bits/dim, MSE of x_0, MSE of eps), [N] each."""
    bits, pred_x0 = bound_terms(tables, output, x0, x_t, t, clip=True)
    recip, recipm1 = (spread(tables[f"sqrt_{name}_alphas_cumprod"], t, x_t) for name in ("recip", "recipm1"))
    eps = (recip * x_t - pred_x0) / recipm1
    return bits, per_sample_mean((pred_x0 - x0) ** 2), per_sample_mean((eps - noise) ** 2)
