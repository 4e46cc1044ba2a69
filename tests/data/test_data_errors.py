"""Tests of what ddpm_fast.data refuses: each message says what was found and what was expected."""

import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data import load_dataset
from ddpm_fast.errors import InputError


def zeros(*shape):
    return np.zeros(shape, np.uint8)


def save_grey(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 1).save(path)


def zip_file(path, member):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, bytes(300))


class Trap:
    """Unpickling one of these would show."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def bad_source(kind, folder):
    make = {
        "wide": lambda: np.save(folder / "a.npy", np.zeros((2, 4, 4), np.uint16)),
        "rank 2": lambda: np.save(folder / "a.npy", zeros(4, 4)),
        "no images at all": lambda: np.save(folder / "a.npy", zeros(0, 4, 4, 3)),
        "channels first": lambda: np.save(folder / "a.npy", zeros(2, 3, 8, 8)),
        "two channels": lambda: np.save(folder / "a.npy", zeros(2, 8, 8, 2)),
        "objects": lambda: np.save(folder / "a.npy", np.array([Trap()], object), allow_pickle=True),
        "pickle": lambda: (folder / "a.npy").write_bytes(pickle.dumps(Trap())),
        "labels of objects": lambda: np.savez(folder / "a.npz", images=zeros(1, 4, 4), labels=np.array([Trap()])),
        "no key images": lambda: np.savez(folder / "a.npz", x=zeros(2, 4, 4)),
        "short labels": lambda: np.savez(folder / "a.npz", images=zeros(3, 4, 4), labels=np.arange(2)),
        "float labels": lambda: np.savez(folder / "a.npz", images=zeros(3, 4, 4), labels=np.zeros(3)),
        "negative labels": lambda: np.savez(folder / "a.npz", images=zeros(2, 4, 4), labels=np.array([0, -1])),
        "few names": lambda: np.savez(
            folder / "a.npz", images=zeros(2, 4, 4), labels=np.array([0, 2]), label_names=["a", "b"]
        ),
        "no labels": lambda: np.savez(folder / "a.npz", images=zeros(2, 4, 4)),
        "txt": lambda: (folder / "a.txt").write_text("hello"),
        "empty folder": lambda: (folder / "a").mkdir(),
        "only other files": lambda: zip_file(folder / "a.zip", "readme.txt"),
        "no classes": lambda: save_grey(folder / "a/x.png"),
        "no class for one": lambda: [save_grey(folder / f"a/{n}.png") for n in ("cat/x", "y")],
        "sizes": lambda: [save_grey(folder / f"a/{n}.png", (n, 5)) for n in (5, 6)],
        "all broken": lambda: [(folder / "a").mkdir(), (folder / "a" / "x.png").write_bytes(b"broken")],
    }
    make[kind]()
    return next(folder.glob("a*"))


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("wide", {}, r"uint16 \[2, 4, 4\], expected uint8 \[N, H, W\] or \[N, H, W, C\]"),
        ("rank 2", {}, r"uint8 \[4, 4\], expected uint8 \[N, H, W\]"),
        ("no images at all", {}, r"\[0, 4, 4, 3\], expected at least one image"),
        ("channels first", {}, r"\[2, 3, 8, 8\].*transpose\(0, 2, 3, 1\)"),
        ("two channels", {"channels": 3}, r"have 2 channels and 3 were asked for"),
        ("objects", {}, r"pickled objects are never loaded"),
        ("pickle", {}, r"pickled objects are never loaded"),
        ("labels of objects", {}, r"pickled objects are never loaded"),
        ("no key images", {}, r"no array called 'images' \(or 'arr_0'\), only \['x'\]"),
        ("short labels", {}, r"labels of .* \[2\], but there are 3 images"),
        ("float labels", {}, r"labels of .* float64 \[3\], expected integers"),
        ("negative labels", {}, r"go down to -1, expected class numbers from 0 up"),
        ("few names", {}, r"labels of .* go up to 2, but there are 2 label_names"),
        ("no labels", {"classes": True}, r"classes were asked for, but .*a\.npz has no labels"),
        ("txt", {}, r"a\.txt is neither a folder, a \.zip"),
        ("empty folder", {}, r"no images in the folder .*\(0 files\).* \.jpg"),
        ("only other files", {}, r"no images in the archive .*\(1 file: 1 \.txt\).* \.jpg"),
        ("no classes", {"classes": True}, r"there are no sub-folders with images"),
        ("no class for one", {"classes": True}, r"y\.png is in no sub-folder"),
        ("sizes", {}, r"differ in size .*5x5 \(1 images, such as 5\.png\), 6x5 .*--image-size"),
        ("sizes", {"image_size": 0}, r"image_size is 0; expected an integer of at least 1"),
        ("sizes", {"image_size": -8}, r"image_size is -8; expected an integer of at least 1"),
        ("sizes", {"image_size": 8.0}, r"image_size is 8\.0, a float; expected an integer"),
        ("sizes", {"channels": 0}, r"channels is 0; expected an integer of at least 1"),
        ("sizes", {"channels": 4, "image_size": 8}, r"1 channel \(grey\) or 3 \(RGB\), got channels=4"),
    ],
)
def test_refusals_say_what_and_why(tmp_path, monkeypatch, kind, options, words):
    monkeypatch.chdir(tmp_path)
    source = bad_source(kind, tmp_path)
    with pytest.raises(InputError, match=words):
        load_dataset(source, **options)
    assert not (tmp_path / "unpickled").exists()


def test_all_broken_names_the_first(tmp_path):
    source = bad_source("all broken", tmp_path)
    with (
        warnings.catch_warnings(),
        pytest.raises(InputError, match=r"none of the 1 images is readable; x\.png"),
    ):
        warnings.simplefilter("ignore")
        load_dataset(source)


@pytest.mark.parametrize("source", ["mnist", "no/such/folder"])
def test_missing_path_lists_the_builtin_sets(source):
    with pytest.raises(InputError, match=f"no file or folder {source}; .*built-in set: emoji32, mnist5k"):
        load_dataset(source)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9], ids=["empty", "a third", "the end is missing"])
@pytest.mark.parametrize("suffix", [".zip", ".npz", ".npy"])
def test_truncated_files(tmp_path, suffix, keep):
    path = tmp_path / f"a{suffix}"
    if suffix == ".zip":
        zip_file(path, "a.png")
    elif suffix == ".npz":
        np.savez_compressed(path, images=zeros(4, 8, 8))
    else:
        np.save(path, zeros(4, 8, 8))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=f"cannot read .*a{suffix}"):
        load_dataset(path)


def test_zip_of_an_unknown_version(tmp_path):
    zip_file(tmp_path / "a.zip", "a.png")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\1\2") + 6] = 250  # "version needed to extract", times ten
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(InputError, match=r"cannot read the archive .*a\.zip: zip file version 25\.0"):
        load_dataset(tmp_path / "a.zip")
