"""`Archive`: the pictures of a .zip, each read by its place in the file, in any number of threads."""

import io
import posixpath
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ddpm_fast.data.bounds import Unreadable, held_bytes
from ddpm_fast.data.files import Listing, choose_pictures
from ddpm_fast.data.index import Entry, Names
from ddpm_fast.data.positioned import PositionedFile
from ddpm_fast.errors import InputError

_MAX_MEMBER_BYTES = 1 << 30  # no picture unpacks to a gigabyte
_SMALL_MEMBER_BYTES = 1 << 26  # up to here a picture may be packed as tightly as deflate can
_MAX_PACKING = 100  # above, this is more than any picture is packed: a flat BMP of 600 dpi reaches it
_ROOTS = re.compile(r"^(\.\.?/|/)+")  # that a name may start with; nothing is written, so it leads nowhere
_LOCAL = struct.Struct("<4s22xHH")  # a member's own header: its signature, and the lengths of its name and extras
_FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")
_MEMBER = np.dtype(list(zip(_FIELDS, ("<i8", "<i8", "<i8", "<u4", "<u2", "<u2"), strict=True)))


class Archive:
    """Members of a .zip that are pictures.

    Args:
        file: The archive.
        names: Their names.
        members: What its directory says of each, a structured array of `_FIELDS`.
    """

    def __init__(self, file: PositionedFile, names: Names, members: np.ndarray) -> None:
        self._file, self._names, self._members = file, names, members
        self.close = file.close

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> Entry:
        return Entry(self._names[i], partial(self._open, i), int(self._members["file_size"][i]))

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    def identity(self) -> bytes:
        """The names, sizes and checksums of the members."""
        return self._names.identity() + self._members["file_size"].tobytes() + self._members["CRC"].tobytes()

    def _open(self, i: int) -> BinaryIO:
        return io.BytesIO(_unpack(self._file, self._members[i]))


def _unpack(file: PositionedFile, stored: np.void) -> bytes:
    """The bytes of a member.

    Raises:
        Unreadable: If it is damaged, packed by a method that is not read, or unpacks to more than a picture needs.
    """
    member = zipfile.ZipInfo()
    for field in _FIELDS:
        setattr(member, field, int(stored[field]))
    held = held_bytes(member, file.size)
    packing = held / max(member.compress_size, 1)
    if held > _MAX_MEMBER_BYTES or (held > _SMALL_MEMBER_BYTES and packing > _MAX_PACKING):
        raise Unreadable(f"it unpacks to {held} bytes from {member.compress_size}, more than a picture can need")
    header = file.read(member.header_offset, _LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
        raise Unreadable("there is no such member where the archive's directory says")
    _, name_bytes, extra_bytes = _LOCAL.unpack(header)
    packed = file.read(member.header_offset + _LOCAL.size + name_bytes + extra_bytes, member.compress_size)
    try:
        data = (
            packed if member.compress_type == zipfile.ZIP_STORED else zlib.decompressobj(-15).decompress(packed, held)
        )
    except zlib.error as error:
        raise Unreadable(f"it is damaged ({error})") from error
    if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
        raise Unreadable("it is damaged: its size or its CRC-32 is not what the archive's directory says")
    return data


def _read_directory(file: PositionedFile) -> tuple[dict[str, int], np.ndarray]:
    """What an archive's directory says: the members that are no folders, and by each name the last one's place there.

    zipfile takes about 1 KB for each member, which is given back at the end.
    """
    with file.stream() as stream, zipfile.ZipFile(stream) as archive:
        # zipfile itself fails at a member whose name is empty.
        members = [member for member in archive.infolist() if member.filename and not member.is_dir()]
        found = {_ROOTS.sub("", posixpath.normpath(member.filename)): i for i, member in enumerate(members)}
        values = (tuple(getattr(member, field) for field in _FIELDS) for member in members)
        return found, np.fromiter(values, _MEMBER, len(members))


def list_zip(path: Path) -> Listing:
    """Every picture in an archive. Of several members of one name, the last one counts, as for `unzip`.

    Args:
        path: The archive.

    Raises:
        InputError: If it is damaged, or has no picture.
    """
    try:
        file = PositionedFile(path)
        found, stored = _read_directory(file)
    except Exception as error:  # zipfile, struct and codecs each raise their own exceptions for damaged files
        raise InputError(f"cannot read the archive {path}: {error}; download or zip it again") from error
    ignored = Counter({"replaced by a later one of its name": len(stored) - len(found)})
    names, stored = list(found), stored[list(found.values())]
    everything = Archive(file, Names(names), stored)
    chosen, ignored = choose_pictures(names, lambda i: everything[i].open(), ignored, f"archive {path}")
    pictures = [names[i] for i in chosen]
    # `zip -r pets.zip pets` puts everything into one folder, which says nothing about classes.
    if len({name.split("/")[0] for name in pictures}) == 1 and all(name.count("/") >= 2 for name in pictures):
        pictures = [name.split("/", 1)[1] for name in pictures]
    return Listing(Archive(file, Names(pictures), stored[chosen]), ignored)
