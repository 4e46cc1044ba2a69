"""From the options of `python -m ddpm_fast.train` to what trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.markup import escape

from ddpm_fast.commands.precision import automatic_precision, choose_dtype
from ddpm_fast.commands.profiling import check_profile
from ddpm_fast.commands.stopping import Stopping
from ddpm_fast.commands.together import in_all, in_first
from ddpm_fast.commands.training import fine_tuning, resuming
from ddpm_fast.commands.training.fine_tuning import Beginning
from ddpm_fast.commands.training.images import check_same_images, run_images
from ddpm_fast.commands.training.log import say
from ddpm_fast.commands.training.records import parse_logs
from ddpm_fast.commands.training.reference import LEAST
from ddpm_fast.commands.training.resuming import Options, State
from ddpm_fast.data import (
    BUILTIN,
    Augmentation,
    ImageSet,
    StoredDataset,
    parse_held_out,
)
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files.averages import remove_averages_after
from ddpm_fast.loops.distributed import of_each_process, of_first_process, rank, world_size
from ddpm_fast.loops.running import average_every
from ddpm_fast.loops.snapshot import MODEL_NAME
from ddpm_fast.loops.train_config import TrainConfig, divided, warmup_for
from ddpm_fast.loops.training import Trainer
from ddpm_fast.loops.training_state import check_network
from ddpm_fast.nn import UNetConfig
from ddpm_fast.nn.unet_config import norm_groups
from ddpm_fast.objective import LEARNED_VARIANCES
from ddpm_fast.samplers import check_sampler
from ddpm_fast.schedule import SCHEDULES

LR = TrainConfig.lr  # what --lr defaults to
FINE_TUNING_LR = 1e-4  # where the training begins with a model


class Parts(NamedTuple):
    """What a trainer is made of, and the images that are held out, if any."""

    network: UNetConfig
    diffusion: GaussianDiffusion
    config: TrainConfig
    dataset: ImageSet
    held_out: ImageSet | None


class Ready(NamedTuple):
    """A run that can begin or go on.

    Attributes:
        trainer: Ready for its next step.
        state: What it was resumed from, or None.
        held_out: Images that it is not trained on, or None.
    """

    trainer: Trainer
    state: State | None
    held_out: ImageSet | None


def prepare(options: Options, device: torch.device, stopping: Stopping) -> Ready:
    """Make the trainer and what goes with it.

    Where several processes train together, the first one decides what is a choice, and all go on or none.
    """
    arguments = options.arguments
    state = in_first(lambda: resuming.find_state(options.out, arguments))
    changes = in_all(lambda: _settle(options, state))
    begun = in_all(lambda: fine_tuning.begin(options, state))
    if arguments["precision"] == "auto":
        arguments["precision"] = of_first_process(automatic_precision(device))
    in_all(lambda: choose(arguments, device))
    parts, differing = in_all(lambda: _make_parts(arguments, state, begun, stopping))
    found = of_each_process((len(parts.dataset), parts.dataset.digest if world_size() > 1 else ""))
    in_all(lambda: check_same_images(found))
    # Making it waits for other processes, so that only what goes wrong in all of them can be told by one.
    trainer = in_all(lambda: _make_trainer(parts, arguments, device), InputError)
    if begun is not None and (model := begun.loaded) is not None:
        in_all(lambda: fine_tuning.load_weights(trainer, model))
    if state is not None:
        _resume(trainer, state, options.out, changes | differing)
    say(escape(description(trainer)))
    if trainer.averages:
        say(kept_averages(trainer, arguments["steps"], arguments["average_every"]))
    return Ready(trainer, state, parts.held_out)


def _resume(trainer: Trainer, state: State, out: Path, changes: dict[str, list[Any]]) -> None:
    """Continue from a state, and say so. changes: What differs from here on, by name."""
    in_all(lambda: trainer.load(state.path))
    say(f"Resuming at step {trainer.step} from {escape(str(state.path))}")
    resuming.compare_machine(state.meta, trainer)
    if changes:
        trainer.history.append({"step": trainer.step, **changes})
        told = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changes.items())
        say(f"Changed from here on: {escape(told)}")
    in_first(lambda: remove_averages_after(out, trainer.step))
    if in_first(lambda: trainer.complete(out)):
        say(f"{MODEL_NAME} was missing, damaged or of another step, and is written again")


def _settle(options: Options, state: State | None) -> dict[str, list[Any]]:
    """Check the options, which become those of the run that is resumed. Returns what is changed on purpose."""
    arguments = options.arguments
    if rank() > 0:
        arguments["profile"] = None
    changes = resuming.adopt(options, state) if state is not None else {}
    check(arguments)
    return changes


def _make_parts(
    arguments: dict[str, Any], state: State | None, begun: Beginning | None, stopping: Stopping
) -> tuple[Parts, dict[str, Any]]:
    """Load the images and make what is trained on them. begun: What a run with --init-from is made of.

    Returns:
        The parts, and what differs from the images that the run was trained on until here.
    """
    diffusion = make_diffusion(arguments) if begun is None else begun.diffusion
    config = make_config(arguments)
    divided(config, world_size())
    dataset, held_out, differing = run_images(arguments, state, stopping)
    network = make_network(arguments, dataset, diffusion, begun.network if begun is not None else None)
    if state is not None:
        check_network(state.path, state.meta, network)  # before it is built
    return Parts(network, diffusion, config, dataset, held_out), differing


def _make_trainer(parts: Parts, arguments: dict[str, Any], device: torch.device) -> Trainer:
    return Trainer(
        parts.network,
        parts.diffusion,
        parts.config,
        parts.dataset,
        device,
        arguments["cuda_graph"],
        arguments["compile"],
        arguments["grad_checkpoint"],
    )


def check(arguments: dict[str, Any]) -> None:
    """Raises InputError for arguments that no class checks that is made of them."""
    if arguments["data"] is None:
        raise InputError(f"--data is missing: give {', '.join(BUILTIN)}, or a folder of images")
    for name, least in (
        ("steps", 1),
        ("log_every", 1),
        ("save_every", 1),
        ("sample_every", 0),
        ("evaluate_every", 0),
        ("evaluate_n", 0),
        ("evaluate_steps", 1),
        ("average_every", 1),
    ):
        if arguments[name] is not None and arguments[name] < least:
            raise InputError(f"--{name.replace('_', '-')} is {arguments[name]}; expected at least {least}")
    if arguments["lr_schedule"] == "cosine" and arguments["steps"] > (arguments["lr_steps"] or arguments["steps"]):
        raise InputError(
            f"--steps is {arguments['steps']}, and the learning rate has fallen to 0 at --lr-steps "
            f"{arguments['lr_steps']}: give a larger --lr-steps (of a run that goes on, with --change)"
        )
    if arguments["held_out"] is not None:
        parse_held_out(arguments["held_out"])
    if 0 < arguments["evaluate_n"] < LEAST:
        raise InputError(f"--evaluate-n is {arguments['evaluate_n']}; expected at least {LEAST}, or 0 to draw nothing")
    check_sampler(arguments["evaluate_sampler"], None)
    check_profile(arguments["profile"])
    parse_logs(arguments["log"])
    numbers(arguments["channel_mult"], "--channel-mult")
    integers(arguments["attention"], "--attention")
    # A run that began with a model may have that model's own list of betas.
    if arguments["schedule"] not in SCHEDULES and not (arguments["init_from"] and arguments["schedule"] == "betas"):
        raise InputError(f"schedule {arguments['schedule']!r} is unknown; there are {', '.join(SCHEDULES)}")


def choose(arguments: dict[str, Any], device: torch.device) -> None:
    """Replace the arguments whose default depends on others or on the machine by what is chosen.

    They are stored so, because a run that is resumed elsewhere, or later, must not change its arithmetic.
    """
    choose_dtype(arguments["precision"], device)  # which refuses what is unknown
    if arguments["lr_schedule"] == "cosine" and arguments["lr_steps"] is None:
        arguments["lr_steps"] = arguments["steps"]
    if arguments["lr"] is None:
        arguments["lr"] = FINE_TUNING_LR if arguments["init_from"] else LR
    if arguments["warmup"] is None:
        arguments["warmup"] = warmup_for(arguments["steps"])
    if arguments["average_every"] is None:
        arguments["average_every"] = average_every(arguments["steps"])
    learned = arguments["variance"] in LEARNED_VARIANCES
    arguments["loss"] = arguments["loss"] or ("hybrid" if learned else "simple")


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
        crop=arguments["crop"],
        augment=arguments["augment"],
        timestep_sampling=arguments["timestep_sampling"],
        seed=arguments["seed"],
        precision=arguments["precision"],
        micro_batch=arguments["micro_batch"],
        lr_schedule=arguments["lr_schedule"],
        lr_steps=arguments["lr_steps"],
        betas=(arguments["beta1"], arguments["beta2"]),
        average_widths=numbers(arguments["average_widths"], "--average-widths"),
    )


def make_network(
    arguments: dict[str, Any], dataset: ImageSet, diffusion: GaussianDiffusion, begun_with: UNetConfig | None
) -> UNetConfig:
    """The network that the arguments ask for, for these images.

    Args:
        arguments: The command's options.
        dataset: The images.
        diffusion: What it is trained for.
        begun_with: The network of the model that the run began with, or None.
    """
    num_classes = 0 if arguments["classes"] is False else dataset.num_classes or 0
    told = Augmentation.of(arguments["augment"]).channels if arguments["augment"] else 0
    if begun_with is not None:
        dropout = arguments["dropout"]
        return dataclasses.replace(begun_with, num_classes=num_classes, dropout=dropout, augment_channels=told)
    return UNetConfig(
        image_size=dataset.shape[1:],
        in_channels=dataset.shape[0],
        model_channels=arguments["model_channels"],
        channel_mult=numbers(arguments["channel_mult"], "--channel-mult"),
        num_res_blocks=arguments["num_res_blocks"],
        attention_resolutions=integers(arguments["attention"], "--attention"),
        num_heads=arguments["num_heads"],
        dropout=arguments["dropout"],
        num_classes=num_classes,
        scale_shift=arguments["scale_shift"],
        norm_groups=norm_groups(arguments["model_channels"]),
        learned_variance=diffusion.objective.learned,
        augment_channels=told,
    )


def integers(text: str, name: str) -> tuple[int, ...]:
    """The numbers of a text such as "1,2,4"; none for an empty one. Raises InputError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{name} is {text!r}; expected integers separated by commas, such as 1,2,4") from None


def numbers(text: str, name: str) -> tuple[float, ...]:
    """The numbers of a text such as "0.5,1,2"; none for an empty one. Raises InputError naming the option."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{name} is {text!r}; expected numbers separated by commas, such as 0.5,1,2") from None


def description(trainer: Trainer) -> str:
    """A line that says what is trained, on what."""
    dataset, classes = trainer.dataset, trainer.model.config.num_classes
    parameters = sum(p.numel() for p in trainer.model.parameters())
    reading = ", read on demand" if isinstance(dataset, StoredDataset) else ""
    held_out = "" if dataset.held_out is None else f", {dataset.held_out.count} more held out"
    values = "" if dataset.value_range is None else f" (floats {dataset.value_range.layout}, {dataset.value_range})"
    return (
        f"{len(dataset)} images {'x'.join(map(str, dataset.shape))} from {dataset.name}{values}{reading}{held_out}"
        f"{f', {classes} classes' if classes else ''}; "
        f"{parameters / 1e6:.2f}M parameters; {trainer.config.precision} on {trainer.device}"
    )


def kept_averages(trainer: Trainer, steps: int, every: int) -> str:
    """A line that says which averages are saved, and how much they take in the end."""
    parameters, saves = sum(p.numel() for p in trainer.model.parameters()), -(-steps // every)
    widths = ", ".join(f"{width:g}" for width in trainer.averages)
    size = 2 * parameters * len(trainer.averages) * saves / 2**20  # they are fp16
    return f"averages of the widths {widths} are saved every {every} steps: {size:,.0f} MiB after {steps} steps"
