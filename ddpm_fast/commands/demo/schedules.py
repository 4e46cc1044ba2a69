"""The tab of the schedules: what a schedule does over t, and a picture that it noises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.commands.demo.limits import MOST_TIMESTEPS, whole
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.schedule import SCHEDULES, Schedule

LEAST_TIMESTEPS = 10


def chosen(names: object, T: object, zero_terminal_snr: bool) -> list[Schedule]:
    """The schedules of these names.

    Args:
        names: Some of SCHEDULES.
        T: The number of timesteps.
        zero_terminal_snr: Whether they are rescaled to end in pure noise.

    Raises:
        InputError: For no schedule, an unknown one, and a T that is out of range.
    """
    if not isinstance(names, list) or not names or any(name not in list(SCHEDULES) for name in names):
        raise InputError(f"choose at least one of the schedules {', '.join(SCHEDULES)}")
    length = whole("T", T, LEAST_TIMESTEPS, MOST_TIMESTEPS)
    made = [SCHEDULES[name](length) for name in SCHEDULES if name in names]
    return [schedule.zero_terminal_snr() for schedule in made] if zero_terminal_snr else made


def timestep(share: object, T: int) -> int:
    """The timestep at this share, in percent, of a chain of T. Raises InputError for no number from 0 to 100."""
    return round(whole("t", share, 0, 100) / 100 * (T - 1))


def log_snr(schedule: Schedule) -> np.ndarray:
    """log10 of the signal-to-noise ratio: float64 [T]; NaN, which is not drawn, where no signal is left."""
    return torch.where(schedule.snr > 0, schedule.snr, torch.nan).log10().numpy()


def noised(schedules: Sequence[Schedule], image: Tensor, t: int, seed: int = 0) -> Tensor:
    """A picture noised at t by each schedule, with the same noise: fp32 [K, C, H, W]. image: uint8 [C, H, W]."""
    at, key = torch.tensor([t]), NoiseKey.of(seed, 1)
    return torch.cat([GaussianDiffusion(one, "v").q_sample(image[None], at, key) for one in schedules])


def describe(schedules: Sequence[Schedule], t: int) -> str:
    """What the schedules are at t, in words."""
    values = (f"{one.source['kind']} {one.alphas_cumprod[t].item():.4g}" for one in schedules)
    return f"t = {t} of 0 to {len(schedules[0]) - 1}. alpha-bar: {', '.join(values)}"
