"""Pictures, arrays, archives and folders, damaged or hostile."""

from __future__ import annotations

import os
import random
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_fast.data.load import Dataset, load_dataset, open_dataset, read_picture
from ddpm_fast.data.stored import StoredDataset
from tests.fuzz import damage, specimens
from tests.fuzz.places import MEGABYTES, PICTURE_MEGABYTES, Case, special, write


def _one_picture(rng: random.Random) -> tuple[bytes, str, str, bool]:
    """A file, a suffix, what was done, and whether it is a good picture."""
    good = specimens.pictures()
    if rng.random() < 0.15:
        name = rng.choice(sorted(specimens.FOREIGN))
        return specimens.FOREIGN[name], rng.choice(("png", "jpg", "eps", "gif", "tif", "bmp")), name, False
    name = rng.choice(sorted(good))
    data, suffix, how = good[name], name.rpartition(".")[2], name
    is_good = rng.random() < 0.15
    if not is_good:
        data, what = damage.bytes_of(data, rng)
        how = f"{name}, {what}"
        if rng.random() < 0.15 and suffix == "png":
            size = rng.choice((60000, 2**31 - 1, 100000))
            data = _huge_png(good["png"], size)
            how = f"png that says it has {size}x{size} pixels"
    if rng.random() < 0.1:
        suffix = rng.choice(("png", "jpg", "PNG", "gif", "webp", "tif"))
        how += f", named .{suffix}"
    return data, suffix, how, is_good


def _huge_png(data: bytes, size: int) -> bytes:
    head = data[12:16] + struct.pack(">II", size, size) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


def picture(rng: random.Random, place: Path) -> Case:
    data, suffix, how, good = _one_picture(rng)
    size = rng.choice((None, None, 8, (5, 9)))
    if rng.random() < 0.6:
        path = write(rng, place, data, f"a.{suffix}")

        def check(loaded: torch.Tensor) -> str:
            wrong = loaded.ndim != 3 or loaded.shape[0] not in (1, 3) or loaded.dtype != torch.uint8
            return "no picture was loaded" if wrong or (good and loaded.shape[1:] not in _SIZES) else ""

        return f"read_picture, {how}", lambda: read_picture(path, "--init-image", size), check, PICTURE_MEGABYTES
    (place / f"a.{suffix}").write_bytes(data)
    (place / "good.png").write_bytes(specimens.pictures()["png"])
    strict, channels, wanted = rng.random() < 0.2, rng.choice((None, 1, 3)), rng.choice((8, 8, (5, 9), (20, 3)))
    return (
        f"in a folder, strict={strict}, image_size={wanted}, {how}",
        lambda: _load_both(place, wanted, channels, strict=strict),
        lambda loaded: check_dataset(loaded, 1, 2),
        PICTURE_MEGABYTES,
    )


_SIZES = ((10, 12), (12, 10), (8, 8), (5, 9))


def _load_both(source: Path, *of: Any, **options: Any) -> Dataset:
    """The images in memory. Those that are read on demand must be the same, the broken ones left out."""
    loaded = load_dataset(source, *of, **options)
    stored = open_dataset(source, *of, **options, in_memory=False)
    assert isinstance(stored, StoredDataset)
    if stored.pixel_digest() != loaded.digest:
        raise AssertionError(f"on demand {len(stored)} images without {stored.skipped}, in memory {len(loaded)}")
    stored.close()
    return loaded


def check_dataset(loaded: Dataset, least: int, most: int) -> str:
    images, labels, names = loaded.images, loaded.labels, loaded.label_names
    # Only arrays of floats have a range of values, which was made [-1, 1].
    dtype = torch.uint8 if loaded.value_range is None else torch.float32
    if images.dtype != dtype or images.ndim != 4 or not images.is_contiguous():
        return f"the images are {images.dtype} {list(images.shape)}"
    if loaded.value_range is not None and not bool((images.abs() <= 1).all()):
        return f"the values go from {float(images.min())} to {float(images.max())}"
    if not least <= len(images) <= most:
        return f"{len(images)} images were loaded"
    if labels is not None:
        if labels.shape != (len(images),) or labels.dtype != torch.int64 or int(labels.min()) < 0:
            return "the labels are none"
        if names is None and (loaded.num_classes or 0) > 10**6:
            return f"{loaded.num_classes} classes"
        if names is not None and int(labels.max()) >= len(names):
            return "a label has no name"
    return ""


# --- arrays


def array(rng: random.Random, place: Path) -> Case:
    good = dict(specimens.arrays())
    kind = rng.randrange(8)
    suffix = "npz"
    if kind == 0:
        data, how = damage.bytes_of(specimens.npz(good, rng.random() < 0.5), rng)
    elif kind == 1:
        data, how = damage.bytes_of(specimens.npy(good["images"]), rng)
        suffix = "npy"
    elif kind == 2:
        data, how = damage.npy_header(good["images"], rng)
        suffix = "npy"
    elif kind == 3:
        header, how = damage.npy_header(good["images"], rng)
        name = rng.choice(("images.npy", "labels.npy", "label_names.npy"))
        members = [(f"{n}.npy", specimens.npy(a)) for n, a in good.items() if f"{n}.npy" != name]
        data, how = specimens.archive([*members, (name, header)]), f"{name}: {how}"
    elif kind == 4:
        head = specimens.npy(np.zeros((1, 1, 1), np.uint8))[:128].replace(b"(1, 1, 1)", b"(4,10000,10000)")
        data, how = specimens.bomb("images.npy", 300, head), "300 MB of zeros"
    else:
        name, value, how = _strange_array(rng)
        data, how = specimens.npz({**good, name: value}, True), f"{name} is {how}"
    path = write(rng, place, data, f"a.{suffix}")
    size, channels = rng.choice((None, None, 4, 8, (4, 9))), rng.choice((None, None, 1, 3, 2))
    classes = rng.random() < 0.3
    return (
        f"{how}; image_size={size}, channels={channels}",
        lambda: load_dataset(path, size, channels, classes=classes),
        lambda loaded: check_dataset(loaded, 1, 1000),
        MEGABYTES,
    )


class _Program:
    """Starts a program when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def _strange_array(rng: random.Random) -> tuple[str, np.ndarray, str]:
    name = rng.choice(("images", "images", "labels", "labels", "label_names"))
    images = specimens.arrays()["images"]
    choices = {
        "images": (
            images.astype(np.float32),
            images.astype(np.int64),
            images.astype(np.float16),
            images[:0],
            images[:, :0],
            images[..., :2],
            images[..., 0],
            images.transpose(0, 3, 1, 2),
            images.ravel(),
            np.array([_Program()], dtype=object),
            np.zeros((6, 1, 1, 200), np.uint8),
            np.zeros((6, 5, 5, 3), dtype="V1"),
            np.zeros((6, 5, 5), dtype="M8[s]"),
            np.array(5, np.uint8),
            np.zeros((1,) * 32, np.uint8),
            images.astype(">u2"),
            images > 3,
        ),
        "labels": (
            np.array([0, 1, 2, 0, 1, 2 * 10**8]),
            np.array([0, 1, 2, 0, 1, 2**62]),
            np.array([0, 1, 2, 0, 1, 2**64 - 1], np.uint64),
            np.array([0, -1, 2, 0, 1, 2]),
            np.array([0.0] * 6),
            np.array(["cat"] * 6),
            np.array([[0]] * 6),
            np.array([0]),
            np.array([], np.int64),
            np.array([None] * 6),
            np.array([_Program()] * 6),
            np.array([True] * 6),
            np.array([0, 1, 2, 0, 1, 2], ">i2"),
            np.array(3),
        ),
        "label_names": (
            np.array(["a"]),
            np.array(["\x1b[31mred", "b", "c"]),
            np.array(["same", "same", "same"]),
            np.array(["", "", ""]),
            np.array([b"a", b"b", b"c"]),
            np.array([1, 2, 3]),
            np.array([["a", "b", "c"]]),
            np.array([_Program()] * 3),
            np.array(["x" * 100000, "b", "c"]),
            np.array("cat"),
        ),
    }
    value = rng.choice(choices[name])
    return name, value, f"{value.dtype} {list(value.shape)}"


# --- archives and folders


def archive(rng: random.Random, place: Path) -> Case:
    good = specimens.pictures()
    members = [(f"cat/{i}.png", good["png"]) for i in range(2)] + [("dog/0.png", good["png"])]
    kind = rng.randrange(8)
    how = f"kind {kind}"
    if kind == 0:
        data, how = damage.bytes_of(specimens.archive(members), rng)
    elif kind == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data, how = specimens.archive([*members, members[0]]), "two members of one name"
    elif kind == 2:
        data, how = specimens.bomb("0.png", 300, good["png"]), "a member of 300 MB"
    elif kind == 3:
        name = rng.choice(_NAMES)
        data, how = specimens.archive([*members, (name, good["png"])]), f"a member called {name!r:.50}"
    elif kind == 4:
        inner, suffix, how, _ = _one_picture(rng)
        data, how = specimens.archive([*members, (f"dog/1.{suffix}", inner)]), f"a member is {how}"
    elif kind == 5:
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        data, how = damage.bytes_of(specimens.archive(members, method), rng)
    elif kind == 6:
        data, how = specimens.archive([]), "empty"
    else:
        made = bytearray(specimens.archive(members))
        at = made.rfind(b"PK\x01\x02", 0, made.rfind(b"PK\x01\x02"))
        offset = rng.choice((8, 10, 16, 20, 24, 28, 42))  # flags, method, CRC, sizes, name, place
        made[at + offset : at + offset + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x01\0\0\0"))
        data, how = bytes(made), f"its directory was edited at {offset}"
    path = write(rng, place, data, "a.zip")
    classes = rng.random() < 0.5
    return (
        f"{how}; classes={classes}",
        lambda: _load_both(path, rng.choice((None, 8)), classes=classes),
        lambda loaded: check_dataset(loaded, 1, 4),
        MEGABYTES,
    )


_NAMES = (
    "../../evil.png",
    "/evil.png",
    "dog\\1.png",
    "dog/\x1b[31m.png",
    "dog/a\nb.png",
    "dog/.png",
    "dog//1.png",
    "dog/" + "x" * 255 + ".png",
    "C:/a.png",
    "dog/1.png/2.png",
    "top.png",
    "dog/\u202egnp.png",
    "__MACOSX/dog/1.png",
    "dog/1.PNG",
)
_FILE_NAMES = (
    "\x1b[31mred.png",
    "a\nb.png",
    "-rf.png",
    "[red]x.png",
    "é.png",
    "\udcff.png",
    "x" * 250 + ".png",
    " .png",
    "a.PNG",
    "b.png.txt",
    "c",
    "%s.png",
    "'$(x)'.png",
)


def folder(rng: random.Random, place: Path) -> Case:
    """Good pictures beside whatever else a folder may hold."""
    good = specimens.pictures()["png"]
    classes = rng.random() < 0.5
    count, done = 0, []
    for name in ("1", "10", "2") if classes else ("",):
        (place / name).mkdir(exist_ok=True)
        (place / name / "good.png").write_bytes(good)
        count += 1
    most = count
    for i in range(rng.choice((1, 2, 3))):
        parent = place / rng.choice(("1", "new")) if classes else place
        parent.mkdir(exist_ok=True)
        kind = rng.randrange(5)
        if kind == 0:
            special(rng, parent / f"special{i}.png")
            done.append("no regular file")
        elif kind == 1:
            name = rng.choice(_FILE_NAMES)
            (parent / name).write_bytes(good)
            done.append(f"a file called {name!r:.40}")
            most += 1
        elif kind == 2:
            name = rng.choice(("\x1b[31m", "a\nb", "\udcff", "-", ".hidden", "__MACOSX", "[b]"))
            (parent / name).mkdir(exist_ok=True)
            (parent / name / "x.png").write_bytes(good)
            done.append(f"a folder called {name!r}")
            most += 1
        elif kind == 3:
            (parent / f"loop{i}").symlink_to(rng.choice((place, place.parent, parent)), target_is_directory=True)
            done.append("a loop")
            most += 10000
        else:
            data, suffix, how, _ = _one_picture(rng)
            (parent / f"bad{i}.{suffix}").write_bytes(data)
            done.append(how)
            most += 1
    strict = rng.random() < 0.2
    return (
        f"{'; '.join(done)}; classes={classes}, strict={strict}",
        lambda: _load_both(place, 8, classes=classes, strict=strict),
        lambda loaded: check_dataset(loaded, count, most),
        PICTURE_MEGABYTES,
    )
