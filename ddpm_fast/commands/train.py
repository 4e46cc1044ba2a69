"""`python -m ddpm_fast.train --data IMAGES --out FOLDER`: train a model on your images.

The folder gets training states (to resume from), model.safetensors (to sample from), sample grids, and curves for
TensorBoard. Ctrl-C and SIGTERM save first; --resume continues bit for bit.
"""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ddpm_fast.commands.common import choose_device, choose_dtype, console, plain_errors
from ddpm_fast.data import BUILTIN, Dataset, load_dataset
from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.atomic import check_writable_folder
from ddpm_fast.loops.sampling import sample
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.loops.training import NonFiniteLoss, TrainConfig, Trainer
from ddpm_fast.nn import UNetConfig
from ddpm_fast.objective import LEARNED_VARIANCES, LOSSES, PREDICTIONS, VARIANCES, WEIGHTINGS
from ddpm_fast.pictures import images
from ddpm_fast.schedule import SCHEDULES

PLAIN_REPORT_SECONDS = 30  # between lines of progress where there is no terminal to draw a bar on
GRID_SAMPLES = 64
# What may differ between a run and its continuation: these do not touch the weights.
FREE_ON_RESUME = {"out", "steps", "log_every", "sample_every", "save_every", "resume", "device", "strict", "cuda_graph"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def integers(text: str, name: str) -> tuple[int, ...]:
    """ "1,2,4" as numbers; "" as none. Raises InputError."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{name} is {text!r}; expected integers separated by commas, such as 1,2,4") from None


def norm_groups(channels: int) -> int:
    """The most groups, up to the usual 32, that divide the channels and hold at least four each."""
    return next((groups for groups in range(32, 0, -1) if channels % groups == 0 and channels >= 4 * groups), 1)


@app.command()
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="folder for checkpoints, samples and curves")],
    data: Annotated[
        str | None, typer.Option(help=f"{', '.join(BUILTIN)}, a folder of images, a .zip of them, .npz or .npy")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="resize images to this side")] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3 (RGB); as found if not given")] = None,
    classes: Annotated[
        bool | None, typer.Option(help="condition on classes: sub-folders, or an array file's labels")
    ] = None,
    strict: Annotated[bool, typer.Option(help="stop at a broken image file instead of skipping it")] = False,
    flip: Annotated[bool, typer.Option(help="mirror half of the images left-right")] = False,
    model_channels: Annotated[int, typer.Option(help="channels of the first level")] = 64,
    channel_mult: Annotated[str, typer.Option(help="each level's multiple of that")] = "1,2,2",
    num_res_blocks: Annotated[int, typer.Option(help="residual blocks a level")] = 2,
    attention: Annotated[str, typer.Option(help="image heights with self-attention")] = "",
    num_heads: Annotated[int, typer.Option(help="attention heads")] = 4,
    dropout: Annotated[float, typer.Option()] = 0.1,
    scale_shift: Annotated[bool, typer.Option(help="time and class scale and shift the norms")] = True,
    schedule: Annotated[str, typer.Option(help=f"of the noise: {', '.join(SCHEDULES)}")] = "cosine",
    zero_terminal_snr: Annotated[bool, typer.Option("--zero-terminal-snr", help="end in pure noise")] = False,
    timesteps: Annotated[int, typer.Option(help="length of the chain")] = 1000,
    prediction: Annotated[str, typer.Option(help=f"what the network predicts: {', '.join(PREDICTIONS)}")] = "eps",
    variance: Annotated[str, typer.Option(help=f"of the reverse steps: {', '.join(VARIANCES)}")] = "fixed_large",
    loss: Annotated[
        str | None, typer.Option(help=f"{', '.join(LOSSES)}; simple, or hybrid with a learned variance, if not given")
    ] = None,
    loss_weighting: Annotated[str, typer.Option(help=f"of the error over t: {', '.join(WEIGHTINGS)}")] = "none",
    timestep_sampling: Annotated[str, typer.Option(help=f"of t: {', '.join(TIMESTEP_SAMPLINGS)}")] = "uniform",
    steps: Annotated[int, typer.Option(help="training steps in all")] = 10_000,
    batch_size: Annotated[int, typer.Option()] = 64,
    lr: Annotated[float, typer.Option(help="learning rate after the warm-up")] = 2e-4,
    warmup: Annotated[int, typer.Option(help="steps of linear warm-up")] = 500,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    grad_clip: Annotated[float, typer.Option(help="largest gradient norm")] = 1.0,
    ema_decay: Annotated[float, typer.Option(help="of the averaged weights, after its own warm-up")] = 0.9999,
    label_drop: Annotated[float, typer.Option(help="share of labels dropped, for guidance")] = 0.1,
    precision: Annotated[str, typer.Option(help="auto, fp32, or bf16 (autocast)")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    log_every: Annotated[int, typer.Option(help="steps between points of the curves")] = 50,
    sample_every: Annotated[int, typer.Option(help="steps between sample grids; 0 for none")] = 1000,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 1000,
    cuda_graph: Annotated[
        bool | None, typer.Option(help="replay each step from a CUDA graph; where possible, if not given")
    ] = None,
    resume: Annotated[bool, typer.Option(help="continue from the newest checkpoint in --out")] = False,
) -> None:
    """Train a diffusion model on your images."""
    with plain_errors():
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in context.params.items()}
        state = _find_state(context, arguments, out, resume)
        a = arguments
        if a["data"] is None:
            raise InputError(f"--data is missing: give {', '.join(BUILTIN)}, or a folder of images")
        for name, least in (("steps", 1), ("log_every", 1), ("save_every", 1), ("sample_every", 0)):
            if a[name] < least:
                raise InputError(f"--{name.replace('_', '-')} is {a[name]}; expected at least {least}")
        if a["schedule"] not in SCHEDULES:
            raise InputError(f"schedule {a['schedule']!r} is unknown; there are {', '.join(SCHEDULES)}")
        torch_device = choose_device(a["device"])
        # Stored as what it came to: a run resumed elsewhere must not change its arithmetic.
        a["precision"] = "bf16" if choose_dtype(a["precision"], torch_device) == torch.bfloat16 else "fp32"
        a["loss"] = a["loss"] or ("hybrid" if a["variance"] in LEARNED_VARIANCES else "simple")
        noising = SCHEDULES[a["schedule"]](a["timesteps"])
        diffusion = GaussianDiffusion(
            noising.zero_terminal_snr() if a["zero_terminal_snr"] else noising,
            **{k: a[k] for k in ("prediction", "variance", "loss", "loss_weighting")},
        )
        config = TrainConfig(**{k: a[k] for k in TrainConfig.__dataclass_fields__})
        dataset = _load(a)
        network = UNetConfig(
            image_size=dataset.images.shape[-1],
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
        trainer = Trainer(network, diffusion, config, dataset, torch_device, a["cuda_graph"])
        check_writable_folder(out)
        if state is not None:
            trainer.load(state)
            console.print(f"Resuming at step {trainer.step} from {state}")
        parameters = sum(p.numel() for p in trainer.model.parameters())
        console.print(
            f"{len(dataset)} images {'x'.join(map(str, dataset.images.shape[1:]))} from {dataset.name}"
            f"{f', {network.num_classes} classes' if network.num_classes else ''}; "
            f"{parameters / 1e6:.2f}M parameters; {config.precision} on {torch_device}"
        )
        try:
            finished = run(trainer, out, arguments)
        except NonFiniteLoss as error:
            console.print(f"[bold red]Stopped:[/] {escape(str(error))}")
            raise typer.Exit(1) from None
    if not finished:
        console.print(f"Stopped at step {trainer.step}, saved. Continue with: --out {out} --resume")
        raise typer.Exit(130)
    model = out / "model.safetensors"
    console.print(f"Done: {model}. Sample with: python -m ddpm_fast.sample --model {model}", soft_wrap=True)


def _find_state(context: typer.Context, arguments: dict, out: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, with `arguments` set to those it was started with; None for a new run."""
    state = checkpoint.latest_checkpoint(out)
    if not resume:
        if state is not None:
            raise InputError(
                f"{out} holds a run already ({state.name}): add --resume to continue it, or choose another --out"
            )
        return None
    if state is None:
        raise InputError(f"--resume: there is no checkpoint (step-*.safetensors) in {out}")
    # An option younger than the run: its default is what the run was started with.
    defaults = {option.name: option.get_default(context) for option in context.command.params if not option.required}
    stored = defaults | checkpoint.read_training(state)[1]["arguments"]
    for name, value in stored.items():
        given = context.get_parameter_source(name).name == "COMMANDLINE"
        if name == "precision" and arguments[name] == "auto":
            given = False  # stored as what it came to
        if name in FREE_ON_RESUME and given:
            continue
        if given and name != "data" and arguments[name] != value:
            raise InputError(
                f"--{name.replace('_', '-')} {arguments[name]} differs from the {value} this run was started with, and "
                "would change its result: leave it out, or start a new run"
            )
        if not (name == "data" and given):  # the images may have moved
            arguments[name] = value
    return state


def _load(arguments: dict) -> Dataset:
    """The dataset, with what was skipped shown as it is found."""
    names = ("image_size", "channels", "strict")
    with warnings.catch_warnings(record=True) as caught, Progress(transient=True, console=console) as bar:
        warnings.simplefilter("always")
        task = bar.add_task("loading images")
        dataset = load_dataset(
            arguments["data"],
            **{name: arguments[name] for name in names},
            classes=bool(arguments["classes"]),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for warning in caught:
        console.print(f"[yellow]Warning:[/] {escape(str(warning.message))}")
    return dataset


def run(trainer: Trainer, out: Path, arguments: dict) -> bool:
    """Train up to arguments["steps"]. Returns False if a signal stopped it (after saving).

    Raises NonFiniteLoss, nothing saved after the last good step.
    """
    stopping: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: stopping.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    writer = SummaryWriter(out / "curves", purge_step=trainer.step + 1)
    bar = Progress(
        TextColumn("step"),
        *(MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True)),
        TextColumn("{task.fields[rate]:.0f} images/s  loss {task.fields[loss]:.4f}"),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=arguments["steps"], completed=trainer.step, rate=0.0, loss=math.nan)
    metrics = Metrics(trainer.step)
    started = reported = time.monotonic()
    first_step = saved = trainer.step
    looked = time.monotonic()
    try:
        with bar:
            while trainer.step < arguments["steps"] and not stopping:
                metrics.add(*trainer.train_step())
                step, last = trainer.step, trainer.step == arguments["steps"]
                bar.update(task, completed=step)
                saving = last or step % arguments["save_every"] == 0
                sampling = bool(arguments["sample_every"]) and (last or step % arguments["sample_every"] == 0)
                if saving or sampling or step % arguments["log_every"] == 0:
                    # Nothing is saved before it is known to be good; otherwise nobody waits.
                    found = metrics.look(out, wait=saving or sampling)
                    now = time.monotonic()
                    rate = sum(look.steps for look in found) * trainer.config.batch_size / (now - looked)
                    looked = now if found else looked
                    for look in found:
                        writer.add_scalar("loss", look.loss, look.step)
                        writer.add_scalar("gradient norm", look.norm, look.step)
                        writer.add_scalar("images a second", rate, look.step)
                        bar.update(task, rate=rate, loss=look.loss)
                    if found and not console.is_terminal and (now - reported > PLAIN_REPORT_SECONDS or last):
                        reported = now
                        left = (now - started) / (step - first_step) * (arguments["steps"] - step)
                        console.print(
                            f"step {found[-1].step}/{arguments['steps']}  loss {found[-1].loss:.4f}  "
                            f"{rate:.0f} images/s  {left / 60:.1f} min left"
                        )
                    if saving:
                        trainer.save(out, arguments)
                        saved = step
                    if sampling:
                        _sample(trainer, out, writer)
                    looked += time.monotonic() - now if saving or sampling else 0.0
        if stopping and saved < trainer.step:
            metrics.look(out, wait=True)
            trainer.save(out, arguments)
    finally:
        writer.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return not stopping


class Look(NamedTuple):
    """The means over some steps, `step` being the last of them."""

    step: int
    steps: int
    loss: float
    norm: float


class Metrics:
    """The loss and gradient norm of each step, on their way from the device. They are sent at a look and read at the
    next one, when they have long arrived: the loop waits for no step that it has just started."""

    def __init__(self, step: int):
        self._step = step  # of the last one that was read
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []  # since the last look, on the device
        self._sent: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()  # [2, steps] each

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Of one step more: scalars on the device."""
        self._steps.append((loss, norm))

    def look(self, out: Path, wait: bool) -> list[Look]:
        """What has arrived; with wait, all there is. Raises NonFiniteLoss naming the first bad step."""
        if self._steps:
            self._sent.append(_send(torch.stack([torch.stack(column) for column in zip(*self._steps, strict=True)])))
            self._steps.clear()
        found = []
        # All but what was sent just now, or else a loop that is faster than the device would run ever further ahead.
        while self._sent and (wait or len(self._sent) > 1 or _arrived(self._sent[0][1])):
            numbers, event = self._sent.popleft()
            if event is not None:
                event.synchronize()
            found.append(self._read(numbers, out))
        return found

    def _read(self, numbers: torch.Tensor, out: Path) -> Look:
        finite = numbers.isfinite().all(0).tolist()
        losses, norms = numbers
        if not all(finite):
            i = finite.index(False)
            last_good = checkpoint.latest_checkpoint(out)
            raise NonFiniteLoss(
                f"step {self._step + i + 1} gave the loss {losses[i].item()} and the gradient norm "
                f"{norms[i].item()}. "
                + (f"The last good checkpoint is {last_good}. " if last_good else "")
                + "Lower --lr, lengthen --warmup, or use --precision fp32."
            )
        self._step += len(finite)
        return Look(self._step, len(finite), losses.mean().item(), norms.mean().item())


def _send(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on its way to the CPU, and the event after which it is there; None: at once."""
    if numbers.device.type != "cuda":
        return numbers.cpu(), None
    place = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    place.copy_(numbers, non_blocking=True)
    return place, torch.cuda.current_stream(numbers.device).record_event()


def _arrived(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()


def _sample(trainer: Trainer, out: Path, writer: SummaryWriter) -> None:
    """A grid from the averaged weights: one class a column where there are classes."""
    model = trainer.averaged_model()
    classes = model.config.num_classes
    columns = min(classes, 10) or 8
    n = GRID_SAMPLES // columns * columns
    labels = [i % classes for i in range(n)] if classes else None
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.config.precision == "bf16"):
        x = sample(model, trainer.diffusion, n, steps=min(50, trainer.diffusion.num_timesteps), labels=labels)
    images.save_grid(out / f"samples-{trainer.step:08d}.png", x, columns=columns)
    grid = images.make_grid(images.to_uint8(x), columns=columns)
    writer.add_image("samples", grid, trainer.step, dataformats="HWC")
