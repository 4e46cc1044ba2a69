"""The tab Schedules: what a schedule does to an image, redrawn while sliders move."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np

from ddpm_fast.commands.demo import showing
from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.examples import EMOJI, PICTURES, example
from ddpm_fast.commands.demo.figures import draw_alpha_bar, draw_log_snr
from ddpm_fast.commands.demo.gates import errors_shown
from ddpm_fast.commands.demo.limits import MOST_TIMESTEPS, choice, whole
from ddpm_fast.commands.demo.schedules import LEAST_TIMESTEPS, chosen, describe, noised, timestep
from ddpm_fast.pictures.images import to_uint8
from ddpm_fast.schedule import SCHEDULES

_FIRST = ["linear", "cosine"]
_ENLARGED = 5


def build(desk: Desk, tab: Any) -> None:
    """Build the tab, inside of it. tab: the tab, which is drawn when it is first opened."""
    with gr.Row(elem_classes="df-columns"):
        with gr.Column(scale=2, min_width=300):
            names = gr.CheckboxGroup(list(SCHEDULES), value=_FIRST, label="Schedules", elem_id="schedule-names")
            length = gr.Slider(LEAST_TIMESTEPS, MOST_TIMESTEPS, 1000, step=10, label="T, the number of timesteps")
            share = gr.Slider(0, 100, 20, step=1, label="t", info="percent of the way to T - 1", elem_id="schedule-t")
            zero = gr.Checkbox(False, label="Rescaled to end in pure noise (zero terminal SNR)")
            source = gr.Radio(list(PICTURES), value=EMOJI, label="Picture")
            seed = gr.Slider(0, 99, 0, step=1, label="Seed of the noise")
        with gr.Column(scale=3, min_width=300):
            text = gr.HTML(showing.finished(""), elem_classes="df-line")
            panels = gr.HTML(showing.empty("The curves come here"), elem_id="schedule-curves")
            pictures = gr.HTML(showing.empty("The noised picture comes here"), elem_id="schedule-pictures")
    inputs = [names, length, share, zero, source, seed]

    def drawn(names: Any, length: Any, share: Any, zero: Any, source: Any, seed: Any) -> list[str]:
        with errors_shown(desk):
            return draw(names, length, share, bool(zero), source, seed)

    for event in (tab.select, *(field.change for field in inputs)):
        event(
            drawn,
            inputs,
            [text, panels, pictures],
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_limit=2,
            concurrency_id="schedules",
            api_visibility="private",
        )


def draw(names: Any, length: Any, share: Any, zero: bool, source: Any, seed: Any) -> list[str]:
    """The tab's three parts as HTML: a line, the curves, and the noised pictures.

    Raises:
        InputError: For what is no schedule, no picture, or out of range.
    """
    schedules = chosen(names, length, zero)
    t = timestep(share, len(schedules[0]))
    line = describe(schedules, t)
    image = example(choice("The picture", source, list(PICTURES)), 1)
    parts = [showing.picture(draw_alpha_bar(schedules, t), f"alpha-bar over t. {line}")]
    parts.append(showing.picture(draw_log_snr(schedules, t), "the logarithm of the signal-to-noise ratio over t"))
    x_t = to_uint8(noised(schedules, image, t, whole("The seed", seed, 0, 99)))
    shown = [_figure(image.permute(1, 2, 0).numpy(), "the picture", "the picture as it is")]
    for schedule, pixels in zip(schedules, x_t, strict=True):
        kind = schedule.source["kind"]
        shown.append(_figure(pixels, kind, f"the picture noised by {kind} at t = {t}"))
    return [
        showing.finished(line),
        f'<div class="df-panels">{"".join(parts)}</div>',
        f'<div class="df-noised">{"".join(shown)}</div>',
    ]


def _figure(pixels: np.ndarray, caption: str, alt: str) -> str:
    """A small picture uint8 [H, W, C], enlarged, with a text below it."""
    enlarged = pixels.repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)
    shown = showing.picture(showing.png(enlarged), alt)
    return f"<figure>{shown}<figcaption>{showing.safe(caption)}</figcaption></figure>"
