"""How time and peak memory grow: `python -m benchmarks growth --out FILE.json`. One size changes at a time, and each
point is measured in a process of its own, which gives memory that nothing else has touched."""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import ddpm_fast as df
from benchmarks import machine, networks, timing
from benchmarks.machine import DTYPES
from benchmarks.rows import duration
from benchmarks.runs import Options, Run, say
from ddpm_fast.data import Dataset
from ddpm_fast.errors import InputError
from ddpm_fast.loops.distributed import join, local_device, rank
from ddpm_fast.loops.training import TrainConfig, Trainer
from tests.support.networks import random_unet

TIMED = 3  # runs whose median is a point's time, after the one whose memory is measured
ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Point:
    """One piece of work. task: "sampling", a chain; "training", a step of Trainer; "step", the forward and backward
    pass of a training step without optimiser; "loss", the same without the network. stored: whether the noise of the
    last two is a tensor that is kept, or a key. threads: 0 for as many as there are by default. ranks: processes of
    torchrun that share the batch, and the cores; 0 for one that was started without it."""

    task: str
    network: str
    batch: int
    image_size: int
    steps: int = 1
    threads: int = 0
    dtype: str = "fp32"
    stored: bool = False
    device: str = "cpu"
    ranks: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, networks.SIZES[self.network].in_channels, self.image_size, self.image_size)


class Series(NamedTuple):
    """Points that differ in one field: "batch", "image_size", "steps", "threads", "ranks", or "stored", the noise's."""

    fixed: Point
    axis: str
    values: tuple[int, ...]

    def __str__(self) -> str:
        return f"noise {self.fixed.task}" if self.axis == "stored" else f"{self.fixed.task} {self.axis}"


def series(quick: bool, device: torch.device) -> list[Series]:
    """CIFAR-10's network, whose attention is at 16 pixels in images of 16 to 128, or a tiny one."""
    place = str(device)
    threads = tuple(2**i for i in range(machine.cores().bit_length()))
    if quick:
        chain = Point("sampling", "quick", 2, 16, steps=2, device=place)
        axes = {"batch": (1, 2), "image_size": (8, 16), "steps": (1, 2), "threads": (1,)}
    elif device.type == "cuda":
        chain = Point("sampling", "cifar10", 64, 32, steps=20, device=place)
        axes = {"batch": (1, 4, 16, 64, 256), "image_size": (16, 32, 64, 128), "steps": (5, 10, 20, 40)}
    else:
        chain = Point("sampling", "cifar10", 2, 32, steps=4, device=place)
        axes = {"batch": (1, 2, 4, 8), "image_size": (16, 32, 64, 128), "steps": (1, 2, 4, 8), "threads": threads}
    training = dataclasses.replace(chain, task="training", steps=1)
    made = [Series(chain, axis, values) for axis, values in axes.items()]
    made += [Series(training, axis, values) for axis, values in axes.items() if axis != "steps"]
    places = threads if device.type == "cpu" else tuple(2**i for i in range(torch.cuda.device_count().bit_length()))
    shared = dataclasses.replace(training, batch=2 * places[-1] if quick else 8 * training.batch)
    made.append(Series(shared, "ranks", (1,) if quick else places))
    step = dataclasses.replace(training, task="step")
    loss = dataclasses.replace(step, task="loss", batch=8 * step.batch, image_size=32 if quick else 256)
    return [*made, Series(step, "stored", (1, 0)), Series(loss, "stored", (1, 0))]


def work(point: Point, device: torch.device) -> Callable[[], object]:
    """What is measured of a point, ready to be called."""
    torch.manual_seed(0)
    diffusion = df.GaussianDiffusion(df.Schedule.linear(1000), variance="fixed_small")
    sizes = {} if point.task == "loss" else {"image_size": point.image_size}  # without a network any size will do
    config = dataclasses.replace(networks.SIZES[point.network], **sizes)
    shape, images = point.shape, torch.randint(0, 256, point.shape, dtype=torch.uint8)
    if point.task == "training":
        options = TrainConfig(batch_size=point.batch, precision=point.dtype)
        return Trainer(config, diffusion, options, Dataset(images, None, None, "random pixels"), device).train_step
    if point.task == "sampling":
        dtype = DTYPES[point.dtype]
        model = df.UNet(config).to(device, dtype).eval()
        return lambda: df.sample(model, diffusion, point.batch, steps=point.steps)
    model = random_unet(**config.to_dict()).train().to(device) if point.task == "step" else None
    output = None if model else torch.randn(shape, device=device, requires_grad=True)
    t, x0 = torch.randint(1000, shape[:1], device=device), images.to(device)
    key = df.NoiseKey.of(0, point.batch, stream=df.Stream.TRAINING, device=device)

    def step() -> None:
        noise = torch.randn(shape, device=device) if point.stored else key
        x_t = diffusion.q_sample(x0, t, noise)
        diffusion.training_losses(model(x_t, t) if model else output, x0, t, noise).mean().backward()

    return step


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS", those in memory now, or "VmHWM", the most that were since the last "VmRSS"."""
    if name == "VmRSS":
        with contextlib.suppress(OSError):  # where the kernel does not let it, since the beginning
            Path("/proc/self/clear_refs").write_text("5")
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise InputError("peak memory on a CPU is read from /proc/self/status, which is not here") from None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def measured(point: Point) -> dict:
    """A point's median time, and the peak of its first run above what was in memory before, in this process."""
    device = local_device(torch.device(point.device).type) if point.ranks else torch.device(point.device)
    if point.threads:
        torch.set_num_threads(point.threads)
    run = work(point, device)
    # Libraries load themselves and take their workspaces at their first use: those are no part of the work's memory.
    first = dataclasses.replace(point, network="quick", image_size=networks.QUICK.image_size, steps=1)
    work(dataclasses.replace(first, batch=max(1, point.ranks)), device)()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        before = memory("VmRSS")
        run()
        peak = memory("VmHWM") - before
    seconds = [timing.seconds_of(run, device) for _ in range(TIMED)]
    return {"seconds": float(np.median(seconds)), "peak_bytes": max(0, peak)}


def measured_apart(point: Point) -> dict:
    """measured(point) in processes of its own, of which the first one prints it. Raises InputError if that fails."""
    starter: list[str] = []
    environment = dict(os.environ)
    if point.ranks:
        starter = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(point.ranks), "-m"]
        environment["OMP_NUM_THREADS"] = str(max(1, machine.cores() // point.ranks))
    command = [sys.executable, "-m", *starter, "benchmarks.growth", json.dumps(dataclasses.asdict(point))]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if made.returncode:
        reason = (made.stderr.strip() or f"status {made.returncode}").splitlines()[-1]
        raise InputError(f"{point.task}, batch {point.batch}, {point.image_size} pixels: {reason}")
    return json.loads(made.stdout.splitlines()[-1])


def measure(chosen: Series, run: Run) -> None:
    """Measures a series; its points are put down as they come."""
    task, axis, fixed = chosen.fixed.task, chosen.axis, dataclasses.asdict(chosen.fixed)
    del fixed[axis]
    line = {"task": task, "axis": axis, "fixed": fixed, "points": [], "noise_bytes": 4 * math.prod(chosen.fixed.shape)}
    run.found["growth"].append(line)
    for value in chosen.values:
        point = {"x": value, **measured_apart(dataclasses.replace(chosen.fixed, **{axis: value}))}
        line["points"].append(point)
        say(f"{task}, {axis} {value}: {duration(point['seconds'])}, {point['peak_bytes'] / 2**20:.4g} MiB")
        run.write()


def main(options: Options) -> None:
    """Measures how time and peak memory grow, and writes the points to a file."""
    run = Run(options.checked(0, 0), {}, growth=[])
    run.each(options.matching(series(options.quick, run.device)), lambda chosen: measure(chosen, run))
    run.finish()


if __name__ == "__main__":  # in a process of measured_apart
    chosen = Point(**json.loads(sys.argv[1]))
    with join(local_device(torch.device(chosen.device).type)):
        result = measured(chosen)
        if rank() == 0:
            print(json.dumps(result))
