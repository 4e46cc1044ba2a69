"""Writing where the operating system says no: every writer tells of it as InputError, keeps the older file, and leaves
nothing behind.

The limit of file sizes stands for a full disk: it makes the same calls fail, at the same places, without a disk.
"""

import contextlib
import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.files.atomic import atomic_path, check_writable, check_writable_folder, is_full_disk, writing
from ddpm_fast.formats.openai.export import save_state
from ddpm_fast.pictures import canvas, images

LIMIT = 20_000  # bytes: more than what fails first, which is buffered


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def figure(path):
    drawn = matplotlib.figure.Figure()
    drawn.subplots().imshow(np.random.default_rng(0).random((100, 100)))
    canvas.save_figure(drawn, path)


WRITERS = {
    "model.safetensors": lambda path: checkpoint.save_model(path, {"w": torch.zeros(LIMIT)}, {}),
    "state.safetensors": lambda path: checkpoint.save_training(path, {"w": torch.zeros(LIMIT)}, {}),
    "long header.safetensors": lambda path: checkpoint.save_training(path, {}, {"text": "x" * 2 * LIMIT}),
    "model.pt": lambda path: save_state({"w": torch.zeros(LIMIT)}, path),
    "samples.npz": lambda path: images.save_npz(path, noise(1, 1, 200, 200)),
    "grid.png": lambda path: images.save_grid(path, noise(1, 3, 200, 200)),
    "chain.gif": lambda path: images.save_gif(path, [noise(1, 3, 200, 200)] * 2),
    "figure.png": figure,
    "figure.svg": figure,
}


@contextlib.contextmanager
def small_files_only(limit):
    """Inside, this process writes no file beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("limit", [0, LIMIT])
@pytest.mark.filterwarnings("error")  # such as an exception in a destructor
def test_a_writer_that_finds_no_room_keeps_the_older_file(tmp_path, name, limit):
    path = tmp_path / name
    path.write_bytes(b"older")
    with small_files_only(limit), pytest.raises(InputError, match=rf"cannot write {path}: File too large; raise the"):
        WRITERS[name](path)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]
    WRITERS[name](path)
    assert path.stat().st_size > LIMIT and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device; free some space, or choose another place"),
        (errno.EDQUOT, "Disk quota exceeded; free some space, or choose another place"),
        (errno.EROFS, "Read-only file system; choose another place, or make it writable"),
        (errno.EIO, "Input/output error; choose another place, or make it writable"),
    ],
)
@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
def test_whatever_fails_is_told_with_what_to_do(tmp_path, monkeypatch, number, advice, function):
    def failing(*_, **__):
        raise OSError(number, os.strerror(number))

    (tmp_path / "a").write_bytes(b"older")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing)
        with pytest.raises(InputError, match=rf"cannot write {tmp_path}/a: {advice}") as told:
            checkpoint.save_training(tmp_path / "a", {"w": torch.zeros(3)}, {})
    assert is_full_disk(told.value) == ("free some space" in advice)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"older"


def test_a_folder_that_is_removed_meanwhile_is_named(tmp_path):
    removed = pytest.raises(InputError, match=r"run/a: No such file or directory; its folder .* was removed meanwhile")
    with removed, atomic_path(tmp_path / "run" / "a") as temporary:
        shutil.rmtree(tmp_path / "run")
        temporary.write_text("new")
    with removed, atomic_path(tmp_path / "run" / "a") as temporary:
        temporary.write_text("new")
        shutil.rmtree(tmp_path / "run")
    with atomic_path(tmp_path / "run" / "a") as temporary:  # it can be made again
        temporary.write_text("new")


@pytest.mark.parametrize("name", WRITERS)
def test_a_name_that_is_too_long_is_told_before_and_at_writing(tmp_path, name):
    path = tmp_path / ("x" * 250 + name)
    for write in (WRITERS[name], check_writable):
        with pytest.raises(InputError, match=r"cannot write .*: File name too long; choose a shorter name"):
            write(path)
    with pytest.raises(InputError, match=r"cannot write .*: File name too long; choose a shorter name"):
        WRITERS[name](tmp_path / ("x" * 256) / name)
    with pytest.raises(InputError, match="File name too long; choose a shorter name"):
        check_writable_folder(tmp_path / ("x" * 256))
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "a").touch()
    for write in (WRITERS["grid.png"], check_writable, check_writable_folder):
        with pytest.raises(InputError, match=r"cannot write .*(Not a directory|File exists); choose another place"):
            write(tmp_path / "a" / "b" / "c.png")


def test_errors_about_other_files_keep_their_traceback(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "run" / "a"):
        (tmp_path / "elsewhere" / "b").read_text()
    with pytest.raises(BrokenPipeError), atomic_path(tmp_path / "run" / "a"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # the reader of our output is gone
    with pytest.raises(InputError, match="cannot write"), writing(tmp_path / "run" / "curves"):
        Path(tmp_path / "run" / "curves" / "b").write_text("")
    assert list((tmp_path / "run").iterdir()) == []
