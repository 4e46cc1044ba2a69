"""Loops over diffusers' schedulers and ours: the same network, the same timesteps and the same noise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ddpm_fast.formats.diffusers_scheduler import DDPMFastScheduler

SHAPE = (2, 3, 6, 6)
MODULES = ("ddpm", "ddim", "dpmsolver_multistep")


def normals(n: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> list[Tensor]:
    """n tensors of standard normals, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n)]


def network(scheduler: Any, groups: int = 1) -> Callable[[Tensor, Any], Tensor]:
    """The exact denoiser of data that is N(m, 1/2), whose m leaves [-1, 1] here and there, so that limits matter.

    Args:
        scheduler: Whose alphas_cumprod and prediction_type the network was made for.
        groups: 2 for an output that is followed by values for a learned variance, in (0, 1).
    """
    levels, kind = scheduler.alphas_cumprod.double(), scheduler.config.prediction_type

    def answer(x: Tensor, t: Any) -> Tensor:
        ab = levels[int(t)]
        m = 1.2 * torch.cos(torch.arange(x[0].numel(), dtype=torch.float64)).view(x.shape[1:])
        x0 = m + ab.sqrt() * (x.double() - ab.sqrt() * m) / (1 + ab)
        eps = (x.double() - ab.sqrt() * x0) / (1 - ab).sqrt()
        out = {"epsilon": eps, "sample": x0, "v_prediction": ab.sqrt() * eps - (1 - ab).sqrt() * x0}[kind]
        return torch.cat([out, 0.5 + 0.4 * torch.tanh(x)] if groups == 2 else [out], dim=1).to(x.dtype)

    return answer


@contextlib.contextmanager
def drawing(z: Tensor) -> Iterator[list[Tensor]]:
    """Inside, diffusers' schedulers draw z, or what the list that this gives then holds."""
    held = [z]
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            name = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
            stack.enter_context(mock.patch(name, lambda *_, **__: held[0]))
        yield held


def states(scheduler: Any, call: Callable, x: Tensor, noise: list[Tensor], **options: Any) -> list[Tensor]:
    """The state after each step of a loop over the scheduler's timesteps."""
    found = []
    with drawing(x) as held:
        for t, z in zip(scheduler.timesteps, noise, strict=True):
            held[0] = z.to(x.dtype)
            if isinstance(scheduler, DDPMFastScheduler):
                x = scheduler.step(call(x, t), t, x, variance_noise=held[0], **options).prev_sample
            else:
                x = scheduler.step(call(x, t), t, x, **options).prev_sample
            found.append(x)
    return found


def in_float64(peer: Any, steps: int) -> Any:
    """diffusers' scheduler with timesteps set and tables in float64, of the same betas: its float32 tables give
    coefficients that are off by up to 4e-4 near t = 0. The tables are those of its own formulas."""
    levels = torch.cumprod(1 - peer.betas.double(), 0)
    if isinstance(peer, DPMSolverMultistepScheduler):
        if peer.config.rescale_betas_zero_snr:
            levels[-1] = 2**-24
        peer.set_timesteps(steps)
        if not any(peer.config[name] for name in peer.config if name.endswith(("_sigmas", "_lambdas"))):
            sigmas = ((1 - levels) / levels).sqrt()
            last = sigmas[:1] if peer.config.final_sigmas_type == "sigma_min" else torch.zeros(1)
            peer.sigmas = torch.cat([sigmas[peer.timesteps], last])
        else:
            peer.sigmas = peer.sigmas.double()
        return peer
    peer.alphas_cumprod = levels
    peer.one = torch.ones((), dtype=torch.float64)
    if hasattr(peer, "final_alpha_cumprod"):
        peer.final_alpha_cumprod = peer.one if peer.config.set_alpha_to_one else levels[0]
    peer.set_timesteps(steps)
    return peer


def largest_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference between two loops' states, relative to the largest value of the state."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(ours, theirs, strict=True)
    )
