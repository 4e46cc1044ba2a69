"""`python -m ddpm_fast.sample`: draw images from a model; by default 64 handwritten digits, from the one shipped."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from . import checkpoint, images
from .commands import choose_device, choose_dtype, console, plain_errors
from .errors import InputError
from .files import check_writable
from .samplers import SAMPLERS, make_table
from .sampling import check_labels, sample

GIF_FRAMES = 40
GRID_PIXELS = 700  # small images are enlarged to about this side

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class _CallableModule(types.ModuleType):
    """`ddpm_fast.sample` names this command and the function: importing the one must not take away the other."""

    def __call__(self, *args, **kwargs) -> Tensor:
        return sample(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


def parse_labels(text: str | None, n: int, classes: int, names: list[str] | None) -> list[int] | None:
    """The classes of n samples. None: every class in turn. "none": unconditional. Otherwise classes by number or name,
    separated by commas, in turn. Raises InputError for one that the model does not have."""
    if text == "none" or (text is None and classes == 0):
        return None
    if classes == 0:
        raise InputError("--labels: this model is unconditional (it was trained without classes); leave it out")
    if text is None:
        return [i % classes for i in range(n)]
    by_name = {name: i for i, name in enumerate(names or [])} | {str(i): i for i in range(classes)}
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in by_name]
    if unknown or not chosen:
        known = f"0..{classes - 1}" + (f" or {', '.join(names)}" if names else "")
        raise InputError(f"--labels: {', '.join(unknown) or 'nothing'} is no class of this model; it has {known}")
    return [by_name[chosen[i % len(chosen)]] for i in range(n)]


@app.command()
def main(
    model: Annotated[str, typer.Option(help="a shipped model's name, or a model.safetensors file")] = "mnist",
    n: Annotated[int, typer.Option("--n", help="how many images")] = 64,
    steps: Annotated[int | None, typer.Option(help="fewer are faster and coarser; 50 if not given")] = None,
    sampler: Annotated[str, typer.Option(help=", ".join(SAMPLERS))] = "ddpm",
    seed: Annotated[int, typer.Option(help="another seed, other images")] = 0,
    first_sample_id: Annotated[int, typer.Option(help="sample ids start here: continues an earlier set")] = 0,
    labels: Annotated[str | None, typer.Option(help="7 or 1,2,3 (in turn) or none; else every class in turn")] = None,
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 64,
    out: Annotated[str, typer.Option(help="a .png (grid), an .npz, or a folder of PNGs")] = "samples.png",
    gif: Annotated[Path | None, typer.Option(help="also write the denoising as an animation")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto (bf16 where that is faster)")] = "fp32",
) -> None:
    """Draw images from a diffusion model."""
    with plain_errors():
        if n < 1 or batch_size < 1:
            raise InputError(f"--n is {n} and --batch-size {batch_size}; expected at least 1 of each")
        torch_device = choose_device(device)
        loaded = checkpoint.load_model(model, device=torch_device, dtype=choose_dtype(precision, torch_device))
        config = loaded.model.config
        steps = min(50, loaded.diffusion.num_timesteps) if steps is None else steps
        classes = parse_labels(labels, n, config.num_classes, loaded.label_names)
        # All that can be wrong is found before the sampling, not after it.
        check_labels(loaded.model, classes, n)
        make_table(loaded.diffusion, sampler, steps)
        images.check_output(out, channels=config.in_channels)
        if gif is not None:
            if gif.suffix.lower() != ".gif":
                raise InputError(f"--gif is {gif}; expected a name ending in .gif")
            check_writable(gif)

        frames: dict[int, list[Tensor]] = {}
        batches = -(-n // batch_size)
        started = time.perf_counter()
        with _bar() as bar:
            task = bar.add_task("sampling", total=batches * steps, rate=0.0)

            def on_step(first: int, i: int, x: Tensor) -> None:
                if gif is not None and (i % max(1, steps // GIF_FRAMES) == 0 or i == steps - 1):
                    frames.setdefault(i, []).append(x.cpu())
                done = first // batch_size * steps + i + 1
                rate = done / (batches * steps) * n / (time.perf_counter() - started)
                bar.update(task, completed=done, rate=rate)

            x = sample(
                *(loaded.model, loaded.diffusion, n),
                **{"sampler": sampler, "steps": steps, "seed": seed, "first_sample_id": first_sample_id},
                **{"labels": classes, "batch_size": batch_size, "on_step": on_step},
            ).cpu()
        seconds = time.perf_counter() - started

        scale = max(1, GRID_PIXELS // (config.image_size * max(1, round(n**0.5))))
        images.save_samples(out, x, classes, first_index=first_sample_id, scale=scale)
        console.print(
            f"{n} images of {config.in_channels}x{config.image_size}x{config.image_size} in {seconds:.1f} s "
            f"({n / seconds:.1f} images/s; {steps} steps of {sampler}, {precision}, {torch_device})"
        )
        console.print(f"Wrote {Path(out).resolve()}", soft_wrap=True)
        if gif is not None:
            images.save_gif(gif, [torch.cat(parts) for _, parts in sorted(frames.items())], scale=scale)
            console.print(f"Wrote {gif.resolve()}", soft_wrap=True)


def _bar() -> Progress:
    return Progress(
        *(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True)),
        TextColumn("{task.fields[rate]:.1f} images/s"),
        console=console,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    app()
