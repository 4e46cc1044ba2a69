"""Are the samples of the faster modes those of the exact one? `python -m benchmarks fidelity --out FILE.json`."""

import time

import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks import networks
from benchmarks.machine import DTYPES
from benchmarks.rows import duration
from benchmarks.runs import Options, Run, say
from ddpm_fast.errors import InputError
from ddpm_fast.metrics.two_sample import deviations, two_sample_p
from ddpm_fast.pictures.images import to_uint8

FEWER = 5  # the chain that the test must tell apart has so many times fewer steps
BATCH = 100


def main(options: Options, n: int = 500, steps: int = 50) -> None:
    """Compares the samples of each mode with those of plain torch, and writes what was found to a file."""
    if n < 2 or steps < FEWER:
        raise InputError(f"n is {n} and steps {steps}; expected at least 2 images and {FEWER} steps")
    run = Run(options.checked(0, 0), {}, n=n, steps=steps, fidelity=[])
    labels = torch.arange(n, device=run.device) % 10

    def drawn(dtype: torch.dtype, seed: int, steps: int = steps) -> tuple[Tensor, float]:
        made = networks.network(networks.DIGITS)
        model, started = made.model.to(run.device, dtype), time.monotonic()
        images = df.sample(model, made.diffusion, n, steps=steps, seed=seed, labels=labels, batch_size=BATCH).cpu()
        return images, time.monotonic() - started

    with df.use_backend("reference"):
        exact, _ = drawn(torch.float32, seed=0)
    for mode, dtype in DTYPES.items():
        same, seconds = drawn(dtype, seed=0)
        other, _ = drawn(dtype, seed=1)
        found, p = deviations(to_uint8(same), to_uint8(exact)), two_sample_p(other, exact)
        run.found["fidelity"].append({"mode": mode, "seconds": seconds, **found, "p_value": p})
        differ = f"{found['differing_share']:.2%} of the pixels differ, by {found['mean_levels']:.3g} of 255 on average"
        say(f"{mode}, {duration(seconds)}: from the same noise {differ}; from different noise p = {p:.3g}")
        run.write()
    coarse, _ = drawn(torch.float32, seed=1, steps=steps // FEWER)
    p = two_sample_p(coarse, exact)
    run.found["control"] = {"steps": steps // FEWER, "p_value": p}
    say(f"The same test between chains of {steps} and {steps // FEWER} steps: p = {p:.3g}")
    run.finish()
