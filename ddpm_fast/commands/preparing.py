"""Writes the prepared folders that ddpm_fast/data/cache.py reads: images are decoded in parallel, file by file.

Each file holds the readable ones among a fixed range of the source's images, so that files do not depend on each other:
two are made at a time, and those that are finished stay when the work is stopped. The index is written after each.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from ddpm_fast.data import StoredDataset
from ddpm_fast.data.bounds import Unreadable, allocating
from ddpm_fast.data.cache import LABELS, array_header, images_file
from ddpm_fast.data.cache_index import INDEX, CacheIndex, ImageFile, is_prepared, read_index
from ddpm_fast.data.files import is_hidden
from ddpm_fast.data.pixels import run_parallel
from ddpm_fast.data.reading import refusal
from ddpm_fast.data.stored import INDEX_DIGEST
from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.atomic import atomic_path

FILE_BYTES = 128 << 20  # of the images of one file, which are in memory while it is made
_AT_ONCE = 2  # files: while one is hashed and written, the next is decoded


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


def write_images(dataset: StoredDataset, out: Path, index: CacheIndex, advance: Callable[[int], object]) -> None:
    """Write what a folder lacks.

    Args:
        dataset: The images.
        out: The folder.
        index: What it has, which is brought up to date with each file.
        advance: Called with the number of images that were read since its last call, from several threads. What it
            raises ends the work.

    Raises:
        InputError: If a file cannot be read or written, an image is broken and the data set is strict, or all are
            broken.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        lacking = [number for number, file in enumerate(index.files) if file is None]
        making = {pool.submit(_make_file, dataset, out, index, number, advance): number for number in lacking}
        try:
            for future in as_completed(making):
                index.files[making[future]] = future.result()
                _write_index(out, index)
        finally:
            pool.shutdown(cancel_futures=True)
    if not sum(file.count for file in index.files if file is not None):
        raise InputError(f"none of the {len(dataset)} images of {printable(dataset.name)} is readable")
    if dataset.labels is not None:
        broken = [i for file in index.files if file is not None for i, _, _ in file.skipped]
        labels = np.delete(dataset.labels.numpy().astype("<i8"), broken)
        index.labels = _write_array(out / LABELS, labels)
        index.label_names = dataset.label_names
    index.complete = True
    _write_index(out, index)


def _make_file(
    dataset: StoredDataset, out: Path, index: CacheIndex, number: int, advance: Callable[[int], object]
) -> ImageFile:
    """Decode the images of one file and write it."""
    first = number * index.per_file
    numbers = range(first, min(first + index.per_file, len(dataset)))
    shape = (len(numbers), *index.shape)
    with allocating(math.prod(shape), "the images of one file", "close other programs"):
        images = np.empty(shape, np.uint8)

    def fill(k: int) -> str | None:
        try:
            images[k] = dataset.source.read(numbers[k])
        except Unreadable as error:
            if dataset.strict:
                raise InputError(refusal(dataset.source.name_of(numbers[k]), str(error))) from error
            return str(error)
        return None

    told = 0

    def progress(done: int, _: int) -> None:
        nonlocal told
        advance(done - told)
        told = done

    reasons = run_parallel(fill, len(numbers), progress)
    skipped = [
        (i, dataset.source.name_of(i), reason) for i, reason in zip(numbers, reasons, strict=True) if reason is not None
    ]
    if skipped:
        images = np.delete(images, [i - first for i, _, _ in skipped], axis=0)
    return ImageFile(len(images), _write_array(out / images_file(number), images), skipped)


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
