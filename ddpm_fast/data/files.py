"""Which files of a folder or archive are pictures, which classes they have, and the index of a folder."""

import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ddpm_fast.data.bounds import open_regular
from ddpm_fast.data.index import Entries, Entry, Index, Names
from ddpm_fast.data.pixels import run_parallel
from ddpm_fast.data.raster import NAMES, SUFFIXES, looks_like_picture
from ddpm_fast.errors import InputError, printable

# Names with a leading dot belong to other programs: macOS writes a "._x.jpg" for every x.jpg.
_HIDDEN = re.compile(r"(?:^|/)(?:\.|__MACOSX(?:/|$))")
NO_SUFFIX = "without a suffix"
_RECORD = "samples.json"  # what `python -m ddpm_fast.sample` writes beside its pictures
_KINDS_NAMED = 5
_REMEDY = "leave the images as they are while they are read, and start again"
_UNKNOWN = -1  # the size of what is no regular file, or of a link that leads nowhere


class Listing(NamedTuple):
    """The pictures of a folder or archive.

    Attributes:
        entries: The pictures, sorted by name.
        ignored: What the other files are, such as ".txt", and how many of each.
        labels: The class number of each picture, int64 [n], if these are stored with the pictures; else None.
        label_names: One name for each class, if the classes that are stored have names.
        unlabelled: If some pictures have a class and some have none, so that `labels` is None: one that has none.
    """

    entries: Index
    ignored: Counter[str]
    labels: np.ndarray | None = None
    label_names: list[str] | None = None
    unlabelled: str = ""


def say_ignored(ignored: Counter[str]) -> str:
    """A phrase such as "3 files: 2 .txt, 1 .svg"."""
    total = ignored.total()
    kinds = [f"{count} {printable(kind)}" for kind, count in ignored.most_common(_KINDS_NAMED)]
    rest = total - sum(count for _, count in ignored.most_common(_KINDS_NAMED))
    if rest:
        kinds.append(f"{rest} of other kinds")
    return f"{total} file{'s' if total != 1 else ''}" + (f": {', '.join(kinds)}" if kinds else "")


def kind_of(name: str) -> str:
    """The suffix of a file's name, in lower case, to count files by."""
    suffix = posixpath.splitext(name.lower())[1]
    return suffix if len(suffix) <= 12 else "with a long suffix"


def is_hidden(name: str) -> bool:
    """Whether a path, or a folder on it, is not meant to be seen."""
    return _HIDDEN.search(name) is not None


def _is_loop(parent: str, child: str) -> bool:
    """Whether the folder `child` is a link to `parent` or to a folder that contains it."""
    real, here = os.path.realpath(os.path.join(parent, child)), os.path.realpath(parent)
    return here == real or here.startswith(real.rstrip(os.sep) + os.sep)


class Folder:
    """Files of a folder that are pictures.

    Args:
        folder: The folder.
        names: Their paths in it.
        sizes: The bytes of each, int64.
    """

    def __init__(self, folder: str, names: Names, sizes: np.ndarray) -> None:
        self._folder, self._names, self._sizes = folder, names, sizes

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> Entry:
        return Entry(self._names[i], partial(self._open, i))

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    def identity(self) -> bytes:
        """The names and sizes of the files. Their times are not in it: a copy of the folder has others."""
        return self._names.identity() + self._sizes.astype("<i8").tobytes()

    def close(self) -> None:
        """Nothing is open."""

    def _open(self, i: int) -> BinaryIO:
        path, size = os.path.join(self._folder, self._names[i]), self._sizes[i]
        try:
            file = open_regular(path)
        except FileNotFoundError as error:
            if size == _UNKNOWN:
                raise
            raise InputError(f"{printable(path)} has gone since the folder was listed; {_REMEDY}") from error
        now = os.fstat(file.fileno()).st_size
        if size not in (_UNKNOWN, now):
            file.close()
            raise InputError(
                f"{printable(path)} has {now} bytes now, and had {size} when the folder was listed; {_REMEDY}"
            )
        return file


def list_folder(folder: Path) -> Listing:
    """Every picture below `folder`. Symbolic links are followed.

    Raises:
        InputError: If there is no picture, or a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list the folder {error.filename}: {error.strerror}") from error

    root = os.fspath(folder)
    names: list[str] = []
    for parent, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not _is_loop(parent, name)]
        inside = Path(parent).relative_to(folder).as_posix()
        if inside == ".":
            names += [file for file in files if file != _RECORD]
        else:
            names += [f"{inside}/{file}" for file in files]
    chosen, ignored = choose_pictures(
        names, lambda i: open_regular(os.path.join(root, names[i])), Counter(), f"folder {folder}"
    )
    pictures = [names[i] for i in chosen]
    sizes = np.fromiter((_size(os.path.join(root, name)) for name in pictures), np.int64, len(pictures))
    return Listing(Folder(root, Names(pictures), sizes), ignored)


def _size(path: str) -> int:
    """The bytes of a regular file."""
    try:
        found = os.stat(path)
    except OSError:
        return _UNKNOWN
    return found.st_size if stat.S_ISREG(found.st_mode) else _UNKNOWN


def files_alone(folder: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of some kind in a folder, in natural order. None if it has pictures or sub-folders too."""
    found: list[str] = []
    try:
        with os.scandir(folder) as inside:
            for entry in inside:
                name = entry.name.lower()
                if is_hidden(name):
                    continue
                if name.endswith(SUFFIXES) or os.path.isdir(entry.path):
                    return []
                if name.endswith(suffixes):
                    found.append(entry.name)
    except OSError:  # listed as a folder of pictures, it is refused with the reason
        return []
    return [Path(folder, name) for name in sorted(found, key=natural_key)]


def choose_pictures(
    names: list[str], peek: Callable[[int], BinaryIO], ignored: Counter[str], where: str
) -> tuple[list[int], Counter[str]]:
    """The files that are pictures by their suffix or, if they have none, by their first bytes.

    Args:
        names: The paths of the files.
        peek: Opens the file of a position.
        ignored: What was left out before.
        where: The folder or archive, for the message.

    Returns:
        The positions of the pictures, in the order of their names, and what was left out, now and before.

    Raises:
        InputError: If there is none.
    """
    chosen, unnamed, others = [], [], +ignored  # without those of which there are none
    for i, name in enumerate(names):
        if is_hidden(name):
            continue
        if name.lower().endswith(SUFFIXES):
            chosen.append(i)
        elif kind := kind_of(name):
            others[kind] += 1
        else:
            unnamed.append(i)
    looks = run_parallel(lambda k: _looks_like_picture(peek, unnamed[k]), len(unnamed))
    found = [i for i, yes in zip(unnamed, looks, strict=True) if yes]
    if len(found) < len(unnamed):
        others[NO_SUFFIX] = len(unnamed) - len(found)
    chosen += found
    if not chosen:
        raise InputError(
            f"no images in the {where} ({say_ignored(others)}); looked for {NAMES}, in files without a suffix or "
            f"ending in {' '.join(SUFFIXES)}; give a folder or .zip that has some"
        )
    return sorted(chosen, key=names.__getitem__), others


def _looks_like_picture(peek: Callable[[int], BinaryIO], i: int) -> bool:
    try:
        with peek(i) as opened:
            return looks_like_picture(opened.read(16))
    except Exception:  # a pipe, a broken link, a damaged or encrypted member: whatever it is, no picture
        return False


def natural_key(name: str) -> tuple[object, ...]:
    """A key to sort names by, in which runs of digits count as numbers: img2 comes before img10."""
    parts = re.split(r"([0-9]+)", name)  # texts at the even places, digits at the odd ones
    numbers = [part.lstrip("0") for part in parts[1::2]]
    key: list[object] = list(parts)
    key[1::2] = [(len(number), number) for number in numbers]  # int() refuses over 4,300 digits
    return tuple(key), name


def class_labels(entries: Entries) -> tuple[np.ndarray, list[str]]:
    """The classes of the pictures: the sub-folders of the first level, sorted naturally (2 before 10).

    Returns:
        The labels, int64 [N], and the names of the classes.

    Raises:
        InputError: If a picture is in no sub-folder.
    """
    number: dict[str, int] = {}  # in the order in which they are found
    outside, first_outside = 0, ""
    labels = np.empty(len(entries), np.int64)
    for i, entry in enumerate(entries):
        top, slash, _ = entry.name.partition("/")
        if slash:
            labels[i] = number.setdefault(top, len(number))
        else:
            outside, first_outside = outside + 1, first_outside or entry.name
    if outside == len(entries):
        raise InputError(
            "classes were asked for, but there are no sub-folders with images; put the images of each class "
            "into a sub-folder of its own (cat/1.png, dog/1.png), or train without classes"
        )
    if outside:
        raise InputError(
            f"{printable(first_outside)} is in no sub-folder, so it has no class ({outside} such images); move each "
            "into the sub-folder of its class, or train without classes"
        )
    names = sorted(number, key=natural_key)
    final = np.empty(len(names), np.int64)
    final[[number[name] for name in names]] = np.arange(len(names))
    return final[labels], names
