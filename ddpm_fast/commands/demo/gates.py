"""What stands between Gradio and the tabs: uploads that Gradio itself must not open, errors in words, a visitor's name.

Gradio's picture components open what is sent with Pillow, in any format that it knows, and fetch what is sent as a web
address. Here they hand on the path of the uploaded file, or the bytes, and fetch nothing. The components are changed
one by one, since Gradio writes a file beside the module of any class that is derived from them.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ddpm_fast.commands.common import in_words
from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.limits import LARGEST_UPLOAD
from ddpm_fast.commands.demo.showing import safe

_MOST_DRAFTS = 16  # paintings whose parts have arrived, and whose drawing has not begun
_MOST_LAYERS = 4
_ERROR_SECONDS = 20


def visitor(request: gr.Request, tab: str) -> str:
    """Who draws: an open page and the tab of it, which draw once at a time."""
    return f"{request.session_hash}:{tab}"


def stopper(desk: Desk, tab: str) -> Callable[[gr.Request], None]:
    """What ends the drawing of a tab of the page that calls it."""

    def stopped(request: gr.Request) -> None:
        desk.stop(visitor(request, tab))

    return stopped


@contextlib.contextmanager
def errors_shown(desk: Desk) -> Iterator[None]:
    """Inside, what is wrong with the input is shown in the page, in words and without a traceback. Anything else is
    printed where the page was started, and the page only says so."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        words = in_words(error)
        if not words:
            traceback.print_exception(error)
            words = "something went wrong that should not have; the terminal of the page has the details"
        words = desk.models.without_paths(words)
        shown = safe(words[:1].upper() + words[1:])
        raise gr.Error(shown, duration=_ERROR_SECONDS, print_exception=False) from None


def upload(component: Any) -> Any:
    """A gr.Image whose value is the path of the file that was uploaded, which Gradio has not opened."""
    component.preprocess = lambda payload: None if payload is None or not payload.path else payload.path
    return _fetches_nothing(component)


def painting(component: Any) -> Any:
    """A gr.ImageEditor whose value is {"picture": sent, "layers": [sent, ...]}, each the bytes or the path of a picture
    that Gradio has not opened."""
    drafts: dict[str, dict[str, Any]] = {}

    def accept_blobs(data: Any) -> None:
        """A part of a painting, which the browser sends before the drawing begins."""
        kind, sent, name = data.data["type"], bytes(data.files[0][1]), str(data.data["id"])[:64]
        if len(sent) > LARGEST_UPLOAD:
            raise gr.Error("the painting is too large")
        while name not in drafts and len(drafts) >= _MOST_DRAFTS:
            drafts.pop(next(iter(drafts)), None)
        draft = drafts.setdefault(name, {"picture": None, "layers": {}})
        if kind == "background":
            draft["picture"] = sent
        elif kind == "layer" and len(draft["layers"]) < _MOST_LAYERS:
            draft["layers"][str(data.data["index"])[:8]] = sent

    def preprocess(payload: Any) -> dict[str, Any]:
        if payload is None:
            return {"picture": None, "layers": []}
        if payload.id is not None:
            draft = drafts.pop(payload.id, {"picture": None, "layers": {}})
            return {"picture": draft["picture"], "layers": list(draft["layers"].values())}
        background = None if payload.background is None else payload.background.path
        return {"picture": background, "layers": [layer.path for layer in payload.layers[:_MOST_LAYERS]]}

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]  # by which Gradio knows what a browser may call
    component.accept_blobs = accept_blobs
    component.preprocess = preprocess
    return _fetches_nothing(component)


def _fetches_nothing(component: Any) -> Any:
    move = component.async_move_resource_to_block_cache

    async def moved(path: Any) -> Any:
        if path is not None and "://" in str(path):
            raise gr.Error("send a file, not a web address")
        return await move(path)

    component.async_move_resource_to_block_cache = moved
    return component
