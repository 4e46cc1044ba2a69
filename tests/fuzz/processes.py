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

GRACE = 30.0  # seconds from a signal to the end of a process; a busy machine may take some
SIGNALS = (signal.SIGKILL,) * 7 + (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.listdir", "os.scandir", "os.link"}
COMMANDS = {"train": train_command.app, "sample": sample_command.app}


@dataclass(frozen=True)
class Kill:
    """When a process is killed, and by which signal.

    Attributes:
        signal: The signal.
        event: At which event of the process itself; None for a time.
        share: After which share of the time that an undisturbed run takes.
    """

    signal: signal.Signals
    event: int | None
    share: float

    @classmethod
    def random(cls, rng: random.Random, events: int) -> Kill:
        event = rng.randrange(1, events + 1) if rng.random() < 0.5 else None
        return cls(rng.choice(SIGNALS), event, 1.1 * rng.random())

    def __str__(self) -> str:
        when = f"after {self.share:.2f} of its time" if self.event is None else f"at event {self.event}"
        return f"{self.signal.name} {when}"


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    status: int
    output: str
    seconds: float
    events: int

    @property
    def code(self) -> int:
        """The exit status, or minus the signal."""
        return os.waitstatus_to_exitcode(self.status)


running: list[Process] = []


class Process:
    """A command in a process of its own."""

    def __init__(self, command: str, arguments: Sequence[str], log: Path, event: int | None = None, by: int = 9):
        self._log, self._began = log, time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                status = _command(command, arguments, log, event, by)
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
        if kill.event is None:
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
                count = int(events.read_text()) if events.exists() else 0
                return Ended(status, output, time.monotonic() - self._began, count)
            time.sleep(0.002)
        self.end()
        raise Failed(
            f"no end {seconds:.0f} s after a signal or the start", self._log.read_text(errors="replace")[-800:]
        )


def _command(name: str, arguments: Sequence[str], log: Path, event: int | None, by: int) -> int:
    """Run a command here, in a process that was forked for it. Returns its exit status."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    count = 0

    def watch(happened: str, _: object) -> None:
        nonlocal count
        if happened in EVENTS:
            count += 1
            if count == event:
                os.kill(os.getpid(), by)

    sys.addaudithook(watch)
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
    log.with_suffix(".events").write_text(str(made))
    return status
