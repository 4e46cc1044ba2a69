"""Small files that ask for much: refused by what they hold, before anything is allocated or waited for."""

import errno
import io
import os
import socket
import struct
import threading
import time
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data import Selection, archive, bounds, load_dataset, read_picture
from ddpm_fast.data.arrays import open_array_source
from ddpm_fast.errors import InputError

MIB = 1 << 20


def png(value=1, size=(8, 8)):
    file = io.BytesIO()
    Image.new("L", size, value).save(file, "PNG")
    return file.getvalue()


def npy_header(shape, dtype="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue()


@pytest.fixture
def peak():
    """Calls a function and returns the most memory that Python and numpy held meanwhile, in bytes."""

    def measure(function):
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure


# ---- array files ----


def write_npz(path, declared, content, method=zipfile.ZIP_DEFLATED, key="images", dtype="|u1"):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{key}.npy", npy_header(declared, dtype) + content)
        if key != "images":
            archive.writestr("images.npy", npy_header((2, 4, 4)) + bytes(32))


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_an_array_larger_than_its_file_is_refused_unallocated(tmp_path, peak, suffix):
    path = tmp_path / f"a{suffix}"
    shape = (1 << 40, 28, 28)
    if suffix == ".npz":
        write_npz(path, shape, bytes(100))
    else:
        path.write_bytes(npy_header(shape) + bytes(100))

    def load():
        with pytest.raises(InputError, match=r"says that it is uint8 \[1099511627776, 28, 28\], but the file holds"):
            load_dataset(path)

    assert peak(load) < MIB


def test_zeros_that_unpack_to_more_than_the_memory_are_refused_unallocated(tmp_path, peak, monkeypatch):
    path = tmp_path / "a.npz"
    write_npz(path, (16 * 1024, 32, 32), bytes(16 * MIB))
    assert path.stat().st_size < MIB // 16
    monkeypatch.setattr(bounds, "available_memory", lambda: 31 * MIB)

    def load():
        with pytest.raises(
            InputError, match=r"images of .*a\.npz take 0\.03 GiB of memory, and 0\.03 GiB are available"
        ):
            load_dataset(path)

    assert peak(load) < MIB
    monkeypatch.setattr(bounds, "available_memory", lambda: None)  # where the system says nothing
    assert len(load_dataset(path)) == 16 * 1024


def test_the_size_in_a_zip_directory_is_not_believed(tmp_path):
    """6 bytes cannot unpack to gigabytes, whatever both the array's header and the archive's directory say."""
    path = tmp_path / "a.npz"
    write_npz(path, (1 << 20, 64, 64), bytes(100))
    data = bytearray(path.read_bytes())
    where = data.index(b"PK\1\2") + 24
    data[where : where + 4] = (0xF0000000).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(
        InputError, match=r"says that it is uint8 \[1048576, 64, 64\], but the file holds \d{1,6} bytes"
    ):
        load_dataset(path)


@pytest.mark.parametrize(
    "key, shape, dtype, words",
    [
        ("images", (16 * MIB // 8, 1, 1), "<i8", r"int64 \[2097152, 1, 1\], expected uint8"),
        ("labels", (16 * MIB // 8,), "<i8", r"int64 \[2097152\], but there are 2 images"),
        ("labels", (16 * MIB // 8, 1), "<i8", r"expected integers \[N\]"),
    ],
    ids=["images of integers", "labels too many", "labels of two dimensions"],
)
def test_arrays_of_the_wrong_kind_are_refused_unread(tmp_path, peak, key, shape, dtype, words):
    write_npz(tmp_path / "a.npz", shape, bytes(16 * MIB), key=key, dtype=dtype)

    def load():
        with pytest.raises(InputError, match=words):
            load_dataset(tmp_path / "a.npz")

    assert peak(load) < MIB


@pytest.mark.parametrize("shape", [(-1, 4, 4), (2, -4, -4)], ids=["one negative", "positive product"])
def test_negative_shapes_are_refused(tmp_path, shape):
    write_npz(tmp_path / "a.npz", shape, bytes(32))
    with pytest.raises(InputError, match=r"cannot read .*a\.npz as numpy arrays"):
        load_dataset(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_resizing_and_colouring_is_bounded_too(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    images = np.zeros((4, 8, 8), np.uint8)
    np.save(path, images) if suffix == ".npy" else np.savez(path, images=images)
    monkeypatch.setattr(bounds, "available_memory", lambda: MIB)
    with pytest.raises(InputError, match=r"take 12\.00 GiB of memory"):
        load_dataset(path, image_size=1 << 15, channels=3)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"the 1 images of 32768x32768 pixels take 1\.00 GiB .*smaller image_size"):
        load_dataset(tmp_path, image_size=1 << 15, channels=1) if suffix == ".npz" else read_zip(tmp_path)


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")], ids=["numpy", "map"]
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_lack_of_memory_is_not_called_damage(tmp_path, monkeypatch, error, suffix):
    path = tmp_path / f"a{suffix}"
    images = np.zeros((4, 8, 8), np.uint8)
    np.save(path, images) if suffix == ".npy" else np.savez(path, images=images)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(np, "memmap", fail)
    monkeypatch.setattr(np.lib.format, "read_array", fail)
    with pytest.raises(
        InputError, match=r"^the (images|arrays) of .* take 0\.00 GiB of memory, which cannot be had; take"
    ):
        load_dataset(path)


def test_pictures_for_which_memory_lacks_are_not_skipped(tmp_path, monkeypatch):
    """Which images a data set has may not depend on how much memory was free."""

    def fail(*_):
        raise MemoryError

    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(2))
    monkeypatch.setattr("ddpm_fast.data.reading.decode", fail)
    with pytest.raises(InputError, match=r"^memory ran out while the image a\.png was read; close"):
        load_dataset(tmp_path)


def read_zip(folder):
    with zipfile.ZipFile(folder / "b.zip", "w") as archive:
        archive.write(folder / "a.png", "a.png")
    load_dataset(folder / "b.zip", image_size=1 << 15)


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="the system says it another way, or not at all")
def test_available_memory_is_between_nothing_and_all():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < bounds.available_memory() <= total


# ---- labels ----


def save_labels(path, labels, **more):
    np.savez(path, images=np.zeros((len(labels), 4, 4), np.uint8), labels=np.array(labels), **more)
    return path


@pytest.mark.parametrize("top", [200_000_000, 65_536, 2**63 - 1])
def test_a_class_number_far_above_the_images_is_refused(tmp_path, top):
    path = save_labels(tmp_path / "a.npz", [0, 1, 2, top])
    with pytest.raises(InputError, match=rf"go up to {top}, but there are 4 images; .*without gaps: .*np\.unique"):
        load_dataset(path)


def test_class_numbers_of_a_large_set_and_of_many_names_are_fine(tmp_path):
    assert load_dataset(save_labels(tmp_path / "a.npz", [0, 21_840])).num_classes == 21_841
    names = [str(i) for i in range(70_001)]
    assert load_dataset(save_labels(tmp_path / "b.npz", [0, 70_000], label_names=names)).num_classes == 70_001


# ---- archives ----


def skipped_from(path, words, **options):
    with pytest.warns(UserWarning, match=words) as caught:
        dataset = load_dataset(path, **options)
    assert len(caught) == 1
    assert dataset.images.unique().tolist() == [2]
    return dataset.skipped


def test_a_member_of_zeros_is_not_unpacked(tmp_path, peak):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb.png", "w") as member:
            for _ in range(80):
                member.write(bytes(MIB))
        archive.writestr("good.png", png(2))
    words = r"^skipped the broken image bomb\.png: it unpacks to 83886080 bytes from \d+, more than a picture can need$"
    assert peak(lambda: skipped_from(path, words)) < 8 * MIB


def test_a_large_member_that_is_hardly_packed_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_SMALL_MEMBER_BYTES", 10_000)
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as made:
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "BMP")
        assert len(file.getvalue()) > 10_000
        made.writestr("a.bmp", file.getvalue())
    assert load_dataset(tmp_path / "a.zip", image_size=8).images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 99])
def test_other_packings_are_skipped_by_name(tmp_path, method):
    """Python unpacks bzip2 and LZMA in pieces of any size: 4 KiB of them can be gigabytes."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png(1), compress_type=zipfile.ZIP_STORED if method == 99 else method)
        archive.writestr("b.png", png(2))
    if method == 99:
        data = bytearray(path.read_bytes())
        where = data.index(b"PK\1\2") + 10
        data[where : where + 2] = (99).to_bytes(2, "little")
        path.write_bytes(data)
    name = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA"}.get(method, "number 99")
    assert skipped_from(path, rf"a\.png: it is packed by the method {name}: zip the files with deflate") == ["a.png"]


def encrypt(path, name):
    """Sets the flag of encryption of a member, which is all that a reader looks at before it asks for a password."""
    data = bytearray(path.read_bytes())
    where = data.index(b"PK\1\2")
    while data[where + 46 : where + 46 + len(name)] != name.encode():
        where = data.index(b"PK\1\2", where + 1)
    data[where + 8] |= 1
    path.write_bytes(data)


def test_an_encrypted_member_is_skipped_by_name(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png(1))
        archive.writestr("b.png", png(2))
    encrypt(path, "a.png")
    assert skipped_from(path, r"a\.png: it is encrypted: unzip the archive with its password first") == ["a.png"]
    np.savez(tmp_path / "c.npz", images=np.zeros((2, 4, 4), np.uint8))
    encrypt(tmp_path / "c.npz", "images.npy")
    with pytest.raises(InputError, match=r"cannot read .*c\.npz .*it is encrypted"):
        load_dataset(tmp_path / "c.npz")


def test_a_member_without_a_name_is_no_picture(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("x.png", png(1))
        out.writestr(zipfile.ZipInfo("y"), b"")
        out.filelist[-1].filename = ""
    assert "" in zipfile.ZipFile(archive).namelist()
    assert len(load_dataset(archive)) == 1


def test_of_two_members_of_one_name_the_last_counts(tmp_path):
    path = tmp_path / "a.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # zipfile's own, about the name
        for value in (1, 2):
            archive.writestr("a.png", png(value))
        archive.writestr("./b.png", png(2))
        archive.writestr("/c.png", png(2))
        archive.writestr("../../d.png", png(2))
    assert skipped_from(path, r"^ignored 1 file: 1 replaced by a later one of its name$") == []
    with pytest.warns(UserWarning):
        assert len(load_dataset(path)) == 4


def test_of_two_arrays_of_one_name_neither_counts(tmp_path):
    path = tmp_path / "a.npz"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for value in (1, 2):
            archive.writestr("images.npy", npy_header((1, 2, 2)) + bytes([value] * 4))
    with pytest.raises(InputError, match=r"a\.npz has 2 arrays called 'images'"):
        load_dataset(path)


# ---- what is no regular file ----


def make_special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))  # the name of a socket may have 107 bytes
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("name", ["a.png", "a", "a.npz", "a.npy", "a.zip"])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    path = folder / name
    make_special(path, kind)
    (folder / "good.png").write_bytes(png(2))
    what = {"pipe": "a named pipe", "socket": "a socket", "device": "a device"}[kind]

    def look():
        ignored = {"a": "1 without a suffix"}.get(name, f"1 {path.suffix}")
        said = rf"a\.png: it is {what}, not a regular file" if name == "a.png" else rf"ignored 1 file: {ignored}$"
        with pytest.warns(UserWarning, match=said):
            load_dataset(folder)
        with pytest.raises(InputError, match="neither a folder nor a regular file, but a pipe, a socket or a device"):
            load_dataset(path)
        with pytest.raises(InputError, match=rf"--image: cannot read the image .*it is {what}, not a regular file"):
            read_picture(path, "--image")
        with pytest.raises(InputError, match=rf"cannot read .*it is {what}, not a regular file"):
            open_array_source(path, "a", None, None, Selection(), None)

    failures = []

    def guarded():
        try:
            look()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for a writer"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("source", ["x" * 300, "a\0b"], ids=["too long", "null byte"])
def test_names_that_no_file_can_have(source):
    with pytest.raises(InputError, match=r"there is no file or folder .* that can be read"):
        load_dataset(source)


# ---- many pixels ----


def png_header(width, height):
    """The start of a grey PNG of any size, whose pixels are missing."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    idat = struct.pack(">I", 9999) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data)) + idat


@pytest.mark.filterwarnings("error")
def test_a_picture_between_pillows_two_limits_is_read_without_a_word(tmp_path, monkeypatch):
    image = Image.new("L", (300, 500), 2)
    for name in ("a.png", "b.tif", "c.jpg", "d.gif", "e.webp"):
        image.save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    assert load_dataset(tmp_path).images.shape == (5, 3, 500, 300)
    assert load_dataset(tmp_path, image_size=8).images.shape == (5, 3, 8, 8)


def test_a_picture_of_200_megapixels_is_refused_by_name(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(20000, 10000))
    (tmp_path / "b.png").write_bytes(png(2))
    words = (
        r"^skipped the broken image a\.png: it has 20000x10000 = 200000000 pixels to decode, and 178956970 are "
        r"allowed, .*raise the limit with the environment variable DDPM_FAST_MAX_PIXELS"
    )
    for size in ({}, {"image_size": 8, "channels": 1}):
        assert skipped_from(tmp_path, words, **size) == ["a.png"]


def test_more_pixels_can_be_allowed(tmp_path, monkeypatch):
    Image.new("L", (150, 100)).save(tmp_path / "a.webp", lossless=True)
    (tmp_path / "b.png").write_bytes(png(2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7499)
    assert skipped_from(tmp_path, r"a\.webp: ", image_size=8) == ["a.webp"]
    monkeypatch.setenv("DDPM_FAST_MAX_PIXELS", "15000")
    assert load_dataset(tmp_path, image_size=8, channels=1).images[:, 0, 0, 0].tolist() == [0, 2]


@pytest.mark.parametrize("value", ["many", "-1", "0", "1e9"])
def test_a_limit_that_is_no_number_is_refused(tmp_path, monkeypatch, value):
    (tmp_path / "b.png").write_bytes(png(2))
    monkeypatch.setenv("DDPM_FAST_MAX_PIXELS", value)
    with pytest.raises(InputError, match=f"DDPM_FAST_MAX_PIXELS is '{value}'; expected a number of pixels"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_jpeg_counts_the_pixels_that_are_decoded(tmp_path, monkeypatch, progressive):
    """A baseline JPEG is scaled while it is decoded; a progressive one is first unpacked in full."""
    Image.new("L", (800, 800), 9).save(tmp_path / "a.jpg", progressive=progressive)
    (tmp_path / "b.png").write_bytes(png(2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    with pytest.warns(UserWarning, match="800x800 = 640000 pixels"):
        load_dataset(tmp_path, channels=1, image_size=400)
    if progressive:
        with pytest.warns(UserWarning, match="800x800 = 640000 pixels"):
            load_dataset(tmp_path, image_size=32)
    else:
        assert load_dataset(tmp_path, image_size=32).images[:, 0, 0, 0].tolist() == [9, 2]


def test_a_budget_runs_small_parts_together_and_a_large_one_alone():
    budget, now, seen, lock = bounds.Budget(10), [], [], threading.Lock()

    def work(amount):
        with budget.take(amount):
            with lock:
                now.append(amount)
                seen.append(list(now))
            time.sleep(0.01)
            with lock:
                now.remove(amount)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in [4, 4, 4, 25, 2, 4, 10]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(seen) == 7 and not now
    assert all(sum(running) <= 10 or running == [25] for running in seen)
    assert max(map(len, seen)) > 1
