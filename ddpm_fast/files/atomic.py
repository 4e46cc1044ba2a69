"""Files that are whole or not there: written under a temporary name beside their target, then renamed over
it.

A run that is killed, or a disk that fills, leaves the old file as it was; what remains of the new one is
named `.ddpm_fast-*.tmp` and is never mistaken for a result.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from ddpm_fast.errors import InputError

_PREFIX, _SUFFIX = ".ddpm_fast-", ".tmp"


def check_writable(target: str | os.PathLike) -> Path:
    """Raise InputError unless a file can be written at `target`; for calling before hours of work.

    Creates the parent folders. Returns the path with symbolic links followed, so that a link stays a link.
    """
    path = _checked(target)
    check_writable_folder(path.parent)
    return path


def check_writable_folder(folder: str | os.PathLike) -> Path:
    """Create `folder` with its parents and prove that a file can be made in it; InputError if not."""
    path = Path(os.path.realpath(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = _temporary(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write in the folder {path}: {error.strerror or error}; choose another place, or make it writable"
        ) from error
    return path


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path (an empty file) beside `target`; rename it over `target` if the block succeeds.

    If the block raises, the temporary file is removed and `target` stays as it was. durable: wait until the
    bytes are on the disk before renaming, so that a power cut leaves the old file or the new one; pictures,
    which can be drawn again, do without (milliseconds each). Parent folders are created. Raises InputError
    where `check_writable` does.
    """
    path = _checked(target)
    temporary = _temporary(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        # Some writers (safetensors 0.8) replace the file with one that only its owner may read.
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose another place, or make it writable"
        ) from error
    try:
        yield temporary
        temporary.chmod(mode)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files of writers that were killed. Only where no other process is writing."""
    for path in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"):
        path.unlink(missing_ok=True)


def _temporary(folder: Path) -> Path:
    # The target's own name is not part of it: a name of 255 bytes has no room for more.
    return folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def _checked(target: str | os.PathLike) -> Path:
    """The path with links followed; InputError if something that must not be replaced is there."""
    path = Path(os.path.realpath(target))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; expected the name of a file: give one inside it")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a device, pipe or socket; expected the name of a file: choose another")
    if not (mode & 0o222 and os.access(path, os.W_OK)):
        raise InputError(f"{path} is read-only: choose another name, or make it writable")
    return path


def _sync_folder(folder: Path) -> None:
    # The file is in place already: that Windows and some network disks cannot sync a folder is no failure.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
