"""`python -m ddpm_fast.train --data IMAGES --out FOLDER`: train a model on your images.

The folder gets training states (to resume from), model.safetensors (to sample from), sample grids, curves (log.csv, and
for TensorBoard), and what the run is (config.yaml). Ctrl-C and SIGTERM save first; --resume continues bit for bit.
"""

from __future__ import annotations

import contextlib
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from ddpm_fast.commands.common import App, FlagsOption, path_option, plain_errors
from ddpm_fast.commands.outcome import note
from ddpm_fast.commands.profiling import PROFILE_HELP
from ddpm_fast.commands.quality.settings import FeaturesOption
from ddpm_fast.commands.selecting import ImageColumnOption, LabelColumnOption, SplitOption, SubsetOption
from ddpm_fast.commands.sizes import size_option
from ddpm_fast.commands.stopping import Stopped, stop_signals
from ddpm_fast.commands.together import in_all, in_first, naming_lost_ranks, share_signal
from ddpm_fast.commands.training import fine_tuning, images, resuming, setup
from ddpm_fast.commands.training.augmenting import augment_option
from ddpm_fast.commands.training.log import say, warn
from ddpm_fast.commands.training.records import LOGS, describe_start
from ddpm_fast.commands.training.run import TrainingRun
from ddpm_fast.data import BUILTIN
from ddpm_fast.files.checkpoint import checkpoint_path
from ddpm_fast.loops.distributed import RanksDiffer, join, local_device, rank
from ddpm_fast.loops.metrics import NonFiniteLoss
from ddpm_fast.loops.snapshot import MODEL_NAME
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.loops.train_config import LONGEST_WARMUP, LR_SCHEDULES
from ddpm_fast.objective import LOSSES, PREDICTIONS, VARIANCES, WEIGHTINGS
from ddpm_fast.samplers import SAMPLERS
from ddpm_fast.schedule import SCHEDULES

app = App()


@app.command()
def main(
    context: typer.Context,
    out: Annotated[Path, path_option("folder for checkpoints, samples and curves")],
    data: Annotated[
        str | None,
        path_option(
            f"{', '.join(BUILTIN)}, a folder of images, a .zip of them, .npz or .npy, tar shards "
            "(train-{000..146}.tar), a .parquet, hf:NAME of Hugging Face, or a folder that ddpm_fast.prepare wrote"
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        size_option("scale and cut the images to this size, or to a square of this side; if not given, as they are"),
    ] = None,
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
    split: SplitOption = None,
    subset: SubsetOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    layout: Annotated[str | None, typer.Option(help="of float arrays, if it cannot be told: NCHW or NHWC")] = None,
    value_range: Annotated[
        str | None,
        typer.Option(
            help="LOW,HIGH of float arrays, for all channels or each in turn: becomes [-1, 1]; measured if not given"
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="images that are never trained on, to measure the model on: a number such as 500, or a share such as "
            "0.05; chosen by --seed, evenly over the classes"
        ),
    ] = None,
    flip: Annotated[bool, typer.Option(help="mirror half of the images left-right")] = False,
    crop: Annotated[
        str,
        typer.Option(help="centre: the middle of each picture; random: any part, from pictures a bit larger"),
    ] = "centre",
    augment: Annotated[
        str,
        augment_option("change images, and tell the network how, so that nothing of it is seen in samples"),
    ] = "",
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
    prediction: Annotated[str, typer.Option(help=f"what the network predicts: {', '.join(PREDICTIONS)}")] = "v",
    variance: Annotated[
        str, typer.Option(help=f"variance of the denoising steps: {', '.join(VARIANCES)}")
    ] = "fixed_small",
    loss: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(LOSSES)}; if not given simple, or hybrid where the variance is learned"),
    ] = None,
    loss_weighting: Annotated[
        str, typer.Option(help=f"weight of the error at each timestep: {', '.join(WEIGHTINGS)}")
    ] = "none",
    timestep_sampling: Annotated[
        str, typer.Option(help=f"how timesteps are chosen in training: {', '.join(TIMESTEP_SAMPLINGS)}")
    ] = "stratified",
    steps: Annotated[int, typer.Option(help="number of training steps in all")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="images in a training step, in all processes together")] = 64,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            help="most images that a process puts through the network at once, which bounds its memory; if not given, "
            "its whole share of --batch-size"
        ),
    ] = None,
    grad_checkpoint: Annotated[
        bool,
        typer.Option(
            "--grad-checkpoint/--no-grad-checkpoint",
            help="compute activations twice instead of keeping them: less memory, more time, the same weights",
        ),
    ] = False,
    lr: Annotated[
        float | None,
        typer.Option(
            help=f"learning rate after the warm-up; if not given {setup.LR}, or {setup.FINE_TUNING_LR} with --init-from"
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="training steps over which the learning rate rises linearly; if not given, a tenth of the start's "
            f"--steps, but at most {LONGEST_WARMUP}"
        ),
    ] = None,
    lr_schedule: Annotated[
        str, typer.Option(help=f"how the learning rate falls after the warm-up: {', '.join(LR_SCHEDULES)}")
    ] = "constant",
    lr_steps: Annotated[
        int | None,
        typer.Option(help="training step at which a cosine has fallen to 0; if not given, the --steps of the start"),
    ] = None,
    beta1: Annotated[float, typer.Option(help="AdamW's decay of the mean gradient")] = 0.9,
    beta2: Annotated[float, typer.Option(help="AdamW's decay of the mean squared gradient")] = 0.999,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay")] = 0.0,
    grad_clip: Annotated[float, typer.Option(help="largest gradient norm; longer gradients are scaled down")] = 1.0,
    ema_decay: Annotated[
        float,
        typer.Option(help="largest decay of the averaged weights, which rises with the steps: it fits any run"),
    ] = 0.9999,
    average_widths: Annotated[
        str,
        typer.Option(
            help="also keep power-function averages of these widths, such as 0.05,0.1, from which ddpm_fast.average "
            "makes any other"
        ),
    ] = "",
    label_drop: Annotated[
        float, typer.Option(help="share of labels dropped, so that the model also learns unconditional sampling")
    ] = 0.1,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16 (autocast), or auto: the fastest one here")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="seed of everything random in the training")] = 0,
    log: Annotated[
        str,
        typer.Option(
            "--log",
            "--log-to",  # torchrun takes the first for one of its own that begin with it
            help=f"where the curves go besides log.csv: {' or '.join(LOGS)}, or both with a comma between them; "
            "empty for none",
        ),
    ] = "tensorboard",
    log_every: Annotated[int, typer.Option(help="training steps between two points of the curves")] = 50,
    sample_every: Annotated[int, typer.Option(help="training steps between two sample grids; 0 for none")] = 1000,
    save_every: Annotated[int, typer.Option(help="training steps between two checkpoints")] = 1000,
    evaluate_every: Annotated[
        int,
        typer.Option(
            help="training steps between two evaluations, which put distances between samples and images, and the "
            "held-out loss, on the curves, and keep the best model; 0 for none"
        ),
    ] = 0,
    evaluate_n: Annotated[
        int, typer.Option(help="samples of an evaluation; 0 for none, with --held-out: its loss alone")
    ] = 1000,
    evaluate_steps: Annotated[int, typer.Option(help="sampling steps of an evaluation's samples")] = 20,
    evaluate_sampler: Annotated[
        str, typer.Option(help=f"what draws an evaluation's samples: {', '.join(SAMPLERS)}")
    ] = "dpmpp_2m",
    features: FeaturesOption = None,
    average_every: Annotated[
        int | None,
        typer.Option(
            help="training steps between two saves of --average-widths; if not given, a 32nd of the start's --steps"
        ),
    ] = None,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(help="replay each training step from a CUDA graph; if not given, wherever that is possible"),
    ] = None,
    compile: Annotated[
        bool, typer.Option(help="call the network through torch.compile: may pay for long runs")
    ] = False,
    profile: Annotated[str | None, path_option(PROFILE_HELP)] = None,
    init_from: Annotated[
        str | None,
        path_option(
            "begin with a model's weights, from whatever --model of the other commands takes; the network follows"
        ),
    ] = None,
    flags: FlagsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint in --out")] = False,
    auto_resume: Annotated[
        bool,
        typer.Option("--auto-resume", help="continue if there is a checkpoint in --out, otherwise start a new run"),
    ] = False,
    change: Annotated[
        bool,
        typer.Option(
            "--change",
            help="with --resume: let the options that are given replace the run's from here on: "
            + ", ".join(f"--{name.replace('_', '-')}" for name in sorted(resuming.CHANGEABLE)),
        ),
    ] = False,
    new_data: Annotated[
        bool,
        typer.Option("--new-data", help="with --resume: go on though the images or class names are not the run's"),
    ] = False,
) -> None:
    """Train a diffusion model on your images."""
    arguments = {**context.params, "out": str(out), "data": data and images.absolute(data)}
    arguments["init_from"] = init_from and fine_tuning.stored_name(init_from)
    arguments["features"] = features and images.absolute_file(features)
    options = resuming.Options.of(context, arguments)
    with plain_errors():
        place = local_device(device)
        with join(place), naming_lost_ranks():
            _main(options.of_the_first(), place)


def _main(options: resuming.Options, device: torch.device) -> None:
    """The command, once this process knows which others it trains with."""
    with (
        stop_signals("stopping, before the first step", lambda: "aborted, before the first step") as stopping,
        contextlib.ExitStack() as stack,
    ):
        if rank() > 0:
            stopping.first = ""  # the first process speaks
        new: list[Path] = []
        try:
            lock = in_all(lambda: stack.enter_context(resuming.locked_folder(options.out)) if rank() == 0 else None)
            ready = setup.prepare(options, device, stopping)
            stack.callback(ready.trainer.close)
            run = TrainingRun(ready, options.arguments, stopping, lock)
            new = describe_start(ready.trainer, options, warn) if rank() == 0 else []
            _train(run)
        except Stopped:
            for path in new:
                path.unlink(missing_ok=True)
            share_signal(stopping, say)
            say("Stopped before the first step was over; there is nothing to save.")
        if stopping:
            raise typer.Exit(stopping.status)


def _train(run: TrainingRun) -> None:
    """Train, and say how it ended. Raises typer.Exit unless it ended well."""
    try:
        run.train()
    except NonFiniteLoss as error:
        told = in_first(partial(resuming.set_diverged_aside, run.out, error, run.arguments))
        say(f"[bold red]Stopped:[/] {escape(told)}")
        raise typer.Exit(1) from None
    except RanksDiffer as error:
        say(f"[bold red]Stopped:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    state = None if run.saver.saved is None else str(run.saver.saved)
    note(step=run.trainer.step, steps=run.arguments["steps"], folder=str(run.out), state=state)
    step, out = run.trainer.step, escape(shlex.quote(str(run.out)))
    if run.saver.saved_step < step:
        saved, last = escape(str(run.saver.saved or "none")), checkpoint_path(run.out, step)
        what = "whose model could not be written" if run.saver.saved == last else "which could not be saved"
        say(f"[bold red]Stopped at step {step}, {what}.[/] The last saved state is {saved}.")
        raise typer.Exit(1)
    if step < run.arguments["steps"]:
        say(f"Stopped at step {step}, saved. Continue with: python -m ddpm_fast.train --out {out} --resume")
    else:
        model = escape(shlex.quote(str(run.out / MODEL_NAME)))
        say(f"Done: {model}. Sample with: python -m ddpm_fast.sample --model {model}")
