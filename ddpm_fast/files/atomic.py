"""Files that are complete or absent: each is written under a temporary name in the target's folder, then renamed.

If a process is killed or a disk fills up, the old file stays as it was. What remains of the new one is called
`.ddpm_fast-*.tmp` and is never mistaken for a result. Its writer holds a lock on it (see lock.py), by which others tell
what is being written from what a killed process has left.
"""

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ddpm_fast.errors import InputError
from ddpm_fast.files.lock import is_at, try_lock

_PREFIX, _SUFFIX = ".ddpm_fast-", ".tmp"

# Without locks, a temporary file that nobody has written to for so long belongs to nobody.
_ABANDONED_SECONDS = 24 * 3600

# What to do about an error of the operating system; for others than these: choose another place, or make it writable.
_ADVICE = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EFBIG: "raise the limit (ulimit -f), or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOMEM: "close other programs, which use the memory",
    errno.ENOENT: "its folder holds no new files, or was removed meanwhile; choose another place",
}


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
        probe.unlink(missing_ok=True)  # another process may have taken it for a leftover
    except OSError as error:
        raise InputError(f"cannot write in the folder {path}: {_reason(error)}") from error
    return path


@contextlib.contextmanager
def writing(target: str | os.PathLike) -> Iterator[None]:
    """Inside, what the operating system has against writing `target`, a file or folder, is raised as InputError.

    Errors that name a file elsewhere pass through, because they are about something else.
    """
    path = Path(os.path.realpath(target))
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError) or not _is_about(error, path):
            raise
        raise InputError(f"cannot write {path}: {_reason(error)}") from error


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike, durable: bool = True, replaces: bool = True) -> Iterator[Path]:
    """Yield a temporary path (an empty file) in the target's folder, and rename it to `target` if the block succeeds.

    If the block raises, the temporary file is removed and `target` stays as it was. Parent folders are created.

    Args:
        target: The file to write.
        durable: Whether to wait until the bytes are on the disk before renaming, so that a power cut leaves either the
            old file or the new one. That takes milliseconds; pictures, which can be drawn again, do without it.
        replaces: Whether the new file takes the place of one that is there; otherwise that one stays.

    Raises:
        InputError: Where `check_writable` does, and if the disk is full or the file cannot be written for another
            reason of the operating system; an older file stays untouched.
    """
    path = _checked(target)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _create(path.parent)
        try:
            # Some writers replace the temporary file with one that only its owner may read.
            mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            if durable:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            if replaces or not _link(temporary, path):
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # what went wrong before matters more than this
                temporary.unlink()
            if descriptor is not None:
                os.close(descriptor)
    if durable:
        _sync_folder(path.parent)


def write_once(target: str | os.PathLike, text: str) -> None:
    """Write a file whole, unless it is there: of several processes that do so at once, the first one's stays.

    Raises:
        InputError: Where `atomic_path` does.
    """
    if not Path(target).exists():
        with atomic_path(target, replaces=False) as temporary:
            temporary.write_text(text, encoding="utf-8")


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a disk, or the user's share of it, is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files of writers that were killed. Those that a living process writes stay."""
    # Not by Path.glob, which makes a list of all names: 270 bytes for each of a million samples.
    leftovers: list[Path] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(Path(folder)) as entries:
        leftovers += [Path(e) for e in entries if e.name.startswith(_PREFIX) and e.name.endswith(_SUFFIX)]
    for path in leftovers:
        with contextlib.suppress(OSError):  # it is gone already, or another user's
            with open(path, "rb+") as file:
                free = try_lock(file.fileno())
                if free:
                    path.unlink()  # while it is locked, because its writer may just have created it
            if free is None and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _link(temporary: Path, path: Path) -> bool:
    """Give a file a second name, unless something has that name. False where the file system has no such links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def _is_about(error: OSError, path: Path) -> bool:
    """Whether an error may concern the writing of `path`: it names no file, or one on the way or in its folder."""
    if not isinstance(error.filename, str | bytes):
        return True
    folder, named = path if path.is_dir() else path.parent, Path(os.path.realpath(os.fsdecode(error.filename)))
    return named in (folder, *folder.parents) or folder in named.parents


def _reason(error: OSError) -> str:
    """What the operating system says, and what to do about it."""
    advice = _ADVICE.get(error.errno or 0, "choose another place, or make it writable")
    return f"{error.strerror or error}; {advice}"


def _create(folder: Path) -> tuple[Path, int | None]:
    """Create an empty temporary file and lock it.

    Returns:
        Its path, and the descriptor that holds the lock; None where there are no locks.
    """
    while True:
        temporary = _temporary(folder)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        held = try_lock(descriptor)
        if held and is_at(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)
        if held is None:
            return temporary, None
        # Before we locked it, another process has taken it for a leftover and removed it.


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
        raise InputError(f"cannot write {path}: {_reason(error)}") from error
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
