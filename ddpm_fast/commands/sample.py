"""`python -m ddpm_fast.sample`: draw images from a model; by default 64 handwritten digits, from the one shipped.

With --init-image it edits a picture instead (sample_edit.py).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ddpm_fast.commands.common import (
    DTYPE_NAMES,
    check_null_class,
    choose_device,
    choose_dtype,
    console,
    parse_labels,
    plain_errors,
)
from ddpm_fast.commands.edit import MODES, Edit, read_images, round_trip_error
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.atomic import check_writable
from ddpm_fast.loops.sampling import Run, sample
from ddpm_fast.pictures import images
from ddpm_fast.respacing import SPACINGS
from ddpm_fast.samplers import SAMPLERS

GIF_FRAMES = 40
GRID_PIXELS = 700  # small images are enlarged to about this side

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="a shipped model's name, or a model.safetensors file")] = "mnist",
    n: Annotated[int | None, typer.Option("--n", help="how many images; 64 if not given, fewer when editing")] = None,
    steps: Annotated[str | None, typer.Option(help="a number (50 if not given), sections 10,15,20, or ddim50")] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLERS)}; ddpm if not given")] = None,
    spacing: Annotated[str, typer.Option(help=f"of the steps: {', '.join(SPACINGS)}")] = "even",
    eta: Annotated[float | None, typer.Option(help="ddim's noise, 0 (none, if not given) to 1")] = None,
    guidance: Annotated[float | None, typer.Option(help="towards the labels; 1 is none, 2 to 4 is much")] = None,
    guidance_rescale: Annotated[float, typer.Option(help="0 to 1, against overexposure by guidance")] = 0.0,
    dynamic_threshold: Annotated[
        float | None, typer.Option(help="a quantile such as 0.995 instead of the clip")
    ] = None,
    seed: Annotated[int, typer.Option(help="another seed, other images")] = 0,
    first_sample_id: Annotated[int, typer.Option(help="sample ids start here: continues an earlier set")] = 0,
    labels: Annotated[
        str | None, typer.Option(help="7 or 1,2,3 (in turn) or none; else every class in turn (none when editing)")
    ] = None,
    init_image: Annotated[Path | None, typer.Option(help="edit this picture, or these of an .npz")] = None,
    strength: Annotated[
        float | None, typer.Option(help="of the edit, 0 to 1: how much noise; 0.5 if not given")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="inpaint: a picture, white where the image is kept")] = None,
    resamplings: Annotated[int | None, typer.Option(help="of inpainting, 1 or more: slower, more coherent")] = None,
    jump_length: Annotated[int | None, typer.Option(help="of inpainting: steps to a resampling")] = None,
    interpolate_with: Annotated[Path | None, typer.Option(help="the picture at the other end of a way")] = None,
    round_trip: Annotated[bool, typer.Option("--round-trip", help="encode and decode it; prints the error")] = False,
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 64,
    out: Annotated[str, typer.Option(help="a .png (grid), an .npz, or a folder of PNGs")] = "samples.png",
    gif: Annotated[Path | None, typer.Option(help="also write the denoising as an animation")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto (bf16 where that is faster)")] = "fp32",
    cuda_graph: Annotated[
        bool | None, typer.Option(help="replay each step from a CUDA graph; where possible, if not given")
    ] = None,
) -> None:
    """Draw images from a diffusion model, or edit some with it."""
    with plain_errors():
        edit = Edit.of(
            init_image,
            **{"strength": strength, "mask": mask, "resamplings": resamplings, "jump_length": jump_length},
            **{"interpolate_with": interpolate_with, "round_trip": round_trip},
        )
        if (n is not None and n < 1) or batch_size < 1:
            raise InputError(f"--n is {n} and --batch-size {batch_size}; expected at least 1 of each")
        if edit is not None and gif is not None:
            raise InputError("--gif shows how images are drawn from noise: leave it out with --init-image")
        torch_device = choose_device(device)
        dtype = choose_dtype(precision, torch_device)
        loaded = checkpoint.load_model(model, device=torch_device, dtype=dtype)
        config, diffusion = loaded.model.config, loaded.diffusion
        pictures = None if edit is None else read_images(edit.init_image, loaded, "--init-image")
        count = n or (64 if edit is None else MODES[edit.mode] or len(pictures))
        text = "none" if edit is not None and labels is None else labels
        classes = parse_labels(text, count, config.num_classes, loaded.label_names)
        if guidance not in (None, 1):
            check_null_class(loaded, "--guidance leads away from the null class")
        if classes is None:
            check_null_class(loaded, "without labels the null class is asked")
        if edit is not None:
            edit.check_others(sampler, guidance, n, classes)
        options = {
            "sampler": sampler or ("ddim" if edit is not None and edit.round_trip else "ddpm"),
            "steps": min(50, diffusion.num_timesteps) if steps is None else steps,
            **{"spacing": spacing, "eta": eta, "guidance": guidance, "guidance_rescale": guidance_rescale},
            **{"dynamic_threshold": dynamic_threshold, "seed": seed, "first_sample_id": first_sample_id},
            **{"labels": classes, "batch_size": batch_size, "cuda_graph": cuda_graph},
        }
        # All that can be wrong is found before the sampling, not after it.
        rows = len(Run(loaded.model, diffusion, count, **options).table.timesteps)
        images.check_output(out, channels=config.in_channels)
        if gif is not None:
            if gif.suffix.lower() != ".gif":
                raise InputError(f"--gif is {gif}; expected a name ending in .gif")
            check_writable(gif)

        scale = max(1, GRID_PIXELS // (config.image_size * max(1, round(count**0.5))))
        started = time.perf_counter()
        if edit is None:
            x = _draw(loaded, count, options, rows, gif, scale)
        else:
            x, rows = _edit(edit, loaded, pictures, count, options)
        seconds = time.perf_counter() - started

        images.save_samples(out, x, classes, first_index=first_sample_id, scale=scale)
        console.print(
            f"{count} images of {config.in_channels}x{config.image_size}x{config.image_size} in {seconds:.1f} s "
            f"({count / seconds:.1f} images/s; {'' if edit is None else edit.mode + ', '}{rows} steps of "
            f"{options['sampler']}, {DTYPE_NAMES[dtype]}, {torch_device})",
            soft_wrap=True,
        )
        if edit is not None and edit.round_trip:
            console.print(round_trip_error(x, pictures))
        for path in (Path(out), gif):
            if path is not None:
                console.print(f"Wrote {path.resolve()}", soft_wrap=True)


def _draw(
    loaded: checkpoint.LoadedModel, n: int, options: dict[str, Any], rows: int, gif: Path | None, scale: int
) -> Tensor:
    """n samples, with a progress bar, and the denoising as an animation if gif says where to."""
    frames: dict[int, list[Tensor]] = {}
    batch_size = options["batch_size"]
    total = -(-n // batch_size) * rows
    started = time.perf_counter()
    with _bar() as bar:
        task = bar.add_task("sampling", total=total, rate=0.0)

        def on_step(first: int, i: int, x: Tensor) -> None:
            if gif is not None and (i % max(1, rows // GIF_FRAMES) == 0 or i == rows - 1):
                frames.setdefault(i, []).append(x.cpu())
            done = first // batch_size * rows + i + 1
            bar.update(task, completed=done, rate=done / total * n / (time.perf_counter() - started))

        x = sample(loaded.model, loaded.diffusion, n, on_step=on_step, **options).cpu()
    if gif is not None:
        images.save_gif(gif, [torch.cat(parts) for _, parts in sorted(frames.items())], scale=scale)
    return x


def _edit(
    edit: Edit, loaded: checkpoint.LoadedModel, pictures: Tensor, n: int, options: dict[str, Any]
) -> tuple[Tensor, int]:
    """n edited images, and the steps that each took, counted as they are made: how many is the edit's affair."""
    started, steps = time.perf_counter(), 0
    counter = TextColumn("{task.description}: step {task.completed}, {task.fields[rate]:.1f}/s")
    with Progress(counter, BarColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(edit.mode, total=None, rate=0.0)

        def on_step(first: int, i: int, x: Tensor) -> None:
            nonlocal steps
            steps += first == 0
            bar.advance(task)
            bar.update(task, rate=bar.tasks[task].completed / (time.perf_counter() - started))

        x = edit.run(loaded, pictures, n, {**options, "on_step": on_step}).cpu()
    return x, steps


def _bar() -> Progress:
    return Progress(
        *(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True)),
        TextColumn("{task.fields[rate]:.1f} images/s"),
        console=console,
        disable=not console.is_terminal,
    )
