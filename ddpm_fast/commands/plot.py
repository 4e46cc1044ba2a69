"""`python -m ddpm_fast.plot WHAT`: pictures of the theory, drawn from the library's own tables (pictures/figures.py).

schedules, noising, variances and snr show noise schedules, and augmentation training images: they need no model. bound
shows a report that `python -m
ddpm_fast.evaluate nll` wrote. chain shows the reverse process of a model.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.markup import escape
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.commands.common import (
    App,
    FlagsOption,
    ModelOption,
    choose_device,
    console,
    expand_home,
    path_option,
    plain_errors,
    say_written,
)
from ddpm_fast.commands.labels import LABELS_HELP, describe_classes, parse_labels
from ddpm_fast.commands.report import read_report
from ddpm_fast.commands.training.augmenting import augmented_rows
from ddpm_fast.data import Augmentation, load_dataset, read_picture
from ddpm_fast.errors import InputError
from ddpm_fast.files.checkpoint import DEFAULT_MODEL
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions, Step
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.noise import Stream
from ddpm_fast.pictures.canvas import check_channels, check_picture, save_figure
from ddpm_fast.pictures.figures import (
    draw_bound,
    draw_chain,
    draw_noising,
    draw_samples,
    draw_schedules,
    draw_snr,
    draw_variances,
)
from ddpm_fast.respacing import sampling_timesteps
from ddpm_fast.samplers import SAMPLERS
from ddpm_fast.schedule import SCHEDULES, Schedule

MOST_SAMPLES = 50  # in a picture of chains; a screen cannot show more
_MOST_EXAMPLES = 100  # in a row of training images
LARGEST_SIDE = 128  # pixels of a noised image; a column on the screen is not wider

app = App(no_args_is_help=True)

Out = Annotated[Path, path_option("the picture, a .png or .svg")]
Names = Annotated[str, typer.Option(help=f"one or more of {', '.join(SCHEDULES)}, separated by commas")]
Timesteps = Annotated[int, typer.Option(help="T, the number of timesteps")]
Columns = Annotated[int, typer.Option(help="how many timesteps to show, equally spaced")]
Seed = Annotated[int, typer.Option(help="the seed of the noise")]


def parse_schedules(names: str, T: int, option: str = "--schedules") -> list[Schedule]:
    """The schedules of a list of names such as "linear,cosine", each with T timesteps.

    Args:
        names: The names, separated by commas.
        T: The number of timesteps.
        option: The command's option that the names came from, for the messages.

    Raises:
        InputError: For an unknown name, for no name, and for a T that the schedule does not allow.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in chosen if name not in SCHEDULES]
    if unknown or not chosen:
        raise InputError(
            f"{option}: {', '.join(unknown) or 'nothing'} is not a schedule; expected one or more of "
            f"{', '.join(SCHEDULES)}, separated by commas"
        )
    return [SCHEDULES[name](T) for name in chosen]


@app.command()
def schedules(
    schedules: Names = "linear,cosine",
    timesteps: Timesteps = 1000,
    zero_terminal_snr: Annotated[
        bool, typer.Option("--zero-terminal-snr", help="also draw each one rescaled to end in pure noise, dashed")
    ] = False,
    out: Out = Path("schedules.png"),
) -> None:
    """Draw beta_t and alpha_bar_t over t, for several schedules."""
    with plain_errors():
        check_picture(out)
        chosen = parse_schedules(schedules, timesteps)
        rescaled = [schedule.zero_terminal_snr() for schedule in chosen] if zero_terminal_snr else []
        _write(draw_schedules([*chosen, *rescaled]), out)


@app.command()
def noising(
    data: Annotated[str, path_option("the images: mnist5k, emoji32, or a folder, .zip, .npz or .npy")] = "mnist5k",
    index: Annotated[int, typer.Option(help="the position of the image among them, from 0")] = 0,
    image: Annotated[Path | None, path_option("a picture file to use instead, of any image format")] = None,
    schedules: Names = "linear,cosine",
    timesteps: Timesteps = 1000,
    columns: Columns = 10,
    seed: Seed = 0,
    out: Out = Path("noising.png"),
) -> None:
    """Draw one image noised at equally spaced timesteps, with one row per schedule and the same noise everywhere."""
    with plain_errors():
        check_picture(out)
        chosen = parse_schedules(schedules, timesteps)
        _check_columns(columns, timesteps)
        _write(draw_noising(chosen, read_image(data, index, image), columns, seed), out)


@app.command()
def augmentation(
    data: Annotated[str, path_option("the images: mnist5k, emoji32, or a folder, .zip, .npz or .npy")] = "mnist5k",
    augment: Annotated[
        list[str] | None,
        typer.Option(help="what train's --augment takes; once for each row. small:0.5 and edm:0.5 if not given"),
    ] = None,
    columns: Annotated[int, typer.Option(help="how many training images to show")] = 12,
    seed: Annotated[int, typer.Option(help="the seed of the training")] = 0,
    out: Out = Path("augmentation.png"),
) -> None:
    """Draw training images as they are, and below them how each augmentation changes them."""
    with plain_errors():
        check_picture(out)
        texts = augment or ["small:0.5", "edm:0.5"]
        found = load_dataset(data)
        check_channels(data, found.shape[0])
        _check_columns(columns, min(len(found), _MOST_EXAMPLES), "images")
        rows = augmented_rows(found, [Augmentation.of(text) for text in texts], columns, seed)
        _write(draw_samples(rows, ["as they are", *texts]), out)


def _check_columns(columns: int, steps: int, of: str = "steps") -> None:
    if not 1 <= columns <= steps:
        raise InputError(f"--columns is {columns}; expected 1..{steps}, the number of {of}")


def read_image(data: str, index: int, image: Path | None) -> Tensor:
    """The image that the command's options choose: uint8 [C, H, W], C = 1, 3 or 4.

    A picture with a side of more than LARGEST_SIDE pixels is scaled and cut to a square of that size.

    Args:
        data: The data set to take the image from.
        index: Which image of the data set.
        image: A picture to read instead, or None.

    Raises:
        InputError: If there is no such image, or it cannot be shown.
    """
    if image is not None:
        if not os.path.isfile(image):  # Path.is_file raises for a name that is too long
            raise InputError(f"--image: there is no file {image}; give the path of a picture")
        picture = read_picture(image, "--image")
        return read_picture(image, "--image", LARGEST_SIDE) if max(picture.shape[1:]) > LARGEST_SIDE else picture
    try:
        found = load_dataset(data).images
    except InputError:
        # Pictures of several sizes: of a set, only arrays have one size for certain.
        if not os.path.isdir(data) and not data.lower().endswith(".zip"):
            raise
        found = load_dataset(data, LARGEST_SIDE).images
    if not 0 <= index < len(found):
        raise InputError(f"--index is {index}; {data} has the images 0..{len(found) - 1}")
    if found.dtype != torch.uint8:
        raise InputError(f"{data} has floats, which this cannot show: give 8-bit images, or a picture as --image")
    check_channels(data, found.shape[1])
    return found[index]


@app.command()
def variances(
    schedule: Annotated[str, typer.Option(help=f"one of {', '.join(SCHEDULES)}")] = "cosine",
    timesteps: Annotated[
        str, typer.Option(help="up to six lengths T of the chain, separated by commas")
    ] = "100,1000,4000",
    out: Out = Path("variances.png"),
) -> None:
    """Draw the two extremes of the reverse variance: their ratio over t, and the range between them."""
    with plain_errors():
        check_picture(out)
        try:
            lengths = list(dict.fromkeys(int(part) for part in timesteps.split(",")))
        except ValueError:
            lengths = []
        if not 1 <= len(lengths) <= 6:
            raise InputError(f"--timesteps is {timesteps!r}; expected one to six lengths T such as 100,1000,4000")
        chosen = [parse_schedules(schedule, T, "--schedule") for T in lengths]
        if len(chosen[0]) > 1:
            raise InputError(f"--schedule is {schedule!r}; this picture shows only one schedule: choose one")
        _write(draw_variances([one for (one,) in chosen]), out)


@app.command()
def snr(
    schedules: Names = "linear,cosine",
    timesteps: Timesteps = 1000,
    gamma: Annotated[float, typer.Option(help="the largest weight of the min_snr weighting")] = 5.0,
    out: Out = Path("snr.png"),
) -> None:
    """Draw the signal-to-noise ratio over t, and the weights of the loss weightings for each prediction."""
    with plain_errors():
        check_picture(out)
        _write(draw_snr(parse_schedules(schedules, timesteps), gamma), out)


@app.command()
def bound(
    report: Annotated[
        Path, typer.Argument(help="the .json that `python -m ddpm_fast.evaluate nll --out` wrote", callback=expand_home)
    ],
    out: Out = Path("bound.png"),
) -> None:
    """Draw the variational bound's terms over t and the errors of the predictions, for an evaluated model."""
    with plain_errors():
        check_picture(out)
        _write(draw_bound(read_report(report)), out)


@app.command()
def chain(
    model: ModelOption = DEFAULT_MODEL,
    flags: FlagsOption = None,
    n: Annotated[int, typer.Option("--n", "-n", help="how many samples")] = 3,
    steps: Annotated[int | None, typer.Option(help="how many sampler steps; 100 if not given")] = None,
    sampler: Annotated[str, typer.Option(help=f"one of {', '.join(SAMPLERS)}")] = "ddpm",
    labels: Annotated[
        str | None,
        typer.Option(help=LABELS_HELP),
    ] = None,
    columns: Columns = 10,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu, ...")] = "auto",
    out: Out = Path("chain.png"),
) -> None:
    """Draw samples on their way from noise to image: x_t, and below it the x_0 that the model predicts from it."""
    with plain_errors():
        check_picture(out)
        if not 1 <= n <= MOST_SAMPLES:
            raise InputError(
                f"--n is {n}; expected 1..{MOST_SAMPLES}, because each sample takes two rows of the picture"
            )
        loaded = load_model(model, choose_device(device), flags=flags)
        check_channels(str(loaded.path), loaded.shape[0])
        T = loaded.diffusion.num_timesteps
        steps = len(sampling_timesteps(min(100, T) if steps is None else steps, T))
        _check_columns(columns, steps)
        classes = parse_labels(labels, n, loaded.classes, loaded.label_names)
        console.print(escape(describe_classes(classes, loaded.label_names)))
        with console.status("sampling"):
            timesteps, x_t, x0 = reverse_states(
                loaded, n, columns, sampler=sampler, steps=steps, labels=classes, seed=seed
            )
        _write(draw_chain(timesteps, x_t, x0), out)


def reverse_states(
    loaded: LoadedModel, n: int, columns: int, *, sampler: str, steps: int, **options: Any
) -> tuple[list[int], Tensor, Tensor]:
    """States of sample(model, diffusion, n, ...) and the predictions from them, at equally spaced sampler steps.

    Args:
        loaded: The model and its diffusion.
        n: The number of samples.
        columns: K, the number of states.
        sampler: As in sample, like steps and the options.
        steps: The number of sampler steps, which are spaced evenly.
        **options: Passed to sample.

    Returns:
        The K timesteps, the noisiest first; x_t; and the predicted x_0, clipped as the sampler does. x_t and x_0 are
        [K, n, C, H, W].

    Raises:
        InputError: Where sample does.
    """
    network = Network.of(loaded.model)
    shown = sampling_timesteps(columns, steps)
    timesteps: list[int] = []
    x_t: list[Tensor] = []
    x0: list[Tensor] = []
    before: list[Tensor] = []  # the state before the row, alone

    def watch(step: Step) -> None:
        if step.index in shown and step.x0 is not None:
            timesteps.append(step.t)
            x_t.append(before[0])
            x0.append(step.x0)
        before[0] = step.x

    wanted = SamplingOptions(sampler=sampler, steps=steps, spacing="even", on_step=watch, **options)
    prepared = prepare(network, loaded.diffusion, n, wanted)
    before.append(ops.normal(replace(prepared.key, stream=Stream.INITIAL), prepared.shape))
    prepared.draw()
    return timesteps, torch.stack(x_t), torch.stack(x0)


def _write(figure: Figure, out: Path) -> None:
    save_figure(figure, out)
    say_written(out)
