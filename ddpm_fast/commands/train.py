"""`python -m ddpm_fast.train --data IMAGES --out FOLDER`: train a model on your images.

The folder gets training states (to resume from), model.safetensors (to sample from), sample grids, and curves for
TensorBoard. Ctrl-C and SIGTERM save first; --resume continues bit for bit.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ddpm_fast.commands import fine_tuning, resuming, training_setup
from ddpm_fast.commands.common import App, choose_device, path_option, plain_errors
from ddpm_fast.commands.profiling import PROFILE_HELP
from ddpm_fast.commands.stopping import Stopped, Stopping, stop_signals
from ddpm_fast.commands.training_log import say
from ddpm_fast.commands.training_run import TrainingRun
from ddpm_fast.data import BUILTIN
from ddpm_fast.loops.metrics import NonFiniteLoss
from ddpm_fast.loops.timesteps import TIMESTEP_SAMPLINGS
from ddpm_fast.loops.training import MODEL_NAME, Trainer
from ddpm_fast.loops.training_state import check_network
from ddpm_fast.objective import LOSSES, PREDICTIONS, VARIANCES, WEIGHTINGS
from ddpm_fast.schedule import SCHEDULES

app = App()


@app.command()
def main(
    context: typer.Context,
    out: Annotated[Path, path_option("folder for checkpoints, samples and curves")],
    data: Annotated[
        str | None, path_option(f"{', '.join(BUILTIN)}, a folder of images, a .zip of them, .npz or .npy")
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
    layout: Annotated[str | None, typer.Option(help="of float arrays, if it cannot be told: NCHW or NHWC")] = None,
    value_range: Annotated[
        str | None,
        typer.Option(
            help="LOW,HIGH of float arrays, for all channels or each in turn: becomes [-1, 1]; measured if not given"
        ),
    ] = None,
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
    ] = "uniform",
    steps: Annotated[int, typer.Option(help="number of training steps in all")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="images in a training step")] = 64,
    lr: Annotated[float, typer.Option(help="learning rate after the warm-up")] = 2e-4,
    warmup: Annotated[int, typer.Option(help="training steps over which the learning rate rises linearly")] = 500,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay")] = 0.0,
    grad_clip: Annotated[float, typer.Option(help="largest gradient norm; longer gradients are scaled down")] = 1.0,
    ema_decay: Annotated[
        float,
        typer.Option(help="largest decay of the averaged weights, which rises with the steps: it fits any run"),
    ] = 0.9999,
    label_drop: Annotated[
        float, typer.Option(help="share of labels dropped, so that the model also learns unconditional sampling")
    ] = 0.1,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16 (autocast), or auto: the fastest one here")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="seed of everything random in the training")] = 0,
    log_every: Annotated[int, typer.Option(help="training steps between two points of the curves")] = 50,
    sample_every: Annotated[int, typer.Option(help="training steps between two sample grids; 0 for none")] = 1000,
    save_every: Annotated[int, typer.Option(help="training steps between two checkpoints")] = 1000,
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
        path_option("begin with a model's weights: a shipped name, a file or a run's folder; the network follows it"),
    ] = None,
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
    arguments = {**context.params, "out": str(out), "data": data and training_setup.absolute(data)}
    arguments["init_from"] = init_from and fine_tuning.stored_name(init_from)
    with (
        plain_errors(),
        stop_signals("stopping, before the first step", lambda: "aborted, before the first step") as stopping,
        resuming.locked_folder(out) as lock,
    ):
        try:
            trainer, state = _prepare(resuming.Options.of(context, arguments), stopping)
            run = TrainingRun(trainer, arguments, stopping, lock, state.path if state else None)
            _train(run)
        except Stopped:
            say("Stopped before the first step was over; there is nothing to save.")
        if stopping:
            raise typer.Exit(stopping.status)


def _prepare(options: resuming.Options, stopping: Stopping) -> tuple[Trainer, resuming.State | None]:
    """The trainer, ready for its next step, and the state that it was resumed from."""
    arguments = options.arguments
    out = Path(arguments["out"])
    state = resuming.find_state(out, arguments)
    changes = resuming.adopt(options, state) if state is not None else {}
    training_setup.check(arguments)
    device = choose_device(arguments["device"])
    training_setup.choose(arguments, device)
    begun = fine_tuning.begin(options, state)
    diffusion = begun.diffusion if begun is not None else training_setup.make_diffusion(arguments)
    config = training_setup.make_config(arguments)
    dataset = training_setup.load_images(arguments, stopping, resuming.value_range(state))
    if state is not None:
        dataset, differing = resuming.match_data(dataset, state, arguments["new_data"])
        changes |= differing
    network = training_setup.make_network(arguments, dataset, diffusion, begun.network if begun else None)
    if state is not None:
        check_network(state.path, state.meta, network)  # before it is built
    trainer = Trainer(network, diffusion, config, dataset, device, arguments["cuda_graph"], arguments["compile"])
    if begun is not None and begun.loaded is not None:
        fine_tuning.load_weights(trainer, begun.loaded)
    if state is not None:
        trainer.load(state.path)
        say(f"Resuming at step {trainer.step} from {escape(str(state.path))}")
        resuming.compare_machine(state.meta, device)
        if changes:
            trainer.history.append({"step": trainer.step, **changes})
            told = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changes.items())
            say(f"Changed from here on: {escape(told)}")
        if trainer.complete(out):
            say(f"{MODEL_NAME} was missing, damaged or of another step, and is written again")
    say(escape(training_setup.description(trainer)))
    return trainer, state


def _train(run: TrainingRun) -> None:
    """Train, and say how it ended. Raises typer.Exit unless it ended well."""
    try:
        run.train()
    except NonFiniteLoss as error:
        say(f"[bold red]Stopped:[/] {escape(resuming.set_diverged_aside(run.out, error, run.arguments))}")
        raise typer.Exit(1) from None
    step, out = run.trainer.step, escape(shlex.quote(str(run.out)))
    if run.saved_step < step:
        saved = escape(str(run.saved or "none"))
        say(f"[bold red]Stopped at step {step}, which could not be saved.[/] The last saved state is {saved}.")
        raise typer.Exit(1)
    if step < run.arguments["steps"]:
        say(f"Stopped at step {step}, saved. Continue with: python -m ddpm_fast.train --out {out} --resume")
    else:
        model = escape(shlex.quote(str(run.out / MODEL_NAME)))
        say(f"Done: {model}. Sample with: python -m ddpm_fast.sample --model {model}")
