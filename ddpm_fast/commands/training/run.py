"""The training itself, from where the trainer stands to the last step or a signal: steps, saves, grids, evaluations,
and the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_fast.commands.profiling import profiling
from ddpm_fast.commands.stopping import Stopped, Stopping
from ddpm_fast.commands.together import in_all, share_signal
from ddpm_fast.commands.training.averaged import Averaged
from ddpm_fast.commands.training.grid import Grids
from ddpm_fast.commands.training.log import TrainingLog, say, warn
from ddpm_fast.commands.training.quality import Quality
from ddpm_fast.commands.training.records import records_of
from ddpm_fast.commands.training.saving import Saver
from ddpm_fast.commands.training.setup import Ready
from ddpm_fast.files.lock import FolderLock
from ddpm_fast.loops.distributed import rank, world_size
from ddpm_fast.loops.metrics import Look, Metrics, NonFiniteLoss


class TrainingRun:
    """A run in its folder. Where several processes train together, each has one, and they stop after the same step.

    Attributes:
        trainer: What is trained.
        arguments: The command's.
        out: The folder.
        saver: What saves its states.
    """

    def __init__(
        self,
        ready: Ready,
        arguments: dict[str, Any],
        stopping: Stopping,
        lock: FolderLock | None,
    ):
        """Prepare it. Nothing is written yet.

        Args:
            ready: What is trained.
            arguments: The command's.
            stopping: Whether a signal has arrived.
            lock: Of the folder, in the first process.

        Raises:
            InputError: If what is to be evaluated on the way cannot be, or a log cannot be started.
        """
        trainer = ready.trainer
        self.trainer, self.arguments, self.out = trainer, arguments, Path(arguments["out"])
        self._averaged = Averaged(trainer)
        self._quality = in_all(lambda: Quality.of(trainer, self._averaged, ready.held_out, arguments))
        self.saver = Saver(trainer, arguments, stopping, lock, ready.state.path if ready.state else None)
        self._records = in_all(lambda: records_of(trainer, arguments, say) if rank() == 0 else [])
        self._stopping = stopping
        self._diverged: NonFiniteLoss | None = None
        if rank() == 0:
            stopping.first = "saving, then stopping; Ctrl-C again to abort"
        stopping.abort = lambda: f"aborted; the last saved state is {self.saver.newest or 'none'}"

    def train(self) -> None:
        """Train up to the last step or until a signal arrives, and save.

        Raises:
            Stopped: If a signal arrived before the first step was over.
            NonFiniteLoss: At the first training step that is not finite. Nothing after the last good step is saved.
        """
        trainer, arguments, stopping, saver = self.trainer, self.arguments, self._stopping, self.saver
        metrics = Metrics(trainer.step, scaled=trainer.config.precision == "fp16")
        with (
            TrainingLog(trainer, self._records, arguments["steps"]) as log,
            profiling(arguments["profile"], trainer.device, say) as profiled,
            saver,
        ):
            grids = Grids(trainer, self._averaged, self.out, warn)
            while trainer.step < arguments["steps"] and not self._is_over():
                try:
                    metrics.add(*self._step(), trainer.quarters)
                except Stopped:
                    break
                profiled()
                log.advance()
                saver.poll()
                self._do_what_is_due(log, metrics, grids)
            share_signal(stopping, say)
            self._look(metrics)
            saver.settle()
            if stopping and saver.saved_step < trainer.step:
                self._save()
                saver.settle()
            if self._diverged is not None:
                raise self._diverged
        if trainer.step == 0:
            stopping.check()

    def _is_over(self) -> bool:
        """Whether the training is to end now: the same in all processes."""
        stops = bool(self._stopping) or self.saver.disk_full or self._diverged is not None
        if world_size() == 1:
            return stops
        self.trainer.wants_stop = stops
        return self.trainer.stopping

    def _step(self) -> tuple[Tensor, Tensor]:
        """Take a training step, which a signal may break off before it has changed anything.

        On a CPU a step may take longer than a container leaves a process until it is killed. On a GPU it is short, and
        must not be broken off while it is recorded. Where several processes train together, the others would wait.
        """
        if self.trainer.device.type != "cpu" or world_size() > 1:
            return self.trainer.train_step()
        with self._stopping.anywhere():
            return self.trainer.train_step(self._stopping.hold)

    def _do_what_is_due(self, log: TrainingLog, metrics: Metrics, grids: Grids) -> None:
        """After a training step: a line, a save, a grid, an evaluation."""
        step, arguments = self.trainer.step, self.arguments
        saving = _is_due(step, arguments["save_every"], arguments["steps"])
        sampling = _is_due(step, arguments["sample_every"], arguments["steps"])
        averaging = bool(self.trainer.averages) and _is_due(step, arguments["average_every"], arguments["steps"])
        evaluating = self._quality is not None and _is_due(step, arguments["evaluate_every"], arguments["steps"])
        # Before anything is saved it must be known to be good. Otherwise nothing waits for the device.
        waiting = saving or sampling or evaluating or averaging or log.is_early()
        if waiting or log.is_due() or step % arguments["log_every"] == 0:
            log.report(self._look(metrics, waiting))
        with log.paused():
            if saving or averaging:
                self._save(saving, averaging)
            if sampling and self._diverged is None:
                grid = grids.draw(self._stopping.check)
                if grid is not None:
                    log.show_grid(grid)
            if evaluating and self._quality is not None and self._diverged is None:
                record = self._quality.evaluate(self._stopping.check, log.working)
                if record is not None:
                    log.show_quality(record)

    def _look(self, metrics: Metrics, wait: bool = True) -> list[Look]:
        """The metrics that have arrived, up to the first that is not finite.

        With what is not finite the run ends. The other processes may see it at a later look, or at this one if all
        wait: so it is raised once all have stopped.
        """
        try:
            return metrics.look(wait) if self._diverged is None else []
        except NonFiniteLoss as error:
            self._diverged = error
            return []

    def _save(self, state: bool = True, averages: bool = False) -> None:
        """Save, unless the run diverged, which all processes know when they have waited for their metrics."""
        if self._diverged is None:
            self.saver.save(state, averages)


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is due. every = 0: never."""
    return bool(every) and (step == last or step % every == 0)
