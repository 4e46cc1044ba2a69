"""A page of pictures and numbers: one HTML file, which a browser opens without a server and without the network.

The pictures are inside the file, as PNGs. Every text is escaped, and the page forbids the browser to run or load
anything, so that names from other people's files are only ever shown.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ddpm_fast.errors import printable
from ddpm_fast.files.atomic import atomic_path
from ddpm_fast.pictures.canvas import figure_png
from ddpm_fast.pictures.images import make_grid

_GRID_WIDTH = 880  # CSS pixels that a grid may be wide
_ROW_HEIGHT = 64  # CSS pixels that images in a table are about high, if they are small
_LARGEST_SCALE = 4  # small images are enlarged to at most this many pixels for one of theirs
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 920px; margin: 2em auto;
  padding: 0 1em; }}
h1 {{ font-size: 1.6em; }}
h2 {{ font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc; }}
img {{ max-width: 100%; height: auto; }}
img.pixels {{ image-rendering: pixelated; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ text-align: left; padding: .25em .8em; border-bottom: 1px solid #ddd; vertical-align: middle; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
tr.marked td {{ background: #fff3c9; }}
p.note {{ color: #555; font-size: .93em; }}
.scroll {{ overflow-x: auto; }}
</style>
</head>
<body>
"""


class HtmlPage:
    """A page that grows from top to bottom."""

    def __init__(self, title: str):
        """Begin with a title."""
        self._parts = [_HEAD.format(title=_escaped(title)), f"<h1>{_escaped(title)}</h1>\n"]

    def section(self, title: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{_escaped(title)}</h2>\n")

    def text(self, text: str, note: bool = False) -> None:
        """Add a paragraph; a note is smaller and grey."""
        opening = '<p class="note">' if note else "<p>"
        self._parts.append(f"{opening}{_escaped(text)}</p>\n")

    def facts(self, facts: Mapping[str, str]) -> None:
        """Add a table of two columns: what each text is about, and the text."""
        self._table([f"<tr><th>{_escaped(name)}</th><td>{_escaped(text)}</td></tr>" for name, text in facts.items()])

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None) -> None:
        """Add a table.

        Args:
            heads: The heads of its columns.
            rows: The cells of each row. A column of which every cell is a number, a dash or empty stands to the right.
            marked: The number of the row to mark, or None.
        """
        right = [bool(rows) and all(_is_numeric(row[i]) for row in rows) for i in range(len(heads))]

        def cells(tag: str, texts: Sequence[str]) -> str:
            classes = [' class="number"' if to_right else "" for to_right in right]
            return "".join(f"<{tag}{c}>{_escaped(text)}</{tag}>" for c, text in zip(classes, texts, strict=True))

        body = [
            f"{'<tr class=marked>' if i == marked else '<tr>'}{cells('td', row)}</tr>" for i, row in enumerate(rows)
        ]
        self._table([f"<tr>{cells('th', heads)}</tr>", *body])

    def figure(self, figure: Figure, what: str) -> None:
        """Add a matplotlib figure. what: what it shows, for those who cannot see it."""
        width = round(figure.get_figwidth() * 100)
        self._parts.append(
            f'<p><img alt="{_escaped(what)}" width="{width}" src="{_data_url(figure_png(figure))}"></p>\n'
        )

    def grid(self, images: np.ndarray, columns: int, what: str) -> None:
        """Add images, uint8 [N, H, W, C], in rows. what: what they are, for those who cannot see them."""
        scale = _scale(images, columns)
        self._parts.append(f"<p>{_picture(make_grid(images, columns), what, scale)}</p>\n")

    def rows_of_images(self, rows: Sequence[tuple[str, np.ndarray, np.ndarray, str]], what: tuple[str, str]) -> None:
        """Add rows that show an image and those that belong to it.

        Args:
            rows: For each row a text before it, the image [H, W, C], the images that belong to it [K, H, W, C], all
                uint8, and a text after it.
            what: The heads of the column of the images, and of those that belong to them.
        """
        lines = []
        for before, image, others, after in rows:
            scale = max(1, min(_scale(others, len(others) + 2), round(_ROW_HEIGHT / image.shape[0])))
            pictures = [
                _picture(make_grid(part, len(part)), what[i], scale) for i, part in ((0, image[None]), (1, others))
            ]
            lines.append(
                f"<tr><td>{_escaped(before)}</td><td>{pictures[0]}</td><td>{pictures[1]}</td>"
                f"<td>{_escaped(after)}</td></tr>"
            )
        heads = "".join(f"<th>{_escaped(head)}</th>" for head in ("", *what, ""))
        self._table([f"<tr>{heads}</tr>", *lines])

    def _table(self, rows: Sequence[str]) -> None:
        """Add a table that is moved sideways where it is wider than the window."""
        self._parts.append("\n".join(['<div class="scroll"><table>', *rows, "</table></div>\n"]))

    def html(self) -> str:
        """The page as it is now."""
        return "".join([*self._parts, "</body>\n</html>\n"])

    def save(self, path: str | os.PathLike) -> None:
        """Write the page, whole or not at all.

        Raises:
            InputError: If it cannot be written.
        """
        with atomic_path(path, durable=False) as temporary:
            temporary.write_text(self.html(), encoding="utf-8")


def _escaped(text: str) -> str:
    """The text, with nothing in it that a browser obeys."""
    return html.escape(printable(text))


def _is_numeric(text: str) -> bool:
    return all(c in "0123456789.,+-±e%–x* " for c in text)


def _scale(images: np.ndarray, columns: int) -> int:
    """How many CSS pixels a pixel of these images is shown as, so that a row of them fits."""
    width = (images.shape[2] + 2) * min(columns, len(images) or 1)
    return max(1, min(_LARGEST_SCALE, _GRID_WIDTH // width))


def _picture(sheet: np.ndarray, what: str, scale: int) -> str:
    """uint8 [H, W, C] as an image element, each pixel as a square of `scale` pixels."""
    file = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet).save(file, format="PNG")
    height, width = sheet.shape[:2]
    return (
        f'<img class="pixels" alt="{_escaped(what)}" width="{width * scale}" height="{height * scale}" '
        f'src="{_data_url(file.getvalue())}">'
    )


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
