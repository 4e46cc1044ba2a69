"""The training itself, from where the trainer stands to the last step or a signal: steps, saves, grids, and the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_fast.commands.profiling import profiling
from ddpm_fast.commands.saving import Saver
from ddpm_fast.commands.stopping import Stopped, Stopping
from ddpm_fast.commands.training_log import TrainingLog, say
from ddpm_fast.files.lock import FolderLock
from ddpm_fast.loops.metrics import Metrics
from ddpm_fast.loops.training import Trainer


class TrainingRun:
    """A run in its folder.

    Attributes:
        trainer: What is trained.
        arguments: The command's.
        out: The folder.
        saver: What saves its states.
    """

    def __init__(
        self, trainer: Trainer, arguments: dict[str, Any], stopping: Stopping, lock: FolderLock, saved: Path | None
    ):
        """saved: the state that the run was resumed from."""
        self.trainer, self.arguments, self.out = trainer, arguments, Path(arguments["out"])
        self.saver = Saver(trainer, arguments, stopping, lock, saved)
        self._stopping = stopping
        stopping.first = "saving, then stopping; Ctrl-C again to abort"
        stopping.abort = lambda: f"aborted; the last saved state is {self.saver.newest or 'none'}"

    def train(self) -> None:
        """Train up to the last step or until a signal arrives, and save.

        Raises:
            Stopped: If a signal arrived before the first step was over.
            NonFiniteLoss: At the first training step that is not finite. Nothing after the last good step is saved.
        """
        trainer, arguments, stopping, saver = self.trainer, self.arguments, self._stopping, self.saver
        steps, metrics = arguments["steps"], Metrics(trainer.step, scaled=trainer.config.precision == "fp16")
        with (
            TrainingLog(trainer, self.out, steps) as log,
            profiling(arguments["profile"], trainer.device, say) as profiled,
            saver,
        ):
            while trainer.step < steps and not stopping and not saver.disk_full:
                try:
                    metrics.add(*self._step())
                except Stopped:
                    break
                profiled()
                log.advance()
                saver.poll()
                saving = _is_due(trainer.step, arguments["save_every"], steps)
                sampling = _is_due(trainer.step, arguments["sample_every"], steps)
                # Before anything is saved it must be known to be good. Otherwise nothing waits for the device.
                waiting = saving or sampling or log.is_early()
                if waiting or log.is_due() or trainer.step % arguments["log_every"] == 0:
                    log.report(metrics.look(wait=waiting))
                with log.paused():
                    if saving:
                        saver.save()
                    if sampling and not stopping:
                        log.draw_grid(stopping.check)
            saver.finish()
            if stopping and saver.saved_step < trainer.step:
                metrics.look(wait=True)
                saver.save()
        if trainer.step == 0:
            stopping.check()

    def _step(self) -> tuple[Tensor, Tensor]:
        """Take a training step, which a signal may break off before it has changed anything.

        On a CPU a step may take longer than a container leaves a process until it is killed. On a GPU it is short, and
        must not be broken off while it is recorded.
        """
        if self.trainer.device.type != "cpu":
            return self.trainer.train_step()
        with self._stopping.anywhere():
            return self.trainer.train_step(self._stopping.hold)


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is due. every = 0: never."""
    return bool(every) and (step == last or step % every == 0)
