"""A run of a benchmark: its cases one after the other, and its file, which holds what there is after each of them."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from rich.markup import escape

from benchmarks import machine, rows
from ddpm_fast.commands.common import choose_device, console
from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable


@dataclasses.dataclass(frozen=True)
class Options:
    """What the commands share. out: the JSON's place. only: a part of the names of the cases to run. quick: small sizes
    and few rounds, which time nothing. rounds: 0 for the usual number. minutes: no case is started after so many.
    compiling: whether networks run under torch.compile too. backends: those of ours to measure, if not the usual.
    autotuning: whether torch.compile also chooses the fastest of its kernels, by mode="max-autotune"."""

    out: Path
    device: str = "cpu"
    only: str = ""
    quick: bool = False
    rounds: int = 0
    minutes: float | None = None
    compiling: bool = False
    backends: tuple[str, ...] = ()
    autotuning: bool = False

    @property
    def place(self) -> torch.device:
        return choose_device(self.device)

    def checked(self, rounds: int, quick_rounds: int) -> "Options":
        """With the number of rounds. Raises InputError for one below 0 and a file that cannot be written."""
        check_writable(self.out)
        if self.rounds < 0:
            raise InputError(f"rounds is {self.rounds}; expected at least 1")
        return dataclasses.replace(self, rounds=quick_rounds if self.quick else self.rounds or rounds)

    def matching(self, cases: list) -> list:
        """The cases whose name holds `only`. Raises InputError if none does."""
        if chosen := [case for case in cases if self.only in str(case)]:
            return chosen
        names = "\n  ".join(map(str, cases))
        raise InputError(f"no case's name holds {self.only!r}; there are\n  {names}")


class Mismatch(Exception):
    """A variant does not give the same result as the others."""


class Run:
    """What is found goes into one file, which is written anew after each case, so that a run that is stopped keeps
    what it had. found: the file's content."""

    def __init__(self, options: Options, ceilings: dict[str, float], **more: Any):
        self.options, self.device, self.ceilings = options, options.place, ceilings
        self.started = time.monotonic()
        self.found: dict[str, Any] = machine.environment(self.device)
        self.found |= {"device": str(self.device), "quick": options.quick, "rounds": options.rounds or None}
        self.found |= {"ceilings": ceilings, "absent": {}, "notes": {}, "failures": [], "left_out": [], "rows": []}
        self.found |= more

    def add(self, made: list[rows.Row]) -> None:
        self.found["rows"] += [dataclasses.asdict(row) for row in made]
        for line in rows.lines(made, self.ceilings):
            say(line)

    def absent(self, label: str, reason: str, case: object) -> None:
        """A variant is not there for a case."""
        self.found["absent"].setdefault(f"{label}: {reason}", []).append(str(case))

    @contextlib.contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Bad input, a mismatch, a lack of memory and what a GPU or a compiler refuses are put down as a failure, and
        do not end the run."""
        try:
            yield
        except (InputError, Mismatch, RuntimeError) as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.found["failures"].append(message if isinstance(error, Mismatch) else f"{what}: {message}")
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of a GPU that is beyond help: the next case says so
                torch.cuda.empty_cache()

    def each(self, cases: list, measure: Callable[[Any], None]) -> None:
        """Calls measure(case) for one case after the other until the time is over, and writes after each."""
        for case in cases:
            if self.options.minutes is not None and time.monotonic() - self.started > 60 * self.options.minutes:
                self.found["left_out"].append(str(case))
                continue
            with self.surviving(str(case)):
                measure(case)
            self.write()

    def write(self) -> None:
        with atomic_path(self.options.out) as path:
            path.write_text(json.dumps(self.found, indent=1) + "\n")

    def finish(self) -> None:
        """Writes the file and says what is missing in it. Raises typer.Exit with status 1 if anything failed."""
        self.write()
        say(f"Wrote {self.options.out}")
        for reason, cases in self.found["absent"].items():
            say(f"Absent from {len(cases)} cases: {reason}")
        if left := self.found["left_out"]:
            say(f"Left out, as the {self.options.minutes:g} minutes were over: {', '.join(left)}")
        for message in self.found["failures"]:
            say(f"Failed: {message}")
        if self.found["failures"]:
            raise typer.Exit(1)


def say(line: str) -> None:
    console.print(escape(line))
