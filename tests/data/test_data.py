"""Tests of ddpm_fast.data: pixels, classes and labels against what they must be.

The images are made here, with colours known beforehand; nothing is compared with the loader's own output.
"""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.data import BUILTIN, load_dataset
from ddpm_fast.errors import InputError


def save(folder, name, image, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def solid(mode, colour, size=(8, 8)):
    return Image.new(mode, size, colour)


def palette_red():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


def wide(value):
    return Image.fromarray(np.full((8, 8), value, dtype=np.uint16))


# ---- one picture of every mode, its colour known ----


@pytest.mark.filterwarnings("ignore:no value in the 16-bit images")
@pytest.mark.parametrize(
    "image, options, channels, colour",
    [
        pytest.param(solid("1", 1), {}, 1, (255,), id="black-and-white"),
        pytest.param(solid("L", 77), {}, 1, (77,), id="grey"),
        pytest.param(solid("LA", (40, 255)), {}, 1, (40,), id="opaque grey with alpha"),
        pytest.param(solid("LA", (40, 0)), {}, 1, (255,), id="transparent grey is white"),
        pytest.param(solid("L", 40), {"transparency": 40}, 1, (255,), id="grey with a transparent value"),
        pytest.param(wide(257 * 90), {}, 1, (90,), id="16 bits scale, not clip"),
        pytest.param(wide(65535), {}, 1, (255,), id="16 bits white"),
        pytest.param(wide(200), {}, 1, (1,), id="16 bits near-black rounds to 200/257"),
        pytest.param(palette_red(), {}, 3, (255, 0, 0), id="palette is colour"),
        pytest.param(palette_red(), {"transparency": 1}, 3, (255, 255, 255), id="transparent palette entry"),
        pytest.param(solid("RGB", (10, 20, 30)), {}, 3, (10, 20, 30), id="rgb"),
        pytest.param(solid("RGBA", (0, 100, 200, 255)), {}, 3, (0, 100, 200), id="opaque rgba"),
        pytest.param(solid("RGBA", (0, 100, 200, 51)), {}, 3, (204, 224, 244), id="a fifth over white"),
    ],
)
@pytest.mark.parametrize("image_size", [None, 4, 16], ids=["as is", "smaller", "larger"])
def test_solid_colour_of_every_png_mode(tmp_path, image, options, channels, colour, image_size):
    save(tmp_path, "a.png", image, **options)
    images = load_dataset(tmp_path, image_size=image_size).images
    side = image_size or 8
    assert images.dtype == torch.uint8 and images.is_contiguous()
    assert images.shape == (1, channels, side, side)
    for plane, value in zip(images[0], colour, strict=True):
        assert plane.unique().tolist() == [value]


@pytest.mark.parametrize(
    "ink, colour",
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))],
    ids=["no ink", "magenta and yellow", "key"],
)
def test_cmyk_jpeg(tmp_path, ink, colour):
    save(tmp_path, "a.jpg", solid("CMYK", ink), quality=95)
    difference = load_dataset(tmp_path).images[0].int() - torch.tensor(colour)[:, None, None]
    assert difference.abs().max() <= 2


def test_grey_and_colour_together_are_rgb_and_either_can_be_asked_for(tmp_path):
    save(tmp_path, "a.png", solid("L", 60))
    save(tmp_path, "b.png", solid("RGB", (0, 255, 0)))
    mixed = load_dataset(tmp_path).images
    assert mixed[:, :, 0, 0].tolist() == [[60, 60, 60], [0, 255, 0]]
    grey = load_dataset(tmp_path, channels=1).images
    assert grey[:, :, 0, 0].tolist() == [[60], [150]]  # ITU-R 601 luma: 0.587 * 255 = 149.7


def test_sixteen_bit_pgm(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + np.array([257 * 90, 65535], ">u2").tobytes())
    assert load_dataset(tmp_path).images.tolist() == [[[[90, 255]]]]


@pytest.mark.parametrize("image_size", [None, 3], ids=["size from the header", "size given"])
def test_exif_orientation_is_applied(tmp_path, image_size):
    exif = Image.Exif()
    exif[0x0112] = 6  # "column 0 is the visual top, row 0 the visual right-hand side"
    stored = np.arange(18, dtype=np.uint8).reshape(3, 6)
    save(tmp_path, "a.png", Image.fromarray(stored), exif=exif)
    upright = [[stored[2 - x, y] for x in range(3)] for y in range(6)]
    image = load_dataset(tmp_path, image_size=image_size).images[0, 0]
    # No scaling is needed, so the cut is exact: rows 1 to 3 of six (the half pixel left over is dropped).
    assert image.tolist() == (upright if image_size is None else upright[1:4])


@pytest.mark.filterwarnings("ignore:no value in the 16-bit images")
def test_sixteen_bit_keeps_its_scale_when_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    save(tmp_path, "a.png", wide(257 * 33), exif=exif)
    assert load_dataset(tmp_path).images.unique().tolist() == [33]


def test_resizing_scales_the_shorter_side_and_keeps_the_middle(tmp_path):
    columns = np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 4)  # 24 steps of 4 pixels, 96 wide
    save(tmp_path, "a.png", Image.fromarray(np.tile(columns, (32, 1))))
    image = load_dataset(tmp_path, image_size=8).images[0, 0]
    # A quarter of the size: one pixel a step, and of the 24 steps the middle eight.
    assert (image.int() - torch.arange(80, 160, 10)).abs().max() <= 1


def test_shrinking_is_antialiased(tmp_path):
    checkers = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    save(tmp_path, "a.png", Image.fromarray(checkers))
    image = load_dataset(tmp_path, image_size=8).images[0, 0, 1:-1, 1:-1].int()
    assert (image - 127.5).abs().max() <= 3  # nearest or plain bilinear sampling would give 0 and 255


def test_transparent_colour_does_not_bleed_into_the_edge(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 255  # red everywhere, but hidden on the left
    pixels[:, 8:] = (0, 0, 255, 255)
    save(tmp_path, "a.png", Image.fromarray(pixels))
    red, green, blue = load_dataset(tmp_path, image_size=4).images[0].int()
    assert (red - green).abs().max() <= 1  # white and blue mix without ever being redder than green
    assert blue.min() >= 254


def test_large_jpeg_decoded_at_reduced_scale_matches_full_decoding(tmp_path):
    y, x = np.mgrid[0:600, 0:800]
    pixels = np.stack([x * 255 / 799, y * 255 / 599, 128 + 100 * np.sin(x / 60)], -1).astype(np.uint8)
    path = save(tmp_path, "a.jpg", Image.fromarray(pixels), quality=95)
    image = load_dataset(tmp_path, image_size=32).images[0]
    full = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None].double()
    reference = torch.nn.functional.interpolate(full[..., 100:700], size=(32, 32), mode="bicubic", antialias=True)
    assert (image - reference[0]).abs().max() <= 3


def test_first_frame_of_an_animation(tmp_path):
    frames = [solid("RGB", (255, 0, 0)), solid("RGB", (0, 0, 255))]
    save(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert load_dataset(tmp_path).images[0, :, 0, 0].tolist() == [255, 0, 0]


# ---- folders and archives ----


def make_zoo(folder):
    """Two classes, nested folders, a suffix in capitals, and files that are none of our business."""
    save(folder, "dog/deep/b.png", solid("L", 3))
    save(folder, "dog/a.PNG", solid("L", 2))
    save(folder, "cat/z.bmp", solid("L", 1))
    (folder / "cat" / "notes.txt").write_text("not a picture")
    (folder / "cat" / "._z.png").write_bytes(b"what macOS leaves behind")


def zip_folder(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "zip with everything in one folder"])
def test_pictures_come_in_path_order_with_their_classes(tmp_path, kind):
    make_zoo(tmp_path / "zoo")
    source = tmp_path / "zoo"
    if kind != "folder":
        source = zip_folder(source, tmp_path / "zoo.zip", "" if kind == "zip" else "zoo/")
    with pytest.warns(UserWarning, match=r"^ignored 1 file: 1 \.txt$") as caught:
        dataset = load_dataset(source, classes=True)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert dataset.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert dataset.labels.tolist() == [0, 1, 1] and dataset.labels.dtype == torch.int64
    assert dataset.label_names == ["cat", "dog"] and dataset.num_classes == 2
    assert dataset.name == source.name and len(dataset) == 3 and dataset.skipped == []
    with pytest.warns(UserWarning, match="^ignored 1 file"):
        plain = load_dataset(str(source))
    assert plain.labels is None and plain.label_names is None and plain.num_classes is None


def test_zip_is_not_extracted(tmp_path):
    make_zoo(tmp_path / "zoo")
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.warns(UserWarning, match="^ignored 1 file"):
        load_dataset(zip_folder(tmp_path / "zoo", alone / "zoo.zip"))
    assert os.listdir(alone) == ["zoo.zip"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere", "a.png", solid("L", 5))
    source = tmp_path / "set"
    source.mkdir()
    (source / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (source / "circle").symlink_to(source, target_is_directory=True)
    assert len(load_dataset(source)) == 1


def test_many_files_keep_their_places_and_progress_counts_them(tmp_path):
    for i in range(100):
        save(tmp_path, f"{i:03}.png", solid("L", i))
    calls = []
    dataset = load_dataset(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert dataset.images[:, 0, 0, 0].tolist() == list(range(100))
    assert calls[-1] == (100, 100) and calls == sorted(calls) and len(calls) > 1


def test_nonsquare_images_of_one_size_keep_it(tmp_path):
    save(tmp_path, "a.png", solid("L", 5, size=(12, 7)))
    assert load_dataset(tmp_path).images.shape == (1, 1, 7, 12)


def make_broken(folder, kind):
    """A good picture on either side of a broken one."""
    save(folder, "a/a.png", solid("L", 1))
    save(folder, "b/c.png", solid("L", 3))
    path = save(folder, "a/b.png", Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "garbage":
        path.write_bytes(b"\x89PNG no more")
    elif kind == "empty":
        path.write_bytes(b"")
    else:  # a sound file, but whether its 1 is black or white nobody knows
        Image.fromarray(np.ones((8, 8), kind)).save(path, format="TIFF")


@pytest.mark.parametrize("kind", ["truncated", "garbage", "empty", "float32", "int32"])
@pytest.mark.parametrize("size", [{}, {"image_size": 8, "channels": 1}], ids=["probed", "all given"])
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_broken_file_is_named_and_skipped(tmp_path, kind, size, zipped):
    make_broken(tmp_path / "set", kind)
    source = zip_folder(tmp_path / "set", tmp_path / "set.zip") if zipped else tmp_path / "set"
    with pytest.warns(UserWarning, match=r"skipped the broken image a/b\.png: ") as caught:
        dataset = load_dataset(source, classes=True, **size)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert dataset.skipped == ["a/b.png"]
    assert dataset.images[:, :, 0, 0].tolist() == [[1], [3]] and dataset.labels.tolist() == [0, 1]
    with pytest.raises(InputError, match=r"cannot read the image a/b\.png: .*strict"):
        load_dataset(source, strict=True, **size)


def test_damaged_member_of_a_sound_zip_is_skipped(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in (("a.png", 1), ("b.png", 2)):
            file = io.BytesIO()
            solid("L", value).save(file, "PNG")
            archive.writestr(name, file.getvalue())
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF  # inside a.png, so its checksum in the archive no longer fits
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"a\.png: .*CRC"):
        assert load_dataset(path).images.unique().tolist() == [2]


def test_decompression_bomb_is_a_broken_file(tmp_path, monkeypatch):
    save(tmp_path, "bomb.png", solid("L", 1, size=(100, 100)))
    save(tmp_path, "good.png", solid("L", 2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(UserWarning, match=r"bomb\.png: .*decompression bomb"):
        assert load_dataset(tmp_path).images.unique().tolist() == [2]


def test_zip_member_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_fast.data.archive._MAX_MEMBER_BYTES", 500)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(1000))
        file = io.BytesIO()
        solid("L", 2).save(file, "PNG")
        archive.writestr("good.png", file.getvalue())
    with pytest.warns(UserWarning, match=r"bomb\.png: it unpacks to 1000 bytes"):
        assert load_dataset(tmp_path / "a.zip").skipped == ["bomb.png"]


# ---- arrays ----


def ramp(*shape):
    return np.arange(np.prod(shape), dtype=np.int64).astype(np.uint8).reshape(shape)


@pytest.mark.parametrize(
    "shape", [(5, 4, 6), (5, 4, 6, 1), (5, 4, 6, 3), (5, 4, 6, 4)], ids=["no channel", "grey", "rgb", "four"]
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("order", ["C", "F"], ids=["C order", "Fortran order"])
def test_arrays_are_read_as_stored(tmp_path, shape, suffix, order):
    images = np.asarray(ramp(*shape), order=order)
    path = tmp_path / f"a{suffix}"
    np.save(path, images) if suffix == ".npy" else np.savez(path, images=images)
    dataset = load_dataset(path)
    expected = torch.from_numpy(ramp(*shape).reshape(5, 4, 6, -1)).permute(0, 3, 1, 2)
    assert torch.equal(dataset.images, expected) and dataset.images.is_contiguous()
    assert dataset.labels is None and dataset.name == f"a{suffix}"
    dataset.images.zero_()
    assert torch.equal(load_dataset(path).images, expected)  # memory of its own, not the file's


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_npz_labels(tmp_path, dtype):
    path = tmp_path / "a.npz"
    np.savez(path, images=ramp(3, 4, 4), labels=np.array([2, 0, 2], dtype))
    dataset = load_dataset(path, classes=True)
    assert dataset.labels.tolist() == [2, 0, 2] and dataset.labels.dtype == torch.int64
    assert dataset.num_classes == 3 and dataset.label_names is None
    np.savez(path, images=ramp(3, 4, 4), labels=np.array([2, 0, 2], dtype), label_names=list("abcd"))
    assert load_dataset(path).label_names == ["a", "b", "c", "d"] and load_dataset(path).num_classes == 4


def test_arrays_change_size_and_channels_as_pictures_do(tmp_path):
    grey, colour = np.full((2, 8, 12), 50, np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    colour[..., 1] = 255
    np.save(tmp_path / "grey.npy", grey)
    np.save(tmp_path / "colour.npy", colour)
    wider = load_dataset(tmp_path / "grey.npy", image_size=4, channels=3).images
    assert torch.equal(load_dataset(tmp_path / "grey.npy", image_size=np.int64(4), channels=np.uint8(3)).images, wider)
    assert wider.shape == (2, 3, 4, 4) and wider.unique().tolist() == [50] and wider.is_contiguous()
    assert load_dataset(tmp_path / "grey.npy", channels=3).images.shape == (2, 3, 8, 12)
    assert load_dataset(tmp_path / "colour.npy", channels=1).images.unique().tolist() == [150]
    larger = load_dataset(tmp_path / "colour.npy", image_size=16).images
    assert larger[0, :, 0, 0].tolist() == [0, 255, 0] and larger.shape == (2, 3, 16, 16)
    four = np.stack([np.full((3, 6, 6), 10 * c, np.uint8) for c in range(4)], -1)
    np.save(tmp_path / "four.npy", four)
    assert load_dataset(tmp_path / "four.npy", image_size=3).images[0, :, 0, 0].tolist() == [0, 10, 20, 30]


def test_builtin_sets(tmp_path):
    assert BUILTIN == ("emoji32", "mnist5k")
    digits = load_dataset("mnist5k")
    assert digits.images.shape == (5000, 1, 28, 28) and digits.name == "mnist5k"
    assert digits.labels.bincount().tolist() == [500] * 10 and digits.num_classes == 10
    emoji = load_dataset("emoji32", image_size=16, channels=1)
    assert emoji.images.shape == (3786, 1, 16, 16)
    assert len(emoji.label_names) == 10 and "Food & Drink" in emoji.label_names


def test_batch_gathers_images_and_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=ramp(6, 2, 2), labels=np.arange(6))
    images, labels = load_dataset(tmp_path / "a.npz").batch(torch.tensor([4, 0, 4]))
    assert images[:, 0, 0, 0].tolist() == [16, 0, 16] and labels.tolist() == [4, 0, 4]
    np.save(tmp_path / "a.npy", ramp(6, 2, 2))
    assert load_dataset(tmp_path / "a.npy").batch(torch.tensor([1]))[1] is None
