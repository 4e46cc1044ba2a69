"""`python -m ddpm_fast.average RUN --width W --out MODEL`: the model that a training run would have given with another
average of its weights. With --sweep, the best of several (average_sweep.py).

The run must have saved power-function averages (train --average-widths), of which others are made: see
nn/reconstruction.py for how, and files/averages.py for what is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_fast.commands.average_sweep import QUALITIES, Sweep, check_sweep, judge_of
from ddpm_fast.commands.common import App, console, expand_home, path_option, plain_errors, say_written
from ddpm_fast.commands.quality.settings import (
    DeviceOption,
    FeaturesOption,
    GuidanceOption,
    NOption,
    PrecisionOption,
    ReferenceOption,
    Request,
    SamplerOption,
    StepsOption,
)
from ddpm_fast.commands.ranks import ranks_of_environment
from ddpm_fast.commands.training.setup import numbers
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import check_writable
from ddpm_fast.files.averages import Average, Plan, make, plan
from ddpm_fast.files.checkpoint import save_model
from ddpm_fast.metrics.measure import METRICS
from ddpm_fast.nn.power_average import check_width

_ROUGH = 0.1  # a difference of profiles, relative to the wanted one, that is worth a warning

app = App(keeps_config=True)


@app.command()
def main(
    run: Annotated[Path, typer.Argument(help="the folder of a training run", callback=expand_home)],
    out: Annotated[Path, path_option("where the model goes: a .safetensors file; for several widths, a folder")],
    width: Annotated[
        str | None, typer.Option(help="of the average, as a share of the training: 0.1, or several: 0.05,0.1")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="measure these widths, such as 0.02,0.05,0.1,0.2, and write the best")
    ] = None,
    by: Annotated[
        str, typer.Option(help=f"with --sweep, what is measured: {', '.join(QUALITIES)}; loss is the quickest")
    ] = "fid",
    step: Annotated[
        int | None, typer.Option(help="after how many training steps; if not given, the last that was saved")
    ] = None,
    reference: ReferenceOption = None,
    n: NOption = None,
    sampler: SamplerOption = "ddpm",
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    features: FeaturesOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
) -> None:
    """Make the model that a run would have given with another average of its weights.

    --reference and what follows it are for --sweep.
    """
    with plain_errors():
        ranks_of_environment().refuse_several("averages are made by one process: start the command without torchrun")
        if (width is None) == (sweep is None):
            raise InputError("give either --width, of the average to make, or --sweep, which finds the best of several")
        if width is not None:
            if reference is not None:
                raise InputError("--reference is for --sweep, which measures: leave it out, or give --sweep")
            _write(run, parse_widths(width, "--width"), step, out)
            return
        widths = parse_widths(sweep or "", "--sweep")
        check_sweep(by, out)
        if reference is None:
            raise InputError("--reference is missing: the real images that --sweep measures with")
        planned = plan(run, widths, step)
        tell(planned)
        request = Request(
            metrics=(by,) if by in METRICS else (),
            model=str(planned.given[-1].path),
            reference=reference,
            n=n,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            features=features,
            device=device,
            precision=precision,
        )
        Sweep(planned, judge_of(by, request), run, out, request).measure(lambda: made(planned))


def _write(run: Path, widths: Sequence[float], step: int | None, out: Path) -> None:
    """Make the averages of the widths and write them."""
    files = output_files(out, widths)
    planned = plan(run, widths, step)
    tell(planned)
    for path, average in zip(files, made(planned), strict=True):
        save_model(path, average.state, average.config)
        say_written(path)


def parse_widths(text: str, name: str) -> tuple[float, ...]:
    """The widths of a text such as "0.05,0.1". Raises InputError naming the option if there are none, or others."""
    widths = tuple(check_width(name, width) for width in numbers(text, name))
    if not widths or len(set(widths)) < len(widths):
        raise InputError(f"{name} is {text!r:.200}; expected different widths separated by commas, such as 0.05,0.1")
    return widths


def output_files(out: Path, widths: Sequence[float]) -> list[Path]:
    """Where the models of the widths go. Raises InputError if they cannot be written there."""
    is_file = out.suffix == ".safetensors"
    if is_file != (len(widths) == 1):
        expected = "a folder for the models of several widths" if is_file else "a name ending in .safetensors"
        raise InputError(f"--out is {out}; expected {expected}")
    return [check_writable(out if is_file else out / f"width-{width:g}.safetensors") for width in widths]


def tell(planned: Plan) -> None:
    """Say what the averages are made of, and how near they come to what is wanted."""
    step, steps = planned.wanted[0].step, sorted({saved.profile.step for saved in planned.given})
    widths = sorted({saved.profile.width for saved in planned.given})
    console.print(
        f"Averages over the first {step} training steps, of {len(planned.given)} that were saved from step {steps[0]} "
        f"to {steps[-1]} with the widths {', '.join(f'{width:g}' for width in widths)}"
    )
    for profile, error in zip(planned.wanted, planned.sums.errors.tolist(), strict=True):
        console.print(f"width {profile.width:g}: within {error:.2%} of its profile")
        if error > _ROUGH:
            warnings.warn(
                f"the average of width {profile.width:g} is far from those that were saved, so that what is made is "
                f"another average ({error:.0%} away): a run with a smaller --average-every, or other "
                "--average-widths, comes nearer",
                stacklevel=2,
            )


def made(planned: Plan) -> Iterator[Average]:
    """The averages one after the other, with a progress bar while the files are read."""
    columns = (TextColumn("reading averages"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=console) as bar:
        task = bar.add_task("")
        yield from make(planned, lambda done, total: bar.update(task, completed=done, total=total))
