"""The page: its head, its look and its tabs. No function of it is offered to other programs (api_visibility)."""

from __future__ import annotations

import gradio as gr

from ddpm_fast.commands.demo import tab_edit, tab_sample, tab_schedules, tab_training
from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.gates import stopper
from ddpm_fast.commands.demo.limits import MOST_WAITING
from ddpm_fast.commands.demo.showing import safe

DEVICE_SECONDS = 4.0
_CACHE_SECONDS = 1800  # uploads older than this are deleted
_MOST_QUEUED = 40  # events of all visitors, such as a slider that was moved

CSS = """
.gradio-container { width: 100% !important; max-width: 1320px !important; margin: 0 auto !important; }
.df-picture img { max-width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--border-color-primary); }
.df-result .df-picture img { width: min(100%, 680px); }
.df-empty { border: 1px dashed var(--border-color-primary); border-radius: 6px; padding: 2.5rem 1rem;
  text-align: center; color: var(--body-text-color-subdued); }
.df-status { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: center; min-height: 1.6rem;
  font-variant-numeric: tabular-nums; }
.df-status progress { flex: 1 1 10rem; height: .7rem; border: 0; border-radius: 4px; appearance: none;
  background: var(--border-color-primary); }
.df-status progress::-webkit-progress-bar { background: var(--border-color-primary); border-radius: 4px; }
.df-status progress::-webkit-progress-value { background: var(--color-accent); border-radius: 4px; }
.df-status progress::-moz-progress-bar { background: var(--color-accent); border-radius: 4px; }
.df-save { display: inline-block; margin: .4rem 0; text-decoration: underline; }
.df-given { display: flex; flex-wrap: wrap; gap: 1rem; }
.df-given img { width: 84px; image-rendering: pixelated; }
.df-panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); gap: .75rem; }
.df-panels img { width: 100%; background: #fff; }
.df-noised { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .75rem; }
.df-noised figure { margin: 0; text-align: center; }
.df-about p, .df-device p { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; }
.df-about, .df-device, .df-line { padding: 0 !important; }
.df-upload img { image-rendering: pixelated; }
.df-head h1 { margin: 0; font-size: 1.5rem; }
.df-head p { margin: .2rem 0 0; }
*:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
@media (max-width: 700px) {
  .df-columns { flex-direction: column; }
  .gradio-container .main { padding: 8px !important; }
  .tab-container button { padding: 0 .4rem !important; font-size: .85rem !important; }
}
"""
HEAD = (
    '<div class="df-head"><h1>ddpm_fast</h1><p>Draw with diffusion models, edit pictures with them, look at trainings, '
    "and see what schedules do.</p></div>"
)


def build(desk: Desk) -> gr.Blocks:
    """The page.

    Args:
        desk: What all visitors share.
    """
    cache = (_CACHE_SECONDS, _CACHE_SECONDS)
    with gr.Blocks(title="ddpm_fast", analytics_enabled=False, fill_width=True, delete_cache=cache) as page:
        gr.HTML(HEAD)
        device = gr.HTML(_device(desk), elem_classes="df-device", elem_id="device")
        with gr.Tabs():
            with gr.Tab("Sample", id="sample"):
                tab_sample.build(desk)
            with gr.Tab("Edit", id="edit"):
                tab_edit.build(desk)
            with gr.Tab("Training", id="training") as training:
                tab_training.build(desk, training)
            with gr.Tab("Schedules", id="schedules") as schedules:
                tab_schedules.build(desk, schedules)
        gr.Timer(DEVICE_SECONDS).tick(
            lambda: _device(desk), None, device, queue=False, show_progress="hidden", api_visibility="private"
        )
        for tab in (tab_sample.TAB, tab_edit.TAB):
            page.unload(stopper(desk, tab))
    page.queue(api_open=False, max_size=_MOST_QUEUED, default_concurrency_limit=MOST_WAITING)
    return page


def look() -> gr.Theme:
    """Colours and fonts.

    The fonts are those of the visitor's system, so that none is fetched. Small texts are dark enough to be read by weak
    eyes, with a contrast of at least 4.5.
    """
    theme = gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
    )


def _device(desk: Desk) -> str:
    return f'<p role="status">{safe(desk.say_device())}</p>'
