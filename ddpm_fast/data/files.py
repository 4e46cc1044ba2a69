"""Folders and .zip archives of pictures: find the pictures, name their classes, decode them, report the broken ones."""

import io
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ddpm_fast.data.pixels import decode, is_grey, run_parallel, upright_size
from ddpm_fast.errors import InputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MAX_MEMBER_BYTES = 1 << 30  # no picture unpacks to a gigabyte, so an archive member that does is a bomb


class Entry(NamedTuple):
    """One picture in a folder or archive.

    Attributes:
        name: Its path inside the folder or archive, with '/' between the parts.
        open: Opens it for reading.
    """

    name: str
    open: Callable[[], BinaryIO]


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading bytes."""
    return open(path, "rb")


def _is_picture(name: str) -> bool:
    # Names with a leading dot belong to other programs: macOS writes a "._x.jpg" for every x.jpg.
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def _is_loop(parent: str, child: str) -> bool:
    """Whether the folder `child` is a link to `parent` or to a folder that contains it."""
    real, here = os.path.realpath(os.path.join(parent, child)), os.path.realpath(parent)
    return here == real or here.startswith(real.rstrip(os.sep) + os.sep)


def list_folder(folder: Path) -> list[Entry]:
    """Every picture below `folder`, sorted by path. Symbolic links are followed.

    Raises:
        InputError: If there is no picture, or a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list the folder {error.filename}: {error.strerror}") from error

    entries: list[Entry] = []
    others = 0
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not _is_loop(parent, name)]
        for file in files:
            path = Path(parent, file)
            name = path.relative_to(folder).as_posix()
            if _is_picture(name):
                entries.append(Entry(name, partial(open_file, path)))
            else:
                others += 1
    return _sorted_entries(entries, others, f"folder {folder}")


def list_zip(archive: zipfile.ZipFile) -> list[Entry]:
    """Every picture in an open archive, sorted by path.

    Raises:
        InputError: If there is no picture.
    """

    def read(member: zipfile.ZipInfo) -> BinaryIO:
        if member.file_size > _MAX_MEMBER_BYTES:
            raise ValueError(f"unpacks to {member.file_size} bytes, more than a picture can need")
        return io.BytesIO(archive.read(member))

    members = [member for member in archive.infolist() if not member.is_dir()]
    entries = [Entry(m.filename, partial(read, m)) for m in members if _is_picture(m.filename)]
    entries = _sorted_entries(entries, len(members) - len(entries), f"archive {archive.filename}")
    # `zip -r pets.zip pets` puts everything into one folder, which says nothing about classes.
    tops = {entry.name.split("/")[0] for entry in entries}
    if len(tops) == 1 and all(entry.name.count("/") >= 2 for entry in entries):
        entries = [entry._replace(name=entry.name.split("/", 1)[1]) for entry in entries]
    return entries


def _sorted_entries(entries: list[Entry], others: int, where: str) -> list[Entry]:
    if not entries:
        raise InputError(
            f"no images in the {where} ({others} other files); looked for files ending in "
            f"{' '.join(SUFFIXES)}; give a folder or .zip that has some"
        )
    return sorted(entries)


def class_labels(entries: list[Entry]) -> tuple[np.ndarray, list[str]]:
    """The classes of the pictures: the sub-folders of the first level, sorted.

    Returns:
        The labels, int64 [N], and the names of the classes.

    Raises:
        InputError: If a picture is in no sub-folder.
    """
    outside = [entry.name for entry in entries if "/" not in entry.name]
    if len(outside) == len(entries):
        raise InputError(
            "classes were asked for, but there are no sub-folders with images; put the images of each class "
            "into a sub-folder of its own (cat/1.png, dog/1.png), or train without classes"
        )
    if outside:
        raise InputError(
            f"{outside[0]} is in no sub-folder, so it has no class ({len(outside)} such images); move each "
            "into the sub-folder of its class, or train without classes"
        )
    tops = [entry.name.split("/")[0] for entry in entries]
    names = sorted(set(tops))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[top] for top in tops], dtype=np.int64), names


class Decoded(NamedTuple):
    """Decoded pictures.

    Attributes:
        images: uint8 [K, C, H, W].
        kept: int64 [K], the positions of their entries.
        skipped: The names of the broken pictures.
    """

    images: np.ndarray
    kept: np.ndarray
    skipped: list[str]


class _Reader:
    """Runs work on every entry, and remembers which entries are broken and why."""

    def __init__(self, entries: list[Entry], strict: bool) -> None:
        self.entries = entries
        self.strict = strict
        self.broken: dict[int, str] = {}

    def attempt(self, i: int, work: Callable[[int, Image.Image], object]) -> str | None:
        """Run work on entry i.

        Returns:
            Why the entry is unreadable, or None if it is readable.

        Raises:
            InputError: If it is unreadable and the reader is strict.
        """
        try:
            with self.entries[i].open() as file, Image.open(file) as image:
                work(i, image)
        except Exception as error:  # on broken bytes, decoders raise nearly anything
            reason = f"{error} ({type(error).__name__})"
            if self.strict:
                raise InputError(
                    f"cannot read the image {self.entries[i].name}: {reason}; repair or remove it, or leave "
                    "strict off to skip such files"
                ) from error
            return reason
        return None

    def each(
        self,
        work: Callable[[int, Image.Image], object],
        progress: Callable[[int, int], object] | None = None,
    ) -> list[int]:
        """Run work(i, picture) on every entry that is not known to be broken.

        Returns:
            The positions of the entries that were readable.

        Raises:
            InputError: If none was, or one was not and the reader is strict.
        """
        todo = [i for i in range(len(self.entries)) if i not in self.broken]
        reasons = run_parallel(lambda k: self.attempt(todo[k], work), len(todo), progress)
        for i, reason in zip(todo, reasons, strict=True):
            if reason is not None:
                self.broken[i] = reason
                # stacklevel 5 is the caller of load_dataset.
                warnings.warn(f"skipped the broken image {self.entries[i].name}: {reason}", stacklevel=5)
        kept = [i for i in todo if i not in self.broken]
        if not kept:
            i = min(self.broken)
            raise InputError(
                f"none of the {len(self.entries)} images is readable; {self.entries[i].name}: "
                f"{self.broken[i]}; give images in one of the formats {' '.join(SUFFIXES)}"
            )
        return kept


def read_pictures(
    entries: list[Entry],
    image_size: int | None,
    channels: int | None,
    strict: bool,
    progress: Callable[[int, int], object] | None,
) -> Decoded:
    """Decode every entry.

    A broken picture is named in a warning and left out. A picture that Pillow calls a decompression bomb (over 179
    million pixels) counts as broken.

    Args:
        entries: The pictures.
        image_size: The side of the square to make; None keeps the size, which must then be the same for all.
        channels: 1 or 3; None means 1 if every picture is grey, and 3 otherwise.
        strict: Whether a broken picture raises InputError instead.
        progress: Called as progress(done, total) while pictures are decoded.

    Raises:
        InputError: If the sizes differ and no image_size is given, or no picture is readable.
    """
    reader = _Reader(entries, strict)
    kept = list(range(len(entries)))
    height = width = image_size or 0
    if image_size is None or channels is None:  # read the headers first, so that memory is allocated once
        grey: dict[int, bool] = {}
        sizes: dict[int, tuple[int, int]] = {}

        def probe(i: int, image: Image.Image) -> None:
            grey[i] = is_grey(image)
            if image_size is None:
                sizes[i] = upright_size(image)

        kept = reader.each(probe)
        if channels is None:
            channels = 1 if all(grey[i] for i in kept) else 3
        if image_size is None:
            width, height = _common_size([(entries[i].name, sizes[i]) for i in kept])

    slots = {i: slot for slot, i in enumerate(kept)}
    images = np.empty((len(slots), channels, height, width), np.uint8)

    def fill(i: int, image: Image.Image) -> None:
        images[slots[i]] = decode(image, image_size, channels)

    kept = reader.each(fill, progress)
    if len(kept) < len(slots):
        images = images[[slots[i] for i in kept]]
    return Decoded(images, np.array(kept, dtype=np.int64), [entries[i].name for i in sorted(reader.broken)])


def _common_size(named_sizes: list[tuple[str, tuple[int, int]]]) -> tuple[int, int]:
    """The (width, height) that all have, or an InputError that lists the sizes."""
    counts = Counter(size for _, size in named_sizes)
    if len(counts) == 1:
        return named_sizes[0][1]
    example = dict((size, name) for name, size in reversed(named_sizes))
    seen = ", ".join(f"{w}x{h} ({n} images, such as {example[w, h]})" for (w, h), n in counts.most_common(5))
    more = f" and {len(counts) - 5} more sizes" if len(counts) > 5 else ""
    raise InputError(
        f"the images differ in size (width x height): {seen}{more}; give image_size (--image-size), to which "
        "the shorter side is scaled before the middle square is cut out"
    )
