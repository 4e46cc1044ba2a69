"""Draws how fast each sampler's error falls with its steps: python docs/convergence.py OUT.png (about half a minute)

The data are a mixture of three Gaussians on a line, for which the best network is known in closed form at every
alpha_bar, and so are the quantiles of x_t. The probability-flow ODE, which DDIM with eta = 0 and DPM-Solver++ solve,
never lets two paths cross on a line: it takes the p-quantile of x_T to the p-quantile of x_0. That is the exact
solution. The error is the Wasserstein-1 distance to the data, the mean distance of sorted samples from the quantiles;
for the ODE's samplers, started at quantiles of x_T, it is the mean error of the solution.
"""

import math
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from ddpm_fast import GaussianDiffusion, NoiseKey, Schedule, ops
from ddpm_fast.noise import Stream
from ddpm_fast.samplers import SAMPLERS, make_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.15, 0.2, 0.1], dtype=torch.float64)

# A long chain, so that the list of steps is fine and what remains at t = 0 (alpha_bar = 1 - 3e-6) is small.
DIFFUSION = GaussianDiffusion(Schedule.linear(2**15), "eps", variance="fixed_small")
DRAWS = 2**16  # of the samplers with noise


def standardised(x: Tensor, ab: float) -> tuple[Tensor, Tensor]:
    """x's distance from each component of x_t's mixture in its standard deviations, and these: [..., 3], [3]."""
    deviations = (ab * DEVIATIONS**2 + 1 - ab).sqrt()
    return (x[..., None] - math.sqrt(ab) * MEANS) / deviations, deviations


def best_eps(x: Tensor, ab: float) -> Tensor:
    """E[eps | x_t = x] = -sqrt(1 - ab) d/dx log p(x): what a perfect network predicts."""
    distances, deviations = standardised(x, ab)
    responsibility = torch.softmax(WEIGHTS.log() - deviations.log() - distances**2 / 2, -1)
    return math.sqrt(1 - ab) * (responsibility * distances / deviations).sum(-1)


def quantiles(n: int, ab: float) -> Tensor:
    """The n quantiles of x_t at (i + 1/2)/n, by bisection: float64 [n]."""
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    low, high = torch.full_like(p, -10.0), torch.full_like(p, 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = (WEIGHTS * torch.special.ndtr(standardised(middle, ab)[0])).sum(-1) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def error(sampler: str, steps: int, spacing: str, draws: int = DRAWS, eta: float | None = None) -> float:
    """The distance to the data of what a sampler makes of x_T's quantiles, in float64: `draws` of them, or 512 where
    it adds no noise."""
    table = make_table(DIFFUSION, sampler, steps, spacing=spacing, eta=eta, clip=False)
    abs_ = DIFFUSION.schedule.alphas_cumprod[table.timesteps].tolist()
    n = draws if (table.coefficients[:, 5] > 0).any() else 512
    x, x0 = quantiles(n, abs_[0]).view(16, 1, n // 16), None
    key = NoiseKey.of(0, 16, stream=Stream.REVERSE)
    for ab in abs_:
        step = ops.reverse_step(x, best_eps(x, ab), table.coefficients, key.step, key, x0_previous=x0, return_x0=True)
        x, x0 = step.x, step.x0
        key.step.add_(1)
    return (x.flatten().sort().values - quantiles(n, 1.0)).abs().mean().item()


def sampling_noise(n: int) -> float:
    """The distance to the data of n draws from the data themselves: the least that can be measured."""
    generator = torch.Generator().manual_seed(0)
    component = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    z = torch.randn(n, dtype=torch.float64, generator=generator)
    return ((MEANS[component] + DEVIATIONS[component] * z).sort().values - quantiles(n, 1.0)).abs().mean().item()


def main(out: Path) -> None:
    steps = [4, 8, 16, 32, 64, 128, 256]
    styles = {
        "ddpm": ("tab:orange", "s-"),
        "ddim": ("tab:blue", "o-"),
        "dpmpp_1": ("black", ":"),
        "dpmpp_2m": ("tab:green", "o-"),
        "dpmpp_2m_sde": ("tab:red", "s-"),
    }
    floor = sampling_noise(DRAWS)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for axes, spacing in zip(panels, ("even", "quadratic"), strict=True):
        for sampler in SAMPLERS:
            colour, style = styles[sampler]
            label = sampler + {"ddim": " (eta 0)", "dpmpp_1": " (the same as ddim)"}.get(sampler, "")
            errors = [error(sampler, n, spacing) for n in steps]
            axes.loglog(steps, errors, style, color=colour, label=label, markersize=4, linewidth=1.6, base=2)
        for order, start in ((1, 1.2), (2, 0.4)):
            guide = [start * (steps[0] / n) ** order for n in steps]
            axes.loglog(steps, guide, "--", color="0.6", linewidth=1)
            axes.annotate(f" order {order}", (steps[-1], guide[-1]), color="0.4", va="center", fontsize=9)
        axes.axhspan(1e-9, floor, color="0.93", zorder=0)
        axes.annotate(f"noise of {DRAWS:,} draws (squares)", (steps[0], floor), color="0.5", va="top", fontsize=8)
        axes.set(title=f"spacing {spacing!r}", xlabel="steps", xlim=(3.4, 560), ylim=(1e-5, 2), xticks=steps)
        axes.set_xticklabels(steps)
        axes.set_yscale("log", base=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distance to the data (Wasserstein-1)")
    panels[0].legend(loc="lower left", fontsize=8.5)
    figure.suptitle("Three Gaussians on a line, a perfect network: error against the exact solution")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
