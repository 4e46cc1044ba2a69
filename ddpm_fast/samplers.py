"""Samplers as tables of coefficients, one row a step: they differ in their rows, not in code (csrc/reverse_step.h).

Ancestral sampling [H: Ho et al. 2020, alg. 2], DDIM [S: Song et al. 2020, eq. 12 and 16] and DPM-Solver++ [L: Lu et al.
2022, alg. 2]. Each goes from a step of the chain to its successor in the schedule's own list, and from the last one to
the image. Tables are float64 on the CPU: cast them last. sampling.py runs through the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.respacing import sampling_timesteps


class SamplerTable(NamedTuple):
    """A sampler's plan. coefficients: float64 [S, 8], as ops.reverse_step reads them; timesteps: int64 [S], the steps
    of the original chain that the network is told. Row 0 is applied first."""

    coefficients: Tensor
    timesteps: Tensor


def ddpm_table(diffusion: GaussianDiffusion, clip: bool = True) -> SamplerTable:
    """Ancestral sampling over every step of the diffusion's schedule, from T-1 to 0 [H alg. 2].

    Each step draws from p(x_{t-1} | x_t): the posterior's mean with the predicted x_0 in x_0's place, the objective's
    variance, fixed or learned, and no noise at the last step. clip holds the predicted x_0 to [-1, 1] before the mean.
    """
    schedule = diffusion.schedule
    base, slope = diffusion.objective.log_variance_table(schedule).unbind(1)
    sigma, spread = (base / 2).exp(), slope / 2
    sigma[0] = spread[0] = 0.0
    b_x, b_x0 = schedule.posterior_mean_coef2, schedule.posterior_mean_coef1
    return _downwards(diffusion, clip, b_x, b_x0, sigma=sigma, spread=spread)


def ddim_table(diffusion: GaussianDiffusion, eta: float = 0.0, clip: bool = True) -> SamplerTable:
    """DDIM from T-1 to 0 [S eq. 12]. ab' is alpha_bar at the successor of t in the schedule's list, 1 after the last:

        x' = sqrt(ab') x0 + sqrt(1 - ab' - sigma^2) eps + sigma z,   eps = (x - sqrt(ab) x0) / sqrt(1 - ab)

    eps is that of the clipped x0. eta from 0 (sigma is 0 everywhere and no noise is drawn) to 1 (ancestral sampling
    with the posterior's variance) scales sigma [S eq. 16]. Raises InputError for an eta outside [0, 1].
    """
    _check_eta(eta)
    return _downwards(diffusion, clip, *_towards_next(diffusion, float(eta)))


def ddim_encode_table(diffusion: GaussianDiffusion, clip: bool = True) -> SamplerTable:
    """DDIM with eta = 0 upwards, from an image to the noise it comes from [S sec. 4.3]: float64 [S-1, 8].

    Row i goes from step i of the schedule's list to step i+1, with the x_0 predicted at step i; clip holds that to
    [-1, 1]. The network is told `timesteps`, all but the last of the list.
    """
    schedule = diffusion.schedule
    ab, ab_next = schedule.alphas_cumprod[:-1], schedule.alphas_cumprod[1:]
    columns = _rows(diffusion, clip, *_mean(ab, ab_next, (1 - ab_next).sqrt()))
    return SamplerTable(columns, schedule.timesteps[:-1].clone())


def dpmpp_table(diffusion: GaussianDiffusion, order: int = 2, sde: bool = False, clip: bool = True) -> SamplerTable:
    """DPM-Solver++ from T-1 to 0: of order 1, or 2 as multistep (2M) [L alg. 2]; sde: its stochastic form.

    With lambda = log(sqrt(ab)/sqrt(1-ab)), h = lambda' - lambda and c = h/(2 h_previous), order 2 puts the
    extrapolation D = (1 + c) x0 - c x0_previous in the place of the first order's x0. It is first order at the first
    step, and at the last, where lambda' is infinite. Order 1 is DDIM, with eta = 0 or, as sde, 1: its coefficients
    sqrt(1-ab')/sqrt(1-ab) and -sqrt(ab') (e^{-h} - 1) are the same numbers, in which no infinity arises.
    Raises InputError for an order other than 1 and 2.
    """
    if order not in (1, 2):
        raise InputError(f"order = {order!r}: DPM-Solver++ is here of order 1 or 2")
    b_x, b_x0, sigma = _towards_next(diffusion, 1.0 if sde else 0.0)
    b_previous = torch.zeros_like(b_x)
    if order == 2:
        # lambda is half the logarithm of the SNR; h[t] is that of step t+1 to t. At zero terminal SNR it is infinite at
        # the first step, and c at the second the 0 of a finite h over an infinite one.
        h = diffusion.schedule.snr.log().diff().neg() / 2
        c = h[:-1] / (2 * h[1:])
        b_previous[1:-1] = -c * b_x0[1:-1]
        b_x0 = b_x0 - b_previous
    return _downwards(diffusion, clip, b_x, b_x0, b_previous=b_previous, sigma=sigma)


SAMPLERS: dict[str, Callable[..., SamplerTable]] = {
    "ddpm": ddpm_table,
    "ddim": ddim_table,
    "dpmpp_1": partial(dpmpp_table, order=1),
    "dpmpp_2m": partial(dpmpp_table, order=2),
    "dpmpp_2m_sde": partial(dpmpp_table, order=2, sde=True),
}


def make_table(
    diffusion: GaussianDiffusion,
    sampler: str = "ddpm",
    steps: int | str | Sequence[int] | None = None,
    *,
    spacing: str = "even",
    eta: float | None = None,
    clip: bool = True,
) -> SamplerTable:
    """The plan of a sampler by name, from T-1 on.

    steps: how many, or which (None: all): see respacing.sampling_timesteps, which spaces them by `spacing`. eta: how
    much noise "ddim" adds, 0 (the default) to 1. clip holds the predicted x_0 to [-1, 1] at every step.
    Raises InputError for an unknown sampler, steps or a spacing that the chain cannot give, and for an eta outside
    [0, 1] or with another sampler.
    """
    check_sampler(sampler, eta)
    options = {} if eta is None else {"eta": eta}
    diffusion = diffusion.respace(sampling_timesteps(steps, diffusion.num_timesteps, spacing))
    return SAMPLERS[sampler](diffusion, clip=clip, **options)


def check_sampler(sampler: str, eta: float | None) -> None:
    """Raises InputError for an unknown sampler, and for an eta outside [0, 1] or with a sampler other than "ddim"."""
    if sampler not in list(SAMPLERS):
        raise InputError(f"sampler {sampler!r} is unknown; there are {', '.join(SAMPLERS)}")
    if eta is None:
        return
    if sampler != "ddim":
        raise InputError(f"eta belongs to ddim; {sampler} has none: leave it out, or choose sampler 'ddim'")
    _check_eta(eta)


def _check_eta(eta: float) -> None:
    if not isinstance(eta, Real) or isinstance(eta, bool) or not 0 <= eta <= 1:
        raise InputError(f"eta = {eta!r}: expected a number from 0 (no noise) to 1 (as much as ancestral sampling)")


def _mean(ab: Tensor, ab_next: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """(b_x, b_x0) of sqrt(ab') x0 + direction * eps, with eps = (x - sqrt(ab) x0) / sqrt(1 - ab) put in."""
    b_x = direction / (1 - ab).sqrt()
    return b_x, ab_next.sqrt() - ab.sqrt() * b_x


def _towards_next(diffusion: GaussianDiffusion, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(b_x, b_x0, sigma) of DDIM's step from each t to t-1, float64 [T].

    With the ratio of the two SNRs, e^{-2h} = (ab/(1-ab)) / (ab'/(1-ab')), [S eq. 16] reads sigma^2 = eta^2 (1-ab')
    (1 - e^{-2h}), and so 1 - ab' - sigma^2 = (1-ab') (1 - eta^2 + eta^2 e^{-2h}) is a sum of what is never negative.
    """
    ab, ab_next = diffusion.schedule.alphas_cumprod, diffusion.schedule.alphas_cumprod_prev
    ratio = ab * (1 - ab_next) / ((1 - ab) * ab_next)
    b_x, b_x0 = _mean(ab, ab_next, ((1 - ab_next) * (1 - eta**2 + eta**2 * ratio)).sqrt())
    return b_x, b_x0, eta * ((1 - ab_next) * (1 - ratio)).sqrt()


def _rows(
    diffusion: GaussianDiffusion,
    clip: bool,
    b_x: Tensor,
    b_x0: Tensor,
    sigma: Tensor | None = None,
    b_previous: Tensor | None = None,
    spread: Tensor | None = None,
) -> Tensor:
    """ops.reverse_step's columns, float64 [len(b_x), 8], in the order of the schedule's first steps; None is 0."""
    a_x, a_out = diffusion.objective.x0_table(diffusion.schedule)[: len(b_x)].unbind(1)
    zero = torch.zeros_like(b_x)
    bound = torch.full_like(b_x, 1.0 if clip else math.inf)
    optional = [zero if column is None else column for column in (b_previous, sigma)]
    return torch.stack([a_x, a_out, b_x, b_x0, *optional, bound, zero if spread is None else spread], dim=1)


def _downwards(diffusion: GaussianDiffusion, clip: bool, *columns: Tensor, **named: Tensor) -> SamplerTable:
    """The table over every step of the schedule, the noisiest first."""
    return SamplerTable(_rows(diffusion, clip, *columns, **named).flip(0), diffusion.schedule.timesteps.flip(0))
