"""Images of sizes that are no squares: scaled to cover the size, the middle or a random part cut out of them.

The pictures are ramps, whose values say from where a pixel was taken: Lanczos' filter keeps a ramp as it is but for the
edges.
"""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.commands import preparing
from ddpm_fast.data import load_dataset, open_dataset
from ddpm_fast.data.pixels import fit
from ddpm_fast.data.size import Size
from ddpm_fast.data.source import Window
from ddpm_fast.errors import InputError


def ramps(height, width):
    """uint8 [height, width, 3]: 2 for each column, 2 for each row, and noise of 0 and 255."""
    y, x = np.mgrid[0:height, 0:width]
    noise = 255 * np.random.default_rng(0).integers(0, 2, (height, width))
    return np.stack([2 * x, 2 * y, noise], -1).astype(np.uint8)


def places(fitted):
    """From which columns and rows of the ramps the pixels were taken, but for those at the edges."""
    image = np.asarray(fitted).astype(float)[2:-2, 2:-2] / 2
    assert image[..., 0].std(0).max() <= 0.3 and image[..., 1].std(1).max() <= 0.3
    return image[..., 0].mean(0), image[..., 1].mean(1)


# How wide and high a picture is, what is made of it, and the part of the picture that this is: left, top and the pixels
# of the picture to one of the image.
PARTS = [
    pytest.param((120, 60), (32, 16), (45, 0, 60 / 32), id="an upright part of a wide picture"),
    pytest.param((60, 120), (16, 32), (0, 45, 60 / 32), id="a wide part of an upright picture"),
    pytest.param((120, 90), (10, 40), (0, 30, 3), id="wider than the picture"),
    pytest.param((90, 100), (40, 12), (30, 0, 2.5), id="more upright than the picture"),
    pytest.param((100, 50), (16, 32), (0, 0, 50 / 16), id="of the picture's proportions"),
    pytest.param((20, 40), (24, 40), (0, 14, 0.5), id="enlarged"),
]


@pytest.mark.parametrize("picture, size, part", PARTS)
def test_the_middle_of_the_picture_covers_the_size(picture, size, part):
    width, height = picture
    fitted = fit(Image.fromarray(ramps(height, width)), Size(*size))
    assert fitted.size == (size[1], size[0])
    for found, first, count in zip(places(fitted), part[:2], (size[1], size[0]), strict=True):
        expected = first + (np.arange(2, count - 2) + 0.5) * part[2] - 0.5
        assert np.abs(found - expected).max() <= 0.5


def test_a_picture_that_need_not_be_scaled_is_cut_at_whole_pixels():
    pixels = ramps(7, 12)
    for size, cut in (((7, 5), np.s_[:, 3:8]), ((4, 12), np.s_[1:5]), ((7, 12), np.s_[:])):
        assert np.array_equal(np.asarray(fit(Image.fromarray(pixels), Size(*size))), pixels[cut])


@pytest.mark.parametrize("size", [(32, 16), (12, 40), (30, 30)], ids=["upright", "wide", "square"])
def test_a_random_cut_is_a_part_of_the_size_and_reaches_every_edge(size):
    """Of a picture that covers the size exactly: a cut has at least 0.8 of one of its sides, and may lie anywhere."""
    height, width = 4 * size[0], 3 * size[1] + size[1]
    picture = Image.fromarray(ramps(height, width)) if max(height, width) < 128 else None
    if picture is None:
        height, width = 2 * size[0], 2 * size[1]
        picture = Image.fromarray(ramps(height, width))
    generator = np.random.default_rng(1)
    scales, ends = [], []
    for zoom, left, top in [*generator.random((60, 3)), (0, 0, 0), (0.999, 0, 0), (0.999, 0.999, 0.999)]:
        fitted = fit(picture, Size(*size), Window(zoom, left, top))
        assert fitted.size == (size[1], size[0])
        columns, rows = places(fitted)
        steps = np.polyfit(np.arange(len(columns)), columns, 1)[0], np.polyfit(np.arange(len(rows)), rows, 1)[0]
        assert abs(steps[0] - steps[1]) < 0.03 * steps[0]  # the proportions of the picture are kept
        scales.append(steps[1] * size[0] / height)
        ends.append((rows[0], rows[-1], columns[0], columns[-1]))
    assert 0.78 <= min(scales) < 0.85 and 0.97 < max(scales) <= 1.02
    low, high = np.min(ends, 0), np.max(ends, 0)
    scale = height / size[0]
    assert low[0] < 3 * scale and low[2] < 3 * scale
    assert high[1] > height - 4 * scale and high[3] > width - 4 * scale


def test_a_random_cut_of_a_picture_of_its_proportions_reads_at_least_four_fifths():
    sizes = {fit(Image.new("L", (64, 128)), Size(20, 10), Window(z, 0, 0)).size for z in (0, 0.5, 0.999)}
    assert sizes == {(10, 20)}


# ---- every kind of data set ----


def png(pixels):
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def sources(place, pictures):
    """The same pictures in every form: name and path."""
    contents = {f"{i}.png": png(pixels) for i, pixels in enumerate(pictures)}
    (place / "folder").mkdir()
    for name, data in contents.items():
        (place / "folder" / name).write_bytes(data)
    with zipfile.ZipFile(place / "set.zip", "w") as archive, tarfile.open(place / "set.tar", "w") as tar:
        for name, data in contents.items():
            archive.writestr(name, data)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    np.savez(place / "set.npz", images=np.stack(pictures))
    (place / "prepared").mkdir()
    dataset = open_dataset(place / "folder", in_memory=False)
    preparing.write_images(dataset, place / "prepared", preparing.begin(dataset, place / "prepared"), lambda _: None)
    return [place / name for name in ("folder", "set.zip", "set.tar", "set.npz", "prepared")]


@pytest.mark.parametrize("size", [(8, 16), (12, 6), (24, 16)], ids=["wide", "upright", "larger"])
def test_all_kinds_of_data_sets_give_the_same_images(tmp_path, size):
    pictures = [np.roll(ramps(14, 20), i, 0) for i in range(3)]
    expected = np.stack([np.asarray(fit(Image.fromarray(one), Size(*size))) for one in pictures])
    for source in sources(tmp_path, pictures):
        for in_memory in (True, False):
            dataset = open_dataset(str(source), size, in_memory=in_memory)
            assert dataset.shape == (3, *size)
            images, _ = dataset.batch(torch.arange(3))
            assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected), source.name
        own = open_dataset(str(source)).batch(torch.arange(3))[0]  # of their own size, which is no square
        assert np.array_equal(own.permute(0, 2, 3, 1).numpy(), np.stack(pictures))


def test_prepared_images_of_the_size_are_not_cut_again_and_others_are(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(ramps(20, 12)))
    dataset = open_dataset(tmp_path / "pictures", (10, 6), in_memory=False)
    index = preparing.begin(dataset, tmp_path / "out")
    preparing.write_images(dataset, tmp_path / "out", index, lambda _: None)
    for size, crops in ((None, False), ((10, 6), False), ((5, 3), True), (6, True)):
        assert open_dataset(tmp_path / "out", size, in_memory=False).source.crops is crops


@pytest.mark.parametrize("orientation", [1, 6], ids=["upright", "on its side"])
@pytest.mark.parametrize("size", [(32, 128), (128, 16)], ids=["wide", "upright"])
def test_a_jpeg_is_decoded_at_a_scale_that_leaves_its_detail(tmp_path, orientation, size):
    """The scale depends on which side is which, after the picture was turned."""
    height, width = 8 * size[0], 2 * size[1]
    y, x = np.mgrid[0:height, 0:width]
    pixels = (127 + 100 * np.sin(x * 1.1) * np.sin(y * 1.3)).astype(np.uint8)  # waves of five to six pixels
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(pixels if orientation == 1 else np.rot90(pixels))
    stored.save(tmp_path / "a.jpg", quality=97, exif=exif)
    found = load_dataset(tmp_path, size).images[0, 0].int()
    exact = np.asarray(fit(Image.fromarray(pixels), Size(*size))).astype(int)
    assert exact.std() > 15
    assert np.abs(found.numpy() - exact).mean() < 3


def test_floats_have_one_size_and_it_may_be_no_square(tmp_path):
    np.save(tmp_path / "a.npy", np.linspace(0, 1, 2 * 8 * 4, dtype=np.float32).reshape(2, 8, 4))
    assert load_dataset(tmp_path / "a.npy").shape == load_dataset(tmp_path / "a.npy", (8, 4)).shape == (1, 8, 4)
    with pytest.raises(InputError, match=r"floats of 1x8x4, and 1x4x8 was asked for"):
        load_dataset(tmp_path / "a.npy", (4, 8))


@pytest.mark.parametrize(
    "size, words",
    [
        ((8, 0), r"image_size\[1\] is 0; expected an integer of at least 1"),
        ((-8, 8), r"image_size\[0\] is -8"),
        ((8, 8, 8), r"expected a side such as 64, or \(height, width\) as in \(64, 32\)"),
        ((), "expected a side such as 64"),
        ("64x32", "image_size is '64x32', a str; expected an integer"),
        ((8, True), r"image_size\[1\] is True, a bool"),
    ],
)
def test_what_is_no_size_is_refused(size, words):
    with pytest.raises(InputError, match=words):
        load_dataset("mnist5k", size)


def test_a_size_is_said_with_its_height_first():
    assert str(Size.of((64, 32))) == "64x32" and Size.of(8) == Size.of([8, 8]) == (8, 8)
