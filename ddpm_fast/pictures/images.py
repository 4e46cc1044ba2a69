"""Samples as pictures: tensors in [-1, 1] become 8-bit images, grids, folders of PNGs, .npz files and GIFs.

Each file is complete or absent (files/atomic.py).
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable, check_writable_folder
from ddpm_fast.values import ValueRange

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_uint8(x: Tensor) -> np.ndarray:
    """Turn floats [N, C, H, W] in [-1, 1], on any device and in any memory format, into uint8 [N, H, W, C].

    The result is round((x + 1) * 127.5), computed in float32 or wider and limited to 0..255. 8-bit images that were
    scaled to [-1, 1] come back unchanged.

    Raises:
        InputError: For another shape or dtype, and for NaN.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"the samples are {x.dtype} {list(x.shape)}; expected floats [N, C, H, W] in [-1, 1]")
    bad = x.isnan().flatten(1).any(dim=1) if x.numel() else x.new_zeros(0)
    if bad.any():
        raise InputError(
            f"{int(bad.sum())} of {len(x)} samples have NaN, the first at position {int(bad.nonzero()[0])}: "
            "the model has diverged, or its dtype overflows; sample in float32 or from an earlier checkpoint"
        )
    x = x.detach()
    x = x if x.element_size() >= 4 else x.float()
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_grid(
    images: np.ndarray, columns: int | None = None, pad: int = 2, background: int = 255, scale: int = 1
) -> np.ndarray:
    """Arrange images in one picture, row by row.

    Args:
        images: uint8 [N, H, W, C].
        columns: The images in a row; None makes the grid about square.
        pad: Pixels between and around the images.
        background: The value of the padding and of empty cells, 0..255.
        scale: Each pixel of an image becomes scale x scale pixels.

    Returns:
        uint8 [rows*(H*scale+pad)+pad, columns*(W*scale+pad)+pad, C].

    Raises:
        InputError: For no images or an impossible layout.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
        raise InputError(f"the images are {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, C], N > 0")
    _check_layout(columns, pad, background, scale)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else min(columns, n)
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, height + pad, width + pad, channels), background, np.uint8)
    cells[:n, pad:, pad:] = images
    cells = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    sheet = cells.reshape(rows * (height + pad), columns * (width + pad), channels)
    return np.pad(sheet, ((0, pad), (0, pad), (0, 0)), constant_values=background)


def save_grid(
    path: str | os.PathLike,
    x: Tensor,
    columns: int | None = None,
    pad: int = 2,
    background: int = 255,
    scale: int = 1,
) -> None:
    """Write samples [N, C, H, W] in [-1, 1] as one PNG, laid out by `make_grid`.

    C is 1, 3 or 4 (red, green, blue, opacity).

    Raises:
        InputError: For another number of channels, and where `to_uint8`, `make_grid` and `check_writable` do.
    """
    _write_png(path, make_grid(_pictures(x), columns, pad, background, scale))


def sample_name(sample_id: int, label: int | None = None, label_names: Sequence[str] | None = None) -> str:
    """The name of a sample's picture: `000012.png`, `000012_label3.png`, or `000012_label3_cat.png` if class 3 has a
    name. What a file system might not take in the class's name becomes `_`."""
    if label is None:
        return f"{sample_id:06d}.png"
    name = label_names[label] if label_names and label < len(label_names) else str(label)
    name = "" if name == str(label) else re.sub(r"[^\w-]+", "_", name)[:40].strip("_")
    return f"{sample_id:06d}_label{label}{'_' if name else ''}{name}.png"


def save_images(
    folder: str | os.PathLike,
    x: Tensor,
    first_index: int = 0,
    labels: Tensor | Sequence[int] | None = None,
    label_names: Sequence[str] | None = None,
    keep: bool = False,
) -> list[Path]:
    """Write samples as one PNG each. sample_name names them; the sample id of sample i is first_index + i.

    Args:
        folder: Where to write them.
        x: [N, C, H, W] in [-1, 1]; C is 1, 3 or 4.
        first_index: The sample id of the first sample.
        labels: N integers, or None.
        label_names: The names of the classes, or None.
        keep: Whether files that exist stay as they are.

    Returns:
        The paths of the pictures.

    Raises:
        InputError: For another number of channels, labels that are not N integers, a negative first_index, and a folder
            that cannot be written.
    """
    pictures = _pictures(x)
    classes = _labels(labels, len(pictures))
    if first_index < 0:
        raise InputError(f"first_index is {first_index}; expected a sample id, 0 or more")
    folder = check_writable_folder(folder)
    chosen = [None] * len(pictures) if classes is None else classes.tolist()
    paths = [folder / sample_name(first_index + i, label, label_names) for i, label in enumerate(chosen)]
    for path, picture in zip(paths, pictures, strict=True):
        if not (keep and path.exists()):
            _write_png(path, picture)
    return paths


def save_npz(
    path: str | os.PathLike,
    x: Tensor,
    labels: Tensor | Sequence[int] | None = None,
    label_names: Sequence[str] | None = None,
    durable: bool = False,
    value_range: ValueRange | None = None,
) -> None:
    """Write samples as an .npz file that can be evaluated or trained on.

    It holds `images`, uint8 [N, H, W, C], and if there are any `labels`, int64 [N], and `label_names`, strings. The
    images of a model of float data are float32, in the units and the layout of that data.

    Args:
        path: The file to write.
        x: [N, C, H, W] in [-1, 1], with any number of channels.
        labels: N integers, or None.
        label_names: The names of the classes, or None.
        durable: Whether to wait until it is on the disk.
        value_range: What [-1, 1] stands for (`LoadedModel.value_range`), or None: 8-bit images.

    Raises:
        InputError: For labels that are not N integers, and where `to_uint8` and `check_writable` do.
    """
    images = to_uint8(x) if value_range is None else value_range.to_array(x)
    classes = _labels(labels, len(x))
    arrays: dict[str, Any] = {"images": images}
    if classes is not None:
        arrays["labels"] = classes
    if label_names:
        arrays["label_names"] = np.array(label_names, dtype=np.str_)
    with atomic_path(path, durable) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def save_gif(
    path: str | os.PathLike,
    frames: Sequence[Tensor],
    columns: int | None = None,
    pad: int = 2,
    background: int = 255,
    scale: int = 1,
    frame_ms: int = 50,
    hold_ms: int = 2000,
) -> None:
    """Write samples at successive steps as a GIF of grids that repeats for ever.

    GIF has 256 colours per frame and no partial opacity: pictures of four channels are drawn over the background.

    Args:
        path: The file to write.
        frames: One tensor [N, C, H, W] in [-1, 1] for each frame.
        columns: As in `make_grid`, like the next three.
        pad: Pixels between and around the images.
        background: The value of the padding and of empty cells.
        scale: Each pixel of an image becomes scale x scale pixels.
        frame_ms: How long each frame is shown, in milliseconds.
        hold_ms: How long the last frame is shown, in milliseconds.

    Raises:
        InputError: For no frames, for frames of different shapes, and where `save_grid` does.
    """
    shapes = {tuple(x.shape) for x in frames}
    if len(shapes) != 1:
        listed = ", ".join(str(list(shape)) for shape in sorted(shapes)) or "none"
        raise InputError(f"the frames have shapes: {listed}; expected one or more frames of one shape")
    if min(frame_ms, hold_ms) < 10:
        raise InputError(
            f"frame_ms is {frame_ms} and hold_ms {hold_ms}; expected at least 10, because a GIF counts time in 10 ms"
        )
    sheets = [_image(make_grid(_pictures(x), columns, pad, background, scale)) for x in frames]
    if sheets[0].mode == "RGBA":
        behind = Image.new("RGBA", sheets[0].size, (background, background, background, 255))
        sheets = [Image.alpha_composite(behind, sheet).convert("RGB") for sheet in sheets]
    durations = [frame_ms] * (len(sheets) - 1) + [hold_ms]
    with atomic_path(path, durable=False) as temporary:
        sheets[0].save(temporary, format="GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0)


def check_output(out: str | os.PathLike, channels: int | None = None, value_range: ValueRange | None = None) -> None:
    """Check that `save_samples(out, ...)` can write there, before the sampling. Creates the parent folders.

    Args:
        out: As in `save_samples`.
        channels: The number of channels of the samples, if it is known. A picture has 1, 3 or 4.
        value_range: As in `save_samples`. Of float data, only grids of 1 or 3 channels are pictures.

    Raises:
        InputError: If it cannot.
    """
    kind = output_kind(out)
    if kind != ".npz" and value_range is not None and (kind == "folder" or value_range.channels not in (1, 3)):
        raise InputError(
            f"this model was trained on floats of {value_range.channels} channels, whose values pictures cannot keep: "
            "write them as .npz, or as a folder with --format npz (a .png can show 1 or 3 channels, black and white "
            "being the ends of the range)"
        )
    if kind != ".npz" and channels is not None:
        _check_channels(channels)
    if kind == "folder":
        check_writable_folder(out)
    else:
        check_writable(out)


def save_samples(
    out: str | os.PathLike,
    x: Tensor,
    labels: Tensor | Sequence[int] | None = None,
    first_index: int = 0,
    columns: int | None = None,
    scale: int = 1,
    value_range: ValueRange | None = None,
) -> None:
    """Write samples in the form that the name `out` asks for.

    A name ending in .png is a grid, and one in .npz an array with the labels. A name without a suffix, an existing
    folder or a name ending in "/" is a folder of PNGs, named by sample id and label.

    Args:
        out: The file or folder to write.
        x: [N, C, H, W] in [-1, 1].
        labels: N integers, or None.
        first_index: The sample id of the first sample, for a folder.
        columns: Images in a row, for a grid.
        scale: As in `make_grid`, for a grid.
        value_range: As in `save_npz`, for an .npz.

    Raises:
        InputError: For another suffix, and where `save_grid`, `save_npz` and `save_images` do.
    """
    kind = output_kind(out)
    if kind == "folder":
        save_images(out, x, first_index, labels)
    elif kind == ".npz":
        save_npz(out, x, labels, value_range=value_range)
    else:
        save_grid(out, x, columns, scale=scale)


def output_kind(out: str | os.PathLike) -> str:
    """What to write: '.png', '.npz' or 'folder'."""
    text = os.fspath(out)
    suffix = Path(text).suffix.lower()
    if suffix in (".png", ".npz"):
        return suffix
    if not suffix or os.path.isdir(text) or text.endswith(("/", os.sep)):
        return "folder"
    raise InputError(
        f"cannot tell what to write as {text}: expected a name ending in .png (a grid), .npz (an array) or / (a folder)"
    )


def shown_channels(x: Tensor, value_range: ValueRange | None = None) -> Tensor:
    """The channels of samples [N, C, H, W] that a picture shows: all if it can, else the first three or the first.

    Float data (with a value_range) has no opacity, so that a picture shows three of four channels.
    """
    if x.shape[1] in _MODES and (value_range is None or x.shape[1] != 4):
        return x
    return x[:, :3] if x.shape[1] > 3 else x[:, :1]


def _pictures(x: Tensor) -> np.ndarray:
    pictures = to_uint8(x)
    _check_channels(pictures.shape[3])
    return pictures


def _check_channels(channels: int) -> None:
    if channels not in _MODES:
        raise InputError(
            f"the samples have {channels} channels, but a picture has 1 (grey), 3 (RGB) or 4 (RGBA): write them as .npz"
        )


def _check_layout(columns: int | None, pad: int, background: int, scale: int) -> None:
    if columns is not None and columns < 1:
        raise InputError(f"columns is {columns}; expected at least 1, or None for a square")
    if pad < 0:
        raise InputError(f"pad is {pad}; expected 0 pixels or more")
    if scale < 1:
        raise InputError(f"scale is {scale}; expected at least 1")
    if not 0 <= background <= 255:
        raise InputError(f"background is {background}; expected a grey value from 0 to 255")


def _labels(labels: Tensor | Sequence[int] | None, n: int) -> np.ndarray | None:
    """The labels as int64 [n]; None stays None."""
    if labels is None:
        return None
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (n,) or not (np.issubdtype(array.dtype, np.integer) or n == 0):
        raise InputError(
            f"the labels are {array.dtype} {list(array.shape)}; expected one integer for each sample, [{n}]"
        )
    return array.astype(np.int64)


def _image(picture: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] as a Pillow image."""
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def _write_png(path: str | os.PathLike, picture: np.ndarray) -> None:
    with atomic_path(path, durable=False) as temporary:
        _image(picture).save(temporary, format="PNG")
