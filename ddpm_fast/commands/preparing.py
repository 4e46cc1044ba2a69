"""Writes the prepared folders that ddpm_fast/data/cache.py reads: images are decoded in parallel, file by file.

Each file holds the readable ones among a fixed range of the source's images, so that files do not depend on each other:
every core makes one at a time, and those that are finished stay when the work is stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import multiprocessing
import multiprocessing.dummy
import os
import queue
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import format_exception
from typing import Any

import numpy as np

from ddpm_fast.data import StoredDataset
from ddpm_fast.data.bounds import Unreadable, allocating
from ddpm_fast.data.cache import LABELS, array_header, images_file
from ddpm_fast.data.cache_index import INDEX, CacheIndex, ImageFile, is_prepared, read_index
from ddpm_fast.data.files import is_hidden
from ddpm_fast.data.pixels import usable_cores
from ddpm_fast.data.reading import refusal
from ddpm_fast.data.stored import INDEX_DIGEST
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import atomic_path

FILE_BYTES = 32 << 20  # of the images of one file, which each worker has in memory while it makes it
_LOOK_SECONDS = 0.2  # between two looks at what the workers have done
_SAVE_SECONDS = 2.0  # between two times that the index is saved


def begin(dataset: StoredDataset, out: Path) -> CacheIndex:
    """What a folder has of the images, and what it lacks.

    Args:
        dataset: The images.
        out: The folder, which exists.

    Raises:
        InputError: If it holds something else, or images of another source or with other options; or if there is not
            enough room for what it lacks.
    """
    per_file = max(1, FILE_BYTES // math.prod(dataset.shape))
    source = {"name": dataset.name, "digest": dataset.digest, "images": len(dataset)}
    index = CacheIndex(dataset.shape, source, per_file, [None] * -(-len(dataset) // per_file))
    if is_prepared(out):
        found = read_index(out)
        if found.origin() != index.origin():
            raise InputError(
                f"{printable(str(out))} has been begun from other images or with other options ({_said(found)}, and "
                f"now {_said(index)}); give the same, or another folder"
            )
        index = found
        for number in range(len(index.files)):
            if not _is_there(index, number, out):
                index.files[number], index.complete = None, False
    elif others := [name for name in os.listdir(out) if not is_hidden(name)]:
        raise InputError(
            f"{printable(str(out))} is not empty: it has {printable(others[0])}; give a new folder, because everything "
            "in a prepared folder belongs to it"
        )
    lacking = index.files.count(None) * per_file * math.prod(index.shape)
    free = shutil.disk_usage(out).free
    needed = min(lacking, len(dataset) * math.prod(index.shape))
    if needed > free:
        raise InputError(
            f"the images take {needed / 2**30:,.2f} GiB, and {printable(str(out))} has {free / 2**30:,.2f} GiB of "
            "room; free some space, choose another place, or a smaller --image-size"
        )
    return index


def _said(index: CacheIndex) -> str:
    source = index.source
    digest = str(source.get("digest")).removeprefix(INDEX_DIGEST)[:12]
    size = "x".join(map(str, index.shape))
    return printable(f"{source.get('images')} images from {source.get('name')} at {size}, digest {digest}")


def _is_there(index: CacheIndex, number: int, out: Path) -> bool:
    """Whether a file is finished, and still has its size."""
    file, path = index.files[number], out / images_file(number)
    if file is None or not path.is_file():
        return False
    shape = (file.count, *index.shape)
    return path.stat().st_size == len(array_header(np.dtype(np.uint8), shape)) + math.prod(shape)


def finished_images(index: CacheIndex) -> int:
    """How many images of the source the finished files were made from."""
    return sum(file.count + len(file.skipped) for file in index.files if file is not None)


def write_images(dataset: StoredDataset, out: Path, index: CacheIndex, look: Callable[[int], object]) -> None:
    """Write what a folder lacks, in a process for each core, or in threads where a process cannot be forked.

    Args:
        dataset: The images.
        out: The folder.
        index: What it has, which is brought up to date.
        look: Called several times a second with the number of images that have been read. What it raises ends the work.

    Raises:
        InputError: If a file cannot be read or written, an image is broken and the data set is strict, or all are
            broken.
    """
    lacking = [number for number, file in enumerate(index.files) if file is None]
    # Where other threads run, as on Windows and macOS, a forked process is not safe.
    forks = sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods()
    team = _Team(multiprocessing.get_context("fork") if forks else multiprocessing.dummy, dataset, out, index, lacking)
    try:
        for number, file in team.made(look):
            index.files[number] = file
            if team.is_time_to_save():
                _write_index(out, index)
    finally:
        for number, file in team.end():
            index.files[number] = file
        _write_index(out, index)
    if not sum(file.count for file in index.files if file is not None):
        raise InputError(f"none of the {len(dataset)} images of {printable(dataset.name)} is readable")
    if dataset.labels is not None:
        broken = [i for file in index.files if file is not None for i, _, _ in file.skipped]
        labels = np.delete(dataset.labels.numpy().astype("<i8"), broken)
        index.labels = _write_array(out / LABELS, labels)
        index.label_names = dataset.label_names
    index.complete = True
    _write_index(out, index)


class _Team:
    """Processes or threads, each of which takes the next file that is lacking when it has finished one.

    Threads alone would not do: of the 0.15 ms that a picture of 64x64 takes, Python holds its lock for most.

    Args:
        context: What makes the workers: multiprocessing, or its likeness with threads.
        dataset: The images.
        out: The folder.
        index: What it has.
        lacking: The numbers of the files that it lacks.
    """

    def __init__(self, context: Any, dataset: StoredDataset, out: Path, index: CacheIndex, lacking: list[int]) -> None:
        self._dataset, self._out, self._index, self._lacking = dataset, out, index, lacking
        self._lock, self._results = context.Lock(), context.Queue()
        # The position in `lacking` that is taken next, the images that have been read, and whether to stop.
        self._next, self._read, self._stop = (context.Value("q", 0) for _ in range(3))
        self._starter, self._saved = os.getpid(), time.monotonic()
        self._workers = [context.Process(target=self._work) for _ in range(min(usable_cores(), len(lacking)))]
        for worker in self._workers:
            worker.daemon = True
            worker.start()

    def made(self, look: Callable[[int], object]) -> Iterator[tuple[int, ImageFile]]:
        """The number of each file and what it has, as they are finished."""
        for _ in self._lacking:
            while True:
                look(self._read.value)
                if lost := self._lost():
                    raise InputError(
                        f"a process that was decoding images was ended ({lost[0]}), perhaps because memory ran out; "
                        "close other programs and run the same command again, which goes on"
                    )
                with contextlib.suppress(queue.Empty):
                    number, made = self._results.get(timeout=_LOOK_SECONDS)
                    break
            if isinstance(made, Exception):
                raise made
            yield number, made
        look(self._read.value)

    def is_time_to_save(self) -> bool:
        """Whether the index was last saved some seconds ago: with many files, it is not small."""
        if time.monotonic() - self._saved < _SAVE_SECONDS:
            return False
        self._saved = time.monotonic()
        return True

    def end(self) -> Iterator[tuple[int, ImageFile]]:
        """Let the workers stop at their next image, wait for that, and give what they had finished before."""
        self._stop.value = 1
        if self._lost():  # it may have held a lock, for which the others would wait
            for worker in self._workers:
                worker.kill()
        works = True
        while works:
            works = any(worker.is_alive() for worker in self._workers)
            with contextlib.suppress(queue.Empty):
                while True:
                    number, made = self._results.get(timeout=_LOOK_SECONDS if works else 0)
                    if isinstance(made, ImageFile):
                        yield number, made
        for worker in self._workers:
            worker.join()

    def _lost(self) -> list[int]:
        """How the workers ended that did not end by themselves."""
        return [worker.exitcode for worker in self._workers if worker.exitcode]

    def _work(self) -> None:
        """What a worker does."""
        if os.getpid() != self._starter:  # Ctrl-C reaches every process of a terminal: the first one decides
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while not self._is_over():
            with self._lock:
                position = self._next.value
                self._next.value += 1
            if position >= len(self._lacking):
                return
            self._results.put((self._lacking[position], self._attempt(self._lacking[position])))

    def _attempt(self, number: int) -> ImageFile | Exception | None:
        """What came of a file: None if the work was stopped."""
        try:
            return self._make_file(number)
        except InputError as error:
            return error
        except Exception as error:  # not every one can be sent to another process
            return RuntimeError("".join(format_exception(error)))

    def _is_over(self) -> bool:
        """Whether to stop: because that was said, or the process that said to start was killed."""
        return bool(self._stop.value) or self._starter not in (os.getpid(), os.getppid())

    def _make_file(self, number: int) -> ImageFile | None:
        """Decode the images of a file and write it; None if the work was stopped."""
        source, per_file = self._dataset.source, self._index.per_file
        first = number * per_file
        numbers = range(first, min(first + per_file, len(self._dataset)))
        shape = (len(numbers), *self._index.shape)
        with allocating(math.prod(shape), "the images of one file", "close other programs"):
            images = np.empty(shape, np.uint8)
        skipped: list[tuple[int, str, str]] = []
        for i in numbers:
            if self._is_over():
                return None
            try:
                images[i - first - len(skipped)] = source.read(i)
            except Unreadable as error:
                if self._dataset.strict:
                    raise InputError(refusal(source.name_of(i), str(error))) from error
                skipped.append((i, source.name_of(i), str(error)))
            with self._lock:
                self._read.value += 1
        images = images[: len(numbers) - len(skipped)]
        return ImageFile(len(images), _write_array(self._out / images_file(number), images), skipped)


def _write_array(path: Path, array: np.ndarray) -> str:
    """Write an .npy file. Returns the SHA-256 of the file."""
    header = array_header(array.dtype, array.shape)
    hashed = hashlib.sha256(header)
    hashed.update(array.data)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        file.write(array.data)
    return hashed.hexdigest()


def _write_index(out: Path, index: CacheIndex) -> None:
    with atomic_path(out / INDEX) as temporary:
        temporary.write_text(index.text(), "utf-8")
