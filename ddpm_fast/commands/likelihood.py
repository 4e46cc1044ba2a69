"""`python -m ddpm_fast.evaluate nll`: how likely a model finds images, in bits/dim, with the parts of the bound: an
estimate from some of its terms, or all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ddpm_fast.commands.common import (
    FlagsOption,
    ModelOption,
    choose_device,
    console,
    path_option,
    plain_errors,
    say_written,
)
from ddpm_fast.commands.drawing import partial_path, unused_path
from ddpm_fast.commands.fitting import PartOption, load_fitting, part_of
from ddpm_fast.commands.labels import check_null_class
from ddpm_fast.commands.precision import DTYPE_NAMES, choose_dtype
from ddpm_fast.commands.ranks import Ranks, ranks_of_environment
from ddpm_fast.commands.report import check_report_path, write_report
from ddpm_fast.commands.stopping import Stopped, stop_signals
from ddpm_fast.commands.together import joined
from ddpm_fast.data import BUILTIN, ImageSet
from ddpm_fast.errors import InputError
from ddpm_fast.files.checkpoint import DEFAULT_MODEL
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.loops.distributed import of_each_process
from ddpm_fast.loops.likelihood import BitsPerDim, LikelihoodOptions
from ddpm_fast.loops.network import Network
from ddpm_fast.objective import DECODERS
from ddpm_fast.pictures.canvas import check_picture, save_figure
from ddpm_fast.pictures.figures import draw_bound


def finished_part(parts: Mapping[int, BitsPerDim]) -> list[BitsPerDim]:
    """The batches up to the first one that is missing, in order. parts: batches by the number of their first image."""
    batches, first = [], 0
    while first in parts:
        batches.append(parts[first])
        first += len(parts[first].total)
    return batches


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


def nll(
    data: Annotated[str, path_option(f"{', '.join(BUILTIN)}, a folder of images, a .zip of them, .npz or .npy")],
    model: ModelOption = DEFAULT_MODEL,
    flags: FlagsOption = None,
    part: PartOption = "all",
    n: Annotated[
        int | None, typer.Option("--n", "-n", help="evaluate only this many images, the first ones; all if not given")
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
    out: Annotated[
        Path | None,
        path_option("where the numbers go: a .json; if not given nll.json, or nll-2.json and so on where that exists"),
    ] = None,
    plot: Annotated[Path | None, path_option("also draw the terms over t: a .png or .svg")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu, ...")] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, fp16, or auto (bf16 where that is faster, else fp32)")
    ] = "fp32",
) -> None:
    """The variational bound on -log p(x_0), in bits per dimension: its total, L_T, the L_{t-1}, and L_0.

    By default it is an unbiased estimate from 50 of the bound's T terms. With --full every term is evaluated.
    """
    with plain_errors():
        ranks = ranks_of_environment()
        if batch_size < 1:
            raise InputError(f"--batch-size is {batch_size}; expected at least 1")
        if decoder not in DECODERS:
            raise InputError(f"--decoder {decoder!r} does not exist: choose one of {', '.join(DECODERS)}")
        torch_device = choose_device(device)
        dtype = choose_dtype(precision, torch_device)
        loaded = load_model(model, torch_device, dtype, flags)
        T = loaded.diffusion.num_timesteps
        options = LikelihoodOptions(steps=_choose_steps(steps, full, T), seed=seed, decoder=decoder)
        out = unused_path(Path("nll.json")) if out is None else out
        if ranks.is_first:
            _check_outputs(out, plot)
        dataset, trained_on = part_of(_load_dataset(data, loaded), loaded, part)
        count = len(dataset) if n is None else min(n, len(dataset))
        if count < 2:
            raise InputError(f"{count} of {len(dataset)} images asked for; a standard error needs at least 2")

        started = time.perf_counter()
        first_signal = "stopping after this step; Ctrl-C again to abort" if ranks.is_first else ""
        with joined(ranks, "evaluate nll"), stop_signals(first_signal, lambda: "aborted") as stopping:
            own = evaluate_images(loaded, dataset, count, batch_size, options, stopping.check, ranks)
            gathered = of_each_process((own, stopping.status))
        if not ranks.is_first:
            raise typer.Exit(stopping.status)
        # Each image's numbers are what one process would have found, and are summed by this one, in their order.
        parts = finished_part({first: part for batches, _ in gathered for first, part in batches.items()})
        status = max(status for _, status in gathered)
        seconds = time.perf_counter() - started
        finished = sum(len(part.total) for part in parts)
        if finished < min(count, 2):
            console.print("Stopped: no batch was finished, so nothing was written. --batch-size makes batches smaller.")
            raise typer.Exit(status)
        report = report_of(
            merge(parts),
            model=loaded.name,
            data=dataset.name,
            part=part,
            training_set=trained_on,
            images_asked=count,
            decoder=decoder,
            seed=seed,
            precision=DTYPE_NAMES[dtype],
        )
        target = out if finished == count else partial_path(out)
        write_report(target, report)
        _print(report, T, seconds, str(torch_device) if ranks.world_size == 1 else f"{ranks.world_size} ranks")
        if finished < count:
            say_written(target)
            console.print(f"Stopped: this is the result of the first {finished} of {count} images.")
            raise typer.Exit(status)
        if plot is not None:
            save_figure(draw_bound(report), plot)
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
    check_report_path(out)
    if plot is not None:
        check_picture(plot)


def _load_dataset(source: str, loaded: LoadedModel) -> ImageSet:
    """The images to evaluate. Says so if the null class has to be used for a lack of labels."""
    dataset = load_fitting(source, loaded)
    if loaded.classes and dataset.labels is None:
        check_null_class(loaded, f"{dataset.name} has no labels, so the null class is used")
        console.print(f"{escape(dataset.name)} has no labels: the model's null class is used.")
    return dataset


def evaluate_images(
    loaded: LoadedModel,
    dataset: ImageSet,
    n: int,
    batch_size: int,
    options: LikelihoodOptions,
    check: Callable[[], object],
    ranks: Ranks,
) -> dict[int, BitsPerDim]:
    """The bound of this rank's share of the first n images, batch by batch, with a progress bar.

    Args:
        loaded: The model.
        dataset: The images, and their labels if they have any.
        n: How many images.
        batch_size: How many at a time.
        options: steps, seed and decoder; its other fields are set here for each batch.
        check: Called after each call of the network.
        ranks: This process among those that share the batches.

    Returns:
        The batches that were finished before check raised Stopped, on the CPU, by the number of their first image.
    """
    device = Network.of(loaded.model).device
    conditional = loaded.classes > 0
    steps = options.steps or loaded.diffusion.num_timesteps
    starts = [first for first in range(0, n, batch_size) if ranks.owns(first // batch_size)]
    calls = max(1, len(starts) * steps)
    parts: dict[int, BitsPerDim] = {}
    started = time.perf_counter()
    with _bar() as bar:
        # The ranks have equal shares, so that the bar of one is that of all.
        task = bar.add_task("evaluating", total=calls, rate=0.0, bits=math.nan)

        def on_step(done: int, of: int) -> None:
            completed = len(parts) * of + done
            rate = completed / calls * n / (time.perf_counter() - started)
            bar.update(task, completed=completed, rate=rate)
            check()

        for first in starts:
            x0, labels = dataset.batch(torch.arange(first, min(first + batch_size, n)))
            try:
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
            except Stopped:
                break
            parts[first] = BitsPerDim._make(field.cpu() for field in part)
            bar.update(task, bits=float(torch.cat([part.total for part in parts.values()]).mean()))
    return parts


def _print(report: dict, T: int, seconds: float, where: str) -> None:
    kind = f"all {T} terms"
    if report["estimate"]:
        kind = f"estimated from {report['steps']} of {T} terms; --full evaluates all"
    console.print(
        f"[bold]{report['total_bits_per_dim']:.4f} bits/dim[/] (standard error {report['total_stderr']:.4f}; {kind})"
    )
    between = report["total_bits_per_dim"] - report["prior_bits_per_dim"] - report["terms_bits_per_dim"][0]
    console.print(
        f"  L_T {report['prior_bits_per_dim']:.2e}   the sum of L_t-1 {between:.4f}"
        f"{' (estimated)' if report['estimate'] else ''}   "
        f"L_0 {report['terms_bits_per_dim'][0]:.4f} ({report['decoder']} decoder)"
    )
    console.print(
        f"{report['images']} images of {escape(report['data'])} under {escape(report['model'])} in {seconds:.1f} s "
        f"({report['images'] / seconds:.2f} images/s, {report['precision']}, {where})"
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
