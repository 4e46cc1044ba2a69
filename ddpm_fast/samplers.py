"""Samplers as tables of coefficients, one row a step: they differ in their rows, not in code (csrc/reverse_step.h).

Ho et al. 2020, alg. 2 is `ddpm`. sampling.py runs through the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .diffusion import GaussianDiffusion
from .errors import InputError


class SamplerTable(NamedTuple):
    """A sampler's plan. coefficients: float64 [S, 7], as ops.reverse_step reads them; timesteps: int64 [S], the steps
    of the original chain that the network is told. Row 0 is applied first."""

    coefficients: Tensor
    timesteps: Tensor


def ddpm_table(diffusion: GaussianDiffusion, clip: bool = True) -> SamplerTable:
    """Ancestral sampling over every step of the diffusion's schedule, from T-1 to 0 (Ho et al. 2020, alg. 2).

    Each step draws from p(x_{t-1} | x_t): the posterior's mean with the predicted x_0 in x_0's place, the variance
    that the objective fixes, and no noise at the last step. clip holds the predicted x_0 to [-1, 1] before the mean.
    """
    schedule, objective = diffusion.schedule, diffusion.objective
    a_x, a_out = objective.x0_table(schedule).unbind(1)
    log_variance = objective.variance_table(schedule)[:, 1]
    sigma = (0.5 * log_variance).exp()
    sigma[0] = 0.0
    columns = [
        *(a_x, a_out, schedule.posterior_mean_coef2, schedule.posterior_mean_coef1, torch.zeros_like(sigma), sigma),
        torch.full_like(sigma, 1.0 if clip else math.inf),
    ]
    return SamplerTable(torch.stack(columns, dim=1).flip(0), schedule.timesteps.flip(0))


SAMPLERS: dict[str, Callable[..., SamplerTable]] = {"ddpm": ddpm_table}


def make_table(diffusion: GaussianDiffusion, sampler: str = "ddpm", steps: int | None = None) -> SamplerTable:
    """The plan of a sampler by name, over `steps` steps spaced evenly over the schedule (None: all of them).

    Raises InputError for an unknown sampler, and for steps outside 1..T.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r} is unknown; there are {', '.join(SAMPLERS)}")
    if steps is not None and not 1 <= steps <= diffusion.num_timesteps:
        raise InputError(f"steps is {steps}; expected 1..{diffusion.num_timesteps}, the length of the model's chain")
    return SAMPLERS[sampler](diffusion if steps is None else diffusion.respace(steps))
