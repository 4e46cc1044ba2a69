"""Commands in processes of their own, forked from this one, and how they are killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_fast.commands import sample as sample_command
from ddpm_fast.commands import train as train_command
from tests.fuzz.supervise import Failed
from tests.support import forked

GRACE = 30.0  # seconds from a signal to the end of a process; a busy machine may take some
SIGNALS = (signal.SIGKILL,) * 7 + (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.listdir", "os.scandir", "os.link"}
SLOW = 0.05  # seconds that a slow disk takes to hold what was written
COMMANDS = {"train": train_command.app, "sample": sample_command.app}


@dataclass(frozen=True)
class Kill:
    """When a process is killed, and by which signal.

    Attributes:
        signal: The signal.
        event: At which event of the process itself; None for a time.
        share: After which share of the time that an undisturbed run takes; of a slow disk's kill, of its wait.
        sync: During which wait for a slow disk, while the rest of the process goes on; None for a usual disk.
    """

    signal: signal.Signals
    event: int | None
    share: float
    sync: int | None = None

    @classmethod
    def random(cls, rng: random.Random, events: int, syncs: int = 0) -> Kill:
        """syncs: How often an undisturbed run waits for the disk; 0 where no kill is to come meanwhile."""
        if syncs and rng.random() < 0.4:
            return cls(rng.choice(SIGNALS), None, rng.random(), rng.randrange(1, syncs + 1))
        event = rng.randrange(1, events + 1) if rng.random() < 0.5 else None
        return cls(rng.choice(SIGNALS), event, 1.1 * rng.random())

    @property
    def inside(self) -> bool:
        """Whether the process kills itself."""
        return self.event is not None or self.sync is not None

    def __str__(self) -> str:
        when = f"after {self.share:.2f} of its time" if self.event is None else f"at event {self.event}"
        if self.sync is not None:
            when = f"{1000 * self.share * SLOW:.0f} ms into wait {self.sync} for a slow disk"
        return f"{self.signal.name} {when}"


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    status: int
    output: str
    seconds: float
    events: int
    syncs: int

    @property
    def code(self) -> int:
        """The exit status, or minus the signal."""
        return os.waitstatus_to_exitcode(self.status)


running: list[Process] = []


class Process:
    """A command in a process of its own."""

    def __init__(self, command: str, arguments: Sequence[str], log: Path, kill: Kill | None = None):
        self._log, self._began = log, time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                status = _command(command, arguments, log, kill)
            finally:
                os._exit(status)
        running.append(self)

    def end(self) -> None:
        """End it at once, because its case is over."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        running.remove(self)

    def kill(self, kill: Kill, usual: float) -> None:
        """Kill it from outside, if the kill is one by time."""
        if not kill.inside:
            time.sleep(kill.share * usual)
            os.kill(self.pid, kill.signal)

    def wait(self, seconds: float = 90.0) -> Ended:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                running.remove(self)
                output = self._log.read_text(errors="replace") if self._log.exists() else ""
                events = self._log.with_suffix(".events")
                count, syncs = map(int, events.read_text().split()) if events.exists() else (0, 0)
                return Ended(status, output, time.monotonic() - self._began, count, syncs)
            time.sleep(0.002)
        self.end()
        raise Failed(
            f"no end {seconds:.0f} s after a signal or the start", self._log.read_text(errors="replace")[-800:]
        )


def _command(name: str, arguments: Sequence[str], log: Path, kill: Kill | None) -> int:
    """Run a command here, in a process that was forked for it. Returns its exit status."""
    forked.begin(log)
    count = 0

    def watch(happened: str, _: object) -> None:
        nonlocal count
        if happened in EVENTS:
            count += 1
            if kill is not None and count == kill.event:
                os.kill(os.getpid(), kill.signal)

    sys.addaudithook(watch)
    waits = _watch_disk(kill)
    status = 0
    try:
        COMMANDS[name](list(arguments))
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:  # before the command has begun
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    made = count
    sys.stdout.flush()
    sys.stderr.flush()
    log.with_suffix(".events").write_text(f"{made} {len(waits)}")
    return status


def _watch_disk(kill: Kill | None) -> list[int]:
    """Count the waits for the disk in a list, and if the kill is to come in one of them, make the disk slow.

    While a thread waits in os.fsync, the rest of the process goes on: so the kill comes while a state is saved in the
    background, at whatever the training is doing then.
    """
    waits: list[int] = []
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        waits.append(descriptor)
        if kill is not None and kill.sync is not None:
            now = len(waits) == kill.sync
            time.sleep(SLOW * kill.share if now else SLOW)
            if now:
                os.kill(os.getpid(), kill.signal)
        plain(descriptor)

    os.fsync = fsync
    return waits
