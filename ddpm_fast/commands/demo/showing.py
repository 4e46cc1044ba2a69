"""Images and texts as HTML. A picture is a data URI, so that the page leaves no files behind; a text is escaped."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from PIL import Image
from torch import Tensor

from ddpm_fast.commands.demo.drawing import Frame
from ddpm_fast.errors import printable
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.pictures.images import make_grid, shown_channels, to_uint8

_SIDE = 640  # small images are enlarged so that a grid has about this many pixels


def safe(text: str) -> str:
    """A text on one line, with nothing in it that a browser or a template of Gradio obeys."""
    return html.escape(printable(text)).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


def png(picture: np.ndarray) -> bytes:
    """uint8 [H, W, C] as a PNG file's bytes."""
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(file, format="PNG")
    return file.getvalue()


def data_uri(png_bytes: bytes) -> str:
    """A PNG as the address of a picture."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes).decode()}"


def grid(images: Tensor, loaded: LoadedModel | None = None) -> bytes:
    """Images [N, C, H, W] in [-1, 1] as one PNG, about square and enlarged. loaded: the model that drew them."""
    shown = shown_channels(images, None if loaded is None else loaded.value_range)
    columns = _columns(len(shown))
    side = max(shown.shape[2] * -(-len(shown) // columns), shown.shape[3] * columns)
    return png(make_grid(to_uint8(shown), columns, scale=max(1, _SIDE // side)))


def _columns(n: int) -> int:
    """The images in a row. Rows of ten, if there are at least two, for then a class of digits has its column."""
    return 10 if n % 10 == 0 and n >= 20 else min(n, round(n**0.5 + 0.499))


def picture(png_bytes: bytes, alt: str, save_as: str | None = None) -> str:
    """A picture, with its description and, if it is to be saved, a link that does so."""
    uri = data_uri(png_bytes)
    link = "" if save_as is None else f'<a class="df-save" href="{uri}" download="{save_as}">Save {save_as}</a>'
    return f'<div class="df-picture"><img src="{uri}" alt="{safe(alt)}">{link}</div>'


def empty(text: str) -> str:
    """What stands where a picture will be."""
    return f'<div class="df-empty">{safe(text)}</div>'


def progress(frame: Frame, what: str) -> str:
    """How far a drawing is."""
    where = f"t = {frame.t}" if frame.t >= 0 else ""
    text = f"Step {frame.done} of {frame.total}{', ' if where else ''}{where}, {frame.seconds:.1f} s"
    bar = f'<progress max="{frame.total}" value="{frame.done}" aria-label="progress"></progress>'
    return f'<div class="df-status">{bar}<span>{safe(text)} \u00b7 {safe(what)}</span></div>'


def finished(text: str) -> str:
    """A line that is read aloud when it appears."""
    return f'<div class="df-status" role="status"><span>{safe(text)}</span></div>'


def summary(frame: Frame, n: int, what: str) -> str:
    """What was drawn and how long it took, or why it ended."""
    if frame.stopped:
        return f"{frame.stopped.capitalize()} after step {frame.done} of {frame.total}, {frame.seconds:.1f} s"
    rate = f", {frame.done / frame.seconds:.1f} steps/s" if frame.seconds >= 0.05 else ""
    return f"{n} image{'s' if n > 1 else ''} in {frame.seconds:.1f} s ({frame.total} steps of {what}{rate})"
