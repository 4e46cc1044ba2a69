"""The losses that hold the variational bound, and the bound's terms, compared with their composition in torch.

The composition is that of the reference codes (openai/improved-diffusion and those that follow it): every table's
entries are spread over the whole batch, x_t and the noise are kept from the forward process, both Gaussians are formed,
and the decoder's likelihood is computed for every sample and used where t is 0.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks import peers
from benchmarks.operations import NOISE_SEED, Operation, T, exact, noised, per_sample_mean, scaled

TABLES = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped")
TABLES += ("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")


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
    return per_sample_mean((noise - eps) ** 2) + bits * (T / 1000.0)


def composed_terms(tables: dict, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> tuple:
    """(bits/dim, MSE of x_0, MSE of eps), [N] each."""
    bits, pred_x0 = bound_terms(tables, output, x0, x_t, t, clip=True)
    recip, recipm1 = (spread(tables[f"sqrt_{name}_alphas_cumprod"], t, x_t) for name in ("recip", "recipm1"))
    eps = (recip * x_t - pred_x0) / recipm1
    return bits, per_sample_mean((pred_x0 - x0) ** 2), per_sample_mean((eps - noise) ** 2)


class BoundOperation(Operation):
    """What both ops read: an output [N, 2C, ...] of eps and v, x_0, x_t and the noise. The compositions are given x_t
    and the noise, which they keep from the forward process; ours is given the key and draws the noise again."""

    def prepare(self, formula: Callable) -> None:
        # Away from t = 0, whose likelihoods in the tails are decided by rounding.
        self.x0, self.t, self.formula = self.image(), self.timesteps(first=1), formula
        self.diffusion = df.GaussianDiffusion(df.Schedule.linear(T), variance="learned_range", loss="hybrid")
        schedule = self.diffusion.schedule
        self.tables = {name: getattr(schedule, name).to(self.device) for name in TABLES}
        self.tables["log_betas"] = schedule.betas.log().to(self.device)
        eps, v = self.randn(self.generator), self.randn(self.generator).clamp(-1, 1)
        self.output = self.as_output(torch.cat([eps, v], 1))
        self.key = self.new_key(NOISE_SEED, df.Stream.EVALUATION)
        shape = self.case.shape[1:]
        self.noise = df.ops.normal(self.key, shape, dtype=self.compute_dtype, memory_format=self.memory_format)
        self.x_t = self.diffusion.q_sample(self.x0, self.t, self.noise)

    def composed(self, _: Tensor | None):
        return self.formula(self.tables, self.output, scaled(self.x0), self.x_t, self.t, self.noise)

    def composed_compiled(self, _: Tensor | None):
        run = self.once("compiled", lambda: peers.freshly_compiled(functools.partial(self.formula, self.tables)))
        return run(self.output, scaled(self.x0), self.x_t, self.t, self.noise)

    def in_float64(self, output: Tensor):
        x0, noise = exact(self.x0), self.noise.double()
        x_t = noised(x0, self.t, self.diffusion.schedule.q_sample_table().to(self.device), noise)
        return self.formula(self.tables, output, x0, x_t, self.t, noise)


def vlb_terms(op: BoundOperation) -> None:
    """The bound's terms and both MSEs of a batch, without gradients."""
    op.prepare(composed_terms)
    op.bytes_per_element = op.x0.itemsize + 2 * op.output_dtype.itemsize
    op.ours = lambda _: tuple(op.diffusion.vlb_terms(op.output, op.x0, op.t, op.key))
    op.peers = {"composed": op.composed, "torch.compile": op.composed_compiled}
    op.expected = lambda _: op.in_float64(op.output.double())


def hybrid_loss(op: BoundOperation) -> None:
    """L_hybrid of each sample, and the gradient of its mean in the output [Nichol & Dhariwal 2021, eq. 16]."""
    op.prepare(composed_hybrid)
    op.output.requires_grad_()
    op.grad = True
    # x_0 and both groups of the output; what the forward keeps for the backward (written, read), the gradient
    op.bytes_per_element = op.x0.itemsize + (2 + 2 + 2 + 2) * op.output_dtype.itemsize

    def with_gradient(loss: Tensor, output: Tensor = op.output) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss.mean(), output)

    def lucidrains(_: Tensor | None) -> tuple[Tensor, ...]:
        # It makes x_t itself, which the compositions are given.
        chain = op.lucidrains(groups=2)
        chain.model.tensors["output"] = op.output
        return with_gradient(chain.p_losses(scaled(op.x0), op.t, noise=op.noise, loss_reduction="none"))

    def expected(_: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            output = op.output.detach().double().requires_grad_()
            return with_gradient(op.in_float64(output), output)

    op.ours = lambda _: with_gradient(op.diffusion.training_losses(op.output, op.x0, op.t, op.key))
    op.expected = expected
    op.peers = {
        "composed": lambda _: with_gradient(op.composed(None)),
        "torch.compile": lambda _: with_gradient(op.composed_compiled(None)),
        peers.LUCIDRAINS: lucidrains,
    }
