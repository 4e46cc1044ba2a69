"""Folders and .zip archives of pictures: find the pictures, count what is not one, and name the classes."""

import io
import os
import posixpath
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ddpm_fast.data.bounds import Unreadable, held_bytes, open_regular
from ddpm_fast.data.pixels import run_parallel
from ddpm_fast.data.raster import NAMES, SUFFIXES, looks_like_picture
from ddpm_fast.errors import InputError, printable

_MAX_MEMBER_BYTES = 1 << 30  # no picture unpacks to a gigabyte
_SMALL_MEMBER_BYTES = 1 << 26  # up to here a picture may be packed as tightly as deflate can
_MAX_PACKING = 100  # above, this is more than any picture is packed: a flat BMP of 600 dpi reaches it
_ROOTS = re.compile(r"^(\.\.?/|/)+")  # that a name may start with; nothing is written, so it leads nowhere
_NO_SUFFIX = "without a suffix"
_KINDS_NAMED = 5


class Entry(NamedTuple):
    """One picture in a folder or archive.

    Attributes:
        name: Its path inside the folder or archive, with '/' between the parts.
        open: Opens it for reading.
        held: The bytes of memory that it takes while it is open.
    """

    name: str
    open: Callable[[], BinaryIO]
    held: int = 0


class Listing(NamedTuple):
    """The pictures of a folder or archive.

    Attributes:
        entries: The pictures, sorted by name.
        ignored: What the other files are, such as ".txt", and how many of each.
    """

    entries: list[Entry]
    ignored: Counter[str]


def say_ignored(ignored: Counter[str]) -> str:
    """A phrase such as "3 files: 2 .txt, 1 .svg"."""
    total = ignored.total()
    kinds = [f"{count} {printable(kind)}" for kind, count in ignored.most_common(_KINDS_NAMED)]
    rest = total - sum(count for _, count in ignored.most_common(_KINDS_NAMED))
    if rest:
        kinds.append(f"{rest} of other kinds")
    return f"{total} file{'s' if total != 1 else ''}" + (f": {', '.join(kinds)}" if kinds else "")


def _kind(name: str) -> str:
    suffix = posixpath.splitext(name.lower())[1]
    return suffix if len(suffix) <= 12 else "with a long suffix"


def _is_hidden(name: str) -> bool:
    # Names with a leading dot belong to other programs: macOS writes a "._x.jpg" for every x.jpg.
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _is_loop(parent: str, child: str) -> bool:
    """Whether the folder `child` is a link to `parent` or to a folder that contains it."""
    real, here = os.path.realpath(os.path.join(parent, child)), os.path.realpath(parent)
    return here == real or here.startswith(real.rstrip(os.sep) + os.sep)


def list_folder(folder: Path) -> Listing:
    """Every picture below `folder`. Symbolic links are followed.

    Raises:
        InputError: If there is no picture, or a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list the folder {error.filename}: {error.strerror}") from error

    entries: list[Entry] = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not _is_loop(parent, name)]
        for file in files:
            path = Path(parent, file)
            entries.append(Entry(path.relative_to(folder).as_posix(), partial(open_regular, path)))
    return _pictures(entries, Counter(), f"folder {folder}")


def list_zip(archive: zipfile.ZipFile, path: Path) -> Listing:
    """Every picture in an open archive. Of several members of one name, the last one counts, as for `unzip`.

    Args:
        archive: The archive.
        path: Its file.

    Raises:
        InputError: If there is no picture.
    """
    archive_bytes = path.stat().st_size

    def read(member: zipfile.ZipInfo) -> BinaryIO:
        held = held_bytes(member, archive_bytes)
        packing = held / max(member.compress_size, 1)
        if held > _MAX_MEMBER_BYTES or (held > _SMALL_MEMBER_BYTES and packing > _MAX_PACKING):
            raise Unreadable(f"it unpacks to {held} bytes from {member.compress_size}, more than a picture can need")
        return io.BytesIO(archive.read(member))

    # zipfile itself fails at a member whose name is empty.
    members = [member for member in archive.infolist() if member.filename and not member.is_dir()]
    last = {_ROOTS.sub("", posixpath.normpath(member.filename)): member for member in members}
    ignored = Counter({"replaced by a later one of its name": len(members) - len(last)})
    entries = [Entry(name, partial(read, member), member.file_size) for name, member in last.items()]
    listing = _pictures(entries, ignored, f"archive {path}")
    # `zip -r pets.zip pets` puts everything into one folder, which says nothing about classes.
    tops = {entry.name.split("/")[0] for entry in listing.entries}
    if len(tops) == 1 and all(entry.name.count("/") >= 2 for entry in listing.entries):
        stripped = [entry._replace(name=entry.name.split("/", 1)[1]) for entry in listing.entries]
        return listing._replace(entries=stripped)
    return listing


def _pictures(files: list[Entry], ignored: Counter[str], where: str) -> Listing:
    """Those of the files that are pictures by their suffix or, if they have none, by their first bytes."""
    files = [file for file in files if not _is_hidden(file.name)]
    unnamed = [file for file in files if not _kind(file.name)]
    looks = run_parallel(lambda k: _looks_like_picture(unnamed[k]), len(unnamed))
    found = {file.name for file, yes in zip(unnamed, looks, strict=True) if yes}
    entries = [file for file in files if file.name in found or file.name.lower().endswith(SUFFIXES)]
    ignored = ignored + Counter(
        _kind(file.name) or _NO_SUFFIX
        for file in files
        if not (file.name in found or file.name.lower().endswith(SUFFIXES))
    )
    if not entries:
        raise InputError(
            f"no images in the {where} ({say_ignored(ignored)}); looked for {NAMES}, in files without a suffix or "
            f"ending in {' '.join(SUFFIXES)}; give a folder or .zip that has some"
        )
    return Listing(sorted(entries, key=lambda entry: entry.name), ignored)


def _looks_like_picture(file: Entry) -> bool:
    try:
        with file.open() as opened:
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


def class_labels(entries: list[Entry]) -> tuple[np.ndarray, list[str]]:
    """The classes of the pictures: the sub-folders of the first level, sorted naturally (2 before 10).

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
            f"{printable(outside[0])} is in no sub-folder, so it has no class ({len(outside)} such images); move each "
            "into the sub-folder of its class, or train without classes"
        )
    tops = [entry.name.split("/")[0] for entry in entries]
    names = sorted(set(tops), key=natural_key)
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[top] for top in tops], dtype=np.int64), names
