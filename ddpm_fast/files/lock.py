"""Locks by which processes keep out of each other's way: one writer for a run folder, and a mark on unfinished files.

The operating system holds them (flock), so that a process leaves no lock behind, however it ends. They also hold
between the machines that share a network disk, if that disk knows locks. Where there are none (some network disks, and
Windows, whose locks work in another way) nothing is locked: a FolderLock warns of it and lets the work go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import warnings
from pathlib import Path
from types import TracebackType

from ddpm_fast.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".ddpm_fast.lock"
_TEXT_BYTES = 1000  # what is read of a lock file, which anybody may have written


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed, without waiting.

    Args:
        descriptor: Of a file that is open for writing, without which some network disks do not lock.

    Returns:
        True if the lock is held now, False if somebody else holds it, None if locks do not work here.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the file that is open, rather than removed or replaced by another one."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class FolderLock:
    """Keeps a folder for one writer, in a `with` statement or from `acquire` to `release`.

    The lock is on a file in the folder, which says who holds it. `release` removes the file. What a killed process
    leaves of it locks nothing, and the next one takes it over.
    """

    def __init__(self, folder: str | os.PathLike):
        """folder: It must exist when the lock is acquired."""
        self._path = Path(os.path.realpath(folder)) / LOCK_FILE
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock. Where the file system has none, warn of that and go on without.

        Raises:
            InputError: If another process holds it, or another FolderLock of this one; the message says who. Or if no
                file can be written in the folder.
        """
        while self._descriptor is None:
            descriptor = self._open()
            held = try_lock(descriptor)
            if held is False:
                text = _read(descriptor)
                os.close(descriptor)
                raise InputError(
                    f"{self._path.parent} is being written by another process{f' ({text})' if text else ''}; two would "
                    "delete each other's files: wait until it ends, stop it, or choose another folder"
                )
            if held and not is_at(descriptor, self._path):  # it was released, and removed, after we opened it
                os.close(descriptor)
                continue
            self._descriptor = descriptor
            if held is None:
                warnings.warn(
                    f"{self._path.parent} is on a file system without locks: nothing keeps a second process from "
                    "writing there too, so take care that none does",
                    stacklevel=2,
                )
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, _this_process().encode())

    def release(self) -> None:
        """Give the lock back. Does nothing if it is not held."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):  # the folder may be gone
            if is_at(self._descriptor, self._path):
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def abandon(self) -> None:
        """Hold the lock until the process ends, for a thread that still writes. What is left of it locks nothing."""
        self._descriptor = None  # and never close it

    def is_lost(self) -> bool:
        """Whether the lock's file has been removed since, for instance together with its folder."""
        return self._descriptor is not None and not is_at(self._descriptor, self._path)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(
                f"cannot write {self._path}: {error.strerror or error}; choose another place, or make it writable"
            ) from error


def _this_process() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _read(descriptor: int) -> str:
    """What the holder of the lock has written about itself, on one line and without control characters."""
    with contextlib.suppress(OSError):
        text = os.read(descriptor, _TEXT_BYTES).decode(errors="replace")
        return "".join(c for c in text if c.isprintable())
    return ""
