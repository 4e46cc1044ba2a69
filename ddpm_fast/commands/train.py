"""`python -m ddpm_fast.train --data IMAGES --out FOLDER`: train a model on your images.

The folder gets training states (to resume from), model.safetensors (to sample from), sample grids, and curves for
TensorBoard. Ctrl-C and SIGTERM save first; --resume continues bit for bit.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import Progress

from ddpm_fast.commands.common import choose_device, choose_dtype, console, plain_errors
from ddpm_fast.commands.stopping import stop_signals
from ddpm_fast.commands.training_log import TrainingLog
from ddpm_fast.data import BUILTIN, Dataset, load_dataset
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.atomic import check_writable_folder
from ddpm_fast.loops.metrics import Metrics, NonFiniteLoss
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.loops.training import TrainConfig, Trainer
from ddpm_fast.nn import UNetConfig
from ddpm_fast.objective import LEARNED_VARIANCES, LOSSES, PREDICTIONS, VARIANCES, WEIGHTINGS
from ddpm_fast.schedule import SCHEDULES

# What may differ between a run and its continuation, because it does not affect the weights.
FREE_ON_RESUME = {"out", "steps", "log_every", "sample_every", "save_every", "resume", "device", "strict", "cuda_graph"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="folder for checkpoints, samples and curves")],
    data: Annotated[
        str | None, typer.Option(help=f"{', '.join(BUILTIN)}, a folder of images, a .zip of them, .npz or .npy")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="resize the images to this side")] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 (grey) or 3 (RGB); if not given, as the images have them")
    ] = None,
    classes: Annotated[
        bool | None,
        typer.Option(
            help="condition on classes: sub-folders, or an array file's labels; if not given, where there are classes"
        ),
    ] = None,
    strict: Annotated[bool, typer.Option(help="stop at a broken image file instead of skipping it")] = False,
    flip: Annotated[bool, typer.Option(help="mirror half of the images left-right")] = False,
    model_channels: Annotated[int, typer.Option(help="channels of the U-Net's first level")] = 64,
    channel_mult: Annotated[
        str, typer.Option(help="channels of each level, as multiples of --model-channels")
    ] = "1,2,2",
    num_res_blocks: Annotated[int, typer.Option(help="residual blocks in each level")] = 2,
    attention: Annotated[str, typer.Option(help="heights of the levels that have self-attention, such as 16,8")] = "",
    num_heads: Annotated[int, typer.Option(help="attention heads")] = 4,
    dropout: Annotated[float, typer.Option(help="share of activations dropped in training")] = 0.1,
    scale_shift: Annotated[
        bool,
        typer.Option(help="let time and class scale and shift the normalised activations, instead of adding to them"),
    ] = True,
    schedule: Annotated[str, typer.Option(help=f"noise schedule: {', '.join(SCHEDULES)}")] = "cosine",
    zero_terminal_snr: Annotated[
        bool, typer.Option("--zero-terminal-snr", help="let the noise schedule end in pure noise")
    ] = False,
    timesteps: Annotated[int, typer.Option(help="T, the number of timesteps")] = 1000,
    prediction: Annotated[str, typer.Option(help=f"what the network predicts: {', '.join(PREDICTIONS)}")] = "eps",
    variance: Annotated[
        str, typer.Option(help=f"variance of the denoising steps: {', '.join(VARIANCES)}")
    ] = "fixed_large",
    loss: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(LOSSES)}; if not given simple, or hybrid where the variance is learned"),
    ] = None,
    loss_weighting: Annotated[
        str, typer.Option(help=f"weight of the error at each timestep: {', '.join(WEIGHTINGS)}")
    ] = "none",
    timestep_sampling: Annotated[
        str, typer.Option(help=f"how timesteps are chosen in training: {', '.join(TIMESTEP_SAMPLINGS)}")
    ] = "uniform",
    steps: Annotated[int, typer.Option(help="number of training steps in all")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="images in a training step")] = 64,
    lr: Annotated[float, typer.Option(help="learning rate after the warm-up")] = 2e-4,
    warmup: Annotated[int, typer.Option(help="training steps over which the learning rate rises linearly")] = 500,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay")] = 0.0,
    grad_clip: Annotated[float, typer.Option(help="largest gradient norm; longer gradients are scaled down")] = 1.0,
    ema_decay: Annotated[float, typer.Option(help="decay of the averaged weights, after its own warm-up")] = 0.9999,
    label_drop: Annotated[
        float, typer.Option(help="share of labels dropped, so that the model also learns unconditional sampling")
    ] = 0.1,
    precision: Annotated[str, typer.Option(help="auto, fp32, or bf16 (autocast)")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="seed of everything random in the training")] = 0,
    log_every: Annotated[int, typer.Option(help="training steps between two points of the curves")] = 50,
    sample_every: Annotated[int, typer.Option(help="training steps between two sample grids; 0 for none")] = 1000,
    save_every: Annotated[int, typer.Option(help="training steps between two checkpoints")] = 1000,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(help="replay each training step from a CUDA graph; if not given, wherever that is possible"),
    ] = None,
    resume: Annotated[bool, typer.Option(help="continue from the newest checkpoint in --out")] = False,
) -> None:
    """Train a diffusion model on your images."""
    with plain_errors():
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in context.params.items()}
        state = _find_state(context, arguments, out, resume)
        _check(arguments)
        trainer = _make_trainer(arguments, choose_device(arguments["device"]))
        check_writable_folder(out)
        if state is not None:
            trainer.load(state)
            console.print(f"Resuming at step {trainer.step} from {state}")
        console.print(_description(trainer))
        try:
            finished = run(trainer, out, arguments)
        except NonFiniteLoss as error:
            last_good = checkpoint.latest_checkpoint(out)
            kept = f" The last good checkpoint is {last_good}." if last_good else ""
            advice = "Lower --lr, lengthen --warmup, or use --precision fp32."
            console.print(f"[bold red]Stopped:[/] {escape(f'{error}{kept} {advice}')}")
            raise typer.Exit(1) from None
    if not finished:
        console.print(f"Stopped at step {trainer.step}, saved. Continue with: --out {out} --resume")
        raise typer.Exit(130)
    model = out / "model.safetensors"
    console.print(f"Done: {model}. Sample with: python -m ddpm_fast.sample --model {model}")


def run(trainer: Trainer, out: Path, arguments: dict[str, Any]) -> bool:
    """Train up to arguments["steps"], with a log, checkpoints and sample grids.

    Returns:
        False if SIGINT or SIGTERM stopped the training, after saving it.

    Raises:
        NonFiniteLoss: At the first training step that is not finite. Nothing after the last good step is saved.
    """
    steps, metrics, saved = arguments["steps"], Metrics(trainer.step), trainer.step
    with (
        stop_signals("saving after this step; Ctrl-C again to abort", lambda: "aborted") as stopping,
        TrainingLog(trainer, out, steps) as log,
    ):
        while trainer.step < steps and not stopping:
            metrics.add(*trainer.train_step())
            log.advance()
            saving = _is_due(trainer.step, arguments["save_every"], steps)
            sampling = _is_due(trainer.step, arguments["sample_every"], steps)
            if saving or sampling or trainer.step % arguments["log_every"] == 0:
                # Before anything is saved it must be known to be good. Otherwise nothing waits for the device.
                log.report(metrics.look(wait=saving or sampling))
            with log.paused():
                if saving:
                    trainer.save(out, arguments)
                    saved = trainer.step
                if sampling:
                    log.draw_grid()
        if stopping and saved < trainer.step:
            metrics.look(wait=True)
            trainer.save(out, arguments)
    return not stopping


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is due. every = 0: never."""
    return bool(every) and (step == last or step % every == 0)


def _find_state(context: typer.Context, arguments: dict[str, Any], out: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a new run. The arguments become those that the run was started
    with."""
    state = checkpoint.latest_checkpoint(out)
    if not resume:
        if state is not None:
            raise InputError(
                f"{out} holds a run already ({state.name}): add --resume to continue it, or choose another --out"
            )
        return None
    if state is None:
        raise InputError(f"--resume: there is no checkpoint (step-*.safetensors) in {out}")
    # A run that is older than an option was started with what is the option's default.
    defaults = {option.name: option.get_default(context) for option in context.command.params if not option.required}
    stored = defaults | checkpoint.read_training(state)[1]["arguments"]
    for name, value in stored.items():
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if name == "precision" and arguments[name] == "auto":
            given = False  # what was chosen is stored
        if name in FREE_ON_RESUME and given:
            continue
        if given and name != "data" and arguments[name] != value:
            raise InputError(
                f"--{name.replace('_', '-')} {arguments[name]} differs from the {value} this run was started with, and "
                "would change its result: leave the option out, or start a new run"
            )
        if not (name == "data" and given):  # the images may have moved
            arguments[name] = value
    return state


def _check(arguments: dict[str, Any]) -> None:
    """Raises InputError for arguments that no class checks that is made of them."""
    if arguments["data"] is None:
        raise InputError(f"--data is missing: give {', '.join(BUILTIN)}, or a folder of images")
    for name, least in (("steps", 1), ("log_every", 1), ("save_every", 1), ("sample_every", 0)):
        if arguments[name] < least:
            raise InputError(f"--{name.replace('_', '-')} is {arguments[name]}; expected at least {least}")
    if arguments["schedule"] not in SCHEDULES:
        raise InputError(f"schedule {arguments['schedule']!r} is unknown; there are {', '.join(SCHEDULES)}")


def _make_trainer(arguments: dict[str, Any], device: torch.device) -> Trainer:
    """The trainer that the arguments ask for. Those whose default depends on others are replaced by what was chosen."""
    a = arguments
    # Stored as what was chosen, because a run that is resumed elsewhere must not change its arithmetic.
    a["precision"] = "bf16" if choose_dtype(a["precision"], device) == torch.bfloat16 else "fp32"
    a["loss"] = a["loss"] or ("hybrid" if a["variance"] in LEARNED_VARIANCES else "simple")
    noising = SCHEDULES[a["schedule"]](a["timesteps"])
    diffusion = GaussianDiffusion(
        noising.zero_terminal_snr() if a["zero_terminal_snr"] else noising,
        prediction=a["prediction"],
        variance=a["variance"],
        loss=a["loss"],
        loss_weighting=a["loss_weighting"],
    )
    config = TrainConfig(
        batch_size=a["batch_size"],
        lr=a["lr"],
        warmup=a["warmup"],
        weight_decay=a["weight_decay"],
        grad_clip=a["grad_clip"],
        ema_decay=a["ema_decay"],
        label_drop=a["label_drop"],
        flip=a["flip"],
        timestep_sampling=a["timestep_sampling"],
        seed=a["seed"],
        precision=a["precision"],
    )
    dataset = _load(a)
    network = UNetConfig(
        image_size=dataset.square_side(),
        in_channels=dataset.images.shape[1],
        model_channels=a["model_channels"],
        channel_mult=integers(a["channel_mult"], "--channel-mult"),
        num_res_blocks=a["num_res_blocks"],
        attention_resolutions=integers(a["attention"], "--attention"),
        num_heads=a["num_heads"],
        dropout=a["dropout"],
        num_classes=0 if a["classes"] is False else dataset.num_classes or 0,
        scale_shift=a["scale_shift"],
        norm_groups=norm_groups(a["model_channels"]),
        learned_variance=diffusion.objective.learned,
    )
    return Trainer(network, diffusion, config, dataset, device, a["cuda_graph"])


def integers(text: str, name: str) -> tuple[int, ...]:
    """The numbers of a text such as "1,2,4"; none for an empty one. Raises InputError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{name} is {text!r}; expected integers separated by commas, such as 1,2,4") from None


def norm_groups(channels: int) -> int:
    """The largest number of groups, up to the usual 32, that divides the channels and leaves at least four in each."""
    return next((groups for groups in range(32, 0, -1) if channels % groups == 0 and channels >= 4 * groups), 1)


def _load(arguments: dict[str, Any]) -> Dataset:
    """The dataset. Files that were skipped are shown as warnings."""
    with warnings.catch_warnings(record=True) as caught, Progress(transient=True, console=console) as bar:
        warnings.simplefilter("always")
        task = bar.add_task("loading images")
        dataset = load_dataset(
            arguments["data"],
            image_size=arguments["image_size"],
            channels=arguments["channels"],
            strict=arguments["strict"],
            classes=bool(arguments["classes"]),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for warning in caught:
        console.print(f"[yellow]Warning:[/] {escape(str(warning.message))}")
    return dataset


def _description(trainer: Trainer) -> str:
    """A line that says what is trained, on what."""
    dataset, classes = trainer.dataset, trainer.model.config.num_classes
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return (
        f"{len(dataset)} images {'x'.join(map(str, dataset.images.shape[1:]))} from {dataset.name}"
        f"{f', {classes} classes' if classes else ''}; "
        f"{parameters / 1e6:.2f}M parameters; {trainer.config.precision} on {trainer.device}"
    )
