"""The one door to the benchmarks: `python -m benchmarks ops|network|loops|growth|fidelity|kernels|report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import fidelity as fidelity_
from benchmarks import growth as growth_
from benchmarks import kernels as kernels_
from benchmarks import layers
from benchmarks import ops as ops_
from benchmarks.report.commands import app as report
from benchmarks.runs import Options
from ddpm_fast.commands.common import plain_errors

Out = Annotated[Path, typer.Option(help="The file for the results, as JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Only = Annotated[str, typer.Option(help="Only the cases whose name contains this, such as 'q_sample uint8'.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds: does all of it run and match?")]
Rounds = Annotated[int, typer.Option(help="Rounds for each comparison; 0 is the usual number.")]
Minutes = Annotated[
    float | None, typer.Option(help="Start no new case after this many minutes, and name what is left.")
]
Backends = Annotated[list[str], typer.Option("--backend", help="Measure this backend of ours alone (repeatable).")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Also time diffusers' networks under torch.compile (minutes).")
]
Sizes = Annotated[list[str], typer.Option("--size", help=f"Only {', '.join(layers.ALL_SIZES)} (repeatable).")]
Kernels = Annotated[Path | None, typer.Option("--kernels", help="The counts of instructions that `kernels` wrote.")]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measure ddpm_fast and what one would use instead, alternately and on the same tensors.",
)
app.add_typer(report, name="report", help="Draw result files as a page, or compare two of them.")


@app.command()
def ops(
    out: Out,
    device: Device = "cpu",
    only: Only = "",
    quick: Quick = False,
    rounds: Rounds = 0,
    minutes: Minutes = None,
    backend: Backends = [],  # noqa: B006
    kernels: Kernels = None,
) -> None:
    """Time each fused op, compared with diffusers, denoising-diffusion-pytorch, plain torch and torch.compile."""
    with plain_errors():
        ops_.main(Options(out, device, only, quick, rounds, minutes, backends=tuple(backend)), kernels)


@app.command()
def network(
    out: Out,
    device: Device = "auto",
    only: Only = "",
    quick: Quick = False,
    rounds: Rounds = 0,
    minutes: Minutes = None,
    compiling: Compile = False,
    size: Sizes = [],  # noqa: B006
) -> None:
    """Time the U-Net, forward and backward, compared with diffusers' network with the same weights."""
    with plain_errors():
        options = Options(out, device, only, quick, rounds, minutes, compiling)
        layers.main(options, layers.NETWORK, tuple(size))


@app.command()
def loops(
    out: Out,
    device: Device = "auto",
    only: Only = "",
    quick: Quick = False,
    rounds: Rounds = 0,
    minutes: Minutes = None,
    compiling: Compile = False,
    size: Sizes = [],  # noqa: B006
) -> None:
    """Time training steps and sampling, compared with the loops of other libraries and of plain torch."""
    with plain_errors():
        options = Options(out, device, only, quick, rounds, minutes, compiling)
        layers.main(options, layers.LOOPS, tuple(size))


@app.command()
def growth(out: Out, device: Device = "auto", only: Only = "", quick: Quick = False, minutes: Minutes = None) -> None:
    """Measure how time and peak memory grow with batch size, image size, number of steps and number of threads."""
    with plain_errors():
        growth_.main(Options(out, device, only, quick, minutes=minutes))


@app.command()
def fidelity(
    out: Out,
    device: Device = "auto",
    n: Annotated[int, typer.Option(help="The number of images in a set.")] = 500,
    steps: Annotated[int, typer.Option(help="The number of steps of the chain.")] = 50,
) -> None:
    """Compare the samples of the faster modes with those of plain torch in fp32."""
    with plain_errors():
        fidelity_.main(Options(out, device), n, steps)


@app.command()
def kernels(
    out: Out,
    device: Device = "cuda",
    only: Only = "",
    quick: Quick = False,
    backend: Backends = [],  # noqa: B006
    inside_ncu: Annotated[bool, typer.Option("--inside-ncu", hidden=True)] = False,
) -> None:
    """Count the instructions that a GPU executes in one call of each op of ours."""
    with plain_errors():
        kernels_.main(Options(out, device, only, quick, backends=tuple(backend)), inside_ncu)


if __name__ == "__main__":
    app()
