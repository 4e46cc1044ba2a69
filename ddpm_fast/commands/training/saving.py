"""The states of a training run on their way to the disk.

The training waits until the tensors have been copied, and goes on while a thread writes them. One save is under way at
a time: one that comes due earlier waits for it, so that no more than one copy takes memory and no state is left out.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ddpm_fast.commands.stopping import Stopped, Stopping
from ddpm_fast.commands.training.log import warn
from ddpm_fast.data.bounds import available_memory
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import is_full_disk
from ddpm_fast.files.lock import FolderLock
from ddpm_fast.files.memory import is_out_of_memory
from ddpm_fast.loops.distributed import of_first_process, rank
from ddpm_fast.loops.snapshot import MODEL_NAME, Snapshot
from ddpm_fast.loops.training import Trainer


class _Write:
    """One snapshot on its way to the disk, in a thread or not.

    Attributes:
        step: Its training step.
        path: The state's file, once it has been written.
        error: What went wrong.
        averages_error: What went wrong with the power-function averages, without which the state is written all the
            same.
        over: Set at the end.
    """

    def __init__(self, snapshot: Snapshot, folder: Path, state: bool, averages: bool):
        self.step, self.state, self.averages = snapshot.step, state, averages
        self.path: Path | None = None
        self.error: Exception | None = None
        self.averages_error: Exception | None = None
        self.over = threading.Event()
        self._snapshot: Snapshot | None = snapshot
        self._folder = folder

    def run(self) -> None:
        """Write it."""
        assert self._snapshot is not None
        try:
            if self.averages:  # first, so that a run that is resumed from the state lacks none
                self._write_averages(self._snapshot)
            if self.state:
                self.path = self._snapshot.write_state(self._folder)
                self._snapshot.write_model(self._folder)
        except Exception as error:  # whatever it is, it is raised in the main thread
            self.error = error
        self._snapshot = None  # its memory is free for the next one
        self.over.set()

    def _write_averages(self, snapshot: Snapshot) -> None:
        try:
            snapshot.write_averages(self._folder)
        except (InputError, OSError) as error:
            self.averages_error = error


class Saver:
    """Saves the states of one run. Use it in a with statement, at whose end it waits for the save that is under way.

    A state that cannot be saved does not end the run, unless the disk is full: it is saved at the next occasion. Where
    several processes train together, each has a Saver, and the first one writes.

    Attributes:
        saved: The newest training state that is known to be on the disk, or None.
        saved_step: The last training step of which everything is, the model too.
        disk_full: Whether a state could not be saved because the disk, or the user's share of it, is full.
    """

    def __init__(
        self,
        trainer: Trainer,
        arguments: dict[str, Any],
        stopping: Stopping,
        lock: FolderLock | None,
        saved: Path | None,
    ):
        """Nothing is saved yet.

        Args:
            trainer: Whose states are saved.
            arguments: The command's.
            stopping: Whether there will be a next occasion.
            lock: Of the run's folder, in the first process.
            saved: The state that the run was resumed from.
        """
        self._trainer, self._arguments, self._stopping, self._lock = trainer, arguments, stopping, lock
        self._out = Path(arguments["out"])
        self.saved, self.saved_step = saved, trainer.step
        self.disk_full = False
        self._write: _Write | None = None
        self._said_short = False

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, (Exception, Stopped)):
            self.finish()
        elif self._write is not None and self._lock is not None:  # a second Ctrl-C waits for no disk
            self._lock.abandon()

    @property
    def newest(self) -> Path | None:
        """The newest training state that is on the disk, also one that `poll` has not been told of. For messages."""
        return (self._write and self._write.path) or self.saved

    def save(self, state: bool = True, averages: bool = False) -> None:
        """Save what the trainer has reached, once the save before it has ended. All processes call it.

        Args:
            state: Whether to save the training state and the model.
            averages: Whether to save the power-function averages.
        """
        self.finish()
        snapshot = self._trainer.snapshot(self._arguments)
        if not state:
            snapshot = snapshot.averages
        if rank() > 0 or self.disk_full:
            return
        try:
            self._hold_folder()
        except (InputError, OSError) as error:
            self._failed(snapshot.step, error)
            return
        copied = self._copied(snapshot)
        self._write = _Write(copied or snapshot, self._out, state, averages)
        if copied is None:
            self._write.run()
            self.finish()
        else:
            # A daemon, because a process that a second Ctrl-C ends must not wait for it.
            threading.Thread(target=self._write.run, name="saving", daemon=True).start()

    def poll(self) -> None:
        """Note, and say if it went wrong, how the save ended that was under way. Does not wait for it.

        Raises:
            Exception: What is neither an error of the disk nor of the folder.
        """
        if self._write is not None and self._write.over.is_set():
            write, self._write = self._write, None
            self.saved = write.path or self.saved
            if write.averages_error is not None:
                warn(
                    f"the averages of step {write.step} could not be saved: {write.averages_error}. The training goes "
                    "on, and those of other widths will be less exact"
                )
            if write.error is None:
                self.saved_step = write.step if write.state else self.saved_step
            elif isinstance(write.error, (InputError, OSError)):
                self._failed(write.step, write.error, "state" if write.path is None else "model")
            else:
                raise write.error

    def finish(self) -> None:
        """Wait for the save that is under way, and `poll`."""
        if self._write is not None:
            self._write.over.wait()
        self.poll()

    def settle(self) -> None:
        """Wait for the save that is under way, in the first process, and tell all of them how it ended."""
        self.finish()
        self.saved, self.saved_step, self.disk_full = of_first_process((self.saved, self.saved_step, self.disk_full))

    def _copied(self, snapshot: Snapshot) -> Snapshot | None:
        """A copy to write in the background, or None where memory is short: then the training waits for the disk."""
        available = available_memory()
        if available is None or snapshot.nbytes < available:
            try:
                return snapshot.copied()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
        if not self._said_short:
            self._said_short = True
            warn(
                f"there is no memory for a copy of the training state ({snapshot.nbytes / 2**20:,.0f} MiB), so the "
                "training waits while it is written"
            )
        return None

    def _failed(self, step: int, error: Exception, what: str = "state") -> None:
        """Say that a state or model could not be saved, and what follows from that."""
        now = f"the last saved state is {self.saved or 'none'}"
        if step == self._arguments["steps"]:
            with suppress(InputError, OSError):
                self._trainer.complete(self._out)
                now += f"; the finished model, which is much smaller, is in {self._out / MODEL_NAME}"
        self.disk_full = is_full_disk(error)
        if self.disk_full and step < self._arguments["steps"]:
            now = f"there is no room for later states either, so the training stops; {now}"
        elif step < self._arguments["steps"] and not self._stopping:
            now = f"the training goes on and will be saved at the next occasion; until then {now}"
        warn(f"the {what} of step {step} could not be saved: {error}. {now[0].upper()}{now[1:]}")

    def _hold_folder(self) -> None:
        """Make and lock the folder again if it was deleted."""
        if self._lock is not None and self._lock.is_lost():
            warn(f"{self._out} was deleted or moved during the training; what is saved goes to a new folder there")
            self._out.mkdir(parents=True, exist_ok=True)
            self._lock.release()
            self._lock.acquire()
