"""Drawing for `python -m ddpm_fast.sample`: a progress bar, the frames of an animation, and what is kept when it is
stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ddpm_fast.commands.common import console
from ddpm_fast.commands.everywhere import Everywhere
from ddpm_fast.commands.ranks import Ranks
from ddpm_fast.commands.sizes import as_argument
from ddpm_fast.commands.stopping import Stopped, stop_signals
from ddpm_fast.errors import printable
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.loops.options import SamplingOptions, Step
from ddpm_fast.pictures import images as pictures
from ddpm_fast.pictures.folder import SampleFolder
from ddpm_fast.values import ValueRange

GIF_FRAMES = 40
GRID_PIXELS = 700  # small images are enlarged to about this side


class Drawable(Protocol):
    """What is ready to be drawn: prepared.Prepared, or one of the classes of editing/."""

    @property
    def n(self) -> int:
        """How many images there are."""

    @property
    def rows(self) -> int:
        """How many rows each batch runs through that on_step is called for."""

    def batches(
        self, check: Callable[[], object] | None = None, wanted: Callable[[slice], bool] | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Draw the images batch by batch; see prepared.Prepared.batches."""


def image_bar() -> Progress:
    """A progress bar of images, whose tasks have a rate: images per second."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[rate]:.1f} images/s"),
        console=console,
        disable=not console.is_terminal,
    )


class Drawing:
    """Draws what is prepared while a progress bar shows how far it is, and keeps what an animation needs.

    Attributes:
        drawn: How many images are finished, by all ranks.
        seconds: How long the drawing took.
        after_row: Called after each row.
    """

    def __init__(self, batch_size: int, keeps_frames: bool = False):
        self._batch_size, self._keeps_frames = batch_size, keeps_frames
        self._rows = self._n = 1
        self._everywhere: Everywhere | None = None
        self.drawn, self._shown = 0, 0.0
        self._started = self.seconds = 0.0
        self.after_row: Callable[[], object] = lambda: None
        self._frames: dict[int, list[Tensor]] = {}
        self._bar = image_bar()

    def batches(
        self,
        prepared: Drawable,
        description: str,
        check: Callable[[], object],
        wanted: Callable[[slice], bool] | None = None,
        everywhere: Everywhere | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """The batches of what is prepared, on the CPU. `on_step` must be among its options.

        Args:
            prepared: What to draw.
            description: What the bar calls it.
            check: Called at every step. What it raises ends the drawing.
            wanted: Whether a batch is to be drawn; None draws all.
            everywhere: What several ranks draw. The bar is then that of all, and after its own last batch this rank
                waits for the others.
        """
        starts = range(0, prepared.n, self._batch_size)
        sizes = {first: min(self._batch_size, prepared.n - first) for first in starts}
        chosen = {first: size for first, size in sizes.items() if wanted is None or wanted(slice(first, first + size))}
        self._rows, self._everywhere = prepared.rows, everywhere
        self._n = max(1, sum(chosen.values()) if everywhere is None else everywhere.n)
        self.drawn, self._shown, slowest = 0, 0.0, 0.0
        self._started = began = time.perf_counter()
        try:
            with self._bar:
                self._task = self._bar.add_task(description, total=self._n, rate=0.0)
                for part, x in prepared.batches(check, lambda part: part.start in chosen):
                    yield part, x.cpu()
                    self.drawn += len(x)
                    slowest, began = max(slowest, time.perf_counter() - began), time.perf_counter()
                if everywhere is not None:
                    everywhere.wait(check, self._show, slowest)
        finally:
            self.drawn = self.drawn if everywhere is None else everywhere.finished(now=True)
            self.seconds = time.perf_counter() - self._started

    def on_step(self, step: Step) -> None:
        """Take note of a row."""
        if self._keeps_frames:
            every = max(1, self._rows // GIF_FRAMES)
            if step.index % every == 0 or step.index == self._rows - 1:
                self._frames.setdefault(step.index, []).append(step.x.cpu())
        self._show((step.index + 1) / self._rows * len(step.x))
        self.after_row()

    def _show(self, current: float = 0) -> None:
        """Move the bar. current: the finished share of this rank's batch, in images."""
        done = self.drawn + current
        if self._everywhere is not None:
            # The others are about as far in their batches. What was shown is not taken back.
            done = self._everywhere.finished() + current * self._everywhere.ranks.world_size
            done = self._shown = min(self._n, max(done, self._shown))
        self._bar.update(self._task, completed=done, rate=done / (time.perf_counter() - self._started))

    def frames(self) -> list[Tensor]:
        """The states to be shown one after the other, each of all images."""
        return [torch.cat(parts) for _, parts in sorted(self._frames.items())]


def settings_of(loaded: LoadedModel, options: SamplingOptions, precision: str) -> dict[str, Any]:
    """All that an image depends on besides its sample id, its class, and the picture that it is an edit of."""
    return {
        "model": loaded.digest,
        "sampler": options.sampler,
        "steps": str(options.steps),
        "spacing": options.spacing,
        "eta": options.eta,
        "guidance": options.guidance,
        "guidance_rescale": options.guidance_rescale,
        "dynamic_threshold": options.dynamic_threshold,
        "seed": options.seed,
        "precision": precision,
        **({} if options.shape is None else {"image_size": as_argument(options.shape[1:])}),
    }


@dataclass(frozen=True)
class Job:
    """What is drawn, and where it goes.

    Attributes:
        prepared: What is drawn.
        drawing: What draws it. Its on_step must be among the options of what is prepared.
        title: What the progress bar calls it.
        target: The file or folder that the images go to.
        folder: The folder of samples, if that is what the target is.
        gif: The animation to write, or None.
        ids: The sample ids.
        classes: The class of each sample, or None.
        batch_size: How many images are drawn at a time.
        ranks: This process among those that draw these images. Of several, each draws its own batches into the folder.
        keeps_all: Whether all images are drawn and returned, those included that a folder has already.
        continuable: Whether --first-sample-id can draw the rest of these images.
        value_range: What [-1, 1] stands for, or None: 8-bit images.
    """

    prepared: Drawable
    drawing: Drawing
    title: str
    target: str
    folder: SampleFolder | None
    gif: Path | None
    ids: range
    classes: Sequence[int] | None
    batch_size: int
    ranks: Ranks
    keeps_all: bool = False
    continuable: bool = True
    value_range: ValueRange | None = None

    def run(self) -> Tensor:
        """Draw and write everything, or what is finished when a signal arrives.

        Returns:
            The images, [n, C, H, W] in [-1, 1]; none of them if they are in a folder and keeps_all is False.

        Raises:
            typer.Exit: After a signal.
        """
        everywhere = None
        if self.folder is not None and self.ranks.world_size > 1 and self.ranks.is_first:
            everywhere = Everywhere(self.folder, len(self.ids), self.ranks)
        parts: list[Tensor] = []
        first = "stopping after this step; Ctrl-C again to abort" if self.ranks.is_first else ""
        with stop_signals(first, self._aborted) as stopping:
            try:
                for part, x in self.drawing.batches(
                    self.prepared, self.title, stopping.check, self._wanted, everywhere
                ):
                    if self.folder is not None:
                        self.folder.write(part, x)
                    if self.folder is None or self.keeps_all:
                        parts.append(x)
            except Stopped:
                if self.folder is None and parts:
                    self._save(partial_path(Path(self.target)), torch.cat(parts))
                console.print(f"Stopped: {escape(self._what_is_kept())}")
                raise typer.Exit(stopping.status) from None
            images = torch.cat(parts) if parts else torch.empty(0)
            if self.folder is None:
                self._save(self.target, images)
            if self.gif is not None:
                pictures.save_gif(self.gif, self.drawing.frames(), scale=_scale(images))
        if everywhere is not None and self.drawing.drawn < everywhere.n:
            console.print(f"The other ranks have stopped or are slow: {escape(self._what_is_kept())}")
        return images

    def _wanted(self, part: slice) -> bool:
        """Whether this process is to draw these images."""
        if not self.ranks.owns(part.start // self.batch_size):
            return False
        return self.folder is None or self.keeps_all or self.folder.missing(part)

    def _save(self, path: str | Path, x: Tensor) -> None:
        classes = None if self.classes is None else self.classes[: len(x)]
        pictures.save_samples(path, x, classes, scale=_scale(x), value_range=self.value_range)

    def _aborted(self) -> str:
        kept = "nothing was written" if self.folder is None else f"{self.folder.count()} images are in {self.target}"
        return printable(f"aborted: {kept}")

    def _what_is_kept(self) -> str:
        """A text that says what is kept after a signal, and how to get the rest."""
        n, drawn = len(self.ids), self.drawing.drawn
        if self.folder is not None:
            return f"{self.folder.count()} of {n} images are in {self.target}. The same command draws the rest."
        if not drawn:
            return "no batch was finished, so nothing was written. --batch-size makes batches smaller."
        kept = f"the first {drawn} of {n} images are in {partial_path(Path(self.target))}."
        if not self.continuable:
            return f"{kept} The same command draws all of them."
        rest = f"--first-sample-id {self.ids.start + drawn} --n {n - drawn}"
        return f"{kept} Draw the rest with the same options and {rest}, into another --out."


def _scale(x: Tensor) -> int:
    """How many pixels wide a pixel of a grid of these images is drawn."""
    return max(1, GRID_PIXELS // (max(x.shape[-2:]) * max(1, round(len(x) ** 0.5))))


def partial_path(path: Path) -> Path:
    """Where the finished part of what was to become `path` goes, so that it is not mistaken for the whole:
    samples.png becomes samples.partial.png."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def unused_path(path: Path) -> Path:
    """The path, or if it is taken the first of samples-2.png, samples-3.png ... that is not."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
