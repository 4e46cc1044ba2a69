"""Are the samples of the faster modes those of the exact one? `python -m benchmarks.fidelity --out FILE.json`.

The shipped digit model draws with plain torch in fp32, as ours does in fp32 (on the CPU by Winograd's convolutions) and
in bf16. From the same noise the images are compared pixel by pixel. From other noise they are two sets of images, and
the kernel two-sample test says whether anything tells them apart (Gretton et al. 2012, "A Kernel Two-Sample Test", with
a Gaussian kernel on pixels and permutations). That the test can tell is shown on chains of fewer steps.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import torch
import typer
from rich.markup import escape
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import machine, networks, report
from ddpm_fast.commands.common import DTYPE_NAMES, choose_device, console, plain_errors
from ddpm_fast.errors import InputError
from ddpm_fast.pictures.images import to_uint8

PERMUTATIONS = 2000
FEWER = 5  # the chain that the test must tell apart has so many times fewer steps
BATCH = 100

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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


def markdown(made: dict) -> str:
    """The results as a page."""
    text = f"# Fidelity\n\n{report.title(made)}; {made['n']} digits, {made['steps']} steps. {made['date']}.\n\n"
    columns = ("mode", "time", "mean levels off", "pixels that differ", "the worst image, mean", "p of other noise")
    rows = [
        [
            *(line["mode"], report.duration(line["seconds"]), f"{line['mean_levels']:.3g}"),
            *(f"{line['differing_share']:.2%}", f"{line['worst_image_mean_levels']:.3g}", f"{line['p_value']:.3g}"),
        ]
        for line in made["results"]
    ]
    text += report.markdown_table(columns, rows)
    text += f"\nThe same test between chains of {made['steps']} and {made['control']['steps']} steps: "
    return text + f"p = {made['control']['p_value']:.3g}.\n"


@app.command()
def main(
    out: report.Out,
    page: report.Page = None,
    n: Annotated[int, typer.Option(help="Images in a set.")] = 500,
    steps: Annotated[int, typer.Option(help="Steps of the chain.")] = 50,
    device: report.Device = "auto",
) -> None:
    """Compare the samples of each mode with those of plain torch; write what was found to a file."""
    with plain_errors():
        place = choose_device(device)
        report.check(out, page)
        if n < 2 or steps < FEWER:
            raise InputError(f"n is {n} and steps {steps}; expected at least 2 images and {FEWER} steps")
        labels = torch.arange(n) % 10

        def drawn(dtype: torch.dtype, seed: int, steps: int = steps) -> tuple[Tensor, float]:
            made = networks.network(networks.DIGITS)
            started = time.monotonic()
            images = df.sample(
                *(made.model.to(place, dtype), made.diffusion, n),
                **{"steps": steps, "seed": seed, "labels": labels.to(place), "batch_size": BATCH},
            ).cpu()
            return images, time.monotonic() - started

        console.print("plain torch, fp32")
        with df.use_backend("reference"):
            exact, _ = drawn(torch.float32, seed=0)
        results = []
        for dtype, mode in DTYPE_NAMES.items():
            console.print(f"{mode}, the same noise and other noise")
            same, seconds = drawn(dtype, seed=0)
            other, _ = drawn(dtype, seed=1)
            line = {"mode": mode, "seconds": seconds, **deviations(same, exact)}
            results.append({**line, "p_value": two_sample_p(other, exact)})
        coarse, _ = drawn(torch.float32, seed=1, steps=steps // FEWER)
        made = {
            **machine.environment(place),
            **{"device": str(place), "n": n, "steps": steps, "permutations": PERMUTATIONS, "results": results},
            "control": {"steps": steps // FEWER, "p_value": two_sample_p(coarse, exact)},
        }
        text = markdown(made)
        report.write(made, text, out, page)
        console.print(escape(text), soft_wrap=True)


if __name__ == "__main__":
    app()
