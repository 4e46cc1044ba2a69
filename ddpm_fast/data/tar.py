"""`Tar`: the pictures of tar shards in webdataset's naming. Their headers are read once; a picture is read when it is
asked for.

The files of a sample follow each other and have one key, their path up to the first dot of the last part: that of
`cats/0007.jpg`, `cats/0007.cls` and `cats/0007.json` is `cats/0007`. What follows the dot says what a file is: a
picture by its suffix, `cls` the number of its class, `json` an object whose "label" is the number or name of its class.
"""

import io
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ddpm_fast.data.bounds import Unreadable, open_regular
from ddpm_fast.data.files import NO_SUFFIX, Listing, is_hidden, kind_of, say_ignored
from ddpm_fast.data.index import Entry, Names
from ddpm_fast.data.labels import UNLABELLED, check_class_numbers, number_names
from ddpm_fast.data.positioned import PositionedFile
from ddpm_fast.data.raster import NAMES, SUFFIXES
from ddpm_fast.data.tar_headers import Member, read_members
from ddpm_fast.errors import InputError, printable

LABEL = "label"  # the entry of a sample's JSON that holds its class
_MAX_PICTURE = 1 << 30  # bytes; no picture has a gigabyte
_MAX_JSON = 1 << 20  # bytes of what is said of a sample
_MAX_DIGITS = 9  # of a class number
_HELD_OPEN = 256  # shards; a process may usually have 1,024 files open
_CLASS_FILES = ("cls", "json")
_OUTSIDE = "with a path that leads out of the archive"
_LONE = "whose key has no picture beside it"


class Tar:
    """The pictures of tar shards. They may be opened in several threads at once.

    Args:
        paths: The shards.
        files: The first of them, open.
        names: The names of the pictures.
        shards: Which shard each picture is in, int32.
        places: Where its bytes start there, int64.
        sizes: How many there are, int32.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        files: Sequence[PositionedFile],
        names: Names,
        shards: np.ndarray,
        places: np.ndarray,
        sizes: np.ndarray,
    ) -> None:
        self._paths, self._files, self._names = paths, files, names
        self._shards, self._places, self._sizes = shards, places, sizes

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> Entry:
        return Entry(self._names[i], partial(self._open, i), int(self._sizes[i]))

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    def identity(self) -> bytes:
        """The names and sizes of the pictures. Which shard a picture is in does not matter."""
        return self._names.identity() + self._sizes.astype("<i4").tobytes()

    def close(self) -> None:
        """Close the shards."""
        for file in self._files:
            file.close()

    def _open(self, i: int) -> BinaryIO:
        shard, place, size = int(self._shards[i]), int(self._places[i]), int(self._sizes[i])
        if size > _MAX_PICTURE:
            raise Unreadable(f"it has {size} bytes, more than a picture can need")
        if shard < len(self._files):
            data = self._files[shard].read(place, size)
        else:
            with open_regular(self._paths[shard]) as file:
                file.seek(place)
                data = file.read(size)
        if len(data) < size:
            raise InputError(
                f"{printable(str(self._paths[shard]))} is shorter than when its headers were read; leave the images as "
                "they are while they are read, and start again"
            )
        return io.BytesIO(data)


def list_tar(
    paths: Sequence[Path],
    image: str | None = None,
    label: str = LABEL,
    progress: Callable[[int, int], object] | None = None,
) -> Listing:
    """The pictures of tar shards, and their classes, from their headers.

    Args:
        paths: The shards, in their order.
        image: What follows the first dot in the names of the pictures, such as "jpg" or "seg.png"; by default, whatever
            ends as a picture's name does.
        label: The entry of a sample's JSON that holds its class. A .cls counts before it.
        progress: Called as progress(done, total) with the number of shards whose headers have been read.

    Raises:
        InputError: If a shard is damaged or compressed, a sample has several pictures, a class is no number or name,
            or there is no picture.
    """
    indexer = _Indexer(image, label)
    files = []
    for number, path in enumerate(paths):
        try:
            file = PositionedFile(path)
            indexer.add(number, file)
        except (Unreadable, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InputError(f"cannot read the tar file {printable(str(path))}: {reason}") from error
        if number < _HELD_OPEN:
            files.append(file)
        else:
            file.close()
        if progress is not None:
            progress(number + 1, len(paths))
    return indexer.listing(paths, files)


class _Indexer:
    """Collects the samples of one shard after another. For the arguments, see list_tar."""

    def __init__(self, image: str | None, label: str) -> None:
        self._image = None if image is None else image.lower().removeprefix(".")
        self._label = label
        self._names: list[str] = []
        self._shards, self._places, self._sizes, self._labels = array("i"), array("q"), array("i"), array("q")
        self._ignored = Counter[str]()
        self._classes: dict[str, int] = {}  # those that have names, in the order in which they are found
        self._numbered = ""  # the first sample whose class is a number
        self._unlabelled = ""  # the first one without a class

    def add(self, shard: int, file: PositionedFile) -> None:
        """Read the headers of a shard."""
        for key, group in groupby(self._keyed(file), key=itemgetter(0)):
            files: dict[str, Member] = {}
            for _, kind, member in group:
                if kind in files:
                    raise InputError(
                        f"{_sample(file, key)} has two files ending in .{printable(kind)}; make the tar file again "
                        "with one of them"
                    )
                files[kind] = member
            picture = self._picture(files, file, key)
            self._count_others(files, picture)
            if picture is not None:
                self._names.append(f"{key}.{picture}")
                self._shards.append(shard)
                self._places.append(files[picture].start)
                self._sizes.append(min(files[picture].size, _MAX_PICTURE + 1))
                self._labels.append(self._class(files, file, key))

    def _keyed(self, file: PositionedFile) -> Iterator[tuple[str, str, Member]]:
        """The regular files of a shard: the key of each, what follows it in the name, and where the file is."""
        for member in read_members(file):
            name = member.name.removeprefix("./")
            folder, slash, base = name.rpartition("/")
            stem, dot, kind = base.partition(".")
            if member.kind == "folders":
                continue
            if name.startswith("/") or ".." in folder.split("/"):
                self._ignored[_OUTSIDE] += 1
            elif is_hidden(name):
                continue
            elif member.kind:
                self._ignored[member.kind] += 1
            elif not dot:
                self._ignored[NO_SUFFIX] += 1
            else:
                yield folder + slash + stem, kind.lower(), member

    def _picture(self, files: dict[str, Member], file: PositionedFile, key: str) -> str | None:
        """Which of a sample's files is the picture; None if none is."""
        if self._image is not None:
            return self._image if self._image in files else None
        found = sorted(kind for kind in files if f".{kind}".endswith(SUFFIXES))
        if len(found) > 1:
            raise InputError(
                f"{_sample(file, key)} has several pictures: {printable(', '.join(found[:10]))}; say which one with "
                f"image_column (--image-column {printable(found[0])})"
            )
        return found[0] if found else None

    def _count_others(self, files: dict[str, Member], picture: str | None) -> None:
        """Count the files of a sample that are neither its picture nor say its class."""
        for kind in files:
            if kind in _CLASS_FILES:
                self._ignored[_LONE] += picture is None
            elif kind != picture:
                self._ignored[kind_of(f"x.{kind}")] += 1

    def _class(self, files: dict[str, Member], file: PositionedFile, key: str) -> int:
        """The class of a sample: its number, or its position in _classes, or UNLABELLED."""
        found: object = None
        if "cls" in files:
            text = files["cls"].head.strip()
            found = int(text) if text.isdigit() and len(text) <= _MAX_DIGITS else text[:50]
        elif "json" in files:
            found = _entry(file, files["json"], key, self._label)
        if found is None:
            self._unlabelled = self._unlabelled or _sample(file, key)
            return UNLABELLED
        if isinstance(found, str):
            found = self._classes.setdefault(found, len(self._classes))
        elif type(found) is int and 0 <= found < 10**_MAX_DIGITS:
            self._numbered = self._numbered or _sample(file, key)
        else:
            raise InputError(f"{_sample(file, key)} has the class {found!a:.60}; expected a number from 0 up")
        if self._numbered and self._classes:
            raise InputError(
                f"{_sample(file, key)} has a class of another kind than those before: some are numbers, such as that "
                f"of {self._numbered}, and some are names; use one of the two"
            )
        return found

    def listing(self, paths: Sequence[Path], files: Sequence[PositionedFile]) -> Listing:
        """What was found in all shards, of which the first ones are open."""
        where = printable(str(paths[0])) + (f" and {len(paths) - 1} more tar files" if len(paths) > 1 else "")
        ignored = +self._ignored  # without those of which there are none
        if not self._names:
            wanted = f"files ending in .{self._image}" if self._image is not None else NAMES
            raise InputError(
                f"no images in {where} ({say_ignored(ignored)}); looked for {wanted}, named as webdataset does "
                "(0007.jpg and 0007.cls of one sample after another); give tar files that have some"
            )
        labels, names = np.array(self._labels, np.int64), None
        if self._classes:
            labels, names = number_names(labels, list(self._classes), where)
        elif self._numbered:
            check_class_numbers(labels, None, where)
        shards, sizes = np.array(self._shards, np.int32), np.array(self._sizes, np.int32)
        entries = Tar(paths, files, Names(self._names), shards, np.array(self._places, np.int64), sizes)
        if self._unlabelled:
            return Listing(entries, ignored, unlabelled=self._unlabelled if self._classes or self._numbered else "")
        return Listing(entries, ignored, labels, names)


def _sample(file: PositionedFile, key: str) -> str:
    """What to call a sample in a message."""
    return f"the sample {printable(key)} of {printable(str(file.path))}"


def _entry(file: PositionedFile, member: Member, key: str, name: str) -> object:
    """The entry of that name in a sample's JSON; None if there is none.

    Raises:
        InputError: If it is no JSON object, or too large.
    """
    try:
        if member.size > _MAX_JSON:
            raise ValueError(f"it has {member.size} bytes, and {_MAX_JSON} are allowed")
        text = member.head if member.size == len(member.head) else file.read(member.start, member.size)
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError("it is no object with entries")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{_sample(file, key)} has a broken .json: {error}; repair it, or leave it out") from error
    return entries.get(name)
