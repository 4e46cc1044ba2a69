"""`python -m ddpm_fast.sample`: draw images from a model; by default 64 handwritten digits, from the one shipped.

With --init-image it edits a picture instead (edit.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from ddpm_fast.commands.common import (
    App,
    FlagsOption,
    ModelOption,
    choose_device,
    console,
    path_option,
    plain_errors,
    say_written,
)
from ddpm_fast.commands.drawing import Drawable, Drawing, Job, settings_of, unused_path
from ddpm_fast.commands.edit import Edit, read_images, round_trip_error
from ddpm_fast.commands.guiding import Guide, SecondImages
from ddpm_fast.commands.labels import LABELS_HELP, Turns, check_null_class, describe_classes, parse_labels
from ddpm_fast.commands.outcome import note
from ddpm_fast.commands.precision import DTYPE_NAMES, choose_dtype, settle
from ddpm_fast.commands.profiling import PROFILE_HELP, check_profile, profiling
from ddpm_fast.commands.ranks import ranks_of_environment
from ddpm_fast.commands.sizes import parse_size, size_option
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import check_writable, remove_leftovers
from ddpm_fast.files.checkpoint import DEFAULT_MODEL
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.load import load_model
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.pictures import images
from ddpm_fast.pictures.folder import FORMATS, SampleFolder, recorded
from ddpm_fast.respacing import SPACINGS
from ddpm_fast.samplers import SAMPLERS

app = App(keeps_config=True)


@app.command()
def main(
    model: ModelOption = DEFAULT_MODEL,
    flags: FlagsOption = None,
    n: Annotated[
        int | None, typer.Option("--n", "-n", help="number of images; 64 if not given, fewer when editing a picture")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="a number of steps (50 if not given), sections 10,15,20, or a stride ddim50")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLERS)}; ddpm if not given")] = None,
    spacing: Annotated[str, typer.Option(help=f"how the steps are spaced: {', '.join(SPACINGS)}")] = "even",
    eta: Annotated[
        float | None, typer.Option(help="how much noise the ddim sampler adds, 0 (none, if not given) to 1")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="how strongly to guide towards the labels: 1 is none, 2 to 4 is strong")
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option(help="how far to undo the overexposure that guidance causes, 0 to 1")
    ] = 0.0,
    dynamic_threshold: Annotated[
        float | None, typer.Option(help="scale images back by this quantile, such as 0.995, instead of clipping them")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the noise: another seed gives other images")] = 0,
    first_sample_id: Annotated[
        int, typer.Option(help="id of the first image, which selects its noise; continues an earlier set of images")
    ] = 0,
    labels: Annotated[
        str | None,
        typer.Option(help=LABELS_HELP + " (none when editing)"),
    ] = None,
    classifier: Annotated[
        str | None, path_option("a classifier of noised images that guides towards the labels: ours, or a .pt file")
    ] = None,
    classifier_scale: Annotated[
        float | None, typer.Option(help="how strongly the classifier guides: 0 is not at all; 1 if not given")
    ] = None,
    classifier_flags: Annotated[
        str | None,
        typer.Option(help="of a classifier's .pt file: the flags that its script was given, such as '--image_size 64'"),
    ] = None,
    condition: Annotated[
        Path | None,
        path_option("for a model that enlarges images: the small picture, or an .npz file of several, used in turn"),
    ] = None,
    image_size: Annotated[
        str | None,
        size_option("draw images of this size, which the model's levels must halve; if not given, of the model's own"),
    ] = None,
    init_image: Annotated[
        Path | None, path_option("the picture to edit, or an .npz file of several, used in turn")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="how much noise to add to the picture: 0 keeps it, 1 starts from pure noise; 0.5 if not given"
        ),
    ] = None,
    mask: Annotated[
        Path | None, path_option("inpaint the picture: a black and white mask, white where it is kept")
    ] = None,
    resamplings: Annotated[
        int | None,
        typer.Option(help="inpainting: how often each stretch of steps is run; more is slower and more coherent"),
    ] = None,
    jump_length: Annotated[
        int | None, typer.Option(help="inpainting: number of steps in a stretch, which is run --resamplings times")
    ] = None,
    interpolate_with: Annotated[Path | None, path_option("the second picture, to interpolate to")] = None,
    round_trip: Annotated[
        bool, typer.Option("--round-trip", help="encode the picture, decode it again, and print the error")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="number of images to draw at a time")] = 64,
    out: Annotated[
        str | None,
        path_option(
            "where the images go: a .png (a grid), an .npz, or a folder, which the same command continues; if "
            "not given samples.png (of a model of floats samples.npz), or samples-2.png and so on where that exists"
        ),
    ] = None,
    format: Annotated[
        str, typer.Option(help="what a folder holds: png (a picture of each image) or npz (a file of each batch)")
    ] = "png",
    gif: Annotated[Path | None, path_option("also write an animation of the denoising: a .gif")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu, ...")] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            "--dtype",
            help="fp32, bf16, fp16, or auto (bf16 where that is faster, else fp32; a CPU may be measured for a second)",
        ),
    ] = "fp32",
    profile: Annotated[Path | None, path_option(PROFILE_HELP)] = None,
    cuda_graph: Annotated[
        bool | None, typer.Option(help="replay each step from a CUDA graph; if not given, wherever that is possible")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="call the network through torch.compile: may pay for many images on a CPU")
    ] = False,
) -> None:
    """Draw images from a diffusion model, or edit a picture with it."""
    with plain_errors():
        edit = Edit.of(
            init_image,
            strength=strength,
            mask=mask,
            resamplings=resamplings,
            jump_length=jump_length,
            interpolate_with=interpolate_with,
            round_trip=round_trip,
        )
        ranks = ranks_of_environment()
        _check_counts(n, batch_size)
        check_profile(profile)
        if edit is not None and gif is not None:
            raise InputError("--gif shows how images are drawn from noise: leave it out with --init-image")
        if edit is not None and image_size is not None:
            raise InputError("--image-size is for images that are drawn from noise: an edit has its picture's size")
        torch_device = choose_device(device)
        dtype = torch.float32 if precision == "auto" else choose_dtype(precision, torch_device)
        loaded = load_model(model, torch_device, dtype, flags)
        pictures = torch.empty(0) if edit is None else read_images(edit.init_image, loaded, "--init-image")
        shape = _choose_shape(loaded, image_size) if edit is None else tuple(pictures.shape[1:])
        count = n or (64 if edit is None else edit.default_count(pictures))
        ids = range(first_sample_id, first_sample_id + count)
        guide = Guide.of(classifier, classifier_scale, classifier_flags, torch_device, dtype)
        second = None if condition is None else SecondImages.read(condition, loaded)
        classes = _choose_classes(loaded, labels, ids, edit, guidance, guide)
        if edit is not None:
            edit.check_others(sampler, guidance, n, classes)
        drawing = Drawing(batch_size, keeps_frames=gif is not None)
        options = SamplingOptions(
            sampler=sampler or ("ddpm" if edit is None else edit.default_sampler),
            steps=min(50, loaded.diffusion.num_timesteps) if steps is None else steps,
            spacing=spacing,
            eta=eta,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            dynamic_threshold=dynamic_threshold,
            classifier=None if guide is None else guide.classifier,
            classifier_scale=None if guide is None else guide.scale,
            condition=None if second is None else second.of(ids),
            seed=seed,
            first_sample_id=first_sample_id,
            labels=None if classes is None else classes.tensor(),
            batch_size=batch_size,
            shape=None if shape == loaded.shape else shape,
            on_step=drawing.on_step,
            cuda_graph=cuda_graph,
            compile=compile,
        )
        # Everything that can be wrong is found here, before the sampling.
        prepared = _prepare(edit, loaded, pictures, count, options)
        default = "samples.png" if loaded.value_range is None else "samples.npz"
        target = str(unused_path(Path(default))) if out is None else out
        is_folder = _check_outputs(target, format, gif, loaded)
        # An animation and a comparison need all images.
        keeps_all = gif is not None or (edit is not None and edit.round_trip)
        if keeps_all or not is_folder:
            ranks.refuse_several(
                "only a folder is drawn by several: give --out a folder, such as samples/, without --gif and "
                "--round-trip, or start one process"
            )
        if precision == "auto":
            before = recorded(target).get("precision") if is_folder else None
            loaded = settle(loaded, options, count, prepared.rows, before, may_measure=ranks.world_size == 1)
            dtype = Network.of(loaded.model).dtype or torch.float32
            prepared = _prepare(edit, loaded, pictures, count, options)
        folder = None
        if is_folder:
            settings = settings_of(loaded, options, DTYPE_NAMES[dtype])
            for part in (guide, second):
                settings |= {} if part is None else part.settings()
            settings |= {} if edit is None else edit.settings(pictures, count)
            if format == "npz":  # the names of PNGs say the class
                settings["labels"] = None if classes is None else classes.chosen
            per_part = batch_size if format == "npz" else None
            folder = SampleFolder(target, settings, ids, classes, loaded.label_names, per_part, loaded.value_range)
            if folder.finished:
                console.print(f"{folder.finished} of {count} images are in {escape(target)} already and are kept")
        if options.shape is not None:
            own, asked = ("x".join(map(str, one[1:])) for one in (loaded.shape, shape))
            console.print(f"The model was made for images of {own}; those of {asked} may come out less well.")
        if loaded.classes or guide is not None:
            console.print(escape(describe_classes(classes, loaded.label_names)))

        job = Job(
            prepared=prepared,
            drawing=drawing,
            title="sampling" if edit is None else edit.mode,
            target=target,
            folder=folder,
            gif=gif,
            ids=ids,
            classes=classes,
            batch_size=batch_size,
            ranks=ranks,
            keeps_all=keeps_all,
            continuable=edit is None or edit.continuable,
            value_range=loaded.value_range,
        )
        with profiling(profile if ranks.is_first else None, torch_device, console.print) as drawing.after_row:
            x = job.run()
        how = f"{'' if edit is None else edit.mode + ', '}{prepared.rows} steps of {options.sampler}"
        if drawing.drawn:
            where = str(torch_device) if ranks.world_size == 1 else f"{ranks.world_size} ranks"
            console.print(_summary(shape, drawing, f"{how}, {DTYPE_NAMES[dtype]}, {where}"))
        note(images=count, drawn=drawing.drawn, drawing_seconds=drawing.seconds, shape=list(shape))
        if edit is not None and edit.round_trip:
            console.print(round_trip_error(x, pictures))
        say_written(target, gif)


def _prepare(
    edit: Edit | None, loaded: LoadedModel, pictures: torch.Tensor, n: int, options: SamplingOptions
) -> Drawable:
    """The n images, ready to be drawn: edits of these pictures, or new ones. Raises InputError."""
    if edit is None:
        return prepare(Network.of(loaded.model), loaded.diffusion, n, options)
    return edit.prepare(loaded, pictures, n, options)


def _check_counts(n: int | None, batch_size: int) -> None:
    if (n is not None and n < 1) or batch_size < 1:
        raise InputError(f"--n is {n} and --batch-size {batch_size}; expected at least 1 of each")


def _choose_shape(loaded: LoadedModel, image_size: str | None) -> tuple[int, ...]:
    """The shape of the images: the model's own, or one of the size that was asked for. Raises InputError."""
    if image_size is None:
        return loaded.shape
    shape = (loaded.shape[0], *parse_size(image_size))
    if misfit := Network.of(loaded.model).misfit(shape):
        raise InputError(f"--image-size is {image_size}, but {misfit}")
    return shape


def _choose_classes(
    loaded: LoadedModel, labels: str | None, ids: range, edit: Edit | None, guidance: float | None, guide: Guide | None
) -> Turns | None:
    """The classes of the images with these sample ids. Raises InputError for labels, or a lack of them, that the model
    was not trained for."""
    text = "none" if edit is not None and labels is None else labels
    # Those of a classifier, where the model itself has none.
    count = loaded.classes or (0 if guide is None else guide.classifier.config.num_classes)
    classes = parse_labels(text, len(ids), count, loaded.label_names, ids.start)
    if guidance not in (None, 1):
        check_null_class(loaded, "--guidance leads away from the null class")
    if classes is None:
        check_null_class(loaded, "without labels the null class is used")
    return classes


def _check_outputs(out: str, format: str, gif: Path | None, loaded: LoadedModel) -> bool:
    """Whether the images go into a folder. Raises InputError for output files that could not be written."""
    is_folder = images.output_kind(out) == "folder"
    if format not in FORMATS:
        raise InputError(f"--format is {format!r}; expected {' or '.join(FORMATS)}")
    if format != "png" and not is_folder:
        raise InputError(f"--format says what a folder holds, and --out is the file {out}: leave --format out")
    channels = loaded.shape[0]
    if format == "npz":
        images.check_output(out)
    else:
        images.check_output(out, channels, loaded.value_range)
    remove_leftovers(out if is_folder else Path(out).parent)  # of commands that were killed
    if gif is not None:
        if gif.suffix.lower() != ".gif":
            raise InputError(f"--gif is {gif}; expected a name ending in .gif")
        if loaded.value_range is not None and channels not in (1, 3):
            raise InputError(f"--gif shows 1 or 3 channels of floats, and this model has {channels}: leave --gif out")
        check_writable(gif)
    return is_folder


def _summary(shape: tuple[int, ...], drawing: Drawing, how: str) -> str:
    """A line that says what was drawn, how long that took, and how it was done."""
    n, seconds = drawing.drawn, drawing.seconds
    return f"{n} images of {'x'.join(map(str, shape))} in {seconds:.1f} s ({n / seconds:.1f} images/s; {how})"
