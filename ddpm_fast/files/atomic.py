"""Files that are complete or absent: each is written under a temporary name in the target's folder, then renamed.

If a process is killed or a disk fills up, the old file stays as it was. What remains of the new one is called
`.ddpm_fast-*.tmp` and is never mistaken for a result.
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
    """Check that a file can be written at `target`, before hours of work. Creates the parent folders.

    Returns:
        The path with symbolic links followed, so that a link remains a link.

    Raises:
        InputError: If no file can be written there.
    """
    path = _checked(target)
    check_writable_folder(path.parent)
    return path


def check_writable_folder(folder: str | os.PathLike) -> Path:
    """Create `folder` with its parents, and check that a file can be created in it.

    Returns:
        The path with symbolic links followed.

    Raises:
        InputError: If it cannot.
    """
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
    """Yield a temporary path (an empty file) in the target's folder, and rename it to `target` if the block succeeds.

    If the block raises, the temporary file is removed and `target` stays as it was. Parent folders are created.

    Args:
        target: The file to write.
        durable: Whether to wait until the bytes are on the disk before renaming, so that a power cut leaves either the
            old file or the new one. That takes milliseconds; pictures, which can be drawn again, do without it.

    Raises:
        InputError: Where `check_writable` does.
    """
    path = _checked(target)
    temporary = _temporary(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        # Some writers (safetensors 0.8) replace the temporary file with one that only its owner may read.
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
    """Remove the temporary files of writers that were killed. Call it only if no other process is writing."""
    for path in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"):
        path.unlink(missing_ok=True)


def _temporary(folder: Path) -> Path:
    # The target's own name is not part of it, because a name of 255 bytes leaves no room for more.
    return folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"


def _checked(target: str | os.PathLike) -> Path:
    """The path with links followed.

    Raises:
        InputError: If something is there that must not be replaced.
    """
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
    # The file is in place already, so it does not matter that Windows and some network disks cannot sync a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
