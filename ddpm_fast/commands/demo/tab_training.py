"""The tab Training: the curves and the latest samples of a run, while it goes on."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.figures import draw_curve
from ddpm_fast.commands.demo.gates import errors_shown
from ddpm_fast.commands.demo.runs import View
from ddpm_fast.commands.demo.showing import empty, finished, picture, safe

LOOK_SECONDS = 5.0
NO_RUNS = (
    "No run was named. Start the page with python -m ddpm_fast.demo --run FOLDER, where FOLDER is what a training was "
    "given as --out. A training that goes on may be looked at."
)


def build(desk: Desk, tab: Any) -> None:
    """Build the tab, inside of it. tab: the tab, which looks at the run only while it is open."""
    names = desk.runs.names
    if not names:
        gr.HTML(empty(NO_RUNS))
        return
    run = gr.Dropdown(names, value=names[0], label="Run", elem_id="training-run")
    text = gr.HTML(finished(""), elem_classes="df-line")
    with gr.Row(elem_classes="df-columns"):
        with gr.Column(scale=3, min_width=300):
            curves = gr.HTML(empty("The curves come here"), elem_id="training-curves")
        with gr.Column(scale=2, min_width=300):
            grid = gr.HTML(empty("The newest samples come here"), elem_id="training-grid")
    seen = gr.State("")
    timer = gr.Timer(LOOK_SECONDS, active=False)

    def looked(name: str, before: str) -> list[Any]:
        with errors_shown(desk):
            version = f"{name}\n{desk.runs.version(name)}"
            if version == before:  # nothing was written: the time since then is all that is new
                return [gr.skip(), gr.skip(), gr.skip(), gr.skip()]
            return [version, *shown(desk.runs.look(name))]

    outputs = [seen, text, curves, grid]
    for event in (timer.tick, run.change, tab.select):
        event(looked, [run, seen], outputs, show_progress="hidden", api_visibility="private")
    tab.select(
        lambda: gr.Timer(active=True), None, timer, queue=False, show_progress="hidden", api_visibility="private"
    )


def shown(view: View) -> list[str]:
    """A run as HTML: the line about it, its curves, and its newest samples."""
    panels = "".join(picture(draw_curve(name, curve), _in_words(name, curve)) for name, curve in view.curves.items())
    if view.grid is None:
        newest = empty("This run has drawn no samples yet")
    else:
        caption = f"<h3>Samples after training step {view.grid_step:,}</h3>"
        newest = caption + picture(view.grid, f"samples of the run after training step {view.grid_step}")
    curves = f'<div class="df-panels">{panels}</div>' if panels else empty("This run has written no curves yet")
    return [finished(view.text), curves, newest]


def _in_words(name: str, curve: tuple[list[int], list[float]]) -> str:
    steps, values = curve
    return safe(f"{name}: {values[0]:.4g} at training step {steps[0]}, {values[-1]:.4g} at {steps[-1]}")
