"""The headers of a tar file, one after another. The data between them are skipped, not read.

Python's tarfile reads the same formats (ustar, GNU's long names, POSIX's extended headers), in three times as long, and
believes what a header says: an extended header of some gigabytes is read into memory. Here nothing is read that is
larger than `_MAX_EXTENSION`, and a size is compared with the file's before it is used.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ddpm_fast.data.bounds import Unreadable
from ddpm_fast.data.positioned import PositionedFile

_BLOCK = 512
_MAX_EXTENSION = 1 << 20  # bytes of a long name or an extended header; names that systems allow have 4,096 at most
_END = bytes(_BLOCK)
_FILES = b"0\x007"  # the types of regular files: ustar's, the oldest format's, and "contiguous"
_WITHOUT_DATA = {b"1": "hard links", b"2": "symbolic links", b"3": "devices", b"4": "devices", b"5": "folders"}
_WITHOUT_DATA[b"6"] = "pipes"
_PACKED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unzstd"),
)
_ADVICE = "download it or make it again"


class Member(NamedTuple):
    """One member of a tar file.

    Attributes:
        name: Its path, as it is stored.
        kind: The empty string for a regular file; else what it is, such as "symbolic links".
        start: Where its data start in the tar file, in bytes.
        size: How many bytes of data it has.
        head: The first bytes of its data, all of them if it has at most 512.
    """

    name: str
    kind: str
    start: int
    size: int
    head: bytes


def read_members(file: PositionedFile) -> Iterator[Member]:
    """The members of a tar file, in their order. Of each, 1,024 bytes are read.

    Raises:
        Unreadable: If it is no tar file, is compressed, damaged, cut off, or has sparse members.
    """
    at, name = 0, ""
    extended: dict[str, str] = {}
    while at < file.size:
        block = file.read(at, 2 * _BLOCK)
        if at == 0:
            _refuse_packed(block)
        if len(block) < _BLOCK:
            raise Unreadable(f"it ends in the middle of a header, at byte {at + len(block)}: {_ADVICE}")
        header = block[:_BLOCK]
        if header == _END:
            return
        length = _checked_size(header, at)
        kind, start = header[156:157], at + _BLOCK
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            extension = _extension(file, start, length)
            if kind == b"L":
                name = _text(extension.split(b"\0", 1)[0])
            elif kind in b"xX":
                extended = _records(extension, at)
            at = start + _padded(length)
            continue
        if kind == b"S" or any(key.startswith("GNU.sparse.") for key in extended):
            raise Unreadable("it has sparse members, which are not read: make it again without tar's option --sparse")
        if "size" in extended:
            length = _decimal(extended["size"].encode(), at)
        what = "" if kind in _FILES else _WITHOUT_DATA.get(kind, "members of unknown types")
        if kind in _WITHOUT_DATA:
            length = 0
        if start + length > file.size:
            raise Unreadable(f"its member at byte {at} has {length} bytes, but it ends at {file.size}: {_ADVICE}")
        name = extended.get("path") or name or _plain_name(header)
        yield Member(name, "folders" if name.endswith("/") else what, start, length, block[_BLOCK:][:length])
        name, extended = "", {}
        at = start + _padded(length)


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _refuse_packed(block: bytes) -> None:
    for magic, name, command in _PACKED:
        if block.startswith(magic):
            raise Unreadable(
                f"it is compressed by {name}, so no place in it can be read alone: unpack it with {command}"
            )


def _checked_size(header: bytes, at: int) -> int:
    """The size that a header states, after its checksum was compared."""
    stated = _octal(header[148:156])
    # The checksum is the sum of the bytes, with spaces in its own place.
    if stated is None or stated != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise Unreadable(f"there is no tar header at byte {at}: it is damaged or no tar file; {_ADVICE}")
    field = header[124:136]
    length = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)  # GNU's form from 8 GiB on
    if length is None:
        raise Unreadable(f"the header at byte {at} states no size: {_ADVICE}")
    return length


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip(b" ")
    try:
        return int(digits or b"0", 8) if not digits or digits.isdigit() else None
    except ValueError:  # an 8 or a 9
        return None


def _decimal(digits: bytes, at: int) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise Unreadable(f"the extended header before byte {at} is damaged: {_ADVICE}")
    return int(digits)


def _extension(file: PositionedFile, start: int, length: int) -> bytes:
    """The data of a header that says more about the next member."""
    if length > _MAX_EXTENSION or start + length > file.size:
        raise Unreadable(f"the extended header at byte {start} has {length} bytes; expected at most {_MAX_EXTENSION}")
    return file.read(start, length)


def _records(extension: bytes, at: int) -> dict[str, str]:
    """The records of a POSIX extended header, each "LENGTH KEY=VALUE\\n", where the length counts all of the record."""
    found = {}
    while extension:
        digits = extension.split(b" ", 1)[0]
        length = _decimal(digits, at)
        record = extension[len(digits) + 1 : length]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not (record.endswith(b"\n") and equals) or length > len(extension):
            raise Unreadable(f"the extended header before byte {at} is damaged: {_ADVICE}")
        found[_text(key)] = _text(value)
        extension = extension[length:]
    return found


def _plain_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
