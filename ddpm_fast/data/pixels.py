"""Turns one picture into uint8 pixels (upright, opaque, 8 bits, grey or RGB, cut to a size), and many in parallel.

Transparent pictures are drawn on white before they are resized. Otherwise the hidden colours of transparent pixels
would bleed into the edges.
"""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from ddpm_fast.data.bounds import Unreadable
from ddpm_fast.data.size import Size
from ddpm_fast.data.source import Window

_BLOCK = 16  # pictures per task, because a future for each of a million files would take a gigabyte
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_ROUNDING = 1e-9  # so that a quotient that is a whole number but for its rounding counts as one
_ORIENTATION = 0x0112  # the EXIF tag; pictures with values 5 to 8 lie on their side
_WIDE_COLOUR = re.compile(r"(RGB|RGBA|RGBX|RGBa|LA|CMYK);16[BLN]")  # Pillow's name of how the pixels are stored
_R = TypeVar("_R")


def is_grey(image: Image.Image) -> bool:
    """Whether the picture's mode holds no colour. A palette counts as colour, whatever its entries are."""
    return image.mode in _GREY_MODES


def lies_on_its_side(image: Image.Image) -> bool:
    """Whether the EXIF orientation exchanges width and height. For most formats this decodes no pixels."""
    return image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the EXIF orientation is applied."""
    width, height = image.size
    return (height, width) if lies_on_its_side(image) else (width, height)


class Pixels(NamedTuple):
    """The pixels of a picture.

    Attributes:
        values: uint8 [channels, H, W].
        peak: If the picture has 16 bits a value, the largest one (or, of colours, at most 255 above it); else None.
    """

    values: np.ndarray
    peak: int | None


def _is_wide_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _is_wide_colour(image: Image.Image) -> bool:
    """Whether the picture has 16 bits a colour, of which Pillow keeps the upper 8. Not after it was decoded."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return image.format in ("PNG", "TIFF") and isinstance(raw, str) and _WIDE_COLOUR.fullmatch(raw) is not None


def _opaque_8bit(image: Image.Image) -> Image.Image:
    """The picture with 8 bits per channel and no transparency."""
    if _is_wide_grey(image):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))  # round(x / 257): 65535 -> 255
    if image.mode in ("I", "F"):
        raise Unreadable(f"its mode {image.mode} has no known range of values: save it with 8 or 16 bits a value")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image


def fit(image: Image.Image, size: Size, window: Window | None = None) -> Image.Image:
    """Scale the picture so that it just covers the size (Lanczos, antialiased) and keep the middle, in one pass.

    Args:
        image: The picture.
        size: That of the result.
        window: Another cut than the middle: the picture is scaled to between the least that covers the size and 1/0.8
            of it, and the cut lies anywhere in that picture, at whole pixels of it.
    """
    width, height = image.size
    # The side that is the shorter one, by the proportions of the result: it is cut only by a window.
    if width * size.height <= height * size.width:
        shorter, side = width, size.width
    else:
        shorter, side = height, size.height
    if window is None:
        # A product of integers that is divided once: for a square, exactly the shorter side.
        cut_width, cut_height = shorter * size.width / side, shorter * size.height / side
        left, top = (width - cut_width) / 2, (height - cut_height) / 2
        if shorter == side:  # there is nothing to scale, and a cut at half a pixel would blur
            left, top = int(left), int(top)
    else:
        # pixels to one of the scaled picture
        scale = shorter / (side + int(window.zoom * (largest_side(side) - side + 1)))
        left = scale * int(window.left * (int(width / scale + _ROUNDING) - size.width + 1))
        top = scale * int(window.top * (int(height / scale + _ROUNDING) - size.height + 1))
        cut_width, cut_height = size.width * scale, size.height * scale
    box = (left, top, min(left + cut_width, width), min(top + cut_height, height))
    return image.resize((size.width, size.height), Image.Resampling.LANCZOS, box)


def largest_side(side: int) -> int:
    """The longest that a random cut, one of whose sides is this, scales that side of a picture to."""
    return -(-5 * side // 4)  # ceil(side / 0.8)


def decode(image: Image.Image, size: Size | None, channels: int, window: Window | None = None) -> Pixels:
    """The pixels of an opened picture. Of an animation, this is the first frame.

    Args:
        image: The picture.
        size: That of the result; None keeps the picture's own.
        channels: 1 or 3.
        window: Where to cut it, as for `fit`; None for the middle.

    Raises:
        Unreadable: For 32-bit modes. For broken data, Pillow raises its own exceptions.
    """
    form = image.format
    is_wide_colour = _is_wide_colour(image)
    upright = ImageOps.exif_transpose(image)
    upright.format = form  # a transposed copy does not keep it
    peak = None
    if _is_wide_grey(upright):
        peak = int(np.asarray(upright).max())
    elif is_wide_colour:
        extrema = upright.getextrema()
        peak = 256 * max(int(high) for _, high in extrema[:3]) + 255  # type: ignore[misc]
    flat = _opaque_8bit(upright).convert("L" if channels == 1 else "RGB")
    if size is not None:
        flat = fit(flat, size, window)
    pixels = np.asarray(flat)
    return Pixels(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), peak)


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parallel(
    job: Callable[[int], _R], total: int, progress: Callable[[int, int], object] | None = None
) -> list[_R]:
    """[job(0), ..., job(total-1)], computed by a pool of threads, which helps because Pillow releases the GIL.

    Args:
        job: What to run for each index.
        total: How many indices there are.
        progress: Called as progress(done, total) from the calling thread.

    Raises:
        Exception: The first one in the order of the indices. It stops the remaining jobs.
    """

    def run_block(block: range) -> list[_R]:
        return [job(i) for i in block]

    results: list[_R] = []
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        blocks = [range(i, min(i + _BLOCK, total)) for i in range(0, total, _BLOCK)]
        for done in pool.map(run_block, blocks):
            results += done
            if progress is not None:
                progress(len(results), total)
    finally:
        pool.shutdown(cancel_futures=True)
    return results
