"""Sampling and training end to end: `python -m benchmarks.loop --out FILE.json`.

The network is the CIFAR-10 one of Ho et al. 2020. Its weights are random, which its speed does not depend on. Beside
ours stand the loops that one would write otherwise: plain torch on the same network, as the reference codes have it,
and diffusers' own loop with its own network of the same architecture.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.markup import escape
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.commands import DTYPE_NAMES, choose_device, console, plain_errors
from ddpm_fast.data import Dataset, batch_indices
from ddpm_fast.errors import InputError
from ddpm_fast.samplers import SamplerTable, make_table
from ddpm_fast.training import TrainConfig, Trainer

from . import machine, report, timing
from .operations import T, noised, scheduler, stepped

_HO = {"downsample_padding": "asymmetric", "norm_eps": 1e-6, "time_denominator": "half-1", "time_order": "sin|cos"}
NETWORK = df.UNetConfig(**_HO)
QUICK_NETWORK = df.UNetConfig(
    image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), **_HO
)
# Of ||out - truth|| / ||truth||. Two ways of the same steps round differently, and a network passes that on.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}
# How ours is asked to run, by the kind of device.
WAYS = {
    "cpu": {"ddpm_fast": {}},
    "cuda": {"graph": {"cuda_graph": True}, "no graph": {"cuda_graph": False}},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything is run. steps: of a chain. training_steps: in a round."""

    network: df.UNetConfig = NETWORK
    sampling: tuple[int, ...] = (1, 64, 512)
    steps: int = 50
    training: int = 128
    training_steps: int = 10
    images: int = 4096
    rounds: int = 5


QUICK = Sizes(QUICK_NETWORK, sampling=(1, 2), steps=3, training=4, training_steps=2, images=16, rounds=2)


@torch.no_grad()
def without_zeros(model: nn.Module) -> nn.Module:
    """The model with random values where its layers start at zero: they would make the network's output 0."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def peer_network(config: df.UNetConfig) -> nn.Module:
    """diffusers' network of the same architecture as UNet(config), without classes and with one head."""
    from diffusers import UNet2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of a list of modules even where that is empty
    attends = [height in config.attention_resolutions for height in config.resolutions]
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=config.num_res_blocks,
        block_out_channels=config.level_channels,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        downsample_padding=0 if config.downsample_padding == "asymmetric" else 1,
        flip_sin_to_cos=config.time_order == "cos|sin",
        freq_shift=1 if config.time_denominator == "half-1" else 0,
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        attention_head_dim=None,
    )


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def plain_sampling(model: nn.Module, table: SamplerTable, x: Tensor, normal: Callable[[int], Tensor]) -> Tensor:
    """Ancestral sampling as one writes it in plain torch; normal(i) is the noise of row i."""
    rows, dtype = table.coefficients.to(x.device, torch.float32), next(model.parameters()).dtype
    for i, t in enumerate(table.timesteps.tolist()):
        output = model(x.to(dtype), torch.full((len(x),), t, device=x.device))
        x = stepped(x, output, rows[i], normal(i))
    return x


@torch.inference_mode()
def peer_sampling(model: nn.Module, chain, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The loop of diffusers' DDPMPipeline."""
    image = torch.randn(shape, dtype=model.dtype, device=device)
    for t in chain.timesteps:
        image = chain.step(model(image, t).sample, t, image).prev_sample
    return image


class PlainTraining:
    """A training step as the reference codes have it, on a copy of a network."""

    def __init__(self, model: nn.Module, diffusion: df.GaussianDiffusion, config: TrainConfig, dataset: Dataset):
        self.model, self.config, self.dataset = copy.deepcopy(model), config, dataset
        self.device = next(model.parameters()).device
        self.table = diffusion.schedule.q_sample_table().to(self.device, torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]

    def loss(self, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        x_t = noised(images, t, self.table, noise)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.model(x_t, t)
        return F.mse_loss(output.float(), noise)

    def step(self) -> None:
        images, _ = self.dataset.batch(torch.randint(len(self.dataset), (self.config.batch_size,)))
        images = images.to(self.device)
        t = torch.randint(T, (len(images),), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(images, t, torch.randn(images.shape, device=self.device)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.average, self.model.parameters(), strict=True):
                average.mul_(self.config.ema_decay).add_(parameter, alpha=1 - self.config.ema_decay)


def deviation(out: Tensor, truth: Tensor, tolerance: float, what: str) -> float:
    """||out - truth|| / ||truth||. Raises InputError beyond the tolerance, and for NaN."""
    error = float((out.double() - truth.double()).norm() / truth.double().norm())
    if not error <= tolerance:
        raise InputError(f"{what} is off by {error:.3g}; expected at most {tolerance:g} of the plain loop's result")
    return error


def compared(runs: dict[str, Callable[[], object]], ours: set[str], rounds: int, device: torch.device, **row) -> list:
    """The results of runs that take turns, one for each pair of ours and a baseline. row: what is said of all; its
    "steps" and "batch" divide the times."""
    batches = [timing.Batch(run, row["steps"]) for run in runs.values()]
    seconds = dict(zip(runs, timing.interleaved(batches, rounds, device).T, strict=True))
    said = {
        label: {
            "median_s": float(np.median(times)),
            "min_s": float(times.min()),
            "images_per_s": row["batch"] / float(np.median(times)) / (row["steps"] if row["what"] == "sampling" else 1),
        }
        for label, times in seconds.items()
    }
    return [
        {
            **row,
            **{"measured": mine, "baseline": other, **timing.ratio(seconds[other], seconds[mine])},
            **{mine: said[mine], other: said[other]},
        }
        for mine in runs
        if mine in ours
        for other in runs
        if other not in ours
    ]


def sampling(sizes: Sizes, n: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """n images in a chain of sizes.steps: ours in each way, the plain loop, and diffusers' where it is installed."""
    torch.manual_seed(0)
    diffusion = df.GaussianDiffusion(df.Schedule.linear(T), variance="fixed_small")
    model = without_zeros(df.UNet(sizes.network)).to(device, dtype).eval()
    shape = (n, sizes.network.in_channels, sizes.network.image_size, sizes.network.image_size)
    table = make_table(diffusion, "ddpm", sizes.steps)

    def normals(i: int) -> Tensor:
        stream = df.Stream.REVERSE if i >= 0 else df.Stream.INITIAL
        key = df.NoiseKey.of(0, n, step=max(i, 0), stream=stream, device=device)
        return df.ops.normal(key, shape[1:], memory_format=torch.channels_last)

    truth = plain_sampling(model, table, normals(-1), normals)
    runs: dict[str, Callable[[], object]] = {}
    errors = {}
    for label, options in WAYS[device.type].items():
        runs[label] = lambda options=options: df.sample(model, diffusion, n, steps=sizes.steps, **options)
        errors[label] = deviation(runs[label](), truth, TOLERANCE[dtype], f"sampling, {label}")
    runs["torch"] = lambda: plain_sampling(
        model, table, torch.randn(shape, device=device), lambda i: torch.randn(shape, device=device)
    )
    if importlib.util.find_spec("diffusers"):
        peer, chain = peer_network(sizes.network).to(device, dtype).eval(), scheduler()
        if parameters(peer) != parameters(model):
            raise InputError(f"diffusers' network has {parameters(peer)} parameters; expected {parameters(model)}")
        chain.set_timesteps(sizes.steps)
        runs["diffusers"] = lambda: peer_sampling(peer, chain, shape, device)
    row = {"what": "sampling", "dtype": DTYPE_NAMES[dtype], "batch": n, "steps": sizes.steps, "errors": errors}
    return compared(runs, set(errors), sizes.rounds, device, **row)


def training(sizes: Sizes, precision: str, device: torch.device) -> list[dict]:
    """A training step: ours in each way, and the plain one on the same network."""
    torch.manual_seed(0)
    diffusion = df.GaussianDiffusion(df.Schedule.linear(T))
    config = TrainConfig(batch_size=sizes.training, precision=precision)
    side = sizes.network.image_size
    images = torch.randint(0, 256, (sizes.images, sizes.network.in_channels, side, side), dtype=torch.uint8)
    dataset = Dataset(images, None, None, "random pixels")
    tolerance = TOLERANCE[torch.float32 if precision == "fp32" else torch.bfloat16]
    runs: dict[str, Callable[[], object]] = {}
    errors = {}

    def several(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(sizes.training_steps):
                step()

        return run

    for label, options in WAYS[device.type].items():
        trainer = Trainer(sizes.network, diffusion, config, dataset, device, **options)
        without_zeros(trainer.model)
        plain = PlainTraining(trainer.model, diffusion, config, dataset)
        key = df.NoiseKey.of(config.seed, sizes.training, stream=df.Stream.TRAINING, device=device)
        t, _ = trainer.timestep_sampler.sample(dataclasses.replace(key, stream=df.Stream.TIMESTEP))
        first, _ = dataset.batch(batch_indices(config.seed, 0, sizes.training, len(dataset)))
        truth = plain.loss(first.to(device), t, df.ops.normal(key, images.shape[1:])).detach()
        errors[label] = deviation(trainer.train_step()[0], truth, tolerance, f"the first training loss, {label}")
        runs[label] = several(trainer.train_step)
    runs["torch"] = several(plain.step)
    row = {"what": "training", "dtype": precision, "batch": sizes.training, "steps": sizes.training_steps}
    return compared(runs, set(errors), sizes.rounds, device, **row, errors=errors)


COLUMNS = ("loop", "ours", "a step", "images/s", "error", "baseline", "a step", "images/s", "speed-up", "95% interval")


def cells(line: dict) -> list[str]:
    """A result as text, under COLUMNS."""
    ours, other = line[line["measured"]], line[line["baseline"]]
    low, high = line["speedup_95"]
    return [
        *(f"{line['what']} {line['dtype']} batch {line['batch']}", line["measured"]),
        *(report.duration(ours["median_s"]), f"{ours['images_per_s']:.4g}", f"{line['errors'][line['measured']]:.0e}"),
        *(line["baseline"], report.duration(other["median_s"]), f"{other['images_per_s']:.4g}"),
        *(f"{line['speedup']:.2f}", f"{low:.2f}..{high:.2f}"),
    ]


@app.command()
def main(
    out: report.Out,
    page: report.Page = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny network, few steps: does it run and match?")] = False,
    device: report.Device = "auto",
    only: Annotated[str, typer.Option(help="Only what holds this, such as 'sampling bf16'.")] = "",
    minutes: report.Minutes = None,
) -> None:
    """Time sampling and training beside the loops one would write otherwise, in turns; write the results to a file."""
    with plain_errors():
        started, place, sizes = time.monotonic(), choose_device(device), QUICK if quick else Sizes()
        report.check(out, page)
        tasks: dict[str, Callable[[], list[dict]]] = {}
        for dtype, name in DTYPE_NAMES.items():
            tasks[f"training {name}"] = lambda name=name: training(sizes, name, place)
            for n in sizes.sampling:
                tasks[f"sampling {name} {n}"] = lambda n=n, dtype=dtype: sampling(sizes, n, dtype, place)
        tasks = {name: task for name, task in tasks.items() if only in name}
        if not tasks:
            raise InputError(f"nothing holds {only!r}; expected part of such as 'training fp32' or 'sampling bf16 64'")
        where = machine.environment(place)
        absent = [] if importlib.util.find_spec("diffusers") else ["diffusers is not installed: its loop is not beside"]
        results, failures = [], []
        for name, task in tasks.items():
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                failures.append(f"{name}: the {minutes:g} minutes were over")
                continue
            console.print(name)
            try:
                results += task()
            except (InputError, torch.OutOfMemoryError) as error:
                failures.append(f"{name}: {str(error).splitlines()[0]}")
            if place.type == "cuda":
                with contextlib.suppress(RuntimeError):  # of a GPU that is beyond help: the next task says so
                    torch.cuda.empty_cache()
        made = {
            **where,
            "device": str(place),
            "sizes": {**dataclasses.asdict(sizes), "network": sizes.network.to_dict()},
            "tf32": {
                "convolutions": torch.backends.cudnn.allow_tf32,
                "matrix_products": torch.backends.cuda.matmul.allow_tf32,
            },
            "absent": absent,
            "failures": failures,
            "results": results,
        }
        text = f"# Loops\n\n{report.title(made)}; {sizes.rounds} rounds, medians. {made['date']}.\n"
        text += f"images/s in sampling: of chains of {sizes.steps} steps.\n\n"
        text += report.markdown_table(COLUMNS, map(cells, results)) + "".join(f"\n{x}\n" for x in absent + failures)
        report.write(made, text, out, page)
        for line in results:
            what, ours, step, rate, error, baseline, other, _, speedup, interval = cells(line)
            console.print(
                escape(f"{what} [{ours}] {step} a step, {rate} images/s, error {error}; {baseline} {other}: ")
                + f"{speedup}x ({interval})",
                soft_wrap=True,
            )
        for message in absent:
            console.print("[yellow]Absent:[/]", escape(message), soft_wrap=True)
        for message in failures:
            console.print("[red]Failed:[/]", escape(message), soft_wrap=True)
        if failures:
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
