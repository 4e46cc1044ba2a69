"""The picture formats that are read, and opening a file as one of them and nothing else.

Pillow alone would try every format that it knows, whatever the file's name. EPS is among them, for which it starts
Ghostscript on the file.
"""

import os
import struct
from functools import cache
from typing import BinaryIO, NamedTuple

import PIL
from PIL import Image, features

from ddpm_fast.data.bounds import Unreadable
from ddpm_fast.data.pixels import lies_on_its_side
from ddpm_fast.data.size import Size
from ddpm_fast.errors import InputError

MAX_PIXELS = "DDPM_FAST_MAX_PIXELS"  # the environment variable that raises the limit


class Raster(NamedTuple):
    """One format of pictures.

    Attributes:
        name: What people call it.
        plugin: What Pillow calls it.
        suffixes: How the names of its files end, in lower case.
        feature: The part of Pillow that decodes it, if Pillow can be built without.
    """

    name: str
    plugin: str
    suffixes: tuple[str, ...]
    feature: str | None = None


RASTERS = (
    Raster("PNG", "PNG", (".png", ".apng"), "zlib"),
    Raster("JPEG", "JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "jpg"),
    Raster("GIF", "GIF", (".gif",)),
    Raster("BMP", "BMP", (".bmp",)),
    Raster("TIFF", "TIFF", (".tif", ".tiff")),
    Raster("WebP", "WEBP", (".webp",), "webp"),
    Raster("AVIF", "AVIF", (".avif", ".avifs"), "avif"),
    Raster("JPEG 2000", "JPEG2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "jpg_2000"),
    Raster("ICO", "ICO", (".ico",)),
    Raster("PPM", "PPM", (".ppm", ".pgm", ".pbm", ".pnm")),
)
# The content of a TGA file does not say that it is one. It is the last resort, for files of these names alone.
_TGA = Raster("TGA", "TGA", (".tga", ".icb", ".vda", ".vst"))

SUFFIXES = tuple(suffix for raster in (*RASTERS, _TGA) for suffix in raster.suffixes)
NAMES = ", ".join(raster.name for raster in (*RASTERS, _TGA))


@cache
def lacking() -> tuple[Raster, ...]:
    """The formats that this build of Pillow cannot read."""
    Image.init()  # fills Image.OPEN
    return tuple(
        raster
        for raster in RASTERS
        if raster.plugin not in Image.OPEN or (raster.feature is not None and not features.check(raster.feature))
    )


def allowed_pixels() -> int | None:
    """The largest number of pixels that is decoded for one picture; None for any.

    It is twice Pillow's MAX_IMAGE_PIXELS, where Pillow refuses a picture as a decompression bomb. The environment
    variable DDPM_FAST_MAX_PIXELS sets both, so that Pillow's own checks inside a file follow.

    Raises:
        InputError: If the variable is not a number.
    """
    text = os.environ.get(MAX_PIXELS)
    if text:
        if not (text.isascii() and text.isdigit() and int(text)):
            raise InputError(f"the environment variable {MAX_PIXELS} is {text!r}; expected a number of pixels")
        Image.MAX_IMAGE_PIXELS = (int(text) + 1) // 2
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


class Opened(NamedTuple):
    """A picture whose pixels are not decoded yet.

    Attributes:
        image: The picture.
        pixels: How many pixels will be decoded. A JPEG that is scaled while it is decoded has fewer than its size says.
    """

    image: Image.Image
    pixels: int


def looks_like_picture(prefix: bytes) -> bool:
    """Whether a file that starts with these 16 bytes is one of the formats. A TGA file never looks like one."""
    return bool(_candidates(prefix))


def open_picture(file: BinaryIO, name: str, size: Size | None = None) -> Opened:
    """Open a picture by its content, as one of the formats above.

    Args:
        file: The file, at its start.
        name: The name of the file. Only its suffix is looked at, to know TGA files.
        size: What the picture will be scaled to. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, so that 12
            megapixels take 15 ms instead of 171. Twice the wanted size leaves enough detail for the filter.

    Raises:
        Unreadable: If the content is none of the formats, or has too many pixels.
    """
    image = _identify(file, name)
    width, height = image.size
    if size is not None:
        wide, high = size.width, size.height
        if wide != high and lies_on_its_side(image):
            wide, high = high, wide
        image.draft(None, (2 * wide, 2 * high))
        if not image.info.get("progressive"):  # such a JPEG is unpacked in full before it is scaled
            width, height = image.size
    limit = allowed_pixels()
    if limit is not None and width * height > limit:
        raise Unreadable(
            f"it has {width}x{height} = {width * height} pixels to decode, and {limit} are allowed, as a guard against "
            f"decompression bombs: scale it down, or raise the limit with the environment variable {MAX_PIXELS}"
        )
    return Opened(image, width * height)


def _candidates(prefix: bytes) -> list[Raster]:
    """The formats whose files start so."""
    lacking()  # has filled Image.OPEN
    found = []
    for raster in RASTERS:
        _, accept = Image.OPEN.get(raster.plugin, (None, None))
        if accept is not None and len(prefix) >= 2 and accept(prefix):
            found.append(raster)
    return found


def _identify(file: BinaryIO, name: str) -> Image.Image:
    """What Image.open(file, formats=...) does, without Pillow's warning from 89 megapixels on, which names no file."""
    candidates = _candidates(file.read(16))
    reason = f"its content is none of the formats {NAMES}"
    # A format that Pillow knows nothing of is known by the suffix.
    for raster in candidates + [raster for raster in lacking() if name.lower().endswith(raster.suffixes)]:
        if raster in lacking():
            reason = (
                f"this Pillow ({PIL.__version__}) cannot read {raster.name}: install another, pip install -U pillow"
            )
    if name.lower().endswith(_TGA.suffixes):
        candidates.append(_TGA)
    for raster in candidates:
        if raster in lacking():
            continue
        factory, _ = Image.OPEN[raster.plugin]
        file.seek(0)
        try:
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # as Pillow's plugins say "not mine"
            reason = f"it is a damaged {raster.name} file ({error})"
    raise Unreadable(reason)
