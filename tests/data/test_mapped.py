"""Pages of a mapped file that are asked for come into memory, and those around them do not."""

import ctypes
import mmap
import os
import sys

import numpy as np
import pytest

from ddpm_fast.data.mapped import will_need

PAGES = 4096


@pytest.fixture
def mapped(tmp_path):
    """16 MiB of a file, of which no page is in the page cache. Skips where the system keeps them there."""
    if not hasattr(os, "posix_fadvise") or sys.platform != "linux":
        pytest.skip("this system has no call that drops a file's pages, or none that says which are in memory")
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(PAGES * mmap.PAGESIZE))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    array = np.memmap(path, np.uint8, "r")
    if resident(array).any():
        pytest.skip("this file system keeps its files in memory")
    return array


def resident(array):
    """Which of the array's pages are in memory: bool [pages]."""
    found = (ctypes.c_ubyte * PAGES)()
    done = ctypes.CDLL(None).mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), found)
    assert done == 0
    return np.frombuffer(found, np.uint8) & 1 == 1


def test_the_pages_that_are_asked_for_come_and_no_others(mapped):
    page = mmap.PAGESIZE
    part = mapped[2000 * page + 100 : 2003 * page + 100]  # of four pages
    will_need(part)
    assert not part.any()  # touched, so that they have arrived
    assert np.flatnonzero(resident(mapped)).tolist() == [2000, 2001, 2002, 2003]


@pytest.mark.parametrize("array", [np.ones(5, np.uint8), np.empty(0, np.uint8), np.ones((3, 4))[1:]])
def test_arrays_of_no_file_stay_as_they_are(array):
    before = array.copy()
    will_need(array)
    assert np.array_equal(array, before)
