"""`PositionedFile`: bytes at any place of one open file, for several threads at once."""

import os
import threading
import weakref
from pathlib import Path
from typing import BinaryIO

from ddpm_fast.data.bounds import open_regular
from ddpm_fast.errors import InputError


class PositionedFile:
    """A regular file that is read at any place. It stays the same file even if another one takes its name.

    Attributes:
        path: Its path.
        size: Its bytes, when it was opened.

    Args:
        path: The file.

    Raises:
        Unreadable: If it is no regular file.
        OSError: If there is no such file, or it may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self._descriptor = os.dup(file.fileno())
        self.size = os.fstat(self._descriptor).st_size
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, count: int) -> bytes:
        """Bytes offset .. offset+count-1, or fewer where the file ends.

        Raises:
            InputError: After `close`.
        """
        if not self.close.alive:
            raise InputError(f"{self.path} has been closed; open the images again")
        parts = []
        while count > 0:
            part = self._read_some(offset, count)
            if not part:
                break
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def stream(self) -> BinaryIO:
        """The same file as a stream, at its start."""
        stream = os.fdopen(os.dup(self._descriptor), "rb")
        stream.seek(0)
        return stream

    def _read_some(self, offset: int, count: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, count, offset)
        with self._lock:  # Windows has no such call
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, count)
