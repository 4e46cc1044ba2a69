"""`python -m ddpm_fast.evaluate nll`: how likely a model finds images, in bits/dim, with every part of the bound."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ddpm_fast.commands.common import (
    DTYPE_NAMES,
    App,
    choose_device,
    choose_dtype,
    console,
    path_option,
    plain_errors,
    say_written,
)
from ddpm_fast.commands.labels import check_null_class
from ddpm_fast.data import BUILTIN, Dataset, load_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.atomic import atomic_path, check_writable
from ddpm_fast.loops.likelihood import BitsPerDim, LikelihoodOptions
from ddpm_fast.loops.network import Network
from ddpm_fast.objective import DECODERS
from ddpm_fast.pictures.canvas import check_picture, save_figure
from ddpm_fast.pictures.figures import draw_bound

app = App()


@app.callback()
def evaluate() -> None:
    """Measure a model."""


def load_images(source: str, model: checkpoint.LoadedModel) -> Dataset:
    """The images as they are. Nothing is converted, because a likelihood is one of exact pixels. Raises InputError for
    images that do not fit the model."""
    config = model.model.config
    # For a model with classes, the sub-folders of a folder are the classes. Array files have labels of their own.
    folder = Path(source)
    by_folder = config.num_classes > 0 and folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())
    dataset = load_dataset(source, classes=by_folder)
    expected = (config.in_channels, config.image_size, config.image_size)
    found = tuple(dataset.images.shape[1:])
    if found != expected:
        raise InputError(
            f"{dataset.name} has images of {'x'.join(map(str, found))}, but the model was trained on "
            f"{'x'.join(map(str, expected))}: a likelihood is one of exact pixels, so nothing is converted here; give "
            "images of the model's size and channels"
        )
    if config.num_classes and dataset.num_classes not in (None, config.num_classes):
        raise InputError(
            f"{dataset.name} has {dataset.num_classes} classes and the model {config.num_classes}: give images with "
            "the model's classes, or without labels (then the null class is used)"
        )
    return dataset


def merge(parts: list[BitsPerDim]) -> BitsPerDim:
    """The results of several batches as one."""
    return BitsPerDim(
        total=torch.cat([part.total for part in parts]),
        prior=torch.cat([part.prior for part in parts]),
        terms=torch.cat([part.terms for part in parts]),
        mse_x0=torch.cat([part.mse_x0 for part in parts]),
        mse_eps=torch.cat([part.mse_eps for part in parts]),
        timesteps=torch.cat([part.timesteps for part in parts]),
        counts=parts[0].counts,
    )


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over images, and its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def report_of(result: BitsPerDim, **about: Any) -> dict[str, Any]:
    """The result in JSON's types: means over images, in bits/dim, with their standard errors.

    Args:
        result: The bound of some images.
        **about: Further entries, put first.
    """
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
    data: Annotated[str, path_option(f"{', '.join(BUILTIN)}, a folder of images, a .zip of them, .npz or .npy")],
    model: Annotated[str, path_option("a shipped model's name, or a model.safetensors file")] = "mnist",
    n: Annotated[
        int | None, typer.Option("--n", help="evaluate only this many images, the first ones; all if not given")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="estimate the bound, without bias, from this many of its terms; 50 if not given")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="evaluate every term: the bound itself")] = False,
    decoder: Annotated[
        str, typer.Option(help=f"how L_0 is computed: {', '.join(DECODERS)}; paper: as in published numbers")
    ] = "paper",
    batch_size: Annotated[int, typer.Option(help="number of images to evaluate at a time")] = 64,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    out: Annotated[Path, path_option("where the numbers go: a .json")] = Path("nll.json"),
    plot: Annotated[Path | None, path_option("also draw the terms over t: a .png or .svg")] = None,
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
        options = LikelihoodOptions(steps=_choose_steps(steps, full, T), seed=seed, decoder=decoder)
        _check_outputs(out, plot)
        dataset = _load_dataset(data, loaded)
        count = len(dataset) if n is None else min(n, len(dataset))
        if count < 2:
            raise InputError(f"{count} of {len(dataset)} images asked for; a standard error needs at least 2")

        started = time.perf_counter()
        result = evaluate_images(loaded, dataset, count, batch_size, options)
        seconds = time.perf_counter() - started
        report = report_of(
            result,
            model=str(loaded.path.name),
            data=dataset.name,
            decoder=decoder,
            seed=seed,
            precision=DTYPE_NAMES[dtype],
        )
        with atomic_path(out) as unfinished:
            unfinished.write_text(json.dumps(report, indent=1) + "\n")
        if plot is not None:
            save_figure(draw_bound(report), plot)
        _print(report, T, seconds, torch_device)
        say_written(out, plot)


def _choose_steps(steps: int | None, full: bool, T: int) -> int:
    """How many terms to evaluate of a bound of T. Raises InputError for options that do not fit together, or T."""
    if full and steps is not None:
        raise InputError(f"--full takes all {T} terms and --steps {steps} of them: leave one out")
    if full:
        return T
    chosen = min(50, T) if steps is None else steps
    if not min(2, T) <= chosen <= T:
        raise InputError(f"--steps is {chosen}; expected {min(2, T)}..{T} (the model's T), or --full")
    return chosen


def _check_outputs(out: Path, plot: Path | None) -> None:
    """Raises InputError for output files that could not be written."""
    if out.suffix.lower() != ".json":
        raise InputError(f"--out is {out}; expected a name ending in .json (--plot is for a picture)")
    check_writable(out)
    if plot is not None:
        check_picture(plot)


def _load_dataset(source: str, loaded: checkpoint.LoadedModel) -> Dataset:
    """The images to evaluate. Says so if the null class has to be used for a lack of labels."""
    dataset = load_images(source, loaded)
    if loaded.model.config.num_classes and dataset.labels is None:
        check_null_class(loaded, f"{dataset.name} has no labels, so the null class is used")
        console.print(f"{dataset.name} has no labels: the model's null class is used.")
    return dataset


def evaluate_images(
    loaded: checkpoint.LoadedModel, dataset: Dataset, n: int, batch_size: int, options: LikelihoodOptions
) -> BitsPerDim:
    """The bound of the first n images, batch by batch, with a progress bar.

    Args:
        loaded: The model.
        dataset: The images, and their labels if they have any.
        n: How many images.
        batch_size: How many at a time.
        options: steps, seed and decoder; its other fields are set here for each batch.
    """
    device = Network.of(loaded.model).device
    conditional = loaded.model.config.num_classes > 0
    steps = options.steps or loaded.diffusion.num_timesteps
    calls = -(-n // batch_size) * steps
    parts: list[BitsPerDim] = []
    started = time.perf_counter()
    with _bar() as bar:
        task = bar.add_task("evaluating", total=calls, rate=0.0, bits=math.nan)

        def on_step(done: int, of: int) -> None:
            completed = len(parts) * of + done
            rate = completed / calls * n / (time.perf_counter() - started)
            bar.update(task, completed=completed, rate=rate)

        for first in range(0, n, batch_size):
            x0, labels = dataset.batch(torch.arange(first, min(first + batch_size, n)))
            part = loaded.diffusion.bits_per_dim(
                loaded.model,
                x0.to(device),
                steps=steps,
                labels=labels.to(device) if conditional and labels is not None else None,
                seed=options.seed,
                first_sample_id=first,
                decoder=options.decoder,
                on_step=on_step,
            )
            parts.append(part)
            bar.update(task, bits=float(torch.cat([part.total for part in parts]).mean()))
    return merge(parts)


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
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[rate]:.2f} images/s  {task.fields[bits]:.4f} bits/dim"),
        console=console,
        disable=not console.is_terminal,
    )
