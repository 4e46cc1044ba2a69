"""The tab Edit: image to image, inpainting and interpolation, of pictures that are uploaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.drawings import PARTS, edit
from ddpm_fast.commands.demo.examples import example, for_channels
from ddpm_fast.commands.demo.fields import drawing_fields, named, outputs
from ddpm_fast.commands.demo.gates import errors_shown, painting, stopper, upload, visitor
from ddpm_fast.commands.demo.limits import MOST_RESAMPLINGS, MOST_WAITING
from ddpm_fast.commands.demo.uploads import enlarged

TAB = "edit"
_CANVAS = 448  # pixels: 16 times a digit, 14 times an emoji
_BRUSH = "#e6007e"  # a colour that few pictures have


def build(desk: Desk) -> None:
    """Build the tab, inside of it."""
    with gr.Row(elem_classes="df-columns"):
        with gr.Column(scale=2, min_width=300):
            with gr.Tabs():
                with gr.Tab("Image to image", id="image-to-image"):
                    image = _image_to_image()
                with gr.Tab("Inpainting", id="inpainting"):
                    inpaint = _inpainting()
                with gr.Tab("Interpolation", id="interpolation"):
                    path = _interpolation()
            with gr.Accordion("Model and sampling", open=True):
                fields = drawing_fields(desk, TAB, 4, "classes by name or number; empty is none")
        with gr.Column(scale=3, min_width=300):
            stop = gr.Button("Stop", elem_id="edit-stop", size="sm")
            shown = outputs(TAB, "Give a picture, or take an example, and press the button below it")
            given = gr.HTML("", elem_classes="df-line")
    targets = [*shown, given]
    for kind, part in (("image to image", image), ("inpainting", inpaint), ("interpolation", path)):
        own = {name: field for name, field in part.items() if name not in ("start", "take")}
        part["start"].click(
            _drawn(desk, kind, fields, own),
            {*fields.values(), *own.values()},
            targets,
            show_progress="hidden",
            concurrency_limit=MOST_WAITING + 2,
            api_visibility="private",
        )
        _offer_examples(desk, part, fields["model"])
    stop.click(stopper(desk, TAB), None, None, queue=False, show_progress="hidden", api_visibility="private")


def _drawn(desk: Desk, kind: str, fields: dict[str, Any], own: dict[str, Any]) -> Callable[..., Iterator[list[str]]]:
    """What the button of an edit calls."""

    def drawn(data: dict[Any, Any], request: gr.Request) -> Iterator[list[str]]:
        with errors_shown(desk):
            values, sent = named(fields, data) | named(own, data), named(own, data)
            if kind == "inpainting":
                sent |= sent["picture"] or {"picture": None, "layers": []}
            for now in edit(desk, visitor(request, TAB), kind, values, sent):
                yield [now.picture, now.status, now.command, now.python, now.given]

    return drawn


def _offer_examples(desk: Desk, part: dict[str, Any], model: Any) -> None:
    """Let the button of an edit fill in examples that suit the model: each time others."""
    pictures = [part[name] for name in ("picture", "other") if name in part]
    is_painting = isinstance(part["picture"], gr.ImageEditor)
    number = gr.State(0)

    def taken(number: int, name: str) -> list[Any]:
        with errors_shown(desk):
            kind = for_channels(desk.models.get(name).shape[0])
            images = [enlarged(example(kind, number + i), _CANVAS) for i in range(len(pictures))]
            values = [{"background": one, "layers": [], "composite": one} if is_painting else one for one in images]
            return [number + len(pictures), *values]

    part["take"].click(taken, [number, model], [number, *pictures], show_progress="hidden", api_visibility="private")


def _buttons(kind: str, label: str) -> dict[str, Any]:
    with gr.Row():
        start = gr.Button(label, variant="primary", elem_id=f"{kind}-start")
        take = gr.Button("Take an example", elem_id=f"{kind}-example")
    return {"start": start, "take": take}


def _picture(label: str, name: str) -> Any:
    return upload(
        gr.Image(
            label=label,
            sources=["upload", "clipboard"],
            type="filepath",
            format="png",
            height=220,
            buttons=[],
            elem_id=name,
            elem_classes="df-upload",
        )
    )


def _strength() -> Any:
    info = "how much noise is added: little keeps the picture, 1 starts from pure noise"
    return gr.Slider(0.05, 1, 0.5, step=0.05, label="Strength", info=info)


def _image_to_image() -> dict[str, Any]:
    fields = {"picture": _picture("Picture", "image-picture"), "strength": _strength()}
    return fields | _buttons("image", "Edit the picture")


def _inpainting() -> dict[str, Any]:
    gr.HTML("<p>Paint over what is to be drawn anew, or choose a part below.</p>", elem_classes="df-about")
    editor = painting(
        gr.ImageEditor(
            label="Picture",
            placeholder="Drop a picture here, and paint over what is to be drawn anew",
            sources=["upload", "clipboard"],
            type="filepath",
            format="png",
            height=430,
            buttons=[],
            transforms=[],
            layers=False,
            canvas_size=(_CANVAS, _CANVAS),
            brush=gr.Brush(default_size=60, colors=[_BRUSH], default_color=_BRUSH, color_mode="fixed"),
            elem_id="inpaint-picture",
        )
    )
    part = gr.Dropdown(
        list(PARTS), value=next(iter(PARTS)), label="Draw anew", info="without painting: a part of the picture"
    )
    resamplings = gr.Slider(
        1, MOST_RESAMPLINGS, 5, step=1, label="Resamplings", info="more is slower and more coherent"
    )
    jump = gr.Slider(
        1,
        50,
        5,
        step=1,
        label="Length of a stretch",
        info="steps that are run that many times",
        elem_id="inpaint-jump",
    )
    fields = {"picture": editor, "part": part, "resamplings": resamplings, "jump_length": jump}
    return fields | _buttons("inpaint", "Fill in")


def _interpolation() -> dict[str, Any]:
    with gr.Row():
        first, second = _picture("From", "path-picture"), _picture("To", "path-other")
    return {"picture": first, "other": second, "strength": _strength()} | _buttons("path", "Interpolate")
