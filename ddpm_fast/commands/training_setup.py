"""From the options of `python -m ddpm_fast.train` to what trains: the images and the trainer."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import Progress

from ddpm_fast.commands.common import console
from ddpm_fast.commands.precision import automatic_precision, choose_dtype
from ddpm_fast.commands.profiling import check_profile
from ddpm_fast.commands.stopping import Stopping
from ddpm_fast.commands.training_log import say, warn
from ddpm_fast.data import BUILTIN, FloatOptions, ImageSet, open_dataset
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.nn import UNetConfig
from ddpm_fast.objective import LEARNED_VARIANCES
from ddpm_fast.schedule import SCHEDULES
from ddpm_fast.values import ValueRange, parse_range


def absolute(data: str) -> str:
    """The path of the images from wherever the run will be resumed, or the name of a built-in set."""
    return data if data in BUILTIN else str(Path(data).absolute())


def check(arguments: dict[str, Any]) -> None:
    """Raises InputError for arguments that no class checks that is made of them."""
    if arguments["data"] is None:
        raise InputError(f"--data is missing: give {', '.join(BUILTIN)}, or a folder of images")
    for name, least in (("steps", 1), ("log_every", 1), ("save_every", 1), ("sample_every", 0)):
        if arguments[name] < least:
            raise InputError(f"--{name.replace('_', '-')} is {arguments[name]}; expected at least {least}")
    check_profile(arguments["profile"])
    integers(arguments["channel_mult"], "--channel-mult")
    integers(arguments["attention"], "--attention")
    # A run that began with a model may have that model's own list of betas.
    if arguments["schedule"] not in SCHEDULES and not (arguments["init_from"] and arguments["schedule"] == "betas"):
        raise InputError(f"schedule {arguments['schedule']!r} is unknown; there are {', '.join(SCHEDULES)}")


def choose(arguments: dict[str, Any], device: torch.device) -> None:
    """Replace the arguments whose default depends on others or on the machine by what is chosen.

    They are stored so, because a run that is resumed elsewhere must not change its arithmetic.
    """
    if arguments["precision"] == "auto":
        arguments["precision"] = automatic_precision(device)
    choose_dtype(arguments["precision"], device)  # which refuses what is unknown
    learned = arguments["variance"] in LEARNED_VARIANCES
    arguments["loss"] = arguments["loss"] or ("hybrid" if learned else "simple")


def load_images(arguments: dict[str, Any], stopping: Stopping, value_range: ValueRange | None = None) -> ImageSet:
    """The dataset. Files that were skipped are shown as warnings. A signal raises Stopped.

    Args:
        arguments: The command's.
        stopping: What hears the signals.
        value_range: That of the run which is resumed; None where the arguments say it, or nobody.
    """
    given = None if arguments["value_range"] is None else parse_range(arguments["value_range"])
    if not console.is_terminal:
        say(f"Loading images from {escape(arguments['data'])}")
    with (
        warnings.catch_warnings(record=True) as caught,
        Progress(transient=True, console=console) as bar,
        stopping.anywhere(),
    ):
        warnings.simplefilter("always")
        task = bar.add_task("loading images")
        dataset = open_dataset(
            arguments["data"],
            image_size=arguments["image_size"],
            channels=arguments["channels"],
            strict=arguments["strict"],
            classes=bool(arguments["classes"]),
            floats=FloatOptions(arguments["layout"], given if value_range is None else value_range.ends),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for warning in caught:
        warn(str(warning.message))
    return dataset


def make_diffusion(arguments: dict[str, Any]) -> GaussianDiffusion:
    """The diffusion that the arguments ask for."""
    noising = SCHEDULES[arguments["schedule"]](arguments["timesteps"])
    return GaussianDiffusion(
        noising.zero_terminal_snr() if arguments["zero_terminal_snr"] else noising,
        prediction=arguments["prediction"],
        variance=arguments["variance"],
        loss=arguments["loss"],
        loss_weighting=arguments["loss_weighting"],
    )


def make_config(arguments: dict[str, Any]) -> TrainConfig:
    """How the arguments ask to train."""
    return TrainConfig(
        batch_size=arguments["batch_size"],
        lr=arguments["lr"],
        warmup=arguments["warmup"],
        weight_decay=arguments["weight_decay"],
        grad_clip=arguments["grad_clip"],
        ema_decay=arguments["ema_decay"],
        label_drop=arguments["label_drop"],
        flip=arguments["flip"],
        timestep_sampling=arguments["timestep_sampling"],
        seed=arguments["seed"],
        precision=arguments["precision"],
    )


def make_network(
    arguments: dict[str, Any], dataset: ImageSet, diffusion: GaussianDiffusion, begun_with: UNetConfig | None = None
) -> UNetConfig:
    """The network that the arguments ask for, for these images.

    Args:
        arguments: The command's.
        dataset: The images.
        diffusion: What it is trained for.
        begun_with: The network of the model that the run began with; None: there was none.
    """
    num_classes = 0 if arguments["classes"] is False else dataset.num_classes or 0
    if begun_with is not None:
        return dataclasses.replace(begun_with, num_classes=num_classes, dropout=arguments["dropout"])
    return UNetConfig(
        image_size=dataset.square_side(),
        in_channels=dataset.shape[0],
        model_channels=arguments["model_channels"],
        channel_mult=integers(arguments["channel_mult"], "--channel-mult"),
        num_res_blocks=arguments["num_res_blocks"],
        attention_resolutions=integers(arguments["attention"], "--attention"),
        num_heads=arguments["num_heads"],
        dropout=arguments["dropout"],
        num_classes=num_classes,
        scale_shift=arguments["scale_shift"],
        norm_groups=norm_groups(arguments["model_channels"]),
        learned_variance=diffusion.objective.learned,
    )


def integers(text: str, name: str) -> tuple[int, ...]:
    """The numbers of a text such as "1,2,4"; none for an empty one. Raises InputError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{name} is {text!r}; expected integers separated by commas, such as 1,2,4") from None


def norm_groups(channels: int) -> int:
    """The largest number of groups, up to the usual 32, that divides the channels and leaves at least four in each."""
    return next((groups for groups in range(32, 0, -1) if channels % groups == 0 and channels >= 4 * groups), 1)


def description(trainer: Trainer) -> str:
    """A line that says what is trained, on what."""
    dataset, classes = trainer.dataset, trainer.model.config.num_classes
    parameters = sum(p.numel() for p in trainer.model.parameters())
    values = "" if dataset.value_range is None else f" (floats {dataset.value_range.layout}, {dataset.value_range})"
    return (
        f"{len(dataset)} images {'x'.join(map(str, dataset.shape))} from {dataset.name}{values}"
        f"{f', {classes} classes' if classes else ''}; "
        f"{parameters / 1e6:.2f}M parameters; {trainer.config.precision} on {trainer.device}"
    )
