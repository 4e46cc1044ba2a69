"""The tab Sample: images from noise, watched on their way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.drawings import sample
from ddpm_fast.commands.demo.fields import drawing_fields, named, outputs
from ddpm_fast.commands.demo.gates import errors_shown, stopper, visitor
from ddpm_fast.commands.demo.limits import MOST_WAITING

TAB = "sample"


def build(desk: Desk) -> None:
    """Build the tab, inside of it."""
    with gr.Row(elem_classes="df-columns"):
        with gr.Column(scale=2, min_width=300):
            fields = drawing_fields(desk, TAB, 16, "classes by name or number; empty is every class in turn, or none")
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                start = gr.Button("Draw", variant="primary", elem_id="sample-draw")
                stop = gr.Button("Stop", elem_id="sample-stop")
            picture, status, command, python = outputs(TAB, "Press Draw to see images come out of noise")

    def drawn(data: dict[Any, Any], request: gr.Request) -> Iterator[list[str]]:
        with errors_shown(desk):
            for shown in sample(desk, visitor(request, TAB), named(fields, data)):
                yield [shown.picture, shown.status, shown.command, shown.python]

    start.click(
        drawn,
        set(fields.values()),
        [picture, status, command, python],
        show_progress="hidden",
        concurrency_limit=MOST_WAITING + 2,
        api_visibility="private",
    )
    stop.click(stopper(desk, TAB), None, None, queue=False, show_progress="hidden", api_visibility="private")
