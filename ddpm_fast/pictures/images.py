"""Samples as pictures: tensors in [-1, 1] to 8-bit images, contact sheets, folders of PNGs, .npz files and
GIFs.

Every file is written whole or not at all (`ddpm_fast.files`).
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable, check_writable_folder

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_uint8(x: Tensor) -> np.ndarray:
    """Floats [N, C, H, W] in [-1, 1], on any device and in any memory format -> uint8 [N, H, W, C].

    round((x + 1) * 127.5), computed in float32 or wider, clamped to 0..255: 8-bit images scaled to [-1, 1]
    come back as they were. Raises InputError for another shape or dtype, and for NaN.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"the samples are {x.dtype} {list(x.shape)}; expected floats [N, C, H, W] in [-1, 1]")
    bad = x.isnan().flatten(1).any(dim=1) if x.numel() else x.new_zeros(0)
    if bad.any():
        raise InputError(
            f"{int(bad.sum())} of {len(x)} samples have NaN, the first at position {int(bad.nonzero()[0])}: "
            f"the model has diverged, or its dtype overflows; sample in float32 or from an earlier checkpoint"
        )
    x = x.detach()
    x = x if x.element_size() >= 4 else x.float()
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_grid(
    images: np.ndarray, columns: int | None = None, pad: int = 2, background: int = 255, scale: int = 1
) -> np.ndarray:
    """uint8 [N, H, W, C] -> one picture [rows*(H*scale+pad)+pad, columns*(W*scale+pad)+pad, C], filled row by
    row.

    columns: None for a square. pad: pixels between and around the images. background: value of padding and
    empty cells. scale: every image pixel becomes scale x scale. Raises InputError for no images or an
    impossible layout.
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
    """Write samples [N, C, H, W] in [-1, 1] as one PNG, laid out by `make_grid`. C is 1, 3 or 4 (red, green,
    blue, opacity). Raises InputError for other channels, and where `to_uint8`, `make_grid` and
    `check_writable` do."""
    _write_png(path, make_grid(_pictures(x), columns, pad, background, scale))


def save_images(
    folder: str | os.PathLike, x: Tensor, first_index: int = 0, labels: Tensor | Sequence[int] | None = None
) -> list[Path]:
    """Write samples [N, C, H, W] in [-1, 1] as one PNG each and return their paths.

    Sample i is named by its sample id, first_index + i, and its label if there are labels: `000012.png`,
    `000012_label3.png`. Raises InputError for channels other than 1, 3 and 4, labels that are not N integers,
    a negative first_index, and a folder that cannot be written.
    """
    pictures = _pictures(x)
    classes = _labels(labels, len(pictures))
    if first_index < 0:
        raise InputError(f"first_index is {first_index}; expected a sample id, 0 or more")
    folder = check_writable_folder(folder)
    ends = [""] * len(pictures) if classes is None else [f"_label{label}" for label in classes]
    paths = [folder / f"{first_index + i:06d}{end}.png" for i, end in enumerate(ends)]
    for path, picture in zip(paths, pictures, strict=True):
        _write_png(path, picture)
    return paths


def save_npz(path: str | os.PathLike, x: Tensor, labels: Tensor | Sequence[int] | None = None) -> None:
    """Write samples [N, C, H, W] in [-1, 1] as `images` uint8 [N, H, W, C], with `labels` int64 [N] if there
    are any: a file to evaluate, or to train on. Any number of channels. Raises InputError for labels that are
    not N integers, and where `to_uint8` and `check_writable` do."""
    arrays = {"images": to_uint8(x)}
    classes = _labels(labels, len(x))
    if classes is not None:
        arrays["labels"] = classes
    with atomic_path(path, durable=False) as temporary, open(temporary, "wb") as file:
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
    """Write samples at successive steps, a list of [N, C, H, W] in [-1, 1], as a GIF of grids that repeats
    for ever.

    Every frame is shown for frame_ms milliseconds, the last for hold_ms. GIF has 256 colours a frame, and no
    partial opacity: four channels are laid over the background. Raises InputError for no frames, frames of
    different shapes, and where `save_grid` does.
    """
    shapes = {tuple(x.shape) for x in frames}
    if len(shapes) != 1:
        listed = ", ".join(str(list(shape)) for shape in sorted(shapes)) or "none"
        raise InputError(f"the frames have shapes: {listed}; expected one or more frames of one shape")
    if min(frame_ms, hold_ms) < 10:
        raise InputError(f"frame_ms is {frame_ms} and hold_ms {hold_ms}; expected at least 10, a GIF's unit of time")
    sheets = [_image(make_grid(_pictures(x), columns, pad, background, scale)) for x in frames]
    if sheets[0].mode == "RGBA":
        behind = Image.new("RGBA", sheets[0].size, (background, background, background, 255))
        sheets = [Image.alpha_composite(behind, sheet).convert("RGB") for sheet in sheets]
    durations = [frame_ms] * (len(sheets) - 1) + [hold_ms]
    with atomic_path(path, durable=False) as temporary:
        sheets[0].save(temporary, format="GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0)


def check_output(out: str | os.PathLike, channels: int | None = None) -> None:
    """Raise InputError unless `save_samples(out, ...)` can write there; for calling before the sampling.

    channels: of the samples, where known: a picture has 1, 3 or 4. Creates the folders on the way to `out`.
    """
    kind = _kind(out)
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
) -> None:
    """Write samples [N, C, H, W] in [-1, 1] as `out` says: `.png` a grid (with columns and scale), `.npz` an
    array with the labels, and no suffix, an existing folder or a closing "/" a folder of PNGs named by sample
    id (from first_index) and label. Raises InputError for another suffix, and where `save_grid`, `save_npz`
    and `save_images` do."""
    kind = _kind(out)
    if kind == "folder":
        save_images(out, x, first_index, labels)
    elif kind == ".npz":
        save_npz(out, x, labels)
    else:
        save_grid(out, x, columns, scale=scale)


def _kind(out: str | os.PathLike) -> str:
    """'.png', '.npz' or 'folder'."""
    text = os.fspath(out)
    suffix = Path(text).suffix.lower()
    if suffix in (".png", ".npz"):
        return suffix
    if not suffix or os.path.isdir(text) or text.endswith(("/", os.sep)):
        return "folder"
    raise InputError(
        f"cannot tell what to write as {text}: expected a name ending in .png (a grid), .npz (an array) or / (a folder)"
    )


def _pictures(x: Tensor) -> np.ndarray:
    pictures = to_uint8(x)
    _check_channels(pictures.shape[3])
    return pictures


def _check_channels(channels: int) -> None:
    if channels not in _MODES:
        raise InputError(
            f"the samples have {channels} channels; a picture has 1 (grey), 3 (RGB) or 4 (RGBA): write them as .npz"
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
    """int64 [n]; None stays None."""
    if labels is None:
        return None
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (n,) or not (np.issubdtype(array.dtype, np.integer) or n == 0):
        raise InputError(f"the labels are {array.dtype} {list(array.shape)}; expected one integer a sample, [{n}]")
    return array.astype(np.int64)


def _image(picture: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] as a Pillow image."""
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def _write_png(path: str | os.PathLike, picture: np.ndarray) -> None:
    with atomic_path(path, durable=False) as temporary:
        _image(picture).save(temporary, format="PNG")
