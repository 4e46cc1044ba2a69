"""`python -m ddpm_fast.prepare`, and what its folders hold: the pictures as NumPy and Pillow have them."""

import hashlib
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import run

from ddpm_fast.commands import preparing
from ddpm_fast.data import Dataset, open_dataset
from ddpm_fast.data.cache import Cache
from ddpm_fast.data.selection import Selection
from ddpm_fast.data.source import Window
from ddpm_fast.errors import InputError

COUNT = 23
PER_FILE = 5


def pixels(i):
    """The pixels of picture i, uint8 [6, 6, 3]."""
    return np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)


def write_pictures(folder):
    """Two classes of pictures, whose paths are in the order of their numbers."""
    for i in range(COUNT):
        path = folder / ("cat" if i < 9 else "dog") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(path)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures")


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(preparing, "FILE_BYTES", PER_FILE * 6 * 6 * 3 + 7)


def prepare(folder, out, *options):
    return run("prepare", "--data", folder, "--out", out, *options)


def expected(numbers=range(COUNT)):
    return np.stack([pixels(i).transpose(2, 0, 1) for i in numbers])


def images_of(dataset):
    return dataset.batch(torch.arange(len(dataset)))[0].numpy()


def edited(out, change):
    """Edit the index."""
    path = out / "index.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored, indent=1))


def test_a_prepared_folder_holds_the_pictures_in_arrays_that_numpy_reads(folder, tmp_path):
    result = prepare(folder, tmp_path / "out", "--classes")
    assert result.exit_code == 0, result.stderr
    assert f"{COUNT} images 3x6x6, with classes, in 5 files" in result.stdout
    files = sorted((tmp_path / "out").glob("images-*.npy"))
    assert [len(np.load(file)) for file in files] == [5, 5, 5, 5, 3]
    assert np.array_equal(np.concatenate([np.load(file) for file in files]), expected())
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0] * 9 + [1] * 14
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["files"][4][1] == hashlib.sha256(files[4].read_bytes()).hexdigest()


def test_training_reads_it_without_a_copy(folder, tmp_path):
    prepare(folder, tmp_path / "out", "--classes")
    dataset = open_dataset(tmp_path / "out", in_memory=False)
    assert np.array_equal(images_of(dataset), expected())
    assert dataset.labels.tolist() == [0] * 9 + [1] * 14
    assert dataset.label_names == ["cat", "dog"]
    assert dataset.name == "out"
    one, other = dataset.source.read(7), dataset.source.read(7)
    assert one.base is not None and np.shares_memory(one, other)


def test_it_is_the_same_set_as_the_pictures(folder, tmp_path):
    prepare(folder, tmp_path / "out", "--classes")
    prepared = open_dataset(tmp_path / "out")
    assert isinstance(prepared, Dataset)
    assert prepared.digest == open_dataset(folder, classes=True, in_memory=True).digest
    assert prepared.digest == open_dataset(tmp_path / "out", in_memory=False).pixel_digest()


def test_the_pictures_are_scaled_and_made_grey_as_training_does(folder, tmp_path):
    prepare(folder, tmp_path / "out", "--image-size", 4, "--channels", 1)
    from_pictures = open_dataset(folder, 4, 1, in_memory=True)
    assert np.array_equal(images_of(open_dataset(tmp_path / "out", in_memory=False)), images_of(from_pictures))


def test_broken_pictures_are_left_out_and_named(folder, tmp_path):
    broken = (0, 4, 13, 20, 21, 22)  # of the last file, all
    for i in broken:
        (folder / ("cat" if i < 9 else "dog") / f"{i:03}.png").write_text("no picture")
    result = prepare(folder, tmp_path / "out", "--image-size", 6, "--classes")
    assert result.exit_code == 0
    assert "left out cat/000.png: its content is none of the formats" in result.stderr + result.stdout
    assert "6 broken images were left out" in result.stderr + result.stdout
    kept = [i for i in range(COUNT) if i not in broken]
    dataset = open_dataset(tmp_path / "out", in_memory=False)
    assert np.array_equal(images_of(dataset), expected(kept))
    assert dataset.labels.tolist() == [int(i >= 9) for i in kept]
    result = prepare(folder, tmp_path / "strict", "--image-size", 6, "--strict")
    assert result.exit_code == 2 and "cannot read the image" in result.stderr


def test_no_folder_is_written_of_which_every_picture_is_broken(folder, tmp_path):
    for path in folder.rglob("*.png"):
        path.write_text("no picture")
    result = prepare(folder, tmp_path / "out", "--image-size", 6, "--channels", 3)
    assert result.exit_code == 2 and f"none of the {COUNT} images" in result.stderr


# ---- stopping and going on ----


def stop_at(monkeypatch, file, how):
    """Let the making of a file, and of those after it, end in an exception."""
    make = preparing._Team._make_file

    def fail(team, number):
        if number >= file:
            raise how
        return make(team, number)

    monkeypatch.setattr(preparing._Team, "_make_file", fail)
    monkeypatch.setattr(preparing, "usable_cores", lambda: 1)  # so that the files before are finished


def test_what_is_finished_stays_and_a_second_start_makes_the_rest(folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare(folder, whole, "--classes")
    with monkeypatch.context() as patch:
        stop_at(patch, 3, InputError("the disk is full"))
        assert prepare(folder, out, "--classes").exit_code == 2
    with pytest.raises(InputError, match=r"is not finished: 3 of its 5 files"):
        open_dataset(out)
    index = json.loads((out / "index.json").read_text())
    finished = [number for number, file in enumerate(index["files"]) if file is not None]
    times = {number: (out / f"images-{number:05}.npy").stat().st_mtime_ns for number in finished}
    assert finished == [0, 1, 2]
    result = prepare(folder, out, "--classes")
    assert result.exit_code == 0, result.stderr
    assert {n: (out / f"images-{n:05}.npy").stat().st_mtime_ns for n in finished} == times
    assert [file.name for file in sorted(out.iterdir())] == [file.name for file in sorted(whole.iterdir())]
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert prepare(folder, out, "--classes").exit_code == 0  # nothing is left to do


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_finished_files(folder, tmp_path, monkeypatch, number):
    make, command = preparing._Team._make_file, os.getpid()

    def interrupted(team, file):
        if file < 2:
            return make(team, file)
        os.kill(command, number)
        while not team._is_over():
            time.sleep(0.01)
        return None

    with monkeypatch.context() as patch:
        patch.setattr(preparing._Team, "_make_file", interrupted)
        patch.setattr(preparing, "usable_cores", lambda: 1)
        result = prepare(folder, tmp_path / "out")
    assert result.exit_code == 128 + number
    assert "the same command goes on" in result.stdout
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [file is not None for file in index["files"]] == [True, True, False, False, False]
    assert prepare(folder, tmp_path / "out").exit_code == 0
    assert np.array_equal(images_of(open_dataset(tmp_path / "out", in_memory=False)), expected())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux decodes in processes")
def test_a_process_that_is_killed_ends_the_work_and_keeps_the_finished_files(folder, tmp_path, monkeypatch):
    make, command = preparing._Team._make_file, os.getpid()

    def killed(team, file):
        if file == 3:
            assert os.getpid() != command
            os.kill(os.getpid(), signal.SIGKILL)
        return make(team, file)

    with monkeypatch.context() as patch:
        patch.setattr(preparing._Team, "_make_file", killed)
        result = prepare(folder, tmp_path / "out")
    assert result.exit_code == 2 and "was ended (-9), perhaps because memory ran out" in result.stderr
    assert prepare(folder, tmp_path / "out").exit_code == 0
    assert np.array_equal(images_of(open_dataset(tmp_path / "out", in_memory=False)), expected())


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_processes_and_threads_write_the_same(folder, tmp_path, monkeypatch, platform):
    monkeypatch.setattr(preparing.sys, "platform", platform)
    monkeypatch.setattr(preparing, "usable_cores", lambda: 3)
    (folder / "cat" / "003.png").write_text("no picture")
    assert prepare(folder, tmp_path / "out", "--image-size", 6).exit_code == 0
    kept = [i for i in range(COUNT) if i != 3]
    assert np.array_equal(images_of(open_dataset(tmp_path / "out", in_memory=False)), expected(kept))


def test_a_file_that_was_lost_or_cut_off_is_made_again(folder, tmp_path):
    out = tmp_path / "out"
    prepare(folder, out)
    (out / "images-00001.npy").unlink()
    with open(out / "images-00003.npy", "rb+") as file:
        file.truncate(200)
    assert prepare(folder, out).exit_code == 0
    assert np.array_equal(images_of(open_dataset(out, in_memory=False)), expected())


@pytest.mark.parametrize("change", ["source", "size", "classes", "labels"])
def test_another_source_or_other_options_are_refused(folder, tmp_path, change):
    out = tmp_path / "out"
    prepare(folder, out, "--classes")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    options = {"size": ("--classes", "--image-size", 4), "classes": ()}.get(change, ("--classes",))
    if change == "source":
        (folder / "cat" / "000.png").write_bytes((folder / "cat" / "000.png").read_bytes() + b"x")
    if change == "labels":
        (folder / "cat" / "008.png").rename(folder / "dog" / "008.png")
    result = prepare(folder, out, *options)
    assert result.exit_code == 2 and "begun from other images or with other options" in result.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_folder_with_other_files_is_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = prepare(folder, tmp_path / "out")
    assert result.exit_code == 2 and "is not empty: it has mine.txt" in result.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_disk_with_too_little_room_is_refused_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": COUNT * 108 - 1}))
    result = prepare(folder, tmp_path / "out")
    assert result.exit_code == 2 and "of room" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("--data", "mnist5k", "--verify")])
def test_either_data_or_verify_is_asked_for(tmp_path, arguments):
    result = run("prepare", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2 and "give either --data" in result.stderr


# ---- reading it ----


def test_another_size_and_random_crops_are_made_from_the_stored_images(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out", 5, in_memory=False)
    assert dataset.shape == (3, 5, 5) and dataset.source.crops
    # A window that zooms not at all and is cut at the lower right: the shorter side is scaled to 5, so all is there.
    scaled = np.asarray(Image.fromarray(pixels(2)).resize((5, 5), Image.Resampling.LANCZOS))
    assert np.array_equal(dataset.source.read(2, Window(0.0, 0.9, 0.9)), scaled.transpose(2, 0, 1))
    assert np.array_equal(dataset.source.read(2), scaled.transpose(2, 0, 1))
    # At the largest zoom the shorter side is scaled to ceil(5 / 0.8) = 7, of which 5 are cut at 2 from the left.
    zoomed = dataset.source.read(2, Window(0.999, 0.999, 0.0))
    box = (2 * 6 / 7, 0, 6, 5 * 6 / 7)
    cut = np.asarray(Image.fromarray(pixels(2)).resize((5, 5), Image.Resampling.LANCZOS, box))
    assert np.array_equal(zoomed, cut.transpose(2, 0, 1))
    assert not open_dataset(tmp_path / "out", 6, in_memory=False).source.crops


def test_colours_convert(folder, tmp_path):
    prepare(folder, tmp_path / "rgb")
    prepare(folder, tmp_path / "grey", "--channels", 1)
    grey = [np.asarray(Image.fromarray(pixels(i)).convert("L"))[None] for i in range(COUNT)]
    assert np.array_equal(images_of(open_dataset(tmp_path / "rgb", None, 1, in_memory=False)), np.stack(grey))
    both = images_of(open_dataset(tmp_path / "grey", None, 3, in_memory=False))
    assert np.array_equal(both, np.stack(grey).repeat(3, axis=1))
    with pytest.raises(InputError, match="only grey and RGB"):
        open_dataset(tmp_path / "rgb", None, 2)


def test_classes_that_were_not_prepared_cannot_be_asked_for(folder, tmp_path):
    prepare(folder, tmp_path / "out")
    with pytest.raises(InputError, match="prepare the images again with --classes"):
        open_dataset(tmp_path / "out", classes=True)


def test_verify_finds_a_changed_byte(folder, tmp_path):
    out = tmp_path / "out"
    prepare(folder, out, "--classes")
    assert "All checksums are right" in run("prepare", "--out", out, "--verify").stdout
    for name in ("images-00002.npy", "labels.npy"):
        data = bytearray((out / name).read_bytes())
        data[-1] ^= 1
        (out / name).write_bytes(data)
        if name != "labels.npy":  # a class number that makes no sense is found at once
            open_dataset(out)  # no size has changed
        result = run("prepare", "--out", out, "--verify")
        assert result.exit_code == 2 and name in result.stderr


def wrong_shape(stored):
    stored["shape"] = [3, 6, 7]


def huge(stored):
    stored["shape"] = [1 << 16] * 3


def negative(stored):
    stored["shape"] = [-3, -6, 6]


def more_images(stored):
    stored["files"][0][0] += 1


def fewer_files(stored):
    stored["files"].pop()


def unfinished(stored):
    stored["files"][2] = None


def many_per_file(stored):
    stored["per_file"] = 1 << 50


def no_names(stored):
    stored["label_names"] = ["cat"]


def names_of_numbers(stored):
    stored["label_names"] = [1, 2]


def no_checksum(stored):
    stored["files"][0][1] = "../../etc/passwd"


def skipped_elsewhere(stored):
    stored["files"][0] = [4, stored["files"][0][1], [[22, "x", "y"]]]


def newer(stored):
    stored["version"] = 2


def no_entry(stored):
    del stored["per_file"]


def no_source(stored):
    stored["source"] = ["pictures"]


CHANGES = (
    wrong_shape, huge, negative, more_images, fewer_files, unfinished, many_per_file, no_names, names_of_numbers,
    no_checksum, skipped_elsewhere, newer, no_entry, no_source,
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    write_pictures(folder / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "FILE_BYTES", PER_FILE * 6 * 6 * 3)
        assert prepare(folder / "pictures", folder / "out", "--classes").exit_code == 0
    return folder / "out"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_index_that_lies_is_refused(prepared, change):
    text = (prepared / "index.json").read_text()
    try:
        edited(prepared, change)
        with pytest.raises(InputError, match=r"again|newer|1 names of classes"):
            open_dataset(prepared)
    finally:
        (prepared / "index.json").write_text(text)


@pytest.mark.parametrize("text", ['{\n "format": "ddpm_fast images"', '{\n "format": "ddpm_fast images"}', ""])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(InputError, match=r"cannot read .*index\.json|no images in the folder"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "replace",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: np.save(path, np.zeros((5, 3, 6, 6), np.int8)),
        lambda path: np.save(path, np.zeros((5, 3, 6, 6), np.uint8, order="F")),
        lambda path: np.save(path, np.array([print], dtype=object), allow_pickle=True),
        lambda path: path.write_bytes(b"\x93NUMPY\x03\x00" + path.read_bytes()[8:]),
    ],
    ids=["gone", "empty", "cut off", "longer", "signed", "transposed", "pickled", "another version"],
)
def test_a_file_that_is_not_what_the_index_says_is_refused(prepared, replace):
    path = prepared / "images-00001.npy"
    before = path.read_bytes()
    try:
        replace(path)
        with pytest.raises(InputError, match=r"cannot read .*images-00001\.npy: .*copy it again, or prepare"):
            Cache(prepared, "x")
    finally:
        path.write_bytes(before)


def test_arrays_need_no_preparing(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 6, 6, 3), np.uint8))
    for data in ("mnist5k", tmp_path / "a.npy"):
        result = prepare(data, tmp_path / "out")
        assert result.exit_code == 2 and "is an array already" in result.stderr


def test_prepared_images_have_no_columns(prepared):
    for selection in (Selection(split="train"), Selection(label_column="label"), Selection(layout="NCHW")):
        with pytest.raises(InputError, match="leave"):
            open_dataset(prepared, selection=selection)


def test_a_prepared_folder_can_be_prepared_smaller(prepared, tmp_path):
    assert prepare(prepared, tmp_path / "out", "--image-size", 3).exit_code == 0
    small = open_dataset(tmp_path / "out", in_memory=False)
    assert small.label_names == ["cat", "dog"]
    assert np.array_equal(images_of(small), images_of(open_dataset(prepared, 3, in_memory=False)))
