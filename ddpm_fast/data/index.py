"""What a folder or archive holds, as an index that a million pictures do not make large: about 50 bytes a picture."""

from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np


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


class Entries(Protocol):
    """A sequence of entries, each of which may be made when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Entry: ...

    def __iter__(self) -> Iterator[Entry]: ...


class Index(Entries, Protocol):
    """The pictures of a folder or archive, sorted by name. Its entries may be opened in several threads at once."""

    def identity(self) -> bytes:
        """The names, and what tells without decoding whether the pictures are others: sizes, or checksums."""

    def close(self) -> None:
        """Close the files. No entry is opened after this."""


class Names:
    """Many texts, kept as one run of bytes: a list of them would take about 70 bytes more for each.

    Args:
        texts: The texts. Lone surrogates, as in the names of files that are no UTF-8, are kept.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        self.blob = b"".join(parts)
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self.ends):
            raise IndexError(i)
        start = int(self.ends[i - 1]) if i else 0
        return self.blob[start : int(self.ends[i])].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def identity(self) -> bytes:
        """Bytes that two lists share only if they hold the same texts."""
        return self.ends.astype("<i8").tobytes() + self.blob
