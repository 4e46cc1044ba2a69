"""The training itself, from where the trainer stands to the last step or a signal: steps, saves, grids, and the log."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_fast.commands.profiling import profiling
from ddpm_fast.commands.stopping import Stopped, Stopping
from ddpm_fast.commands.training_log import TrainingLog, say, warn
from ddpm_fast.errors import InputError
from ddpm_fast.files.lock import FolderLock
from ddpm_fast.loops.metrics import Metrics
from ddpm_fast.loops.training import MODEL_NAME, Trainer


class TrainingRun:
    """A run in its folder. A state that cannot be saved does not end it: it is saved at the next occasion.

    Attributes:
        trainer: What is trained.
        arguments: The command's.
        out: The folder.
        saved: The newest training state, or None.
        saved_step: How many training steps it has taken.
    """

    def __init__(
        self, trainer: Trainer, arguments: dict[str, Any], stopping: Stopping, lock: FolderLock, saved: Path | None
    ):
        """saved: the state that the run was resumed from."""
        self.trainer, self.arguments, self.out = trainer, arguments, Path(arguments["out"])
        self._stopping, self._lock = stopping, lock
        self.saved, self.saved_step = saved, trainer.step
        stopping.first = "saving, then stopping; Ctrl-C again to abort"
        stopping.abort = lambda: f"aborted; the last saved state is {self.saved or 'none'}"

    def train(self) -> None:
        """Train up to the last step or until a signal arrives, and save.

        Raises:
            Stopped: If a signal arrived before the first step was over.
            NonFiniteLoss: At the first training step that is not finite. Nothing after the last good step is saved.
        """
        trainer, arguments, stopping = self.trainer, self.arguments, self._stopping
        steps, metrics = arguments["steps"], Metrics(trainer.step, scaled=trainer.config.precision == "fp16")
        with (
            TrainingLog(trainer, self.out, steps) as log,
            profiling(arguments["profile"], trainer.device, say) as profiled,
        ):
            while trainer.step < steps and not stopping:
                try:
                    metrics.add(*self._step())
                except Stopped:
                    break
                profiled()
                log.advance()
                saving = _is_due(trainer.step, arguments["save_every"], steps)
                sampling = _is_due(trainer.step, arguments["sample_every"], steps)
                # Before anything is saved it must be known to be good. Otherwise nothing waits for the device.
                waiting = saving or sampling or log.is_early()
                if waiting or log.is_due() or trainer.step % arguments["log_every"] == 0:
                    log.report(metrics.look(wait=waiting))
                with log.paused():
                    if saving:
                        self._save()
                    if sampling and not stopping:
                        log.draw_grid(stopping.check)
            if stopping and self.saved_step < trainer.step:
                metrics.look(wait=True)
                self._save()
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

    def _save(self) -> None:
        step = self.trainer.step
        try:
            self._hold_folder()
            self.saved = self.trainer.save(self.out, self.arguments)
            self.saved_step = step
        except (InputError, OSError) as error:
            now = f"the last saved state is {self.saved or 'none'}"
            if step == self.arguments["steps"]:
                with suppress(InputError, OSError):
                    self.trainer.complete(self.out)
                    now += f"; the finished model, which is much smaller, is in {self.out / MODEL_NAME}"
            elif not self._stopping:
                now = f"the training goes on and will be saved at the next occasion; until then {now}"
            warn(f"the state of step {step} could not be saved: {error}. {now[0].upper()}{now[1:]}")

    def _hold_folder(self) -> None:
        """Make and lock the folder again if it was deleted."""
        if self._lock.is_lost():
            warn(f"{self.out} was deleted or moved during the training; what is saved goes to a new folder there")
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock.release()
            self._lock.acquire()


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is due. every = 0: never."""
    return bool(every) and (step == last or step % every == 0)
