"""What a file may ask of this process: only regular files are opened, and only what fits into memory is allocated.

Pictures, archives and array files come from other people. A few bytes can declare gigabytes, and a name can belong to a
pipe that is never written to. So the sizes are checked by what a file holds before anything is allocated.
"""

import errno
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition
from typing import BinaryIO

from ddpm_fast.errors import InputError

_DEFLATE_RATIO = 1032  # deflate writes at most this many bytes for each byte that it reads
_METHODS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATE_RATIO}
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, v2 and v1
_OTHER_METHODS = {9: "Deflate64", zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA", 93: "Zstandard"}
_SPECIAL = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Unreadable(ValueError):
    """A file is not read. The message says why, and calls the file "it"."""


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading bytes. Symbolic links are followed.

    Raises:
        Unreadable: For a pipe, a socket, a device or a folder, none of which is opened.
        OSError: If there is no such file, or it may not be read.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise Unreadable(f"it is {_SPECIAL.get(kind, 'something special')}, not a regular file")
    return open(path, "rb")


def held_bytes(member: zipfile.ZipInfo, archive_bytes: int) -> int:
    """The largest number of bytes that a member of an archive can unpack to, whatever its directory says.

    Args:
        member: The member.
        archive_bytes: The size of the archive's file.

    Raises:
        Unreadable: If the member is encrypted, or packed by another method than deflate. Python unpacks the other
            methods in pieces of any size.
    """
    if member.flag_bits & 1:
        raise Unreadable("it is encrypted: unzip the archive with its password first")
    if member.compress_type not in _METHODS:
        method = _OTHER_METHODS.get(member.compress_type, f"number {member.compress_type}")
        raise Unreadable(f"it is packed by the method {method}: zip the files with deflate, or without compression")
    return min(member.file_size, _METHODS[member.compress_type] * min(member.compress_size, archive_bytes))


def available_memory() -> int | None:
    """The bytes of memory that can be had now, as far as the system says; None if it does not say."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in _LIMITS:
        try:
            found.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # there is no such limit, or it is "max"
            continue
    return min(found, default=None)


@contextmanager
def allocating(needed: int, what: str, remedy: str) -> Iterator[None]:
    """Check that there is memory for an allocation, and let it happen inside.

    Args:
        needed: The bytes to be allocated.
        what: What takes them, for the message; a plural.
        remedy: What to do, for the message.

    Raises:
        InputError: If there is not so much memory, or it cannot be had in the end.
    """
    found = f"{what} take {needed / 2**30:,.2f} GiB of memory"
    available = available_memory()
    if available is not None and needed > available:
        raise InputError(f"{found}, and {available / 2**30:,.2f} GiB are available; {remedy}")
    try:
        yield
    except (MemoryError, OSError) as error:  # such as by a limit of `ulimit -v`, which is no lack of memory
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise InputError(f"{found}, which cannot be had; {remedy}") from error


class Budget:
    """Lets work run side by side while its parts add up to no more than a total. A larger part runs alone.

    Args:
        total: The total, in bytes.
    """

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Wait until `amount` bytes are free, and hold them meanwhile."""
        amount = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()
