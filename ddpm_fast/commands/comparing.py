"""`python -m ddpm_fast.evaluate samplers`: what each sampler costs, and how far its images are from those of a long
chain and from real images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.markup import escape
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
from ddpm_fast.commands.drawing import Drawing, partial_path, unused_path
from ddpm_fast.commands.fitting import is_training_set, load_fitting, say_training_set
from ddpm_fast.commands.labels import LABELS_HELP, check_null_class, describe_classes, parse_labels
from ddpm_fast.commands.precision import DTYPE_NAMES, choose_dtype
from ddpm_fast.commands.ranks import ranks_of_environment
from ddpm_fast.commands.report import check_report_path, write_report
from ddpm_fast.commands.stopping import Stopped, stop_signals
from ddpm_fast.data import ImageSet
from ddpm_fast.errors import InputError
from ddpm_fast.files.checkpoint import DEFAULT_MODEL
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.loops.prepared import Prepared
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.loops.state import asking_rows
from ddpm_fast.metrics.two_sample import deviations, two_sample_p
from ddpm_fast.pictures.canvas import check_channels, check_picture, save_figure
from ddpm_fast.pictures.figures import draw_samples
from ddpm_fast.pictures.images import to_uint8

SHOWN = 12  # images in a row of the picture
REFERENCE_STEPS = 200
_READ = 256  # real images at a time
DEFAULT = (("ddpm", 50), ("ddim", 10), ("ddim", 50), ("dpmpp_2m", 10), ("dpmpp_2m", 20))


@dataclass(frozen=True)
class Choice:
    """A sampler with its number of steps.

    Attributes:
        sampler: Its name.
        steps: The number of steps.
        spacing: How they are spaced.
    """

    sampler: str
    steps: int
    spacing: str = "even"

    @classmethod
    def of(cls, text: str, option: str) -> Choice:
        """Read "ddim:10" or "ddim:10:quadratic". Raises InputError naming the option."""
        name, *rest = text.strip().split(":")
        if len(rest) not in (1, 2) or not rest[0].isdecimal():
            raise InputError(
                f"{option}: {text.strip()!r} is not a sampler with its steps; expected such as ddim:10, or "
                "ddim:10:quadratic"
            )
        return cls(name, int(rest[0]), *rest[1:])

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps}{'' if self.spacing == 'even' else ' ' + self.spacing}"


def samplers(
    model: ModelOption = DEFAULT_MODEL,
    flags: FlagsOption = None,
    samplers: Annotated[
        str | None,
        typer.Option(
            help="samplers with their steps, such as ddim:10,dpmpp_2m:10:quadratic; if not given "
            + ",".join(f"{name}:{steps}" for name, steps in DEFAULT)
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help=f"the chain to compare with; ddim:{REFERENCE_STEPS} if not given")
    ] = None,
    data: Annotated[
        str | None, path_option("also test whether the samples differ from these real images, as a set")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="number of images for each sampler")] = 64,
    labels: Annotated[
        str | None,
        typer.Option(help=LABELS_HELP),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the noise, which is the same for all samplers")] = 0,
    batch_size: Annotated[int, typer.Option(help="number of images to draw at a time")] = 64,
    out: Annotated[
        Path | None,
        path_option("where the numbers go: a .json; if not given samplers.json, or samplers-2.json and so on"),
    ] = None,
    plot: Annotated[Path | None, path_option("also draw the same samples by each sampler: a .png or .svg")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu, ...")] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, fp16, or auto (bf16 where that is faster, else fp32)")
    ] = "fp32",
) -> None:
    """Compare samplers: time, calls of the network, and how far their images are from a long chain's from the same
    noise.

    A sampler that adds noise of its own draws other images than the reference, so no difference is given for it. With
    --data the images are also compared as a set, by a two-sample test: a small p says that they differ from the real
    ones.
    """
    with plain_errors():
        ranks_of_environment().refuse_several("`evaluate samplers` compares times, in one process: start it by itself")
        if n < 2 or batch_size < 1:
            raise InputError(f"--n is {n} and --batch-size {batch_size}; expected at least 2 and 1")
        torch_device = choose_device(device)
        dtype = choose_dtype(precision, torch_device)
        loaded = load_model(model, torch_device, dtype, flags)
        classes = parse_labels(labels, n, loaded.classes, loaded.label_names)
        if classes is None:
            check_null_class(loaded, "without labels the null class is used")
        drawing = Drawing(batch_size)
        options = SamplingOptions(seed=seed, labels=classes, batch_size=batch_size, on_step=drawing.on_step)
        chosen = choose(samplers, reference, loaded.diffusion.num_timesteps)
        network = Network.of(loaded.model)
        prepared = [
            prepare(
                network,
                loaded.diffusion,
                n,
                replace(options, sampler=choice.sampler, steps=choice.steps, spacing=choice.spacing),
            )
            for choice in chosen
        ]
        out = unused_path(Path("samplers.json")) if out is None else out
        _check_outputs(out, plot, loaded)
        about = {"model": loaded.name, "n": n, "seed": seed, "precision": DTYPE_NAMES[dtype], "data": data}
        real = None
        if data is not None:
            dataset = load_fitting(data, loaded)
            real = matching_images(dataset, classes, n)
            trained_on = is_training_set(dataset, loaded)
            about["training_set"] = trained_on
            say_training_set(dataset, trained_on)
        console.print(escape(describe_classes(classes, loaded.label_names)))

        with stop_signals("stopping after this step; Ctrl-C again to abort", lambda: "aborted") as stopping:
            images = draw_all(prepared, chosen, drawing, stopping.check)
        if not images:
            console.print("Stopped: no sampler was finished, so nothing was written.")
            raise typer.Exit(stopping.status)
        rows = [
            row_of(choice, one, images[0], drawn, real)
            for choice, one, drawn in zip(chosen, prepared, images, strict=False)
        ]
        _print(rows, chosen[0], real is not None)
        target = out if len(rows) == len(chosen) else partial_path(out)
        write_report(target, {**about, "reference": str(chosen[0]), "samplers": rows})
        say_written(target)
        if len(rows) < len(chosen):
            console.print(f"Stopped: {len(rows)} of {len(chosen)} samplers were finished.")
            raise typer.Exit(stopping.status)
        if plot is not None:
            shown = [torch.from_numpy(drawn.images[:SHOWN]).permute(0, 3, 1, 2) / 127.5 - 1 for drawn in images]
            save_figure(draw_samples(shown, [str(choice) for choice in chosen]), plot)
            say_written(plot)


def choose(samplers: str | None, reference: str | None, T: int) -> list[Choice]:
    """The reference and then the samplers to be compared with it. Those that are not given have at most T steps.

    Raises:
        InputError: For a text that cannot be read.
    """
    longest = Choice("ddim", min(REFERENCE_STEPS, T)) if reference is None else Choice.of(reference, "--reference")
    if samplers is None:
        return [longest, *(Choice(name, min(steps, T)) for name, steps in DEFAULT)]
    return [longest, *(Choice.of(text, "--samplers") for text in samplers.split(","))]


@dataclass(frozen=True)
class Drawn:
    """What one sampler drew.

    Attributes:
        images: uint8 [n, H, W, C].
        seconds: How long that took.
    """

    images: np.ndarray
    seconds: float


def _check_outputs(out: Path, plot: Path | None, loaded: LoadedModel) -> None:
    """Raises InputError for output files that could not be written."""
    check_report_path(out)
    if plot is not None:
        check_channels(str(loaded.path), loaded.shape[0])
        check_picture(plot)


def matching_images(dataset: ImageSet, classes: Sequence[int] | None, n: int) -> np.ndarray:
    """The first real images whose classes are those of the samples, one by one: uint8 [n, H, W, C].

    Args:
        dataset: The real images.
        classes: The classes of the samples, or None for any.
        n: The number of samples.

    Raises:
        InputError: If there are too few images of a class, or they have no labels.
    """
    if classes is not None and dataset.num_classes is None:
        raise InputError(f"--data: {dataset.name} has no labels to match the samples' classes with: give --labels none")
    wanted = [0] * n if classes is None else list(classes)
    places: dict[int, list[int]] = {}  # of the samples of each class that have no image yet
    for place, label in enumerate(wanted):
        places.setdefault(label, []).append(place)
    chosen: dict[int, Tensor] = {}
    for first in range(0, len(dataset), _READ):  # no more images than are needed are read
        images, labels = dataset.batch(torch.arange(first, min(first + _READ, len(dataset))))
        found = [0] * len(images) if classes is None or labels is None else labels.tolist()
        chosen |= {places[label].pop(0): image for label, image in zip(found, images, strict=True) if places.get(label)}
        if len(chosen) == n:
            break
    for label, left in places.items():
        if left:
            kind = "images" if classes is None else f"images of class {label}"
            raise InputError(f"--data: {dataset.name} has too few {kind} for {n} samples: give a smaller --n")
    return torch.stack([chosen[place] for place in range(n)]).permute(0, 2, 3, 1).numpy()


def draw_all(
    prepared: list[Prepared], chosen: list[Choice], drawing: Drawing, check: Callable[[], object]
) -> list[Drawn]:
    """What the samplers draw, in order: those that were finished before check raised Stopped."""
    drawn: list[Drawn] = []
    try:
        for one, choice in zip(prepared, chosen, strict=True):
            started = time.perf_counter()
            parts = [to_uint8(x) for _, x in drawing.batches(one, str(choice), check)]
            drawn.append(Drawn(np.concatenate(parts), time.perf_counter() - started))
    except Stopped:
        pass
    return drawn


def row_of(
    choice: Choice, prepared: Prepared, reference: Drawn, drawn: Drawn, real: np.ndarray | None
) -> dict[str, Any]:
    """What is reported of one sampler, in JSON's types. A difference or p that cannot be given is None."""
    adds_noise = bool((prepared.table.coefficients[:, 5] != 0).any())
    difference = None if adds_noise else deviations(drawn.images, reference.images)
    p = None if real is None else two_sample_p(torch.from_numpy(drawn.images), torch.from_numpy(real))
    return {
        "sampler": choice.sampler,
        "steps": choice.steps,
        "spacing": choice.spacing,
        "network_calls": int(asking_rows(prepared.table).sum()),
        "seconds": drawn.seconds,
        "images_per_second": len(drawn.images) / drawn.seconds,
        "mean_levels": None if difference is None else difference["mean_levels"],
        "worst_image_mean_levels": None if difference is None else difference["worst_image_mean_levels"],
        "two_sample_p": p,
    }


def _print(rows: list[dict[str, Any]], reference: Choice, has_real: bool) -> None:
    """The table, whose columns are explained under it."""
    heads = ["sampler", "calls", "seconds", "images/s", "difference", "worst", *(["p"] if has_real else [])]
    console.print("".join(f"{head:<24}" if i == 0 else f"{head:>11}" for i, head in enumerate(heads)))
    for row in rows:
        name = str(Choice(row["sampler"], row["steps"], row["spacing"]))
        cells = [f"{row['network_calls']}", f"{row['seconds']:.2f}", f"{row['images_per_second']:.1f}"]
        cells += ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("mean_levels", "worst_image_mean_levels")]
        cells += [f"{row['two_sample_p']:.3f}"] if has_real else []
        console.print(f"{name:<24}" + "".join(f"{cell:>11}" for cell in cells))
    console.print(
        f"difference: the mean difference of a pixel, of 255 levels, from {reference} with the same noise; worst: that "
        "of the worst image; -: the sampler adds noise of its own"
    )
    if has_real:
        console.print("p: of the two-sample test against the real images; small where the samples differ from them")
