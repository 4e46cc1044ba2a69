"""The losses that hold the variational bound, and the bound's terms, compared with their composition in torch operations.

The composition is that of the reference codes (openai/improved-diffusion and those that follow it): every table's
entries are spread over the whole batch, x_t and the noise are kept from the forward process, both Gaussians are formed,
and the decoder's likelihood is computed for every sample and used where t is 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks import peers
from benchmarks.operations import NOISE_SEED, Operation, T, exact, noised, per_sample_mean, scaled


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


# --- the ops: each function makes the Operation of a case


class Inputs(NamedTuple):
    """What both ops read: an output [N, 2C, ...] of eps and v, x_0, x_t and the noise. The compositions are given x_t
    and the noise, which they keep from the forward process; ours is given the key and draws the noise again."""

    diffusion: df.GaussianDiffusion
    tables: Tables
    output: Tensor
    x0: Tensor
    t: Tensor
    noise: Tensor
    x_t: Tensor

    @classmethod
    def of(cls, op: Operation) -> Inputs:
        # Away from t = 0, whose likelihoods in the tails are decided by rounding.
        x0, t = op.image(), op.timesteps(first=1)
        diffusion = df.GaussianDiffusion(df.Schedule.linear(T), variance="learned_range", loss="hybrid")
        eps, v = op.randn(op.generator), op.randn(op.generator).clamp(-1, 1)
        op.key = op.new_key(NOISE_SEED, df.Stream.EVALUATION)
        noise = df.ops.normal(op.key, op.case.shape[1:], dtype=op.compute_dtype, memory_format=op.memory_format)
        return cls(
            diffusion=diffusion,
            tables=Tables.of(diffusion.schedule, op.device),
            output=op.as_output(torch.cat([eps, v], 1)),
            x0=x0,
            t=t,
            noise=noise,
            x_t=diffusion.q_sample(x0, t, noise),
        )

    def composed(self, formula: Callable) -> Callable:
        """The formula on these inputs; what is returned takes a noise tensor and has no use for it."""
        return lambda _: formula(self.tables, self.output, scaled(self.x0), self.x_t, self.t, self.noise)

    def compiled(self, op: Operation, formula: Callable) -> Callable:
        run = op.once("compiled", lambda: peers.freshly_compiled(functools.partial(formula, self.tables)))
        return lambda _: run(self.output, scaled(self.x0), self.x_t, self.t, self.noise)

    def expected(self, formula: Callable, output: Tensor):
        """The formula in float64."""
        x0, noise = exact(self.x0), self.noise.double()
        table = self.diffusion.schedule.q_sample_table().to(x0.device)
        return formula(self.tables, output, x0, noised(x0, self.t, table, noise), self.t, noise)


def vlb_terms(op: Operation) -> Operation:
    """The bound's terms and both MSEs of a batch, without gradients."""
    given = Inputs.of(op)
    op.bytes_per_element = given.x0.itemsize + 2 * op.output_dtype.itemsize
    op.ours = lambda _: tuple(given.diffusion.vlb_terms(given.output, given.x0, given.t, op.key))
    op.peers = {"composed": given.composed(composed_terms), "torch.compile": given.compiled(op, composed_terms)}
    op.expected = lambda _: given.expected(composed_terms, given.output.double())
    return op


def hybrid_loss(op: Operation) -> Operation:
    """L_hybrid of each sample, and the gradient of its mean in the output [Nichol & Dhariwal 2021, eq. 16]."""
    given = Inputs.of(op)
    given.output.requires_grad_()
    op.grad = True
    # x_0 and both groups of the output; what the forward keeps for the backward (written, read), the gradient
    op.bytes_per_element = given.x0.itemsize + (2 + 2 + 2 + 2) * op.output_dtype.itemsize
    composed, compiled = given.composed(composed_hybrid), given.compiled(op, composed_hybrid)

    def with_gradient(loss: Tensor, output: Tensor = given.output) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss.mean(), output)

    def lucidrains(_: Tensor | None) -> tuple[Tensor, ...]:
        # It makes x_t itself, which the compositions are given.
        chain = op.lucidrains(groups=2)
        chain.model.tensors["output"] = given.output
        return with_gradient(chain.p_losses(scaled(given.x0), given.t, noise=given.noise, loss_reduction="none"))

    def expected(_: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            output = given.output.detach().double().requires_grad_()
            return with_gradient(given.expected(composed_hybrid, output), output)

    op.ours = lambda _: with_gradient(given.diffusion.training_losses(given.output, given.x0, given.t, op.key))
    op.expected = expected
    op.peers = {
        "composed": lambda z: with_gradient(composed(z)),
        "torch.compile": lambda z: with_gradient(compiled(z)),
        peers.LUCIDRAINS: lucidrains,
    }
    return op
