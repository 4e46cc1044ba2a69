"""The runs that the page shows: folders that `python -m ddpm_fast.train` writes to while they are looked at.

The curves are read from the run's log.csv, or without one from its TensorBoard files, and the samples from its newest
grid. Nothing is written, and whatever is half written is left out.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_fast.commands.demo.showing import png
from ddpm_fast.commands.demo.uploads import checked
from ddpm_fast.commands.training.log import duration
from ddpm_fast.commands.training.table import NAME as LOG
from ddpm_fast.data.reading import read_pictures
from ddpm_fast.errors import InputError, printable

CURVES = "curves"
_QUARTER = re.compile(r"[/_]q\d$")
_GRID = re.compile(r"samples-(\d{1,12})\.png")
_LARGEST_LOG = 32 << 20  # bytes that are read, from the end: some 400,000 rows
_LARGEST_EVENTS = 512 << 20  # bytes of TensorBoard files, whose grids make them large
_LARGEST_GRID = 256 << 20  # bytes of the file of a grid
_GRID_SIDE = 1024  # pixels of a grid that is sent to a browser
MOST_POINTS = 1000  # of a curve: a screen shows no more
MOST_CURVES = 16
_MOST_COLUMNS = 200

Curve = tuple[list[int], list[float]]


class View(NamedTuple):
    """What a run is like now.

    Attributes:
        curves: The steps and values of each curve, by its name.
        grid: The newest grid of samples as a PNG, or None.
        grid_step: The training step after which it was drawn.
        text: A line about the run.
    """

    curves: dict[str, Curve]
    grid: bytes | None
    grid_step: int
    text: str


class Runs:
    """The runs that were named when the page was started. A visitor chooses one by name."""

    def __init__(self, folders: Sequence[Path]):
        """folders: The runs' folders. Raises InputError for one that is not there."""
        self._folders: dict[str, Path] = {}
        for folder in dict.fromkeys(folders):
            if not os.path.isdir(folder):
                raise InputError(
                    f"--run: there is no folder {folder}; give the folder of a training (its --out), which has to be "
                    "there already"
                )
            name, number = printable(folder.resolve().name), 1
            while name in self._folders:
                number += 1
                name = f"{printable(folder.resolve().name)} ({number})"
            self._folders[name] = folder

    @property
    def names(self) -> list[str]:
        """What can be chosen."""
        return list(self._folders)

    def folder(self, name: object) -> Path:
        """The folder of a run. Raises InputError if there is none of that name."""
        if not isinstance(name, str) or name not in self._folders:
            raise InputError(f"there is no run {name!r:.100} here; expected one of {', '.join(self.names) or 'none'}")
        return self._folders[name]

    def version(self, name: object) -> str:
        """A text that changes when the run has written something that is shown."""
        folder = self.folder(name)
        files = [folder / LOG, *_listed(folder / CURVES), newest_grid(folder)[0]]
        found = []
        for file in files:
            try:
                status = os.stat(file) if file is not None else None
            except OSError:
                continue
            found.append(f"{file} {status.st_size} {status.st_mtime_ns}" if status is not None else "")
        return "\n".join(found)

    def look(self, name: object) -> View:
        """What a run is like now. Raises InputError if there is none of that name, or its grid is no picture."""
        folder = self.folder(name)
        curves = read_curves(folder)
        path, step = newest_grid(folder)
        grid = None if path is None else _read_grid(path)
        return View(curves, grid, step, _describe(curves, folder))


def newest_grid(folder: Path) -> tuple[Path | None, int]:
    """The grid of samples of the latest training step, and that step; None and 0 if there is none."""
    found = [(int(match[1]), path) for path in _listed(folder) if (match := _GRID.fullmatch(path.name))]
    step, path = max(found, default=(0, None))
    return path, step


def read_curves(folder: Path) -> dict[str, Curve]:
    """The curves that a run has written so far: from log.csv, or without one from its TensorBoard files."""
    is_csv = os.path.isfile(folder / LOG)
    found = _from_csv(_end_of(folder / LOG)) if is_csv else _from_events(folder / CURVES)
    # The loss comes first, and the losses by quarter of t last.
    quarters = sorted(name for name in found if _QUARTER.search(name))
    order = sorted((name for name in found if name not in quarters), key=lambda name: name != "loss") + quarters
    return {name: found[name] for name in order[:MOST_CURVES]}


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return []


def _end_of(path: Path) -> str:
    """The header of a CSV file and its last lines, of which the last one may be half written."""
    with open(path, "rb") as file:
        header = file.readline(1 << 16)
        size = os.fstat(file.fileno()).st_size
        if size - len(header) > _LARGEST_LOG:
            file.seek(size - _LARGEST_LOG)
            file.readline(1 << 16)
        rest = file.read(_LARGEST_LOG)
    whole, _, _ = rest.rpartition(b"\n")
    return (header + whole).decode("utf-8", "replace")


def _from_csv(content: str) -> dict[str, Curve]:
    """The columns of numbers over the column `step`. A step that is there twice, because the run was continued from
    before it, counts with its last row."""
    points: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(io.StringIO(content)):
        try:
            step = int(row["step"])
        except (KeyError, TypeError, ValueError):
            continue
        for name, text in row.items():
            if name in (None, "step") or not isinstance(text, str):
                continue
            try:
                value = float(text)
            except ValueError:
                continue
            if math.isfinite(value) and (name in points or len(points) < _MOST_COLUMNS):
                points.setdefault(name, {})[step] = value
    return {name: _thinned(sorted(column.items())) for name, column in points.items()}


def _from_events(folder: Path) -> dict[str, Curve]:
    files = _listed(folder)
    if not files or sum(path.stat().st_size for path in files) > _LARGEST_EVENTS:
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": MOST_POINTS, "images": 1})
    events.Reload()
    names = events.Tags()["scalars"][:_MOST_COLUMNS]
    return {name: _thinned([(point.step, point.value) for point in events.Scalars(name)]) for name in names}


def _thinned(points: list[tuple[int, float]]) -> Curve:
    """At most MOST_POINTS of the points, at equal distances, the last one among them."""
    every = -(-len(points) // MOST_POINTS) or 1
    kept = points[::-1][::every][::-1]
    return [step for step, _ in kept], [value for _, value in kept]


def _read_grid(path: Path) -> bytes:
    """A grid as a PNG of a size for a browser. Raises InputError if it is no picture."""
    entry = checked(path, f"the grid {path.name}", None, _LARGEST_GRID)
    image = read_pictures([entry], None, None, strict=True, progress=None).images[0]
    shown = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    if max(shown.size) > _GRID_SIDE:
        shown.thumbnail((_GRID_SIDE, _GRID_SIDE))
    else:
        factor = max(1, 640 // max(shown.size))
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    pixels = np.asarray(shown)
    return png(pixels[..., None] if pixels.ndim == 2 else pixels)


def _describe(curves: dict[str, Curve], folder: Path) -> str:
    written = [folder / LOG, *_listed(folder / CURVES)]
    times = [path.stat().st_mtime for path in written if path.exists()]
    if not curves or not times:
        return "This run has written no curves yet."
    ago = max(0.0, time.time() - max(times))
    steps, losses = curves.get("loss", next(iter(curves.values())))
    loss = f", loss {losses[-1]:.4f}" if "loss" in curves else ""
    return f"Training step {steps[-1]:,}{loss}; last written {duration(ago)} ago."
