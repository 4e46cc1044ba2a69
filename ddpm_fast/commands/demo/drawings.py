"""What the tabs Sample and Edit show while something is drawn: pictures and texts, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.commands.demo import copying, showing
from ddpm_fast.commands.demo.asking import Ask, batch_size
from ddpm_fast.commands.demo.desk import Desk, Prepare, say_waiting
from ddpm_fast.commands.demo.drawing import Frame, check_view
from ddpm_fast.commands.demo.editing import Edit
from ddpm_fast.commands.demo.uploads import read_for, read_mask
from ddpm_fast.commands.labels import describe_classes
from ddpm_fast.errors import InputError
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.loops.network import Network
from ddpm_fast.loops.sampling import prepare

# What is drawn anew, for those who do not paint: rows and columns from and to, as shares of the picture.
PARTS = {
    "what is painted": None,
    "the left half": (0.0, 1.0, 0.0, 0.5),
    "the right half": (0.0, 1.0, 0.5, 1.0),
    "the upper half": (0.0, 0.5, 0.0, 1.0),
    "the lower half": (0.5, 1.0, 0.0, 1.0),
    "the middle": (0.25, 0.75, 0.25, 0.75),
}


class Shown(NamedTuple):
    """What a tab shows. Each is HTML, but for the texts to copy.

    Attributes:
        picture: The images.
        status: How far it is.
        command: The command that draws the same.
        python: The Python that does.
        given: An edit's pictures, as the model takes them.
    """

    picture: str
    status: str
    command: str
    python: str
    given: str = ""


def sample(desk: Desk, visitor: str, values: Mapping[str, object]) -> Iterator[Shown]:
    """Draw images, and show them as they come to be.

    Args:
        desk: What all visitors share.
        visitor: Who draws.
        values: The fields of the tab: see Ask, and view.

    Raises:
        InputError: For whatever the fields should not say, before anything is drawn.
    """
    ask = Ask.of(values)
    loaded = desk.models.get(ask.model)
    classes = ask.classes(loaded)

    def ready(on_step: Any) -> Any:
        return prepare(Network.of(loaded.model), loaded.diffusion, ask.n, ask.options(loaded, classes, on_step))

    name = describe_classes(classes, loaded.label_names) if loaded.classes else ""
    yield from _watch(desk, visitor, ask, values["view"], ready, name)


def edit(desk: Desk, visitor: str, kind: str, values: Mapping[str, object], sent: Mapping[str, Any]) -> Iterator[Shown]:
    """Edit a picture, and show the images as they come to be.

    Args:
        desk: What all visitors share.
        visitor: Who edits.
        kind: One of editing.KINDS.
        values: The fields of the tab: see Ask and Edit, view, and of an inpainting the part of PARTS.
        sent: The pictures, as uploads.Sent or None: "picture", "other", and "layers", a list of what was painted on.

    Raises:
        InputError: As sample does, and for what is no picture.
    """
    ask = Ask.of(values)
    loaded = desk.models.get(ask.model)
    picture = read_for(loaded, sent.get("picture"), "the picture")
    other = read_for(loaded, sent.get("other"), "the second picture") if kind == "interpolation" else None
    mask = _mask(loaded, values.get("part"), sent.get("layers") or []) if kind == "inpainting" else None
    wanted = Edit.of(kind, values, picture, mask, other)

    def ready(on_step: Any) -> Any:
        return wanted.prepare(ask, loaded, on_step)

    yield from _watch(desk, visitor, ask, values["view"], ready, kind, wanted)


def _mask(loaded: LoadedModel, part: object, layers: list[Any]) -> Tensor:
    """What is kept: bool [H, W]. part: one of PARTS, which is drawn anew."""
    if part not in PARTS:
        raise InputError(f"the part is {part!r:.100}; expected one of {', '.join(PARTS)}")
    box = PARTS[str(part)]
    if box is None:
        return read_mask(layers, loaded)
    height, width = loaded.shape[1:]
    top, bottom, left, right = (
        round(share * side) for share, side in zip(box, (height, height, width, width), strict=True)
    )
    mask = torch.ones((height, width), dtype=torch.bool)
    mask[top:bottom, left:right] = False
    return mask


def _watch(
    desk: Desk, visitor: str, ask: Ask, view: object, ready: Prepare, what: str, wanted: Edit | None = None
) -> Iterator[Shown]:
    """What is shown of a drawing. what: a few words about it. wanted: the edit, or None."""
    loaded, offered = desk.models.get(ask.model), desk.models.offered(ask.model)
    classes = ask.classes(loaded, is_edit=wanted is not None)
    shown = Shown(
        showing.empty("The drawing begins"),
        "",
        copying.command(ask, offered.shown, desk.device_name, wanted),
        copying.python(ask, offered.shown, classes, str(desk.device), wanted),
        "" if wanted is None else _given(wanted),
    )
    frames = desk.draw(visitor, ask.n, loaded.shape, batch_size(loaded, ask.n), check_view(view), ready)
    for frame in frames:
        if isinstance(frame, int):
            yield shown._replace(
                picture=showing.empty("Waiting"), status=showing.finished(say_waiting(frame, desk.device))
            )
            continue
        yield shown._replace(picture=_picture(frame, ask, loaded, wanted), status=_status(frame, ask, desk, what))


def _picture(frame: Frame, ask: Ask, loaded: LoadedModel, wanted: Edit | None) -> str:
    alt = f"{ask.n} images of the model {ask.model}"
    if not frame.finished:
        alt += f" after step {frame.done} of {frame.total}"
    save_as = copying.OUT[None if wanted is None else wanted.kind] if frame.finished else None
    return showing.picture(showing.grid(frame.images, loaded), alt, save_as)


def _status(frame: Frame, ask: Ask, desk: Desk, what: str) -> str:
    if not frame.finished and not frame.stopped:
        return showing.progress(frame, what or str(desk.device))
    line = showing.summary(frame, ask.n, f"{ask.sampler} on {desk.device}")
    return showing.finished(f"{line}. {what}" if what else line)


def _given(wanted: Edit) -> str:
    """The pictures of an edit as the model takes them, each with a link that saves it."""
    pictures = [(wanted.picture, copying.PICTURE, "the picture, cut to what the model draws")]
    if wanted.mask is not None:
        pictures.append((wanted.mask[None].byte() * 255, copying.MASK, "the mask: white is kept"))
    if wanted.other is not None:
        pictures.append((wanted.other, copying.OTHER, "the second picture, cut to what the model draws"))
    parts = (
        showing.picture(showing.png(image.permute(1, 2, 0).contiguous().numpy()), alt, name)
        for image, name, alt in pictures
    )
    return f'<div class="df-given">{"".join(parts)}</div>'
