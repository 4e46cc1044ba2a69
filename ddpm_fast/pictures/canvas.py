"""What the pictures of the theory (figures.py) share: one look, lines labelled in place, rows of images, writing files.

Pictures are made with matplotlib's objects and never with pyplot, whose state is global. The look does not depend on
the user's matplotlibrc, and the same picture always gives the same bytes.
"""

import io
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files.atomic import atomic_path, check_writable
from ddpm_fast.pictures.images import make_grid, to_uint8

WIDTH = 9.0  # inches: the width of a page on a screen with 100 dots per inch
DPI = 150
FORMATS = (".png", ".svg")
DASHES = (0, (3, 1.5))

# Okabe and Ito's palette, whose colours colour-blind readers tell apart too.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 10.5,
    "figure.dpi": DPI,
    "font.size": 10,
    "grid.color": "0.9",
    "lines.linewidth": 1.8,
    "mathtext.fontset": "dejavusans",
    "savefig.dpi": "figure",
    "svg.hashsalt": "ddpm_fast",
    "xtick.color": "0.3",
    "ytick.color": "0.3",
}


def look() -> AbstractContextManager[None]:
    """Inside this context, matplotlib draws in this package's look, whatever the user's settings are."""
    return matplotlib.style.context(["default", _STYLE])


def check_picture(path: str | os.PathLike) -> None:
    """Check that `save_figure(figure, path)` can write there, before the work. Creates the parent folders.

    Raises:
        InputError: If it cannot.
    """
    _format(path)
    check_writable(path)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as .png or .svg. The file is complete or absent, and the same figure gives the same bytes.

    Raises:
        InputError: For another suffix, and if the path cannot be written.
    """
    form = _format(path)
    # By itself, matplotlib would put the date and its version into the file.
    metadata = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    with look(), atomic_path(path, durable=False) as temporary:
        figure.savefig(temporary, format=form, metadata=metadata)


def _format(path: str | os.PathLike) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"cannot draw {os.fspath(path)}: expected a name ending in {' or '.join(FORMATS)}")
    return suffix[1:]


def figure_png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes. The same figure gives the same bytes."""
    file = io.BytesIO()
    with look():
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def without_math(text: str) -> str:
    """The text, without anything that matplotlib would take for mathematics."""
    return text.replace("$", r"\$")


def check_channels(what: str, channels: int) -> None:
    """Raise InputError for images that show_images() cannot show. `what` names their source."""
    if channels not in (1, 3, 4):
        raise InputError(
            f"{what} has images of {channels} channels, but a picture has 1 (grey), 3 (RGB) or 4 (RGBA): choose another"
        )


def name_lines(figure: Figure) -> Figure:
    """Write the label of every line next to it, in its colour without its alpha, away from other lines and texts.

    Call it last, when the limits of the axes are final.

    Returns:
        The figure.
    """
    FigureCanvasAgg(figure)  # so that texts can be measured
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # so that the axes stay where they are while labels are placed
    for axes in figure.axes:
        paths = [_pixels(axes, line) for line in axes.lines]
        taken = [np.asarray(text.get_window_extent().get_points()) for text in axes.texts]
        for i, line in enumerate(axes.lines):
            if str(line.get_label()).startswith("_") or not len(paths[i]):
                continue
            others = np.concatenate([np.full((1, 2), np.inf), *(p for k, p in enumerate(paths) if k != i)])
            taken.append(_name_line(axes, line, paths[i], others, taken, figure.dpi))
    return figure


def _pixels(axes: Axes, line: Line2D) -> np.ndarray:
    """Points along a line, at most 4 pixels apart, as far as they are inside its axes: [P, 2] in pixels."""
    data = np.broadcast_arrays(*(np.atleast_1d(x).astype(float) for x in line.get_data()))
    with np.errstate(all="ignore"):
        points = line.get_transform().transform(np.stack(data, 1))
    points = points[np.isfinite(points).all(1)]
    if len(points) > 1:
        along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
        at = np.arange(0, along[-1], 4)
        points = np.stack([np.interp(at, along, points[:, k]) for k in range(2)], 1)
    box = axes.get_window_extent()
    inside = (points >= (box.x0 - 1, box.y0 - 1)) & (points <= (box.x1 + 1, box.y1 + 1))
    return points[inside.all(1)]


def _name_line(
    axes: Axes, line: Line2D, path: np.ndarray, others: np.ndarray, taken: list[np.ndarray], dpi: float
) -> np.ndarray:
    """Write the label of one line.

    Args:
        axes: The axes of the line.
        line: The line.
        path: Its points, [P, 2] pixels.
        others: The points of all other lines, [Q, 2] pixels.
        taken: Where other texts are, [2, 2] pixels each.
        dpi: Pixels per inch.

    Returns:
        Where the label is: [2, 2] pixels, its lower left and upper right corner.
    """
    text = axes.text(
        0, 0, str(line.get_label()), color=line.get_color(), ha="center", va="center", transform=None, in_layout=False
    )
    measured = text.get_window_extent()
    half = np.array([measured.width, measured.height]) / 2
    thickness = max(line.get_linewidth(), 0 if line.get_marker() == "None" else line.get_markersize())
    gap = (3 + thickness / 2) * dpi / 72
    sides = np.array([(x, y) for y in (1, -1, 0) for x in (0, 1, -1) if x or y])
    anchors = path[:: max(1, len(path) // 60)]
    centres = (anchors[:, None] + sides * (half + gap)).reshape(-1, 2)
    box = axes.get_window_extent()
    edge = np.array([gap, 0])
    cost = 1e6 * ((centres - half < box.min + edge) | (centres + half > box.max - edge)).any(1)
    for lower, upper in taken:
        cost += 1e4 * ((centres + half > lower - gap) & (centres - half < upper + gap)).all(1)
    for points, price in ((others, 100.0), (path, 30.0)):
        covered = (np.abs(points[None] - centres[:, None]) < half + gap / 2).all(2)
        cost += price * covered.sum(1)
    # Both the label and the piece of line that it is next to should be far from the other lines.
    for points, size in ((centres, half), (np.repeat(anchors, len(sides), 0), np.zeros(2))):
        room = np.maximum(np.abs(others[None] - points[:, None]) - size, 0)
        cost -= np.minimum(np.hypot(room[..., 0], room[..., 1]).min(1), 60 * dpi / 100)
    best = centres[cost.argmin()]
    # A position in fractions of the axes does not depend on the resolution at which the figure is drawn.
    x, y = axes.transAxes.inverted().transform(best)
    text.set_transform(axes.transAxes)
    text.set_position((float(x), float(y)))
    return np.stack([best - half, best + half])


def image_figure(rows: int, height: int, columns: int, aspect: float, below: float) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` axes, one above the other, that show_images() fills.

    Args:
        rows: The number of axes.
        height: The rows of images in each axes.
        columns: The images in each row.
        aspect: Height over width of an image.
        below: Inches of text under each axes.
    """
    side = (WIDTH - 0.9) / columns
    figure = Figure((WIDTH, 0.45 + rows * (height * side * aspect + below + 0.12)), layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def show_images(axes: Axes, rows: Sequence[Tensor], names: Sequence[str], below: Sequence[str] = ()) -> None:
    """Show rows of images.

    Args:
        axes: Where to show them.
        rows: Images [K, C, H, W] in [-1, 1] for each row; C is 1, 3 or 4. Values outside are clipped.
        names: A name for each row, written before it.
        below: A text for each column, written under it.
    """
    images = np.concatenate([to_uint8(row) for row in rows])
    columns, (height, width, channels) = len(rows[0]), images.shape[1:]
    # Each pixel is shown as a square, and there is one pixel between images.
    sheet = make_grid(images, columns, pad=1)
    axes.imshow(sheet[..., 0] if channels == 1 else sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor="0.2")
    axes.set_xticks(np.arange(columns) * (width + 1) + width / 2, below or [""] * columns, fontsize=8.5)
    axes.set_yticks(np.arange(len(rows)) * (height + 1) + height / 2, names)


def write_timesteps(axes: Axes, timesteps: Sequence[int]) -> None:
    """Write each column's t above the images of show_images()."""
    top = axes.secondary_xaxis("top")
    top.set_xticks(axes.get_xticks(), [f"t = {t}" if i == 0 else str(t) for i, t in enumerate(timesteps)])
    top.tick_params(length=0, labelcolor="0.2")
    top.spines[:].set_visible(False)
