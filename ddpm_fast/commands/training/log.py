"""What `python -m ddpm_fast.train` shows of a run: a progress bar or plain lines, and an estimate of how long it takes.
What it shows is recorded too (records.py). Where several processes train together, the first one does it.

Nothing here ends a run: where a terminal has been closed or a disk is full, the training goes on without its log.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_fast.commands.common import console
from ddpm_fast.commands.training.curves import Curves
from ddpm_fast.commands.training.recording import Record
from ddpm_fast.errors import InputError
from ddpm_fast.loops.distributed import rank
from ddpm_fast.loops.metrics import Look
from ddpm_fast.loops.training import Trainer

PLAIN_REPORT_SECONDS = 30  # between lines of progress where there is no terminal to draw a bar on
NOTABLE_WAITING = 0.05  # of the time; what is less is not said
EARLY = (1, 2, 5, 10, 20, 50)  # the first lines come after so many training steps, however long these take
ESTIMATE_SECONDS = 5  # that must have been measured, unless ten training steps take less


def say(text: str) -> None:
    """Print a line of a training. Where the terminal or the pipe is gone, the line is lost and not the training."""
    # For a closed pipe rich raises SystemExit, after it has turned itself quiet. A closed terminal is an OSError.
    with contextlib.suppress(OSError, SystemExit):
        console.print(text)


def warn(text: str) -> None:
    """Print a warning, whose text is not read as markup."""
    say(f"[yellow]Warning:[/] {escape(text)}")


class TrainingLog:
    """The log of one run. Use it in a with statement: inside it a bar is shown, and at the end the records are
    closed."""

    def __init__(self, trainer: Trainer, records: Sequence[Record], steps: int):
        """Nothing is shown yet.

        Args:
            trainer: What is trained.
            records: Where the course of the run is written to, in the first process.
            steps: How many training steps the run has in all.
        """
        self._trainer, self._records, self._steps = trainer, records, steps
        self._failed: set[str] = set()
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not console.is_terminal or rank() > 0,
        )
        self._task = self._bar.add_task("step", total=steps, completed=trainer.step, shown="")
        self._first_step = trainer.step
        self._printed = self._looked = time.monotonic()
        self._waited = trainer.waited
        # When the first step was over, which warms up, and its number. Then the same, moved by the pauses since.
        self._started: tuple[float, int] | None = None
        self._measured_from: tuple[float, int] | None = None
        self._estimated = False

    def __enter__(self) -> TrainingLog:
        self._thread_failure, threading.excepthook = threading.excepthook, self._thread_failed
        with contextlib.suppress(OSError):
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, SystemExit):
            self._bar.stop()
        self._write(lambda record: record.close())
        threading.excepthook = self._thread_failure

    def advance(self) -> None:
        """Show that the trainer has taken a step."""
        self._bar.update(self._task, completed=self._trainer.step)

    def is_early(self) -> bool:
        """Whether so few training steps have been taken that each line of progress is worth waiting for."""
        return self._trainer.step - self._first_step in EARLY

    def is_due(self) -> bool:
        """Whether a line of progress is due because the last one was long ago."""
        return not console.is_terminal and time.monotonic() - self._printed > PLAIN_REPORT_SECONDS

    def report(self, looks: list[Look]) -> None:
        """Write the metrics that have arrived."""
        if not looks:
            return
        now = time.monotonic()
        rate = sum(look.steps for look in looks) * self._trainer.config.batch_size / (now - self._looked)
        waiting = (self._trainer.waited - self._waited) / (now - self._looked)
        self._looked, self._waited = now, self._trainer.waited
        for look in looks:
            self._write(lambda record, look=look: record.look(look, rate, waiting))  # type: ignore[misc]
            self._bar.update(self._task, shown=f"{rate:.0f} images/s  loss {look.loss:.4f}")
        step = self._trainer.step
        if not console.is_terminal and (self.is_early() or self.is_due() or step == self._steps):
            self._printed = now
            shown = f"{rate:.{0 if rate >= 10 else 1}f} images/s"
            if waiting >= NOTABLE_WAITING and self._started is not None:  # the first images are always waited for
                shown += f", {waiting:.0%} of the time waiting for them"
            if self._started is not None:
                since, first = self._started
                shown += f"  {duration((now - since) / (step - first) * (self._steps - step))} left"
            say(f"step {looks[-1].step}/{self._steps}  loss {looks[-1].loss:.4f}  {shown}")
        if self._measured_from is None:
            self._started = self._measured_from = now, step
        elif not self._estimated:
            self._estimate(now, step, *self._measured_from)

    def _estimate(self, now: float, step: int, since: float, first: int) -> None:
        """Say once how long the run will take, as soon as some steps were measured.

        Args:
            now: The time.
            step: The number of the step that has just been taken.
            since: The time at which the first step was over, moved by the pauses since.
            first: The number of that step.
        """
        if now - since < ESTIMATE_SECONDS and step - first < 9:
            return
        self._estimated = True
        seconds = (now - since) / (step - first)
        steps = self._steps - self._first_step
        if seconds * steps >= 60:
            say(
                f"About {duration(seconds * steps)} for {steps:,} steps, at {seconds:.2g} s a step; sample grids and "
                "saving come on top. docs/training.md says what takes less time. Ctrl-C saves, and --resume continues"
            )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count as training time in the images per second and in the estimate."""
        before = time.monotonic()
        yield
        pause = time.monotonic() - before
        self._looked += pause
        if self._measured_from is not None:
            self._measured_from = self._measured_from[0] + pause, self._measured_from[1]

    @contextlib.contextmanager
    def working(self, what: str, total: int) -> Iterator[Callable[[int], object]]:
        """Inside, the progress of other work than training is shown: update(done) says how much is done.

        Args:
            what: What is done, such as "evaluating".
            total: How much there is to do.
        """
        task = self._bar.add_task(what, total=total, shown="")
        started = told = time.monotonic()

        def update(done: int) -> None:
            nonlocal told
            self._bar.update(task, completed=done)
            now = time.monotonic()
            if not console.is_terminal and now - told > PLAIN_REPORT_SECONDS:
                told = now
                say(
                    f"{what} step {self._trainer.step}  {done / total:.0%}  "
                    f"{duration((now - started) / done * (total - done))} left"
                )

        try:
            yield update
        finally:
            self._bar.remove_task(task)

    def show_quality(self, record: dict[str, Any]) -> None:
        """Record what was measured of the averaged weights."""
        self._write(lambda each: each.quality(record))

    def show_grid(self, grid: np.ndarray) -> None:
        """Record a grid of samples, uint8 [H, W, C]."""
        self._write(lambda record: record.grid(grid, self._trainer.step))

    def _write(self, act: Callable[[Record], object]) -> None:
        """Act on each record. If one cannot be written, say so once, and try it again the next time."""
        for record in self._records if rank() == 0 else ():
            try:
                act(record)
            except (OSError, InputError) as error:
                self._say_failed(record.name, error)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own, whose failure Python would show as a traceback."""
        names = [record.name for record in self._records if isinstance(record, Curves)]
        if isinstance(failure.exc_value, OSError) and names:
            self._say_failed(names[0], failure.exc_value)
        else:
            self._thread_failure(failure)

    def _say_failed(self, name: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            warn(f"{name} could not be written, and the training goes on: {error}")


def duration(seconds: float) -> str:
    """A time for people: "18 h", "2.5 h", "12 min" or "40 s"."""
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.{1 if seconds < 10 * length else 0}f} {unit}"
    return f"{seconds:.0f} s"
