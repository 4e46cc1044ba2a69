"""How time and peak memory grow: `python -m benchmarks.growth --out FILE.json`.

Sampling and a training step of ours against the batch size, the image size, the number of steps and the number of
threads, one at a time. Each point is measured in a process of its own, which gives memory that nothing else has
touched; the exponent is the slope of a least-squares line through the points' logarithms: 1 is proportional, 0 does not
grow. And the peak memory of a training step with its noise stored, and regenerated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.markup import escape

import ddpm_fast as df
from ddpm_fast import machine, networks, report, timing
from ddpm_fast.commands.common import DTYPE_NAMES, choose_device, console, plain_errors
from ddpm_fast.data import Dataset
from ddpm_fast.errors import InputError
from ddpm_fast.loops.training import TrainConfig, Trainer

TASKS = ("sampling", "training", "step", "loss")
TIMED = 3  # runs whose median is a point's time, after the one whose memory is measured
ROOT = Path(__file__).parent.parent

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True)
class Point:
    """One piece of work. task: "sampling", a chain; "training", a step of Trainer; "step", the forward and backward
    pass of a training step without optimiser; "loss", the same without the network. stored: whether the noise of the
    last two is a tensor that is kept, or a key. threads: 0 for as many as there are by default."""

    task: str
    network: str
    batch: int
    image_size: int
    steps: int = 1
    threads: int = 0
    dtype: str = "fp32"
    stored: bool = False
    device: str = "cpu"

    def __post_init__(self):
        if self.task not in TASKS:
            raise InputError(f"task {self.task!r} is unknown; there are {', '.join(TASKS)}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, networks.SIZES[self.network].in_channels, self.image_size, self.image_size)

    @property
    def config(self) -> df.UNetConfig:
        return dataclasses.replace(networks.SIZES[self.network], image_size=self.image_size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which points: the fixed ones, and along each axis the values that replace one of theirs."""

    sampling: Point
    training: Point
    axes: dict[str, tuple[int, ...]]
    loss_image_size: int


def plan(quick: bool, device: torch.device) -> Plan:
    """CIFAR-10's network, whose attention is at 16 pixels in images of 16 to 128, or a tiny one."""
    threads = tuple(2**i for i in range(machine.cores().bit_length())) if device.type == "cpu" else ()
    if quick:
        point = Point("sampling", "quick", 2, 16, steps=2, device=str(device))
        axes = {"batch": (1, 2), "image_size": (8, 16), "steps": (1, 2), "threads": threads[:1]}
        return Plan(point, dataclasses.replace(point, task="training", steps=1), axes, 32)
    on_gpu = device.type == "cuda"
    point = Point("sampling", "cifar10", 64 if on_gpu else 2, 32, steps=20 if on_gpu else 4, device=str(device))
    axes = {
        "batch": (1, 4, 16, 64, 256) if on_gpu else (1, 2, 4, 8),
        "image_size": (16, 32, 64, 128),
        "steps": (5, 10, 20, 40) if on_gpu else (1, 2, 4, 8),
        "threads": threads,
    }
    return Plan(point, dataclasses.replace(point, task="training", steps=1), axes, 256)


def work(point: Point, device: torch.device) -> Callable[[], object]:
    """What is measured of a point, ready to be called."""
    torch.manual_seed(0)
    diffusion = df.GaussianDiffusion(df.Schedule.linear(1000), variance="fixed_small")
    shape = point.shape
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    if point.task == "training":
        options = TrainConfig(batch_size=point.batch, precision=point.dtype)
        trainer = Trainer(point.config, diffusion, options, Dataset(images, None, None, "random pixels"), device)
        return trainer.train_step
    if point.task == "sampling":
        dtype = next(dtype for dtype, name in DTYPE_NAMES.items() if name == point.dtype)
        model = df.UNet(point.config).to(device, dtype).eval()
        return lambda: df.sample(model, diffusion, point.batch, steps=point.steps)
    model = networks.without_zeros(df.UNet(point.config)).to(device) if point.task == "step" else None
    output = None if model else torch.randn(shape, device=device, requires_grad=True)
    t, x0 = torch.randint(1000, shape[:1], device=device), images.to(device)
    key = df.NoiseKey.of(0, point.batch, stream=df.Stream.TRAINING, device=device)

    def step() -> None:
        noise = torch.randn(shape, device=device) if point.stored else key
        x_t = diffusion.q_sample(x0, t, noise)
        made = model(x_t, t) if model else output
        diffusion.training_losses(made, x0, t, noise).mean().backward()

    return step


def memory_now() -> int:
    """Bytes of this process in memory; resets the mark that memory_peak() reads, where the kernel lets it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def memory_peak() -> int:
    """The most bytes of this process that were in memory."""
    return _status("VmHWM")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise InputError("peak memory on a CPU is read from /proc/self/status, which is not here") from None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def measure(point: Point) -> dict:
    """A point's median time, and the peak of its first run above what was in memory before, in this process."""
    device = torch.device(point.device)
    if point.threads:
        torch.set_num_threads(point.threads)
    run = work(point, device)
    # Libraries load themselves and take their workspaces at their first use: those are no part of the work's memory.
    work(dataclasses.replace(point, network="quick", batch=1, image_size=networks.QUICK.image_size, steps=1), device)()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        before = memory_now()
        run()
        peak = memory_peak() - before
    seconds = [timing.seconds_of(run, device) for _ in range(TIMED)]
    return {"seconds": float(np.median(seconds)), "peak_bytes": max(0, peak)}


def print_measured(fields: dict) -> None:
    """What the process of a point runs: the last line that it prints is measure() as JSON."""
    print(json.dumps(measure(Point(**fields))))


def measured_apart(point: Point) -> dict:
    """measure(point) in a process of its own. Raises InputError if that fails."""
    call = f"from benchmarks import growth; growth.print_measured({dataclasses.asdict(point)!r})"
    command = [sys.executable, "-c", call]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        reason = (made.stderr.strip() or f"status {made.returncode}").splitlines()[-1]
        raise InputError(f"{point.task}, batch {point.batch}, {point.image_size} pixels: {reason}")
    return json.loads(made.stdout.splitlines()[-1])


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """p of the line y = c x^p through the points' logarithms; None for fewer than two points, or values of 0."""
    if len(x) < 2 or min(*x, *y) <= 0:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def along(axis: str, values: Sequence[int], fixed: Point) -> dict:
    """A result: the point with each of the values in place of its own."""
    points = []
    for value in values:
        console.print(f"{fixed.task}, {axis} {value}")
        points.append({"x": value, **measured_apart(dataclasses.replace(fixed, **{axis: value}))})
    x = [point["x"] for point in points]
    return {
        "task": fixed.task,
        "axis": axis,
        "fixed": {name: value for name, value in dataclasses.asdict(fixed).items() if name != axis},
        "points": points,
        "seconds_exponent": exponent(x, [point["seconds"] for point in points]),
        "memory_exponent": exponent(x, [point["peak_bytes"] for point in points]),
    }


def noise_memory(fixed: Point) -> dict:
    """Peak memory with the noise stored and regenerated."""
    console.print(f"{fixed.task}, noise stored and regenerated")
    stored, regenerated = (measured_apart(dataclasses.replace(fixed, stored=kept)) for kept in (True, False))
    return {
        "task": fixed.task,
        "fixed": {name: value for name, value in dataclasses.asdict(fixed).items() if name != "stored"},
        "noise_bytes": 4 * math.prod(fixed.shape),
        "stored": stored,
        "regenerated": regenerated,
    }


AXIS_NAMES = {"batch": "batch size", "image_size": "image size", "steps": "steps", "threads": "threads"}


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.4g}"


def markdown(made: dict) -> str:
    """The results as a page."""
    text = f"# Growth\n\n{report.title(made)}. {made['date']}.\n\n"
    rows = []
    for line in made["results"]:
        points = line["points"]
        time_p, memory_p = (
            "-" if line[name] is None else f"{line[name]:.2f}" for name in ("seconds_exponent", "memory_exponent")
        )
        rows.append(
            [
                *(line["task"], AXIS_NAMES[line["axis"]], ", ".join(str(point["x"]) for point in points)),
                *(", ".join(report.duration(point["seconds"]) for point in points), time_p),
                *(", ".join(_mebibytes(point["peak_bytes"]) for point in points), memory_p),
            ]
        )
    text += report.markdown_table(("task", "against", "at", "time", "exponent", "peak MiB", "exponent"), rows)
    rows = [
        [
            line["task"],
            *(_mebibytes(line[way]["peak_bytes"]) for way in ("stored", "regenerated")),
            _mebibytes(line["noise_bytes"]),
        ]
        for line in made["noise"]
    ]
    text += "\n" + report.markdown_table(("peak MiB of", "noise stored", "regenerated", "the noise itself"), rows)
    return text + "".join(f"\n{message}\n" for message in made["failures"])


@app.command()
def main(
    out: report.Out,
    page: report.Page = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny network and few points: does it run?")] = False,
    device: report.Device = "auto",
    only: Annotated[str, typer.Option(help="Only what holds this: 'sampling batch', 'training', 'noise'.")] = "",
    minutes: report.Minutes = None,
) -> None:
    """Measure how time and peak memory grow; write the points and their exponents to a file."""
    with plain_errors():
        started, place = time.monotonic(), choose_device(device)
        report.check(out, page)
        chosen = plan(quick, place)
        tasks: dict[str, Callable[[], dict]] = {}
        for fixed in (chosen.sampling, chosen.training):
            for axis, values in chosen.axes.items():
                if values and not (axis == "steps" and fixed.task == "training"):
                    tasks[f"{fixed.task} {axis}"] = lambda axis=axis, values=values, fixed=fixed: along(
                        axis, values, fixed
                    )
        step = dataclasses.replace(chosen.training, task="step")
        loss = dataclasses.replace(step, task="loss", batch=8 * step.batch, image_size=chosen.loss_image_size)
        tasks |= {f"noise {point.task}": lambda point=point: noise_memory(point) for point in (step, loss)}
        names = list(tasks)
        tasks = {name: task for name, task in tasks.items() if only in name}
        if not tasks:
            raise InputError(f"nothing holds {only!r}; expected part of one of: {', '.join(names)}")
        results, noise, failures = [], [], []
        for name, task in tasks.items():
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                failures.append(f"{name}: the {minutes:g} minutes were over")
                continue
            try:
                (noise if name.startswith("noise") else results).append(task())
            except InputError as error:
                failures.append(f"{name}: {error}")
        made = {
            **machine.environment(place),
            "quick": quick,
            "device": str(place),
            "failures": failures,
            "results": results,
            "noise": noise,
        }
        text = markdown(made)
        report.write(made, text, out, page)
        console.print(escape(text), soft_wrap=True)
        if failures:
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
