"""The fields that the tabs Sample and Edit have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ddpm_fast.commands.demo.asking import LARGEST_SEED, STRONGEST_GUIDANCE
from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.drawing import VIEWS
from ddpm_fast.commands.demo.gates import errors_shown
from ddpm_fast.commands.demo.limits import LONGEST_TEXT, MOST_IMAGES, MOST_STEPS
from ddpm_fast.commands.demo.models import describe
from ddpm_fast.commands.demo.showing import empty, finished, safe
from ddpm_fast.samplers import SAMPLERS

STEPS = 50  # at first, as of the command


def drawing_fields(desk: Desk, tab: str, n: int, labels: str) -> dict[str, Any]:
    """The fields of Ask, and the view, by their names.

    Args:
        desk: What all visitors share.
        tab: The tab, whose name begins the fields' ids.
        n: How many images at first.
        labels: What the field of the labels says about an empty one.
    """
    model = gr.Dropdown(desk.models.names, value=desk.models.names[0], label="Model", elem_id=f"{tab}-model")
    most = _most_steps(desk, desk.models.names[0])
    about = gr.HTML(_about(desk, desk.models.names[0]), elem_classes="df-about")
    fields = {
        "model": model,
        "labels": gr.Textbox(
            "",
            label="Labels",
            info=labels,
            placeholder="7 or cat,dog",
            max_length=LONGEST_TEXT,
            elem_id=f"{tab}-labels",
        ),
        "n": gr.Slider(1, MOST_IMAGES, n, step=1, label="Images", elem_id=f"{tab}-n"),
        "steps": gr.Slider(1, most, min(STEPS, most), step=1, label="Sampling steps", elem_id=f"{tab}-steps"),
        "sampler": gr.Dropdown(list(SAMPLERS), value="ddpm", label="Sampler", elem_id=f"{tab}-sampler"),
        "eta": gr.Slider(
            0, 1, 0, step=0.05, label="eta", info="how much noise ddim adds", visible=False, elem_id=f"{tab}-eta"
        ),
        "guidance": gr.Slider(
            0,
            STRONGEST_GUIDANCE,
            1,
            step=0.1,
            label="Guidance",
            info="towards the labels: 1 is none, 2 to 4 is strong",
            elem_id=f"{tab}-guidance",
        ),
        "seed": gr.Number(
            0,
            label="Seed",
            info="another seed draws other images",
            precision=0,
            minimum=0,
            maximum=LARGEST_SEED,
            elem_id=f"{tab}-seed",
        ),
        "view": gr.Radio(
            [(text, name) for name, text in VIEWS.items()], value="x0", label="Watch", elem_id=f"{tab}-view"
        ),
    }

    def told(name: str) -> list[Any]:
        with errors_shown(desk):
            most = _most_steps(desk, name)
            return [_about(desk, name), gr.update(maximum=most, value=min(STEPS, most))]

    model.change(told, model, [about, fields["steps"]], show_progress="hidden", api_visibility="private")
    fields["sampler"].change(
        lambda sampler: gr.update(visible=sampler == "ddim"),
        fields["sampler"],
        fields["eta"],
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )
    return fields


def _most_steps(desk: Desk, name: str) -> int:
    return min(MOST_STEPS, desk.models.get(name).diffusion.num_timesteps)


def _about(desk: Desk, name: str) -> str:
    return f"<p>{safe(describe(desk.models.get(name)))}</p>"


def outputs(tab: str, first: str) -> list[Any]:
    """What a drawing fills: the picture, the status, and the two texts to copy.

    Args:
        tab: The tab, whose name begins the ids.
        first: What stands there at first.
    """
    status = gr.HTML(finished(""), elem_id=f"{tab}-status", elem_classes="df-line")
    picture = gr.HTML(empty(first), elem_id=f"{tab}-picture", elem_classes="df-result")
    with gr.Accordion("The same on the command line and in Python", open=False):
        command = gr.Code(
            "", language="shell", label="Command", interactive=False, buttons=["copy"], elem_id=f"{tab}-command"
        )
        python = gr.Code(
            "", language="python", label="Python", interactive=False, buttons=["copy"], elem_id=f"{tab}-python"
        )
    return [picture, status, command, python]


def named(fields: Mapping[str, Any], data: Mapping[Any, Any]) -> dict[str, Any]:
    """The values of fields by the names of the fields."""
    return {name: data[field] for name, field in fields.items() if field in data}
