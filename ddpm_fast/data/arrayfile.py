"""Array files as numpy stores them: .npy, and .npz with `images`, optionally `labels` and `label_names`.

Where an .npz has no `images`, `arr_0` are the images and `arr_1`, if it holds integers, the labels: so guided-diffusion
writes samples, and so np.savez names what it is given without a name.

They are never unpickled. The headers are read and checked first: an array is read or mapped only if the file can hold
it. What is not compressed can be mapped: its numbers come from the file when they are asked for, and the system may
drop them again, so that an array may be larger than the memory.
"""

import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from ddpm_fast.data.bounds import allocating, held_bytes, open_regular
from ddpm_fast.errors import InputError

REMEDY = "take fewer or smaller images"
_READ_WHOLE = 256 << 20  # bytes of images of an .npz that are not mapped but read, so that their checksum is compared
_MOST_UNMAPPED = 1 << 31  # bytes of images that are read into memory because they cannot be mapped
_BLOCKS, _BLOCK = 256, 4096  # so many blocks, of so many bytes, of an .npy are looked at to tell it from others
_KEYS = ("images", "labels", "label_names")
_UNNAMED = {"images": "arr_0", "labels": "arr_1"}  # what stands for an array in a file without `images`
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: its signature, and the lengths of name and extra field


class Header(NamedTuple):
    """What the header of a stored array says.

    Attributes:
        dtype: The type of its numbers.
        shape: Its shape.
        is_fortran: Whether the first index changes fastest in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class ArrayFile:
    """An open .npz or .npy file.

    Attributes:
        path: Its path.
        headers: The headers of the arrays that we know, by their names. An .npy has `images`.
    """

    def __init__(self, file: BinaryIO, path: Path):
        """Read the headers. Exceptions of many kinds say that the file is damaged, or no such file."""
        self.path, self._file = path, file
        self._bytes = os.fstat(file.fileno()).st_size
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, str] = {}  # what the arrays are called in an archive
        self._starts: dict[str, int] = {}  # where the numbers of an array begin in the file, of those that are stored
        self.headers: dict[str, Header] = {}
        is_archive = file.read(2) == b"PK"
        file.seek(0)
        if is_archive:
            self._archive = zipfile.ZipFile(file)
            self._read_members(self._archive)
        else:
            self.headers["images"] = read_header(file, self._bytes)
            self._starts["images"] = file.tell()

    def _read_members(self, archive: zipfile.ZipFile) -> None:
        found = [name.removesuffix(".npy") for name in archive.namelist()]
        names = {key: key for key in _KEYS} if "images" in found else _UNNAMED
        for key, name in names.items():
            if found.count(name) > 1:
                raise InputError(f"{self.path} has {found.count(name)} arrays called '{name}'; save it again with one")
            if name not in found:
                continue
            member = archive.getinfo(f"{name}.npy")
            held = held_bytes(member, self._bytes)
            with archive.open(member) as stream:
                header = read_header(stream, held)
                length = stream.tell()
            if name == "arr_1" and header.dtype.kind not in "iu":
                continue  # not labels, but whatever else was saved without a name
            self.headers[key], self._members[key] = header, member.filename
            if member.compress_type == zipfile.ZIP_STORED:
                self._starts[key] = self._start_of(member) + length
        if "images" not in self.headers:
            raise InputError(
                f"{self.path} has no array called 'images' (or 'arr_0'), only {sorted(found)}; save it with "
                "np.savez(path, images=..., labels=...)"
            )

    def _start_of(self, member: zipfile.ZipInfo) -> int:
        """Where the bytes of an uncompressed member begin in the file."""
        self._file.seek(member.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        start = member.header_offset + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\3\4" or start + member.compress_size > self._bytes:
            raise ValueError(f"the archive's directory does not fit its member {member.filename}")
        return int(start)

    @property
    def is_archive(self) -> bool:
        """Whether it is an .npz."""
        return self._archive is not None

    def is_mappable(self, key: str) -> bool:
        """Whether an array can be mapped."""
        return key in self._starts and not self.headers[key].is_fortran

    def map(self, key: str) -> np.ndarray:
        """An array that is mappable, read-only: its numbers stay in the file, which must not be changed meanwhile."""
        header = self.headers[key]
        return np.memmap(self._file, header.dtype, "r", self._starts[key], header.shape)

    def read(self, key: str) -> np.ndarray:
        """An array in memory, or, of an .npy, mapped."""
        if self._archive is None:
            return np.lib.format.open_memmap(self.path, mode="r")
        with self._archive.open(self._members[key]) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def identity(self) -> bytes:
        """Bytes that tell this file's arrays from others, without reading all of them.

        Of an .npz these are its checksums. An .npy has none; of it, blocks throughout the file are taken.
        """
        hashed = hashlib.sha256()
        for key, header in self.headers.items():
            hashed.update(f"{key} {header} {header.is_fortran}".encode())
        if self._archive is not None:
            checks = [self._archive.getinfo(self._members[key]).CRC for key in self.headers]
            return hashed.digest() + struct.pack(f"<{len(checks)}I", *checks)
        for block in range(_BLOCKS):
            self._file.seek(max(0, self._bytes - _BLOCK) * block // (_BLOCKS - 1))
            hashed.update(self._file.read(_BLOCK))
        return hashed.digest()


@contextmanager
def open_arrays(path: Path, expected: str) -> Iterator[ArrayFile]:
    """Open an .npz or .npy file.

    Args:
        path: The file.
        expected: What it should hold, for the message.

    Raises:
        InputError: If the file, here or inside, turns out to be damaged, or something else.
    """
    try:
        with open_regular(path) as file:
            yield ArrayFile(file, path)
    except InputError:  # the file can be read, and what it holds is wrong
        raise
    except Exception as error:  # zipfile, zlib, struct and numpy each raise their own exceptions for damaged files
        raise InputError(
            f"cannot read {path} as numpy arrays (pickled objects are never loaded): {error}; the file is "
            f"damaged or holds something else: save {expected} with np.savez(path, images=..., labels=...)"
        ) from error


def read_arrays(
    path: Path, wanted: Mapping[str, Callable[[Header], str | None]], expected: str, single: str | None = None
) -> dict[str, np.ndarray]:
    """Those arrays of an .npz that are wanted and there, in memory.

    Args:
        path: The file.
        wanted: For each name, what says what is wrong with such an array, by its header, or None if nothing is.
        expected: What the file should hold, for the message; a plural.
        single: Which of the names the array of an .npy has; None where the file may not be an .npy.

    Raises:
        InputError: If the file is damaged or something else, or an array is wrong or does not fit into memory.
    """
    arrays = {}

    def read(name: str, open_array: Callable[[], IO[bytes]], held: int) -> None:
        with open_array() as stream:
            header = read_header(stream, held)
        if (wrong := wanted[name](header)) is not None:
            raise InputError(f"'{name}' of {path} is {header}; {wrong}")
        what = f"the {expected} of {path}"
        with allocating(header.nbytes, what, "close other programs"), open_array() as stream:
            arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)

    try:
        with open_regular(path) as file:
            held = os.fstat(file.fileno()).st_size
            if single is not None and file.read(2) != b"PK":
                read(single, partial(open_regular, path), held)
                return arrays
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                for name in wanted:
                    try:
                        member = archive.getinfo(f"{name}.npy")
                    except KeyError:
                        continue
                    read(name, partial(archive.open, member), held_bytes(member, held))
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib, struct and numpy each raise their own exceptions for damaged files
        raise InputError(
            f"cannot read {path} as an .npz of {expected} (pickled objects are never loaded): {error}; the file is "
            "damaged or holds something else"
        ) from error
    return arrays


def read_images(file: ArrayFile) -> np.ndarray:
    """The images of a file: mapped, or in memory if they are compressed, or few ones of an archive.

    Raises:
        InputError: If they cannot be mapped and are too large to be read.
    """
    size = file.headers["images"].nbytes
    if file.is_mappable("images") and (size > _READ_WHOLE or not file.is_archive):
        with allocating(0, f"the images of {file.path}", REMEDY):
            return file.map("images")
    _check_unmapped(file)
    # They are there twice while they are brought into our layout.
    with allocating(2 * size if file.is_archive else 0, f"the images of {file.path}", REMEDY):
        return file.read("images")


def read_labels(file: ArrayFile) -> dict[str, np.ndarray]:
    """The labels and label_names of a file, if it has them."""
    keys = [key for key in file.headers if key != "images"]
    with allocating(sum(file.headers[key].nbytes for key in keys), f"the labels of {file.path}", REMEDY):
        return {key: file.read(key) for key in keys}


def _check_unmapped(file: ArrayFile) -> None:
    """Raises InputError if the images of a file, which are not mapped, are too large to be read into memory."""
    size = file.headers["images"].nbytes
    if size > _MOST_UNMAPPED:
        why = "in Fortran order" if file.headers["images"].is_fortran else "compressed"
        raise InputError(
            f"the images of {file.path} are {size / 2**30:,.2f} GiB and {why}, so they would have to be read into "
            f"memory, which is done up to {_MOST_UNMAPPED / 2**30:g} GiB; save them in C order with np.savez (not "
            "np.savez_compressed), or pack a compressed file anew without compression: unzip it in an empty folder, "
            "and there zip -0 new.npz *.npy"
        )


def read_header(file: IO[bytes], held: int) -> Header:
    """The header at the start of a stored array.

    Args:
        file: The array's file or archive member, of which no more than the header is read.
        held: The bytes that it can hold.

    Raises:
        ValueError: If it is no such array, has Python objects, or says that it is larger.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"it is of version {version} of numpy's format, which only structured arrays need")
    # In one dimension both orders are the same.
    header = Header(dtype, shape, is_fortran and len(shape) > 1)
    if dtype.hasobject:
        raise ValueError(f"an array of {dtype} holds pickled objects")
    if min(shape, default=0) < 0 or file.tell() + header.nbytes > held:
        raise ValueError(f"an array says that it is {header}, but the file holds {held} bytes of it")
    return header
