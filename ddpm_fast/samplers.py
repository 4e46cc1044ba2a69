"""Samplers as tables of coefficients. One row is one sampler step; samplers differ in their rows, not in their code.

csrc/reverse_step.h has the formula that a row enters, and loops/sampling.py applies the rows one after another. The
samplers are ancestral sampling [H: Ho et al. 2020, alg. 2], DDIM [S: Song et al. 2020, eq. 12 and 16] and DPM-Solver++
[L: Lu et al. 2022, alg. 2]. Each row goes from one timestep of the schedule's list to the next less noisy one, and the
last row goes to the image. All tables are float64 on the CPU; cast them last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError, check_number
from ddpm_fast.respacing import TimestepSpec, sampling_timesteps


class SamplerTable(NamedTuple):
    """The rows of a sampler; row 0 is applied first.

    Attributes:
        coefficients: float64 [S, 8], as ops.reverse_step reads them.
        timesteps: int64 [S], the timesteps of the original chain that the network is told.
    """

    coefficients: Tensor
    timesteps: Tensor


def ddpm_table(diffusion: GaussianDiffusion, clip: bool = True) -> SamplerTable:
    """Ancestral sampling over every timestep of the diffusion's schedule, from T-1 to 0 [H alg. 2].

    Each row draws from p(x_{t-1} | x_t). The mean is the posterior's, with the predicted x_0 in place of x_0; the
    variance is the objective's, fixed or learned. The last row adds no noise.

    Args:
        diffusion: Its schedule may be respaced.
        clip: Whether to limit the predicted x_0 to [-1, 1] before the mean is formed from it.
    """
    schedule = diffusion.schedule
    base, slope = diffusion.objective.log_variance_table(schedule).unbind(1)
    sigma, spread = (base / 2).exp(), slope / 2
    sigma[0] = spread[0] = 0.0
    b_x, b_x0 = schedule.posterior_mean_coef2, schedule.posterior_mean_coef1
    return _downwards(diffusion, clip, b_x, b_x0, sigma=sigma, spread=spread)


def ddim_table(diffusion: GaussianDiffusion, eta: float = 0.0, clip: bool = True) -> SamplerTable:
    """DDIM over every timestep of the diffusion's schedule, from T-1 to 0 [S eq. 12].

        x' = sqrt(ab') x0 + sqrt(1 - ab' - sigma^2) eps + sigma z,   eps = (x - sqrt(ab) x0) / sqrt(1 - ab)

    ab' is alpha_bar at the next timestep in the schedule's list, and 1 after the last. eps is computed from the clipped
    x0.

    Args:
        diffusion: Its schedule may be respaced.
        eta: Scales sigma [S eq. 16], from 0 (sigma is 0 everywhere, so no noise is drawn) to 1 (ancestral sampling with
            the posterior's variance).
        clip: Whether to limit the predicted x_0 to [-1, 1].

    Raises:
        InputError: For an eta outside [0, 1].
    """
    b_x, b_x0, sigma = _towards_next(diffusion, _checked_eta(eta))
    return _downwards(diffusion, clip, b_x, b_x0, sigma=sigma)


def ddim_encode_table(diffusion: GaussianDiffusion, clip: bool = True) -> SamplerTable:
    """DDIM with eta = 0 in the opposite direction, from an image to the noise that it comes from [S sec. 4.3].

    Row i goes from timestep i of the schedule's list to timestep i+1, with the x_0 that is predicted at timestep i.
    There are S - 1 rows for S timesteps: the network is told all but the last of the list.

    Args:
        diffusion: Its schedule may be respaced.
        clip: Whether to limit the predicted x_0 to [-1, 1].
    """
    schedule = diffusion.schedule
    ab, ab_next = schedule.alphas_cumprod[:-1], schedule.alphas_cumprod[1:]
    b_x, b_x0 = _mean(ab, ab_next, (1 - ab_next).sqrt())
    return SamplerTable(_rows(diffusion, clip, b_x, b_x0), schedule.timesteps[:-1].clone())


def dpmpp_table(diffusion: GaussianDiffusion, order: int = 2, sde: bool = False, clip: bool = True) -> SamplerTable:
    """DPM-Solver++ over every timestep of the diffusion's schedule, from T-1 to 0 [L alg. 2].

    With lambda = log(sqrt(ab)/sqrt(1-ab)), h = lambda' - lambda and c = h/(2 h_previous), order 2 uses the
    extrapolation D = (1 + c) x0 - c x0_previous where order 1 uses x0. It is of order 1 in its first row, and in its
    last, where lambda' is infinite. Order 1 is the same as DDIM with eta = 0, or with eta = 1 if sde: its coefficients
    sqrt(1-ab')/sqrt(1-ab) and -sqrt(ab') (e^{-h} - 1) are the same numbers, and in DDIM's form no infinity arises.

    Args:
        diffusion: Its schedule may be respaced.
        order: 1, or 2 for the multistep method (2M).
        sde: Whether to use the stochastic form.
        clip: Whether to limit the predicted x_0 to [-1, 1].

    Raises:
        InputError: For another order.
    """
    if order not in (1, 2):
        raise InputError(f"order = {order!r}: expected 1 or 2, the orders of DPM-Solver++ that are implemented")
    b_x, b_x0, sigma = _towards_next(diffusion, 1.0 if sde else 0.0)
    b_previous = torch.zeros_like(b_x)
    if order == 2:
        # lambda is half the logarithm of the SNR, and h[t] is the h of the step from t+1 to t. With zero terminal SNR
        # the first row's h is infinite, so the second row's c is a finite h over an infinite one, which is 0.
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
    steps: TimestepSpec | None = None,
    *,
    spacing: str = "even",
    eta: float | None = None,
    clip: bool = True,
) -> SamplerTable:
    """The table of the sampler of the given name, starting from T-1.

    Args:
        diffusion: The diffusion that the network was trained with.
        sampler: A name in SAMPLERS.
        steps: How many rows, or which timesteps; None means all. See respacing.sampling_timesteps.
        spacing: How a number of steps is spaced over the chain; see respacing.sampling_timesteps.
        eta: How much noise "ddim" adds, from 0 (the default) to 1. Other samplers have no eta.
        clip: Whether to limit the predicted x_0 to [-1, 1] in every row.

    Raises:
        InputError: For an unknown sampler, for steps or a spacing that the chain does not allow, and for an eta outside
            [0, 1] or with a sampler other than "ddim".
    """
    check_sampler(sampler, eta)
    diffusion = diffusion.respace(sampling_timesteps(steps, diffusion.num_timesteps, spacing))
    if eta is not None:
        return ddim_table(diffusion, eta, clip)
    return SAMPLERS[sampler](diffusion, clip=clip)


def check_sampler(sampler: str, eta: float | None) -> None:
    """Raises InputError for an unknown sampler, and for an eta outside [0, 1] or with a sampler other than "ddim"."""
    if sampler not in list(SAMPLERS):
        raise InputError(f"sampler {sampler!r} is unknown; there are {', '.join(SAMPLERS)}")
    if eta is None:
        return
    if sampler != "ddim":
        raise InputError(f"eta belongs to ddim, and {sampler} has none: leave it out, or choose sampler 'ddim'")
    _checked_eta(eta)


def _checked_eta(eta: float) -> float:
    expected = "a number from 0 (no noise) to 1 (as much as ancestral sampling)"
    return check_number("eta", eta, lambda v: 0 <= v <= 1, expected)


def _mean(ab: Tensor, ab_next: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """(b_x, b_x0) of sqrt(ab') x0 + direction * eps, where eps is (x - sqrt(ab) x0) / sqrt(1 - ab)."""
    b_x = direction / (1 - ab).sqrt()
    return b_x, ab_next.sqrt() - ab.sqrt() * b_x


def towards(ab: Tensor, ab_next: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(b_x, b_x0, sigma) of DDIM's step from noise levels alpha_bar to less noisy ones, float64 [S].

    e^{-2h} = (ab/(1-ab)) / (ab'/(1-ab')) is the ratio of the two SNRs. In its terms [S eq. 16] reads
    sigma^2 = eta^2 (1-ab') (1 - e^{-2h}). Then 1 - ab' - sigma^2 = (1-ab') (1 - eta^2 + eta^2 e^{-2h}), in which no
    term is ever negative.
    """
    ratio = ab * (1 - ab_next) / ((1 - ab) * ab_next)
    b_x, b_x0 = _mean(ab, ab_next, ((1 - ab_next) * (1 - eta**2 + eta**2 * ratio)).sqrt())
    return b_x, b_x0, eta * ((1 - ab_next) * (1 - ratio)).sqrt()


def _towards_next(diffusion: GaussianDiffusion, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """`towards` from each t to t-1, float64 [T]."""
    return towards(diffusion.schedule.alphas_cumprod, diffusion.schedule.alphas_cumprod_prev, eta)


def _rows(
    diffusion: GaussianDiffusion,
    clip: bool,
    b_x: Tensor,
    b_x0: Tensor,
    *,
    sigma: Tensor | None = None,
    b_previous: Tensor | None = None,
    spread: Tensor | None = None,
) -> Tensor:
    """The columns of ops.reverse_step, float64 [len(b_x), 8], in ascending order of the schedule's timesteps.

    The rows belong to the first len(b_x) timesteps. A column that is None is 0.
    """
    a_x, a_out = diffusion.objective.x0_table(diffusion.schedule)[: len(b_x)].unbind(1)
    zero = torch.zeros_like(b_x)
    limit = torch.full_like(b_x, 1.0 if clip else math.inf)
    b_previous, sigma, spread = (zero if column is None else column for column in (b_previous, sigma, spread))
    return torch.stack([a_x, a_out, b_x, b_x0, b_previous, sigma, limit, spread], dim=1)


def _downwards(
    diffusion: GaussianDiffusion,
    clip: bool,
    b_x: Tensor,
    b_x0: Tensor,
    *,
    sigma: Tensor | None = None,
    b_previous: Tensor | None = None,
    spread: Tensor | None = None,
) -> SamplerTable:
    """The table over every timestep of the schedule, the noisiest first; for the columns see _rows."""
    rows = _rows(diffusion, clip, b_x, b_x0, sigma=sigma, b_previous=b_previous, spread=spread)
    return SamplerTable(rows.flip(0), diffusion.schedule.timesteps.flip(0))
