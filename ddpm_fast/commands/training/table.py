"""log.csv in a run's folder: one row for each point of the curves, for whatever reads tables.

A row is appended when it is known, so a process that is killed may leave an incomplete one. A run that is resumed cuts
that one, and the rows of the training steps that it takes again.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.loops.metrics import Look

NAME = "log.csv"
QUARTERS = ("loss_q0", "loss_q1", "loss_q2", "loss_q3")
COLUMNS = (
    "step",
    "loss",
    *QUARTERS,  # of the timesteps, the least noisy one first
    "gradient_norm",
    "skipped_steps",
    "images_per_second",
    "waiting_share",  # of the time, for images
    "time",  # UTC
)
_MOST_DIGITS = 18  # of a step
_LONGEST = 10_000  # bytes of a line; ours have about 150


class Table:
    """The table of one run.

    Attributes:
        name: What it is called where it cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        """Nothing is written yet.

        Args:
            folder: The run's.
            step: The training step that the run goes on from.
        """
        self._path, self._kept, self._is_whole = folder / NAME, step, False
        self.name = f"the table {self._path}"

    def look(self, look: Look, rate: float, waiting: float) -> None:
        """Add a row. Raises OSError or InputError if it cannot be written."""
        if not self._is_whole or not self._path.exists():
            self._cut()
        self._is_whole = False  # until all of the row is written
        with open(self._path, "a", encoding="ascii") as file:
            csv.writer(file, lineterminator="\n").writerow(_row(look, rate, waiting))
        self._is_whole, self._kept = True, look.step

    def quality(self, record: dict[str, Any]) -> None:
        """Nothing: quality.jsonl has the evaluations."""

    def grid(self, grid: Any, step: int) -> None:
        """Nothing: the folder has the grids."""

    def close(self) -> None:
        """Nothing: no file is open."""

    def _cut(self) -> None:
        """Write the file again, with the rows up to the step that is reached."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path, durable=False) as temporary, open(temporary, "w", encoding="ascii") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in _rows(self._path) if int(row["step"]) <= self._kept)
        self._is_whole = True


def _row(look: Look, rate: float, waiting: float) -> list[Any]:
    """What stands in the columns."""
    quarters = look.quarters or (math.nan,) * len(QUARTERS)
    numbers = (look.loss, *quarters, look.norm)
    time = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return [
        look.step,
        *(f"{number:.9g}" if math.isfinite(number) else "" for number in numbers),
        look.skipped,
        f"{rate:.6g}",
        f"{waiting:.4g}",
        time,
    ]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The complete rows of a table, in order; none of a file that is no such table."""
    try:
        with open(path, "rb") as file:
            header = _cells(file.readline(_LONGEST))
            while line := file.readline(_LONGEST):
                cells = _cells(line)
                if len(cells) == len(header) and "step" in header:
                    row = dict(zip(header, cells, strict=True))
                    if row["step"].isdecimal() and len(row["step"]) <= _MOST_DIGITS:
                        yield row
    except FileNotFoundError:
        return


def _cells(line: bytes) -> list[str]:
    """The cells of a line; none of one that is cut off, or no text."""
    try:
        return line[:-1].decode("ascii").split(",") if line.endswith(b"\n") else []
    except UnicodeDecodeError:
        return []
