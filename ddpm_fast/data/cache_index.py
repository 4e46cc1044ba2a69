"""`CacheIndex`: what index.json of a prepared set says, read with suspicion and written as text."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm_fast.data.bounds import Unreadable, open_regular
from ddpm_fast.errors import InputError, check_integer, printable

INDEX = "index.json"
_FORMAT, _VERSION = "ddpm_fast images", 1
_START = f'{{\n "format": "{_FORMAT}"'.encode()
_MAX_BYTES = 1 << 28  # of an index; the name of a skipped file takes about 100
_MAX_SIDE = 1 << 16
_MAX_IMAGES = 1 << 40
_HASH = re.compile("[0-9a-f]{64}")


@dataclass
class ImageFile:
    """One finished file of images.

    Attributes:
        count: How many images it has.
        sha256: Of the whole file.
        skipped: The images of the source that are not in it because they are broken: the number of each in the source,
            its name, and the reason.
    """

    count: int
    sha256: str
    skipped: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass
class CacheIndex:
    """What a prepared set consists of.

    Attributes:
        shape: The channels, height and width of each image.
        source: What the images were made from: its name, its digest, and how many images it has.
        per_file: How many images of the source each file was made from; the last one from fewer.
        files: The files, None for one that is not finished.
        labels: The SHA-256 of the file of the labels; None if there are none.
        label_names: One name for each class, or None.
        complete: Whether everything is finished.
    """

    shape: tuple[int, int, int]
    source: dict[str, Any]
    per_file: int
    files: list[ImageFile | None]
    labels: str | None = None
    label_names: list[str] | None = None
    complete: bool = False

    def origin(self) -> tuple[object, ...]:
        """What is the same from the first file to the last: what the images are made from, and how."""
        return self.source.get("digest"), self.source.get("images"), self.shape, self.per_file

    def text(self) -> str:
        """What index.json holds."""
        files = [None if file is None else [file.count, file.sha256, file.skipped] for file in self.files]
        return json.dumps({"format": _FORMAT, "version": _VERSION} | vars(self) | {"files": files}, indent=1) + "\n"


def is_prepared(folder: str | os.PathLike) -> bool:
    """Whether a folder has the index of a prepared set."""
    try:
        with open_regular(os.path.join(folder, INDEX)) as file:
            return file.read(len(_START)) == _START
    except (OSError, ValueError):
        return False


def read_index(folder: Path) -> CacheIndex:
    """The index of a prepared set.

    Raises:
        InputError: If it is damaged, or of a later version.
    """
    path = folder / INDEX
    try:
        with open_regular(path) as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        stored = json.loads(text)
        if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
            raise ValueError("it is not the index of a prepared set")
        if stored.get("version") != _VERSION:
            raise ValueError(
                f"it is of version {stored.get('version')!a:.20}, and this program reads version {_VERSION}: use a "
                "newer ddpm_fast"
            )
        return _checked(stored)
    except (OSError, Unreadable, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"the entry {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"cannot read {printable(str(path))}: {printable(what[:300])}; prepare the images again"
        ) from error


def _checked(stored: dict[str, Any]) -> CacheIndex:
    """The index of what JSON gave; ValueError, TypeError or KeyError if it makes no sense."""
    channels, height, width = (check_integer("a side of the images", side, 1, _MAX_SIDE) for side in stored["shape"])
    per_file = check_integer("per_file", stored["per_file"], 1, _MAX_IMAGES)
    names, source = stored["label_names"], stored["source"]
    files: list[ImageFile | None] = []
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("label_names is no list of names")
    if not isinstance(source, dict):
        raise ValueError("source does not say what the images were made from")
    images = check_integer("the number of images of the source", source["images"], 1, _MAX_IMAGES)
    if len(stored["files"]) != -(-images // per_file):
        raise ValueError(f"it has {len(stored['files'])} files for {images} images, of which {per_file} are in each")
    for number, entry in enumerate(stored["files"]):
        numbers = range(number * per_file, min((number + 1) * per_file, images))
        files.append(None if entry is None else _checked_file(entry, numbers))
    labels = None if stored["labels"] is None else _hash(stored["labels"])
    complete = stored["complete"] is True
    if complete and (None in files or sum(file.count for file in files if file is not None) == 0):
        raise ValueError("it says that all is finished, and has files that are not, or no image")
    return CacheIndex((channels, height, width), source, per_file, files, labels, names, complete)


def _checked_file(entry: Any, numbers: range) -> ImageFile:
    """One entry of the files, for the images of the source with these numbers."""
    count, sha256, skipped = entry
    left_out = [
        (check_integer("the number of a skipped image", i, numbers[0], numbers[-1]), str(name), str(why))
        for i, name, why in skipped
    ]
    left = len(numbers) - len({i for i, _, _ in left_out})
    return ImageFile(check_integer("the number of images of a file", count, left, left), _hash(sha256), left_out)


def _hash(text: object) -> str:
    if not isinstance(text, str) or not _HASH.fullmatch(text):
        raise ValueError("a checksum is none")
    return text
