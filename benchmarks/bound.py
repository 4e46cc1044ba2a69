"""The losses that hold the variational bound, and the bound's terms, beside their composition in torch operations.

The composition is that of the reference codes (openai/improved-diffusion and those that follow it): every table's
entries are spread over the whole batch, x_t and the noise are kept from the forward process, both Gaussians are formed,
and the decoder's likelihood is computed for every sample and used where t is 0.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from ddpm_fast.operations import (
    NOISE_SEED,
    Case,
    GivenOutput,
    Operation,
    T,
    exact,
    freshly_compiled,
    noised,
    per_sample_mean,
    scaled,
)
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import peers


class Tables(NamedTuple):
    """The schedule's tables that the formulas read, float64 [T] each, on the images' device."""

    steps: float
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    posterior_log_variance_clipped: Tensor
    log_betas: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor

    @classmethod
    def of(cls, schedule: df.Schedule, device: torch.device) -> Tables:
        names = [name for name in cls._fields if name not in ("steps", "log_betas")]
        tables = {name: getattr(schedule, name).to(device) for name in names}
        return cls(steps=float(len(schedule)), log_betas=schedule.betas.log().to(device), **tables)


def spread(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """A table's entries at t, one value an element."""
    values = table[t].to(torch.promote_types(like.dtype, torch.float32))
    return values.view(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    difference = (mean1 - mean2) ** 2
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + difference * torch.exp(-log_variance2)
    )


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def decoder_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    centred, inverse = x - mean, torch.exp(-log_scale)
    above = normal_cdf(inverse * (centred + 1.0 / 255.0))
    below = normal_cdf(inverse * (centred - 1.0 / 255.0))
    first, last = torch.log(above.clamp(min=1e-12)), torch.log((1.0 - below).clamp(min=1e-12))
    middle = torch.log((above - below).clamp(min=1e-12))
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, middle))


def bound_terms(s: Tables, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> tuple[Tensor, ...]:
    """(the bound's term in bits/dim [N], the predicted x_0) of an eps network with the learned range of variances."""
    eps, v = output.chunk(2, dim=1)
    posterior_mean = spread(s.posterior_mean_coef1, t, x_t) * x0 + spread(s.posterior_mean_coef2, t, x_t) * x_t
    posterior_log_variance = spread(s.posterior_log_variance_clipped, t, x_t)
    low, high = spread(s.posterior_log_variance_clipped, t, x_t), spread(s.log_betas, t, x_t)
    fraction = (v + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    pred_x0 = spread(s.sqrt_recip_alphas_cumprod, t, x_t) * x_t - spread(s.sqrt_recipm1_alphas_cumprod, t, x_t) * eps
    if clip:
        pred_x0 = pred_x0.clamp(-1, 1)
    mean = spread(s.posterior_mean_coef1, t, x_t) * pred_x0 + spread(s.posterior_mean_coef2, t, x_t) * x_t
    kl = per_sample_mean(gaussian_kl(posterior_mean, posterior_log_variance, mean, log_variance)) / math.log(2.0)
    nll = per_sample_mean(-decoder_log_likelihood(x0, mean, 0.5 * log_variance)) / math.log(2.0)
    return torch.where(t == 0, nll, kl), pred_x0


def composed_hybrid(s: Tables, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    eps, v = output.chunk(2, dim=1)
    frozen = torch.cat([eps.detach(), v], dim=1)
    bits, _ = bound_terms(s, frozen, x0, x_t, t, clip=False)
    return per_sample_mean((noise - eps) ** 2) + bits * (s.steps / 1000.0)


def composed_terms(
    s: Tables, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(bits/dim, MSE of x_0, MSE of eps), [N] each."""
    bits, pred_x0 = bound_terms(s, output, x0, x_t, t, clip=True)
    recip, recipm1 = spread(s.sqrt_recip_alphas_cumprod, t, x_t), spread(s.sqrt_recipm1_alphas_cumprod, t, x_t)
    eps = (recip * x_t - pred_x0) / recipm1
    return bits, per_sample_mean((pred_x0 - x0) ** 2), per_sample_mean((eps - noise) ** 2)


class VlbTerms(Operation):
    """The bound's terms and both MSEs of a batch, without gradients.

    The compositions are given x_t and the noise, which they keep from the forward process; ours is given the key and
    draws the noise again.
    """

    baselines: dict[str, str] = {"composed": "composed", "torch.compile": "compiled"}  # noqa: RUF012
    formula = staticmethod(composed_terms)

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        self.x0 = self.image()
        # Away from t = 0, whose likelihoods in the tails are decided by rounding.
        self.t = torch.randint(1, T, case.shape[:1], generator=self.generator, device=device)
        self.diffusion = df.GaussianDiffusion(df.Schedule.linear(T), variance="learned_range", loss="hybrid")
        self.tables = Tables.of(self.diffusion.schedule, device)
        self.exact_table = self.diffusion.schedule.q_sample_table().to(device)
        eps, v = self.randn(self.generator), self.randn(self.generator).clamp(-1, 1)
        self.output = self.as_output(torch.cat([eps, v], 1))
        self.key = self.new_key(NOISE_SEED, df.Stream.EVALUATION)
        self.noise = df.ops.normal(self.key, case.shape[1:], dtype=self.compute_dtype, memory_format=self.memory_format)
        self.x_t = self.diffusion.q_sample(self.x0, self.t, self.noise)
        self.bytes_per_element = self.x0.itemsize + 2 * self.output_dtype.itemsize

    @functools.cached_property
    def compiled_formula(self):
        return freshly_compiled(functools.partial(self.formula, self.tables))

    def ours(self, noise: None) -> tuple[Tensor, ...]:
        return tuple(self.diffusion.vlb_terms(self.output, self.x0, self.t, self.key))

    def composed(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.formula(self.tables, self.output, scaled(self.x0), self.x_t, self.t, self.noise)

    def compiled(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.compiled_formula(self.output, scaled(self.x0), self.x_t, self.t, self.noise)

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        return self.formula(self.tables, *self.wide_inputs())

    def wide_inputs(self) -> tuple[Tensor, ...]:
        x0, noise = exact(self.x0), self.noise.double()
        x_t = noised(x0, self.t, self.exact_table, noise)
        return self.output.detach().double(), x0, x_t, self.t, noise


class HybridLoss(VlbTerms):
    """L_hybrid of each sample, and the gradient of its mean in the output [Nichol & Dhariwal 2021, eq. 16]."""

    grad = True
    baselines: dict[str, str] = {**VlbTerms.baselines, peers.LUCIDRAINS: "lucidrains"}  # noqa: RUF012
    formula = staticmethod(composed_hybrid)

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        self.output.requires_grad_()
        # x_0 and both groups of the output; what the forward keeps for the backward (written, read), the gradient
        self.bytes_per_element = self.x0.itemsize + (2 + 2 + 2 + 2) * self.output_dtype.itemsize

    def with_gradient(self, loss: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss.mean(), output)

    def ours(self, noise: None) -> tuple[Tensor, ...]:
        losses = self.diffusion.training_losses(self.output, self.x0, self.t, self.key)
        return self.with_gradient(losses, self.output)

    @functools.cached_property
    def lucid(self):
        _, channels, *size = self.case.shape
        network = GivenOutput(channels, groups=2)
        return peers.lucidrains_diffusion(network, tuple(size), learned=True).to(self.device)

    def lucidrains(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        # It makes x_t itself, which the compositions are given.
        self.lucid.model.tensors["output"] = self.output
        loss = self.lucid.p_losses(scaled(self.x0), self.t, noise=self.noise, loss_reduction="none")
        return self.with_gradient(loss, self.output)

    def composed(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.with_gradient(super().composed(noise), self.output)

    def compiled(self, noise: Tensor | None) -> tuple[Tensor, ...]:
        return self.with_gradient(super().compiled(noise), self.output)

    def expected(self, noise: Tensor) -> tuple[Tensor, ...]:
        output, *others = self.wide_inputs()
        with torch.enable_grad():
            output.requires_grad_()
            return self.with_gradient(self.formula(self.tables, output, *others), output)
