"""Runs the cases of a fuzzer in a process of its own, so that a case that crashes or hangs ends neither the run nor the
knowledge of which case it was.

The worker is forked from a process that has imported everything and computed nothing: a new one takes milliseconds.
Before each case it writes the case's number into memory that both processes share. A case is a function of (seed,
number) alone, and so `--seed S --case K` repeats it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import random
import re
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_STATE = struct.Struct("qdq")  # the case's number, when it began, the calls so far: the worker writes them
_STOP = 64  # the byte by which the worker is told to stop
SHOWN = 2  # failures of one kind that are printed; the others are counted
PROGRESS_SECONDS = 30.0  # between two lines of progress


_folder = ""


def folder() -> Path:
    """A folder for the files of a case, which is removed in the end."""
    return Path(_folder)


@contextlib.contextmanager
def _workplace() -> Iterator[None]:
    global _folder
    before = _folder
    with tempfile.TemporaryDirectory(prefix="ddpm_fast-fuzz-", ignore_cleanup_errors=True) as _folder:
        yield
    _folder = before


class Failed(Exception):
    """A case that went wrong.

    Attributes:
        kind: What failures of one cause have in common, such as "q_sample: wrong value".
        what: What happened, with all that helps to understand it.
    """

    def __init__(self, kind: str, what: str = ""):
        super().__init__(f"{kind}: {what}" if what else kind)
        self.kind, self.what = kind, what


class Failure(NamedTuple):
    """What is reported of a failed case."""

    case: int
    kind: str
    what: str


class Notes:
    """What a case says of itself. Only a case that is repeated alone says it, because formatting takes time."""

    def __init__(self, aloud: bool):
        self.aloud = aloud

    def __call__(self, *words: object) -> None:
        if self.aloud:
            print("  ", *(word() if callable(word) else word for word in words), flush=True)


@dataclass(frozen=True)
class Fuzzer:
    """What a fuzzer is.

    Attributes:
        name: Its command.
        unit: What it counts: "calls", "files" or "kills".
        run: Called as run(rng, notes); runs one case and returns how many of the unit that were. Raises Failed.
        seconds: How long a case may take.
        prepare: Called once in each worker, before its first case.
        warm: Called once in the process that the workers are forked from.
    """

    name: str
    unit: str
    run: Callable[[random.Random, Notes], int]
    seconds: float
    prepare: Callable[[], Any] = lambda: None
    warm: Callable[[], Any] = lambda: None


@dataclass
class Report:
    """The result of a run."""

    fuzzer: Fuzzer
    seed: int
    calls: int = 0
    cases: int = 0
    took: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)

    def add(self, failure: Failure) -> None:
        """Count a failure, and print it if it is one of the first of its kind."""
        self.kinds[failure.kind] += 1
        if self.kinds[failure.kind] <= SHOWN:
            print(f"FAILED {failure.kind}")
            for line in failure.what.splitlines():
                print(f"    {line}")
            print(f"    reproduce: {command(self.fuzzer, self.seed, failure.case)}", flush=True)

    def say_progress(self, now: float) -> None:
        """Now and then, a line that says how far the run is."""
        if now - self.said > PROGRESS_SECONDS:
            self.said, took = now, now - self.began
            unit, count = self.fuzzer.unit, self.calls
            print(f"{count} {unit} in {took:.0f} s ({count / took:.1f}/s), {self.kinds.total()} failures", flush=True)

    def summary(self) -> str:
        """A line for each kind of failure, and one of the whole run."""
        lines = [f"{count:7d} x {kind}" for kind, count in self.kinds.most_common()]
        failures = f"{self.kinds.total()} failures" if self.kinds else "no failure"
        rate = self.calls / max(self.took, 1e-9)
        return "\n".join(
            [
                *lines,
                f"{self.fuzzer.name}: {self.calls} {self.fuzzer.unit} in {self.cases} cases, {self.took:.0f} s "
                f"({rate:.1f}/s), seed {self.seed}: {failures}",
            ]
        )


def memory(field: str) -> int:
    """A number of kB from /proc/self/status, such as VmSize; 0 where there is no such file."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])
    return 0


def limit_memory(gigabytes: float) -> None:
    """Let this process take so much memory, and no more, besides what it has."""
    if in_use := memory("VmSize"):
        limit = in_use * 1024 + int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def command(fuzzer: Fuzzer, seed: int, case: int) -> str:
    """The command that repeats a case."""
    return f"python -m tests.fuzz {fuzzer.name} --seed {seed} --case {case}"


def source(seed: int, case: int) -> random.Random:
    """The random numbers of a case."""
    return random.Random(f"{seed}/{case}")


class _Worker:
    """A process that runs the cases from `first` on, up to `last`."""

    def __init__(self, fuzzer: Fuzzer, seed: int, first: int, last: int | None):
        self.shared = mmap.mmap(-1, 4096)
        self.shared[: _STATE.size] = _STATE.pack(first, time.monotonic(), 0)
        self.pipe, writer = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            status = 70
            try:
                _work(fuzzer, seed, first, last, self.shared, writer)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)
        self._rest = b""

    @property
    def state(self) -> tuple[int, float, int]:
        return _STATE.unpack_from(self.shared, 0)

    def failures(self, wait: float) -> Iterator[Failure]:
        """Those that have been reported, after waiting for one for so long at most."""
        while select.select([self.pipe], [], [], wait)[0]:
            part = os.read(self.pipe, 1 << 16)
            if not part:  # the worker has ended
                return
            *lines, self._rest = (self._rest + part).split(b"\n")
            yield from (Failure(*json.loads(line)) for line in lines)
            wait = 0.0

    def ended(self) -> int | None:
        """The status of the process that has ended, or None."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else status

    def stop(self) -> None:
        """Ask it to end after this case."""
        self.shared[_STOP] = 1

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def close(self) -> None:
        os.close(self.pipe)
        self.shared.close()


def _work(fuzzer: Fuzzer, seed: int, first: int, last: int | None, shared: mmap.mmap, writer: int) -> None:
    """The worker: cases one after the other, until it is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    fuzzer.prepare()
    notes, case, calls, parent = Notes(aloud=False), first, 0, os.getppid()
    while os.getppid() == parent:
        if case == last:
            shared[_STOP] = 1
        # Not pack_into, which first fills the place with zeros: the parent would see those.
        shared[: _STATE.size] = _STATE.pack(case, time.monotonic(), calls)
        if shared[_STOP]:
            return
        failure, did = attempt(fuzzer, seed, case, notes)
        if failure is not None:
            os.write(writer, (json.dumps(failure) + "\n").encode())
        case, calls = case + 1, calls + did


def attempt(fuzzer: Fuzzer, seed: int, case: int, notes: Notes) -> tuple[Failure | None, int]:
    """Run a case here. Returns its failure and what it counts."""
    try:
        return None, fuzzer.run(source(seed, case), notes)
    except Failed as failed:
        return Failure(case, failed.kind, failed.what), 1
    except Exception as error:
        where = traceback.format_exc(limit=-6)[:2000]
        return Failure(case, f"the fuzzer itself: {type(error).__name__}", where), 1


def run(
    fuzzer: Fuzzer, seed: int, minutes: float, calls: int | None = None, first: int = 0, cases: int | None = None
) -> Report:
    """Run cases until the time is over, or so many calls (or cases) have been made."""
    fuzzer.warm()
    report = Report(fuzzer, seed)
    case, end = first, report.began + 60 * minutes
    last = None if cases is None else first + cases
    with _workplace():
        while time.monotonic() < end and (calls is None or report.calls < calls) and (last is None or case < last):
            case = _run_worker(report, case, end, calls, last)
    report.cases, report.took = case - first, time.monotonic() - report.began
    print(report.summary(), flush=True)
    return report


def _run_worker(report: Report, first: int, end: float, calls: int | None, last: int | None) -> int:
    """Run a worker until it ends. Returns the number of the next case."""
    fuzzer, before = report.fuzzer, report.calls
    worker = _Worker(fuzzer, report.seed, first, last)
    try:
        while True:
            for failure in worker.failures(wait=0.05):
                report.add(failure)
            status = worker.ended()
            case, began, done = worker.state
            report.calls = before + done
            if status is not None:
                for failure in worker.failures(wait=0.0):
                    report.add(failure)
                if not worker.shared[_STOP] or status:
                    report.calls += 1
                    report.add(_crash(fuzzer, report.seed, case, _words(status)))
                    case += 1
                return case
            now = time.monotonic()
            report.say_progress(now)
            if now - began > fuzzer.seconds:
                worker.kill()
                report.calls += 1
                report.add(_crash(fuzzer, report.seed, case, f"no end after {fuzzer.seconds:.0f} s"))
                return case + 1
            if now > end or (calls is not None and report.calls >= calls):
                worker.stop()
    finally:
        worker.kill()
        worker.close()


def _words(status: int) -> str:
    """How a process ended."""
    if os.WIFSIGNALED(status):
        return f"crash: {signal.Signals(os.WTERMSIG(status)).name}"
    return f"the process ended with status {os.waitstatus_to_exitcode(status)}"


def _crash(fuzzer: Fuzzer, seed: int, case: int, how: str) -> Failure:
    """The failure of a case that ended its process. The case is repeated, so that it says what it did."""
    status, output = repeat(fuzzer, seed, case)
    said = output.splitlines()
    calls = [line.strip() for line in said if line.startswith("   ")]
    again = "the same when it is repeated" if status else "NOT when it is repeated alone"
    named = re.match(r"[\w.]+", calls[-1]) if calls else None
    op = named[0] if named else "?"
    return Failure(case, f"{how}: {op}", "\n".join([*calls[-4:], *said[-1:], again]))


def repeat(fuzzer: Fuzzer, seed: int, case: int) -> tuple[int, str]:
    """Run one case in a process of its own that says what it does. Returns its status and what it said."""
    fuzzer.warm()
    with _workplace():
        return _repeat(fuzzer, seed, case)


def _repeat(fuzzer: Fuzzer, seed: int, case: int) -> tuple[int, str]:
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        os.close(reader)
        status = 70
        try:
            faulthandler.enable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            status = _repeat_here(fuzzer, seed, case)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writer)
    output, end = b"", time.monotonic() + fuzzer.seconds
    while (left := end - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            break
        output += part
    else:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    os.close(reader)
    return status, output.decode(errors="replace")


def _repeat_here(fuzzer: Fuzzer, seed: int, case: int) -> int:
    warnings.simplefilter("ignore")
    fuzzer.prepare()
    failure, did = attempt(fuzzer, seed, case, Notes(aloud=True))
    if failure is None:
        print(f"case {case}: {did} {fuzzer.unit}, no failure")
        return 0
    print(f"FAILED {failure.kind}\n{failure.what}")
    return 1
