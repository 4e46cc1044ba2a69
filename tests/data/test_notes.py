"""What a user is told about pictures that are broken, dark or elsewhere: once, by name, and in words that help."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_fast.data import load_dataset, read_picture
from ddpm_fast.errors import InputError


def notes_of(source, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_dataset(source, **options)
    assert all(warning.filename == __file__ for warning in caught)
    return dataset, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("size", [{}, {"image_size": 8, "channels": 1}], ids=["probed", "all given"])
def test_many_broken_pictures_are_one_warning(tmp_path, size):
    Image.new("L", (8, 8), 1).save(tmp_path / "good.png")
    for i in range(300):
        (tmp_path / f"x{i:03}.png").write_bytes(b"broken")
    dataset, notes = notes_of(tmp_path, **size)
    assert len(dataset.skipped) == 300 and len(dataset) == 1
    assert len(notes) == 1 and "\n" not in notes[0]
    names = "x000.png, x001.png, x002.png and 297 more"
    assert notes[0].startswith(f"skipped 300 broken images: {names}: its content is none of the formats PNG, ")
    assert notes[0].endswith(", TGA (Dataset.skipped lists them)")


def test_broken_pictures_are_told_by_reason(tmp_path):
    Image.new("L", (8, 8), 1).save(tmp_path / "good.png")
    for i in range(6):
        (tmp_path / f"a{i}.png").write_bytes(b"broken")
        (tmp_path / f"b{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
        Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / f"c{i}.png", format="TIFF")
        Image.fromarray(np.ones((8, 8), np.int32)).save(tmp_path / f"d{i}.png", format="TIFF")
    _, (note,) = notes_of(tmp_path, image_size=8, channels=1)
    words = [
        "skipped 24 broken images: ",
        "a0.png, a1.png, a2.png and 3 more: its content",
        "b0.png, b1.png, b2.png and 3 more: ",
        "c0.png, c1.png, c2.png and 3 more: its mode F has no known range",
        "; and 6 for other reasons",
    ]
    places = [note.find(part) for part in words]
    assert places == sorted(places) and places[0] == 0


def test_none_readable_names_a_few(tmp_path):
    for i in range(5):
        (tmp_path / f"x{i}.png").write_bytes(b"broken")
    with (
        warnings.catch_warnings(),
        pytest.raises(InputError, match=r"none of the 5 images .*x0.*x2\.png and 2 more: its content"),
    ):
        warnings.simplefilter("error")
        load_dataset(tmp_path)


def test_control_characters_of_names_are_not_shown(tmp_path):
    Image.new("L", (8, 8), 1).save(tmp_path / "good.png")
    (tmp_path / "a\x1b[2J\n.png").write_bytes(b"broken")
    _, notes = notes_of(tmp_path)
    assert r"a\x1b[2J\x0a.png: its content" in notes[0] and notes[0].isprintable()
    with pytest.raises(InputError, match=r"cannot read the image a\\x1b\[2J\\x0a\.png: "):
        load_dataset(tmp_path, strict=True)


# ---- 16 bits a value ----

DARK = r"^no value in the 16-bit images \(%d\) is above %d, .* if %d is their white, multiply the values by %d "


def png16(path, values):
    """A grey or RGB PNG of 16 bits a value; Pillow itself writes only the grey ones."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    kind = 0 if values.ndim == 2 else 2
    rows = values.astype(">u2").reshape(height, -1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))


@pytest.mark.parametrize("colour", [False, True], ids=["grey", "rgb"])
@pytest.mark.parametrize("bits, said", [(10, True), (12, True), (14, True), (15, False), (16, False)])
@pytest.mark.parametrize("image_size", [None, 4])
def test_sixteen_bit_images_that_use_few_bits_are_said(tmp_path, colour, bits, said, image_size):
    top = (1 << bits) - 1
    values = np.linspace(0, top, 64).reshape(8, 8)
    for name in ("a.png", "b.png"):
        png16(tmp_path / name, np.stack([values] * 3, -1) if colour else values)
    dataset, notes = notes_of(tmp_path, image_size=image_size)
    assert dataset.images.shape[1] == (3 if colour else 1)
    assert len(notes) == said
    if said:
        with pytest.warns(UserWarning, match=DARK % (2, top, top, 1 << (16 - bits))):
            load_dataset(tmp_path)
        png16(tmp_path / "a.png", (np.stack([values] * 3, -1) if colour else values) * (1 << (16 - bits)))
        brightened = load_dataset(tmp_path).images
        assert brightened[0].max() >= 252 and brightened[1].max() <= 64  # the remedy


def test_sixteen_bit_colours_of_a_tiff_are_measured_too(tmp_path):
    values = np.full((4, 4, 3), 4095, "<u2")
    data = values.tobytes()
    tags = [(256, 4), (257, 4), (258, 0), (259, 1), (262, 2), (273, 0), (277, 3), (278, 4), (279, len(data))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, value in tags:
        count, value = (3, start) if tag == 258 else (1, start + 6 if tag == 273 else value)
        entries += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, count, value)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    (tmp_path / "a.tif").write_bytes(head + entries + bytes(4) + struct.pack("<3H", 16, 16, 16) + data)
    dataset, notes = notes_of(tmp_path)
    assert dataset.images.unique().tolist() == [15]
    assert len(notes) == 1 and "is above 4095" in notes[0]


def test_black_images_and_images_of_8_bits_are_not_suspected(tmp_path):
    png16(tmp_path / "a.png", np.zeros((8, 8)))
    Image.new("L", (8, 8), 3).save(tmp_path / "b.png")
    assert notes_of(tmp_path)[1] == []


def test_one_dark_picture_is_said_too(tmp_path):
    png16(tmp_path / "a.png", np.full((8, 8), 4095))
    with pytest.warns(UserWarning, match=DARK % (1, 4095, 4095, 16)) as caught:
        read_picture(tmp_path / "a.png", "--image")
    assert caught[0].filename == __file__


# ---- where a path may lead ----


def test_the_home_folder_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "set").mkdir()
    Image.new("L", (8, 8), 1).save(tmp_path / "set" / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4), np.uint8))
    assert len(load_dataset("~/set")) == 1 and load_dataset("~/set").name == "set"
    assert len(load_dataset("~/a.npy")) == 2
    assert read_picture("~/set/a.png", "--image").shape == (1, 8, 8)
    with pytest.raises(InputError, match="there is no file or folder ~nobody-of-that-name/x; "):
        load_dataset("~nobody-of-that-name/x")


def test_mixed_sizes_are_told_what_to_do_with_and_without_the_option(tmp_path):
    for side in (5, 6):
        Image.new("L", (side, side)).save(tmp_path / f"{side}.png")
    with pytest.raises(
        InputError, match=r"give image_size \(in training: --image-size\).*or scale the files to one size"
    ):
        load_dataset(tmp_path)


def test_nothing_is_said_of_the_record_beside_samples(tmp_path):
    for folder in (tmp_path, tmp_path / "inner"):
        folder.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 1).save(folder / "000000.png")
        (folder / "samples.json").write_text("{}")
    assert notes_of(tmp_path)[1] == ["ignored 1 file: 1 .json"]  # the one that is not where `sample` writes it
    (tmp_path / "inner" / "samples.json").unlink()
    assert notes_of(tmp_path)[1] == []
