"""Images that are read on demand are those of the same folder in memory, broken ones apart."""

import errno
import os
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import StoredDataset, files, load_dataset, open_dataset
from ddpm_fast.data.index import Names
from ddpm_fast.errors import InputError

N = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of two classes, of several formats and sizes."""
    folder = tmp_path_factory.mktemp("set")
    noise = np.random.default_rng(0)
    for i in range(N):
        place = folder / "pets" / ("cat", "dog")[i % 3 == 0]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(noise.integers(0, 256, (20 + i, 30, 3), np.uint8))
        image.save(place / f"{i}.{('png', 'jpg', 'webp')[i % 3]}", lossless=True)
    return folder


def zipped(folder, target, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    return target


@pytest.mark.parametrize("kind", ["folder", "deflated", "stored"])
@pytest.mark.parametrize("channels", [None, 1])
def test_what_is_read_on_demand_is_what_would_be_in_memory(folder, tmp_path, kind, channels):
    source = folder / "pets"
    if kind != "folder":
        method = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
        source = zipped(folder, tmp_path / "pets.zip", method)
    options = {"image_size": 16, "channels": channels, "classes": True}
    memory, stored = load_dataset(source, **options), open_dataset(source, in_memory=False, **options)
    assert isinstance(stored, StoredDataset)
    for of in (len, *(lambda x, a=a: getattr(x, a) for a in ("shape", "dtype", "num_classes", "label_names", "name"))):
        assert of(stored) == of(memory)
    indices = torch.tensor([5, 0, N - 1, 5, 17])
    for ours, theirs in zip(stored.batch(indices), memory.batch(indices), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert stored.skipped == [] and stored.shape[1:] == (16, 16)
    assert stored.pixel_digest() == memory.digest
    assert stored.digest.startswith("index:")
    turned = stored.with_classes(["dog", "cat"])
    assert torch.equal(turned.batch(indices)[1], 1 - memory.batch(indices)[1])
    assert turned.digest != stored.digest and turned.pixel_digest() == memory.with_classes(["dog", "cat"]).digest
    stored.close()


def test_a_small_set_is_loaded_and_a_large_one_is_not(folder, monkeypatch):
    assert not isinstance(open_dataset(folder, 16), StoredDataset)
    monkeypatch.setattr("ddpm_fast.data.load.IN_MEMORY", N * 3 * 16 * 16 - 1)
    assert isinstance(open_dataset(folder, 16), StoredDataset)
    assert not isinstance(open_dataset(folder, 16, channels=1), StoredDataset)
    assert not isinstance(load_dataset(folder, 16), StoredDataset)


def test_a_broken_picture_is_named_once_and_the_next_readable_one_stands_in(tmp_path):
    for i in range(6):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    for i in (2, 3, 5):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    stored = open_dataset(tmp_path, image_size=4, channels=1, in_memory=False)
    assert len(stored) == 6  # nothing was read yet
    with pytest.warns(UserWarning, match=r"^the image 5\.png is broken: .*; the next readable one takes its place$"):
        assert stored.batch(torch.tensor([4, 5]))[0][:, 0, 0, 0].tolist() == [4, 0]
    with pytest.warns(UserWarning, match=r"image [23]\.png is broken: .* \([23] broken images so far") as caught:
        assert stored.batch(torch.arange(6))[0][:, 0, 0, 0].tolist() == [0, 1, 4, 4, 4, 0]
    assert len(caught) == 2 and stored.skipped == ["2.png", "3.png", "5.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored.batch(torch.arange(6))
    with pytest.warns(UserWarning):
        assert stored.pixel_digest() == load_dataset(tmp_path, image_size=4, channels=1).digest


def test_strict_ends_at_a_broken_picture(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    stored = open_dataset(tmp_path, image_size=4, channels=1, strict=True, in_memory=False)
    stored.batch(torch.tensor([0]))
    with pytest.raises(InputError, match=r"^cannot read the image b\.png: .*leave strict off to skip"):
        stored.batch(torch.tensor([1]))
    with pytest.raises(InputError, match="leave strict off"):
        open_dataset(tmp_path, strict=True, in_memory=False)  # which has to look


def test_if_no_picture_is_readable_it_is_said(tmp_path):
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    stored = open_dataset(tmp_path, image_size=4, channels=1, in_memory=False)
    with pytest.raises(InputError, match=r"none of the 1 images of .* is readable"):
        stored.batch(torch.tensor([0]))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: path.unlink(), "has gone since the folder was listed"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"has \d+ bytes now, and had \d+ when the folder"),
    ],
    ids=["gone", "longer"],
)
def test_a_file_that_changes_ends_the_training_by_its_name(tmp_path, change, words):
    for name in "ab":
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    stored = open_dataset(tmp_path, in_memory=False)
    change(tmp_path / "a.png")
    with pytest.raises(InputError, match=rf"a\.png {words}.*; leave the images as they are while they are read"):
        stored.batch(torch.tensor([0]))


def test_an_archive_that_is_replaced_is_read_on(folder, tmp_path):
    path = zipped(folder, tmp_path / "a.zip")
    stored, before = open_dataset(path, 8, in_memory=False), load_dataset(path, 8).images
    (tmp_path / "b.zip").write_bytes(b"other")
    (tmp_path / "b.zip").replace(path)
    assert torch.equal(stored.batch(torch.arange(N))[0], before)


def test_a_picture_unlike_those_that_were_looked_at_counts_as_broken(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_fast.data.picturesource.PROBED", 2)
    for i in range(4):
        Image.new("L", (4, 5 if i == 1 else 4), i).save(tmp_path / f"{i}.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "3.png")
    stored = open_dataset(tmp_path, in_memory=False)  # looks at 0 and 2
    assert stored.shape == (1, 4, 4)
    with pytest.warns(UserWarning) as caught:
        assert stored.batch(torch.arange(4))[0][:, 0, 0, 0].tolist() == [0, 2, 2, 0]
    said = sorted(str(warning.message) for warning in caught)
    assert "1.png is broken: it has 4x5 pixels, and the pictures that were looked at first have 4x4: give" in said[0]
    assert "3.png is broken: it has colours, and the pictures that were looked at first have none" in said[1]


def test_the_digest_is_of_the_index(folder, tmp_path):
    def digest(image_size=8, channels=None):
        return open_dataset(folder, image_size, channels, in_memory=False).digest

    assert digest() == digest() and len({digest(), digest(image_size=9), digest(channels=1)}) == 3
    for name in ("a", "b"):
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    digests = [open_dataset(tmp_path, in_memory=False).digest]
    (tmp_path / "a.png").touch()  # a copy of a folder has other times
    assert open_dataset(tmp_path, in_memory=False).digest == digests[0]
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    digests.append(open_dataset(tmp_path, in_memory=False).digest)
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes() + b"x")
    digests.append(open_dataset(tmp_path, in_memory=False).digest)
    assert len(set(digests)) == 3


# ---- what other people's files may not do ----


def good(path):
    Image.new("L", (4, 4), 2).save(path)
    return path.read_bytes()


def read_all(source, words):
    """Everything is a good picture of 2s, whose warnings are these."""
    stored = open_dataset(source, image_size=4, channels=1, in_memory=False)
    with pytest.warns(UserWarning, match=words):
        assert stored.batch(torch.arange(len(stored)))[0].unique().tolist() == [2]
    return stored


def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch):
    Image.new("L", (300, 300)).save(tmp_path / "bomb.png")
    good(tmp_path / "good.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert read_all(tmp_path, r"bomb\.png is broken: it has 300x300 = 90000 pixels .* decompression").skipped


def test_members_that_are_bombs_encrypted_or_damaged_are_not_read(tmp_path, monkeypatch):
    picture = good(tmp_path / "good.png")
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(1 << 20))
        archive.writestr("bzip.png", picture, compress_type=zipfile.ZIP_BZIP2)
        archive.writestr("damaged.png", picture, compress_type=zipfile.ZIP_STORED)
        archive.writestr("../../escapes.png", picture)
        archive.writestr("good.png", picture)
    data = bytearray(path.read_bytes())
    data[data.index(b"damaged.png") + len("damaged.png") + 20] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("ddpm_fast.data.archive._SMALL_MEMBER_BYTES", 1000)
    words = r"bomb\.png is broken: it unpacks to|bzip\.png is broken: .*bzip2|damaged\.png is broken: .*CRC"
    stored = read_all(path, words)
    assert stored.skipped == ["bomb.png", "bzip.png", "damaged.png"]
    assert stored.source.name_of(3) == "escapes.png"


def test_a_shorter_archive_is_broken_members(tmp_path):
    picture = good(tmp_path / "good.png")
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a.png", "b.png"):
            archive.writestr(name, picture)
    stored = open_dataset(path, image_size=4, channels=1, in_memory=False)
    with path.open("r+b") as file:
        file.truncate(len(picture) + 40)  # within the second
    with pytest.warns(UserWarning, match=r"b\.png is broken: it is damaged|b\.png is broken: there is no such"):
        assert stored.batch(torch.tensor([1]))[0].unique().tolist() == [2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_links_in_circles_and_pipes_are_not_followed(tmp_path):
    good(tmp_path / "good.png")
    (tmp_path / "circle").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nowhere.png").symlink_to("missing")
    stored = read_all(tmp_path, r"(pipe\.png is broken: it is a named pipe|nowhere\.png is broken: .*No such file)")
    assert len(stored) == 3 and stored.skipped == ["nowhere.png", "pipe.png"]


@pytest.mark.parametrize("number, fatal", [(errno.EIO, True), (errno.EMFILE, True), (errno.EACCES, False)])
def test_a_disk_that_fails_ends_the_training_and_a_locked_file_does_not(tmp_path, monkeypatch, number, fatal):
    for name in "ab":
        good(tmp_path / f"{name}.png")
    stored = open_dataset(tmp_path, image_size=4, channels=1, in_memory=False)
    plain = files.open_regular

    def failing(path):
        if path.endswith("a.png"):
            raise OSError(number, os.strerror(number))
        return plain(path)

    monkeypatch.setattr(files, "open_regular", failing)
    if fatal:
        with pytest.raises(InputError, match=r"cannot read the image a\.png of .*; see that its disk is there"):
            stored.batch(torch.tensor([0]))
    else:
        with pytest.warns(UserWarning, match=r"a\.png is broken: .*Permission denied"):
            stored.batch(torch.tensor([0]))


def test_names_of_any_bytes_come_back(tmp_path):
    texts = ["a", "", "é/ü.png", os.fsdecode(b"\xff\xfe.png"), "\U0001f431" * 9]
    names = Names(texts)
    assert list(names) == texts and [names[i] for i in range(5)] == texts and len(names) == 5
    assert names.identity() != Names(["ab", *texts[2:]]).identity() != Names(["a", "b"]).identity()
    with pytest.raises(IndexError):
        names[5]


def test_a_closed_archive_is_not_read(folder, tmp_path):
    stored = open_dataset(zipped(folder, tmp_path / "a.zip"), 8, in_memory=False)
    stored.close()
    stored.close()
    with pytest.raises(InputError, match=r"a\.zip has been closed; open the images again"):
        stored.batch(torch.tensor([0]))
