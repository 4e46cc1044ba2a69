"""Pictures that a visitor sends, as files or as bytes.

They are hostile until they are read: by the package's own reader, which knows few formats and runs no programs, and
only after their bytes and pixels were counted.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_fast.commands.demo.limits import LARGEST_UPLOAD, MOST_PIXELS
from ddpm_fast.data.bounds import Unreadable, open_regular
from ddpm_fast.data.index import Entry
from ddpm_fast.data.pixels import fit
from ddpm_fast.data.raster import NAMES, open_picture
from ddpm_fast.data.reading import read_pictures, reason_of
from ddpm_fast.data.size import Size
from ddpm_fast.errors import InputError
from ddpm_fast.files.loaded_model import LoadedModel

_PAINTED = 128  # a pixel whose paint is at least half opaque is painted

Sent = str | os.PathLike | bytes  # the path of a file that was sent, or what it holds


def read_for(loaded: LoadedModel, sent: Sent | None, what: str) -> Tensor:
    """A picture, scaled and cut to what a model draws: uint8 [C, H, W].

    Args:
        loaded: The model.
        sent: The picture; None if there is none.
        what: What the page calls the picture.

    Raises:
        InputError: If there is none, it is too large or no picture, or the model does not draw 8-bit pictures.
    """
    channels, height, width = loaded.shape
    if loaded.value_range is not None or channels not in (1, 3):
        raise InputError(
            "this model does not draw grey or coloured pictures of 8 bits, and the page edits nothing else: use "
            "python -m ddpm_fast.sample --init-image with an .npz"
        )
    entry = checked(sent, what, Size(height, width))
    try:
        read = read_pictures([entry], Size(height, width), channels, strict=True, progress=None)
    except InputError as error:
        raise _unreadable(what, _reason(error)) from error
    return torch.from_numpy(read.images[0])


def read_mask(layers: Sequence[Sent], loaded: LoadedModel) -> Tensor:
    """What was painted, scaled and cut as read_for does it with the picture below: bool [H, W], True where a pixel is
    kept, which is where nothing was painted.

    Args:
        layers: What was painted on, pictures with opacity.
        loaded: The model.

    Raises:
        InputError: If nothing was painted, or everything, or a layer is no picture.
    """
    size = Size(*loaded.shape[1:])
    painted = np.zeros(size, bool)
    for sent in layers:
        entry = checked(sent, "What was painted", None)
        try:
            with entry.open() as file, open_picture(file, entry.name).image as layer:
                opacity = layer.convert("RGBA").getchannel("A")
                painted |= np.asarray(fit(opacity, size)) >= _PAINTED
        except Exception as error:  # on broken bytes, decoders raise nearly anything
            raise InputError(f"what was painted cannot be read ({reason_of(error)}): paint it again") from error
    if not painted.any():
        raise InputError("nothing is painted: paint over the part of the picture that is to be drawn anew")
    if painted.all():
        raise InputError(
            "all of the picture is painted over, so that nothing of it is kept: leave a part of it, or use Sample"
        )
    return torch.from_numpy(~painted)


def checked(sent: Sent | None, what: str, size: Size | None, most_bytes: int = LARGEST_UPLOAD) -> Entry:
    """A file that was sent, once its bytes and pixels were counted. Nothing of it is decoded yet.

    Args:
        sent: The picture; None if there is none.
        what: What the page calls it.
        size: What it will be scaled to, or None.
        most_bytes: How many bytes it may have.

    Raises:
        InputError: If there is none, or it is too large, or no picture.
    """
    if sent is None:
        raise InputError(f"{what} is missing: give one, or take an example")
    entry = Entry(what, partial(_opened, sent))  # the name of the file is its sender's, and its folder ours
    try:
        with entry.open() as file:
            found = file.seek(0, os.SEEK_END)
            file.seek(0)
            if found > most_bytes:
                raise InputError(
                    f"{what} has {found / 2**20:.0f} MiB; expected at most {most_bytes >> 20}: scale it down first"
                )
            opened = open_picture(file, "", size)
            width, height = opened.image.size
            opened.image.close()
    except InputError:
        raise
    except Exception as error:  # on broken bytes, decoders raise nearly anything
        raise _unreadable(what, reason_of(error)) from error
    if width * height > MOST_PIXELS:
        millions = MOST_PIXELS // 10**6
        raise InputError(
            f"{what} has {width}\u00d7{height} pixels; expected at most {millions} million: scale it down first"
        )
    return entry


def _opened(sent: Sent) -> BinaryIO:
    return io.BytesIO(sent) if isinstance(sent, bytes) else open_regular(sent)


def _unreadable(what: str, reason: str) -> InputError:
    advice = "" if NAMES in reason else f"; expected one of the formats {NAMES}"
    return InputError(f"{what} cannot be read: {reason}{advice}")


def _reason(error: InputError) -> str:
    return reason_of(error.__cause__) if isinstance(error.__cause__, Unreadable) else "it is damaged"


def enlarged(image: Tensor, side: int) -> Image.Image:
    """A small picture uint8 [C, H, W], enlarged by a whole factor to about so many pixels, so that one can paint on
    it."""
    channels, height, width = image.shape
    factor = max(1, side // max(height, width))
    picture = Image.fromarray(image[0].numpy() if channels == 1 else image.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
