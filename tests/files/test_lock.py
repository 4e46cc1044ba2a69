"""Locks: other processes are real ones, forked here, which hold what they hold until they are told or killed."""

import contextlib
import errno
import os
import signal
import time
import warnings

import pytest

from ddpm_fast.errors import InputError
from ddpm_fast.files import lock
from ddpm_fast.files.atomic import atomic_path, remove_leftovers
from ddpm_fast.files.lock import FolderLock


@contextlib.contextmanager
def process(work):
    """A child process that enters the context manager `work()` and stays in it until it is killed. Yields its pid."""
    entered, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with work():
                os.write(tell, b"x")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(entered, 1) == b"x"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(entered)


@contextlib.contextmanager
def writing(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        yield


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_second_process_is_told_who_holds_the_folder(tmp_path):
    with process(lambda: FolderLock(tmp_path)) as child:
        with pytest.raises(InputError, match=rf"being written by another process \(pid {child} on .*wait until"):
            FolderLock(tmp_path).acquire()
        with FolderLock(tmp_path.parent):
            pass  # another folder is free


def test_an_abandoned_lock_holds_as_long_as_its_process(tmp_path):
    def work():
        held = FolderLock(tmp_path)
        held.acquire()
        held.abandon()
        held.release()
        return contextlib.nullcontext()

    with process(work), pytest.raises(InputError, match="another process"):
        FolderLock(tmp_path).acquire()
    with FolderLock(tmp_path):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    with process(lambda: FolderLock(tmp_path)):
        pass
    assert names(tmp_path) == [lock.LOCK_FILE]
    with FolderLock(tmp_path):
        assert f"pid {os.getpid()} on " in (tmp_path / lock.LOCK_FILE).read_text()
    assert names(tmp_path) == []


def test_one_process_locks_a_folder_once_also_through_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with FolderLock(tmp_path / "folder"):
        for again in ("folder", "link"):
            with pytest.raises(InputError, match=f"folder is being written by another process .pid {os.getpid()} on"):
                FolderLock(tmp_path / again).acquire()
    with FolderLock(tmp_path / "link"):
        pass


def test_of_many_processes_exactly_one_gets_the_lock(tmp_path):
    """They race for a lock that is released, and removed, again and again."""
    children = []
    for _ in range(8):
        children.append(os.fork())
        if children[-1] == 0:
            wrong, last = 0, time.monotonic() + 0.5
            while time.monotonic() < last:
                with contextlib.suppress(InputError), FolderLock(tmp_path):
                    try:
                        os.close(os.open(tmp_path / "mine", os.O_CREAT | os.O_EXCL))
                        os.unlink(tmp_path / "mine")
                    except OSError:
                        wrong = 1
            os._exit(wrong)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert names(tmp_path) == []


def test_the_lock_outlives_its_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with FolderLock(tmp_path / "folder"):
        (tmp_path / "folder" / lock.LOCK_FILE).unlink()
        (tmp_path / "folder").rmdir()
    assert names(tmp_path) == []


@pytest.mark.parametrize("unsupported", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_the_work_goes_on_with_a_warning(tmp_path, monkeypatch, unsupported):
    def flock(*_):
        raise OSError(unsupported, os.strerror(unsupported))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=f"{tmp_path} is on a file system without locks"), FolderLock(tmp_path):
        pass
    monkeypatch.setattr(lock, "fcntl", None)  # as on Windows
    with pytest.warns(UserWarning, match="without locks"), FolderLock(tmp_path):
        pass


def test_with_locks_there_is_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FolderLock(tmp_path):
            pass


def test_a_folder_that_cannot_hold_a_lock_is_named(tmp_path):
    for folder in (tmp_path / "none", "/proc"):
        with pytest.raises(InputError, match=r"cannot write .*ddpm_fast\.lock: .*; choose another place"):
            FolderLock(folder).acquire()


def test_what_a_lock_file_holds_is_shown_without_control_characters(tmp_path):
    with FolderLock(tmp_path):
        (tmp_path / lock.LOCK_FILE).write_bytes(b"\x1b[31mred\n\xff" + b"x" * 10_000)
        with pytest.raises(InputError) as caught:
            FolderLock(tmp_path).acquire()
    assert str(caught.value).isprintable() and "[31mred" in str(caught.value) and len(str(caught.value)) < 2000


# Leftovers


def test_the_file_of_a_living_writer_stays_and_that_of_a_killed_one_goes(tmp_path):
    with process(lambda: writing(tmp_path / "a")):
        (unfinished,) = names(tmp_path)
        remove_leftovers(tmp_path)
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("ours")
            remove_leftovers(tmp_path)
        assert names(tmp_path) == [unfinished, "a"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "ours"


def test_writers_of_one_target_and_removers_do_not_meet(tmp_path):
    children = []
    for number in range(6):
        children.append(os.fork())
        if children[-1] == 0:
            failed, last = 1, time.monotonic() + 0.5
            with contextlib.suppress(Exception):
                while time.monotonic() < last:
                    with atomic_path(tmp_path / "a", durable=False) as temporary:
                        remove_leftovers(tmp_path)
                        temporary.write_text(str(number) * 1000)
                failed = 0
            os._exit(failed)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    text = (tmp_path / "a").read_text()
    assert names(tmp_path) == ["a"] and len(text) == 1000 and len(set(text)) == 1


def test_without_locks_only_what_is_a_day_old_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        old = tmp_path / ".ddpm_fast-0123456789abcdef.tmp"
        old.touch()
        os.utime(old, (0, time.time() - 25 * 3600))
        remove_leftovers(tmp_path)
        assert not old.exists()
    assert names(tmp_path) == ["a"]
