"""What `python -m ddpm_fast.train` shows of a run: a progress bar or plain lines, TensorBoard curves, and sample
grids."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ddpm_fast.commands.common import console
from ddpm_fast.loops.metrics import Look
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.options import SamplingOptions
from ddpm_fast.loops.sampling import prepare
from ddpm_fast.loops.training import Trainer
from ddpm_fast.pictures import images

PLAIN_REPORT_SECONDS = 30  # between lines of progress where there is no terminal to draw a bar on
GRID_SAMPLES = 64


class TrainingLog:
    """The log of one run. Use it in a with statement: inside it a bar is shown, and at the end the curves are
    closed."""

    def __init__(self, trainer: Trainer, out: Path, steps: int):
        """steps: how many training steps the run has in all."""
        self._trainer, self._out, self._steps = trainer, out, steps
        self._writer = SummaryWriter(out / "curves", purge_step=trainer.step + 1)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[rate]:.0f} images/s  loss {task.fields[loss]:.4f}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=trainer.step, rate=0.0, loss=math.nan)
        self._first_step = trainer.step
        self._started = self._printed = self._looked = time.monotonic()

    def __enter__(self) -> TrainingLog:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._writer.close()

    def advance(self) -> None:
        """Show that the trainer has taken a step."""
        self._bar.update(self._task, completed=self._trainer.step)

    def report(self, looks: list[Look]) -> None:
        """Write the metrics that have arrived."""
        if not looks:
            return
        now = time.monotonic()
        rate = sum(look.steps for look in looks) * self._trainer.config.batch_size / (now - self._looked)
        self._looked = now
        for look in looks:
            self._writer.add_scalar("loss", look.loss, look.step)
            self._writer.add_scalar("gradient norm", look.norm, look.step)
            self._writer.add_scalar("images a second", rate, look.step)
            self._bar.update(self._task, rate=rate, loss=look.loss)
        is_last = self._trainer.step == self._steps
        if not console.is_terminal and (now - self._printed > PLAIN_REPORT_SECONDS or is_last):
            self._printed = now
            step = self._trainer.step
            left = (now - self._started) / (step - self._first_step) * (self._steps - step)
            console.print(
                f"step {looks[-1].step}/{self._steps}  loss {looks[-1].loss:.4f}  {rate:.0f} images/s  "
                f"{left / 60:.1f} min left"
            )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count as training time in the images per second."""
        before = time.monotonic()
        yield
        self._looked += time.monotonic() - before

    def draw_grid(self) -> None:
        """Write a grid of samples from the averaged weights, with one class in each column if there are classes."""
        trainer = self._trainer
        network = Network.of(trainer.averaged_model())
        classes = network.classes or 0
        columns = min(classes, 10) or 8
        n = GRID_SAMPLES // columns * columns
        options = SamplingOptions(
            steps=min(50, trainer.diffusion.num_timesteps),
            labels=[i % classes for i in range(n)] if classes else None,
        )
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.config.precision == "bf16"):
            x = prepare(network, trainer.diffusion, n, options).draw()
        images.save_grid(self._out / f"samples-{trainer.step:08d}.png", x, columns=columns)
        grid = images.make_grid(images.to_uint8(x), columns=columns)
        self._writer.add_image("samples", grid, trainer.step, dataformats="HWC")
