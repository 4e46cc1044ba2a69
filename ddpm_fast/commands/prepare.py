"""`python -m ddpm_fast.prepare`: decode images once, into a folder that training maps into memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_fast.commands import preparing
from ddpm_fast.commands.common import App, console, path_option, plain_errors, say_written
from ddpm_fast.commands.selecting import ImageColumnOption, LabelColumnOption, SplitOption, SubsetOption
from ddpm_fast.commands.sizes import parse_size, size_option
from ddpm_fast.commands.stopping import Stopped, Stopping, stop_signals
from ddpm_fast.commands.training.log import PLAIN_REPORT_SECONDS, duration, say, warn
from ddpm_fast.data import StoredDataset, open_dataset
from ddpm_fast.data.cache import Cache
from ddpm_fast.data.cache import verify as verify_folder
from ddpm_fast.data.cache_index import CacheIndex
from ddpm_fast.data.picturesource import PictureSource
from ddpm_fast.data.selection import Selection
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import check_writable_folder, remove_leftovers
from ddpm_fast.files.lock import FolderLock

_NAMED = 3  # of many broken images

app = App()


@app.command()
def main(
    out: Annotated[Path, path_option("the folder to write; a second start with the same options goes on")],
    data: Annotated[
        str | None,
        path_option(
            "a folder of images, a .zip of them, tar shards (a .tar, a folder of them, or train-{000..146}.tar), a "
            ".parquet, or hf:NAME"
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        size_option(
            "the size to make, or the side of a square: images are scaled to cover it, and the middle is cut out"
        ),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 (grey) or 3 (RGB); if not given, as the images have them")
    ] = None,
    classes: Annotated[
        bool, typer.Option("--classes", help="the sub-folders of the first level are the classes")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="stop at a broken image instead of leaving it out")] = False,
    split: SplitOption = None,
    subset: SubsetOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="compare the files of --out with their checksums")] = False,
) -> None:
    """Decode images once, into files that training maps into memory: --data OUT then needs no decoding."""
    with plain_errors():
        if verify == (data is not None):
            raise InputError("give either --data, the images to prepare, or --verify, to check what is in --out")
        if verify:
            _verify(out)
            return
        with stop_signals(
            "stopping after the images that are being decoded; Ctrl-C again to abort",
            lambda: "stopped; the finished files stay, and the same command goes on",
        ) as stopping:
            selection = Selection(split, subset, image_column, label_column)
            size = None if image_size is None else parse_size(image_size)
            with stopping.anywhere():
                dataset = open_dataset(str(data), size, channels, classes, strict, in_memory=False, selection=selection)
            if not isinstance(dataset, StoredDataset) or not isinstance(dataset.source, PictureSource | Cache):
                raise InputError(
                    f"{printable(str(data))} is an array already, which needs no decoding; train from it as it is"
                )
            try:
                _prepare(dataset, check_writable_folder(out), stopping)
            except Stopped:
                say(f"Stopped. The finished files are in {escape(str(out))}; the same command goes on")
                raise typer.Exit(stopping.status) from None


def _prepare(dataset: StoredDataset, out: Path, stopping: Stopping) -> None:
    with FolderLock(out):
        remove_leftovers(out)
        index = preparing.begin(dataset, out)
        if not index.complete:
            with _Shown(len(dataset), preparing.finished_images(index)) as shown:

                def look(read: int) -> None:
                    stopping.check()
                    shown.show(read)

                preparing.write_images(dataset, out, index, look)
    _report(index)
    say_written(out)


def _report(index: CacheIndex) -> None:
    """Say what is in the folder, and which images were left out."""
    files = [file for file in index.files if file is not None]
    count = sum(file.count for file in files)
    skipped = [found for file in files for found in file.skipped]
    for _, name, reason in skipped[:_NAMED]:
        warn(f"left out {printable(name)}: {printable(reason)}")
    if len(skipped) > _NAMED:
        warn(f"{len(skipped)} broken images were left out; index.json lists them")
    classes = "" if index.labels is None else ", with classes"
    plural = "s" if len(files) > 1 else ""
    say(f"{count} images {'x'.join(map(str, index.shape))}{classes}, in {len(files)} file{plural}")


def _verify(out: Path) -> None:
    with Progress(transient=True, console=console) as bar:
        task = bar.add_task("verifying")
        index = verify_folder(out, lambda done, total: bar.update(task, completed=done, total=total))
    say("All checksums are right")
    _report(index)


class _Shown:
    """A progress bar, or lines where there is no terminal. Use it in a with statement."""

    def __init__(self, total: int, done: int):
        """The numbers of images in all, and of those that were finished before."""
        self._total, self._before = total, done
        self._started = self._printed = time.monotonic()
        self._bar = Progress(
            TextColumn("decoding"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[rate]:.0f} images/s"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=done, rate=0.0)

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, read: int) -> None:
        """Show that so many images were read since the start."""
        self._bar.start()  # not before, since it starts a thread, beside which no process is to be forked
        now, done = time.monotonic(), self._before + read
        rate = read / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=done, rate=rate)
        if not console.is_terminal and now - self._printed > PLAIN_REPORT_SECONDS and read:
            self._printed = now
            say(f"{done}/{self._total} images  {rate:.0f} images/s  {duration((self._total - done) / rate)} left")
