"""Pictures that are sent to the page: scaled and cut as the package does it, and refused if they are hostile."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.commands.demo import uploads
from ddpm_fast.commands.demo.limits import LARGEST_UPLOAD
from ddpm_fast.commands.demo.uploads import enlarged, read_for, read_mask
from ddpm_fast.data import load_dataset
from ddpm_fast.errors import InputError
from ddpm_fast.values import ValueRange


@pytest.fixture
def loaded(models):
    return models.get(models.names[0])


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_a_picture_is_scaled_and_cut_as_the_images_of_a_training(loaded, tmp_path):
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data" / "a.png")
    expected = load_dataset(tmp_path / "data", 8).images[0]
    read = read_for(loaded, str(tmp_path / "data" / "a.png"), "the picture")
    assert torch.equal(read, expected)
    assert torch.equal(read_for(loaded, (tmp_path / "data" / "a.png").read_bytes(), "the picture"), expected)


def test_grey_and_transparent_pictures_suit_a_model_of_colours(loaded):
    for mode in ("L", "LA", "RGBA", "P", "1"):
        assert read_for(loaded, png(Image.new(mode, (9, 9))), "the picture").shape == (3, 8, 8)


def bomb(width, height):
    """A PNG of 100 bytes that says it has so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch started) (w) file\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
HOSTILE = {
    "too many pixels": bomb(7000, 7000),
    "a decompression bomb": bomb(60000, 60000),
    "a program": POSTSCRIPT,
    "a script": SVG,
    "nothing": b"",
    "half a picture": png(Image.effect_noise((64, 64), 50))[:600],
    "text": b"<b>hello</b>",
}


@pytest.mark.parametrize("sent", HOSTILE.values(), ids=list(HOSTILE))
def test_what_is_hostile_is_refused_without_naming_a_path(loaded, sent, tmp_path):
    path = tmp_path / "upload.png"
    path.write_bytes(sent)
    for one in (sent, str(path)):
        with pytest.raises(InputError, match="the picture") as caught:
            read_for(loaded, one, "the picture")
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(InputError, match="painted"):
        read_mask([sent], loaded)


def test_a_file_larger_than_allowed_is_not_decoded(loaded, tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(png(Image.new("RGB", (9, 9))))
    with open(path, "ab") as file:
        file.truncate(LARGEST_UPLOAD + 1)
    monkeypatch.setattr(uploads, "open_picture", None)
    with pytest.raises(InputError, match="16 MiB; expected at most 16"):
        read_for(loaded, str(path), "the picture")


def test_what_is_no_file_is_refused(loaded, tmp_path):
    for sent in (None, str(tmp_path / "nothing.png"), str(tmp_path), "/dev/zero"):
        with pytest.raises(InputError, match="the picture"):
            read_for(loaded, sent, "the picture")


def test_models_of_floats_are_not_given_pictures(loaded, monkeypatch):
    monkeypatch.setattr(loaded, "value_range", ValueRange((0.0,) * 3, (1.0,) * 3, "NCHW"))
    with pytest.raises(InputError, match=r"\.npz"):
        read_for(loaded, png(Image.new("RGB", (8, 8))), "the picture")


def painted(width, height, box):
    layer = Image.new("RGBA", (width, height))
    layer.paste((230, 0, 126, 255), box)
    return png(layer)


def test_what_is_painted_is_drawn_anew_and_the_rest_is_kept(loaded):
    expected = torch.ones(8, 8, dtype=torch.bool)
    expected[:, :4] = False
    assert torch.equal(read_mask([painted(80, 80, (0, 0, 40, 80))], loaded), expected)
    # A wide picture is cut to its middle: 40 pixels on each side are not seen.
    assert torch.equal(read_mask([painted(160, 80, (0, 0, 80, 80))], loaded), expected)
    both = [painted(80, 80, (0, 0, 20, 80)), painted(80, 80, (20, 0, 40, 80))]
    assert torch.equal(read_mask(both, loaded), expected)


def test_nothing_painted_and_all_painted_are_refused(loaded):
    for layers in ([], [painted(80, 80, (0, 0, 0, 0))]):
        with pytest.raises(InputError, match="nothing is painted"):
            read_mask(layers, loaded)
    with pytest.raises(InputError, match="all of the picture"):
        read_mask([painted(80, 80, (0, 0, 80, 80))], loaded)


def test_a_small_picture_is_enlarged_by_a_whole_factor():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    large = np.asarray(enlarged(image, 10))
    assert large.shape == (6, 8) and (large == np.kron(image[0].numpy(), np.ones((2, 2)))).all()
