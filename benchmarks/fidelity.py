"""Are the samples of the faster modes those of the exact one? `python -m benchmarks fidelity --out FILE.json`.

The shipped digit model draws with plain torch in fp32, and ours does in fp32 (on the CPU by Winograd's convolutions)
and in bf16. From the same noise the images are compared pixel by pixel. From different noise they are two sets of
images, and the kernel two-sample test says whether they can be told apart (Gretton et al. 2012, "A Kernel Two-Sample
Test", with a Gaussian kernel on pixels and permutations). That the test can tell is shown on chains of fewer steps.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks import networks
from benchmarks.rows import duration
from benchmarks.runs import Options, Run, checked
from ddpm_fast.commands.common import DTYPE_NAMES, console
from ddpm_fast.errors import InputError
from ddpm_fast.pictures.images import to_uint8

PERMUTATIONS = 2000
FEWER = 5  # the chain that the test must tell apart has so many times fewer steps
BATCH = 100


def two_sample_p(first: Tensor, second: Tensor, permutations: int = PERMUTATIONS) -> float:
    """The p-value of "both are of one distribution": [n, ...] and [n, ...] of as many images, the i-th of one class. If
    they are, it is uniform; it is small where a Gaussian kernel of the median distance tells them apart."""
    if first.shape != second.shape or len(first) < 2:
        raise InputError(f"got {list(first.shape)} and {list(second.shape)}; expected as many of both, at least two")
    n = len(first)
    points = torch.cat([first, second]).flatten(1).double()
    distances = torch.cdist(points, points)
    kernel = torch.exp(-0.5 * (distances / distances[distances > 0].median()).square())
    # Classes are even in both sets, so only images of the same one may change places.
    swaps = np.random.default_rng(0).choice([-1.0, 1.0], (permutations + 1, n))
    swaps[0] = 1
    signs = torch.from_numpy(np.concatenate([swaps, -swaps], axis=1))
    # For sets of one size this orders the permutations as the unbiased statistic does.
    statistics = ((signs @ kernel) * signs).sum(1)
    return float((statistics >= statistics[0] * (1 - 1e-12)).double().mean())


def deviations(images: Tensor, exact: Tensor) -> dict:
    """How far images [n, ...] in [-1, 1] are from others of the same noise, in levels of 8 bits."""
    levels = np.abs(to_uint8(images).astype(float) - to_uint8(exact)).reshape(len(images), -1)
    return {
        "mean_levels": float(levels.mean()),
        "differing_share": float((levels > 0).mean()),
        "worst_image_mean_levels": float(levels.mean(1).max()),
    }


def main(options: Options, n: int = 500, steps: int = 50) -> None:
    """Compares the samples of each mode with those of plain torch, and writes what was found to a file."""
    if n < 2 or steps < FEWER:
        raise InputError(f"n is {n} and steps {steps}; expected at least 2 images and {FEWER} steps")
    run = Run(checked(options, 0, 0), {}, n=n, steps=steps, permutations=PERMUTATIONS, fidelity=[])
    labels = torch.arange(n, device=run.device) % 10

    def drawn(dtype: torch.dtype, seed: int, steps: int = steps) -> tuple[Tensor, float]:
        made = networks.network(networks.DIGITS)
        model, started = made.model.to(run.device, dtype), time.monotonic()
        images = df.sample(model, made.diffusion, n, steps=steps, seed=seed, labels=labels, batch_size=BATCH).cpu()
        return images, time.monotonic() - started

    with df.use_backend("reference"):
        exact, _ = drawn(torch.float32, seed=0)
    for dtype, mode in DTYPE_NAMES.items():
        same, seconds = drawn(dtype, seed=0)
        other, _ = drawn(dtype, seed=1)
        line = {"mode": mode, "seconds": seconds, **deviations(same, exact), "p_value": two_sample_p(other, exact)}
        run.found["fidelity"].append(line)
        console.print(
            f"{mode}, {duration(seconds)}: from the same noise {line['differing_share']:.2%} of the pixels differ, on "
            f"average by {line['mean_levels']:.3g} of 255 levels; from different noise p = {line['p_value']:.3g}"
        )
        run.write()
    coarse, _ = drawn(torch.float32, seed=1, steps=steps // FEWER)
    control = {"steps": steps // FEWER, "p_value": two_sample_p(coarse, exact)}
    run.found["control"] = control
    console.print(f"The same test between chains of {steps} and {control['steps']} steps: p = {control['p_value']:.3g}")
    run.finish()
