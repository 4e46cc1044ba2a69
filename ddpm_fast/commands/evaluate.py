"""`python -m ddpm_fast.evaluate nll`: how likely a model finds images, in bits/dim, with every part of the bound."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ddpm_fast.commands.common import DTYPE_NAMES, check_null_class, choose_device, choose_dtype, console, plain_errors
from ddpm_fast.data import BUILTIN, Dataset, load_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.atomic import atomic_path, check_writable
from ddpm_fast.loops.likelihood import BitsPerDim, bits_per_dim
from ddpm_fast.objective import DECODERS
from ddpm_fast.pictures.canvas import check_picture, save_figure
from ddpm_fast.pictures.figures import draw_bound

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def evaluate() -> None:
    """Measure a model."""


def load_images(source: str, model: checkpoint.LoadedModel) -> Dataset:
    """The images as they are: a likelihood belongs to pixels, so nothing is converted. Raises InputError where they do
    not fit the model."""
    config = model.model.config
    # A folder's sub-folders are its classes where the model has classes; array files say so themselves.
    folder = Path(source)
    by_folder = config.num_classes > 0 and folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())
    dataset = load_dataset(source, classes=by_folder)
    expected = (config.in_channels, config.image_size, config.image_size)
    found = tuple(dataset.images.shape[1:])
    if found != expected:
        raise InputError(
            f"{dataset.name} has images of {'x'.join(map(str, found))} and the model is of "
            f"{'x'.join(map(str, expected))}: likelihoods belong to pixels, so nothing is converted here; give images "
            "as the model has them"
        )
    if config.num_classes and dataset.num_classes not in (None, config.num_classes):
        raise InputError(
            f"{dataset.name} has {dataset.num_classes} classes and the model {config.num_classes}: give images with "
            "the model's classes, or without labels (then the null class is asked)"
        )
    return dataset


def merge(parts: list[BitsPerDim]) -> BitsPerDim:
    """The results of several batches as one."""
    return BitsPerDim(*(torch.cat(column) for column in list(zip(*parts, strict=True))[:-1]), parts[0].counts)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over images, and its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def report_of(result: BitsPerDim, **about) -> dict:
    """The result in JSON's types: means over images, in bits/dim, with their standard errors."""
    total, total_error = mean_and_error(result.total)
    columns = [mean_and_error(column) for column in result.terms.unbind(1)]
    return {
        **about,
        "images": len(result.total),
        "total_bits_per_dim": total,
        "total_stderr": total_error,
        "estimate": result.is_estimate,
        "steps": result.timesteps.shape[1],
        "prior_bits_per_dim": mean_and_error(result.prior)[0],
        "timesteps": result.timesteps.double().mean(0).tolist(),
        "counts": result.counts.tolist(),
        "terms_bits_per_dim": [mean for mean, _ in columns],
        "terms_stderr": [error for _, error in columns],
        "mse_x0": result.mse_x0.double().mean(0).tolist(),
        "mse_eps": result.mse_eps.double().mean(0).tolist(),
    }


@app.command()
def nll(
    data: Annotated[str, typer.Option(help=f"{', '.join(BUILTIN)}, a folder of images, a .zip of them, .npz or .npy")],
    model: Annotated[str, typer.Option(help="a shipped model's name, or a model.safetensors file")] = "mnist",
    n: Annotated[int | None, typer.Option("--n", help="the first so many images; all if not given")] = None,
    steps: Annotated[
        int | None, typer.Option(help="estimate from so many of the chain's terms, unbiased; 50 if not given")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="every term of the chain: the bound itself")] = False,
    decoder: Annotated[str, typer.Option(help=f"of L_0: {', '.join(DECODERS)}; paper: as published")] = "paper",
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 64,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    out: Annotated[Path, typer.Option(help="where the numbers go, as JSON")] = Path("nll.json"),
    plot: Annotated[Path | None, typer.Option(help="also draw the terms over t: a .png or .svg")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto (bf16 where that is faster)")] = "fp32",
) -> None:
    """The variational bound on -log p(x_0), in bits per dimension: its total, L_T, every L_{t-1}, and L_0."""
    with plain_errors():
        if batch_size < 1:
            raise InputError(f"--batch-size is {batch_size}; expected at least 1")
        if decoder not in DECODERS:
            raise InputError(f"--decoder {decoder!r} does not exist: choose one of {', '.join(DECODERS)}")
        torch_device = choose_device(device)
        dtype = choose_dtype(precision, torch_device)
        loaded = checkpoint.load_model(model, device=torch_device, dtype=dtype)
        T = loaded.diffusion.num_timesteps
        if full and steps is not None:
            raise InputError(f"--full takes all {T} terms and --steps {steps} of them: leave one out")
        steps = T if full else min(50, T) if steps is None else steps
        if not min(2, T) <= steps <= T:
            raise InputError(f"--steps is {steps}; expected {min(2, T)}..{T} (the model's T), or --full")
        if out.suffix.lower() != ".json":
            raise InputError(f"--out is {out}; expected a name ending in .json (--plot is for a picture)")
        check_writable(out)
        if plot is not None:
            check_picture(plot)
        dataset = load_images(data, loaded)
        conditional = loaded.model.config.num_classes > 0
        if conditional and dataset.labels is None:
            check_null_class(loaded, f"{dataset.name} has no labels, so the null class is asked")
            console.print(f"{dataset.name} has no labels: the model's null class is asked.")

        count = len(dataset) if n is None else min(n, len(dataset))
        if count < 2:
            raise InputError(f"{count} of {len(dataset)} images asked for; a standard error needs at least 2")
        parts: list[BitsPerDim] = []
        started = time.perf_counter()
        with _bar() as bar:
            task = bar.add_task("evaluating", total=-(-count // batch_size) * steps, rate=0.0, bits=math.nan)
            for first in range(0, count, batch_size):
                x0, labels = dataset.batch(torch.arange(first, min(first + batch_size, count)))

                def on_step(done: int, of: int, before: int = len(parts)) -> None:
                    finished = (before * of + done) / (-(-count // batch_size) * of)
                    rate = finished * count / (time.perf_counter() - started)
                    bar.update(task, completed=before * of + done, rate=rate)

                parts.append(
                    bits_per_dim(
                        *(loaded.diffusion, loaded.model, x0.to(torch_device)),
                        steps=steps,
                        labels=labels.to(torch_device) if conditional and labels is not None else None,
                        **{"seed": seed, "first_sample_id": first, "decoder": decoder, "on_step": on_step},
                    )
                )
                bar.update(task, bits=float(torch.cat([part.total for part in parts]).mean()))
        seconds = time.perf_counter() - started

        report = report_of(
            merge(parts),
            model=str(loaded.path.name),
            data=dataset.name,
            decoder=decoder,
            seed=seed,
            precision=DTYPE_NAMES[dtype],
        )
        with atomic_path(out) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")
        if plot is not None:
            save_figure(draw_bound(report), plot)
        _print(report, T, seconds, torch_device)
        for path in (out, plot):
            if path is not None:
                console.print(f"Wrote {path.resolve()}", soft_wrap=True)


def _print(report: dict, T: int, seconds: float, device: torch.device) -> None:
    kind = f"estimated from {report['steps']} of {T} terms" if report["estimate"] else f"all {T} terms"
    console.print(
        f"[bold]{report['total_bits_per_dim']:.4f} bits/dim[/] (standard error {report['total_stderr']:.4f}; {kind})"
    )
    between = report["total_bits_per_dim"] - report["prior_bits_per_dim"] - report["terms_bits_per_dim"][0]
    console.print(
        f"  L_T {report['prior_bits_per_dim']:.2e}   the sum of L_t-1 {between:.4f}   "
        f"L_0 {report['terms_bits_per_dim'][0]:.4f} ({report['decoder']} decoder)"
    )
    console.print(
        f"{report['images']} images of {escape(report['data'])} under {escape(report['model'])} in {seconds:.1f} s "
        f"({report['images'] / seconds:.2f} images/s, {report['precision']}, {device})"
    )


def _bar() -> Progress:
    return Progress(
        *(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True)),
        TextColumn("{task.fields[rate]:.2f} images/s  {task.fields[bits]:.4f} bits/dim"),
        console=console,
        disable=not console.is_terminal,
    )
